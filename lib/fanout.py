"""Many jobs, here or on a cluster. Each job leaves an artefact, so an interrupted fan-out goes on where it was."""

import contextlib
import gc
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

from lib import hardware
from lib.errors import UserError


def threads(workers):
    """Threads each of `workers` processes may use, so that threads x processes <= cores that may be used."""
    return max(1, hardware.cores() // workers)


def _quiet(function, job, count):
    """Run one job with a bounded number of threads: two torch processes on two cores spin against each other."""
    import torch

    torch.set_num_threads(count)
    return function(job)


def processes(settings):
    """How many processes at a time: `machine.processes`, or for 0 one a core, and one where there is a GPU.

    A small model gains little from a second thread, so two processes of one thread do more than one of two.
    """
    import torch

    return settings.machine.processes or (1 if torch.cuda.is_available() else hardware.cores())


def each(settings, function, arguments, show=True):
    """`function(*a)` of every tuple of arguments, in their order, in `processes(settings)` processes; see `run`.

    Jobs of several kinds share the processes with `operator.call` as function, each job's own the first argument.
    """
    arguments = list(arguments)
    return run(_Call(function), arguments, workers=min(processes(settings), len(arguments) or 1), show=show)


class _Call:
    """A function that takes its arguments as one tuple."""

    def __init__(self, function):
        self.function = function

    def __call__(self, arguments):
        return self.function(*arguments)


def run(function, jobs, workers=1, cluster="here", logs=None, show=True):
    """`function` of every job, in the order of `jobs`.

    function: picklable, one argument; it should return where it left its artefact (`artifacts.build`), so that a job
    done before costs nothing. workers: processes at a time. cluster: "here", or an executor of submitit ("slurm",
    "local"), with `logs` the folder for its files. Raises what a job raised; finished jobs stay finished.
    """
    jobs = list(jobs)
    if cluster != "here":
        return _submit(function, jobs, workers, cluster, logs)
    if workers == 1:
        return [function(job) for job in _progress(jobs, show)]
    make = _forked if _copies(workers) else _started
    return make(function, jobs, workers, show)


def _copies(workers):
    """Whether `workers` processes can be copies of this one: Linux, one thread each, no GPU (copies cannot use it)."""
    import torch

    return sys.platform == "linux" and threads(workers) == 1 and not torch.cuda.is_available()


def _started(function, jobs, workers, show):
    """In new processes, which import everything again."""
    from joblib import Parallel, delayed, parallel_config

    with _quiet_bars(), parallel_config("loky", n_jobs=workers, inner_max_num_threads=threads(workers)):
        stream = Parallel(return_as="generator")(delayed(_quiet)(function, j, threads(workers)) for j in jobs)
        return list(_progress(stream, show, len(jobs)))


def _forked(function, jobs, workers, show):
    """In copies of this process: importing torch, transformers and peft again takes longer than many a job.

    With one thread each, as torch's own data loaders do: after a fork OpenMP cannot start threads.
    """
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _enter, (os.getpid(),))
    try:
        stream = pool.map(_quiet, [function] * len(jobs), jobs, [1] * len(jobs))
        found = list(_progress(stream, show, len(jobs)))
    except BaseException:  # an interrupt as well: what is under way would go on for minutes
        for process in set(multiprocessing.active_children()) - set(others):
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _enter(parent):
    """What a copied process does first: show no bars of its own, and see to it that it ends when its parent does."""
    from tqdm import std

    gc.freeze()  # what the parent holds stays, so no collection need look through it
    begin = std.tqdm.__init__
    std.tqdm.__init__ = lambda self, *args, **how: begin(self, *args, **how | {"disable": True})
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextlib.contextmanager
def _quiet_bars():
    """Processes started within show no bars of their own, which would run across the one that counts their jobs."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TQDM_DISABLE")
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


def _progress(stream, show, total=None):
    from tqdm.auto import tqdm

    return tqdm(stream, total=total, disable=not show, unit="job")


def _submit(function, jobs, workers, cluster, logs):
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=logs or "logs", cluster=cluster)
    except RuntimeError as error:
        raise UserError(
            f"fan-out: cluster {cluster!r} is not available here ({error}); use 'here' or 'local'"
        ) from None
    executor.update_parameters(slurm_array_parallelism=workers, name="from-text-to-emoji")
    return [job.result() for job in executor.map_array(function, jobs)]
