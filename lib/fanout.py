"""Many jobs, here or on a cluster. Each job leaves an artefact, so an interrupted fan-out goes on where it was."""

import contextlib
import os

from lib.errors import UserError


def threads(workers):
    """Threads each of `workers` processes may use, so that threads x processes <= cores."""
    return max(1, (os.cpu_count() or 1) // workers)


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

    return settings.machine.processes or (1 if torch.cuda.is_available() else os.cpu_count() or 1)


def each(settings, function, arguments, show=True):
    """`function(*a)` of every tuple of arguments, in their order, in `processes(settings)` processes; see `run`."""
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
    from joblib import Parallel, delayed, parallel_config

    with _quiet_bars(), parallel_config("loky", n_jobs=workers, inner_max_num_threads=threads(workers)):
        stream = Parallel(return_as="generator")(delayed(_quiet)(function, j, threads(workers)) for j in jobs)
        return list(_progress(stream, show, len(jobs)))


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
