"""Fan-out keeps order, bounds threads and passes errors on, here and through submitit."""

import math
import operator
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lib import fanout, hardware, profiles
from lib.errors import UserError


def double(x):
    return 2 * x


def bounded(_):
    import torch

    return torch.get_num_threads()


def fail(x):
    raise ValueError(f"job {x}")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_keep_the_order_of_jobs(workers):
    assert fanout.run(double, range(5), workers, show=False) == [0, 2, 4, 6, 8]


def test_threads_times_workers_stay_within_the_cores():
    assert set(fanout.run(bounded, range(2), 2, show=False)) == {fanout.threads(2)}


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_through(workers):
    with pytest.raises(ValueError, match="job 0"):
        fanout.run(fail, [0, 1], workers, show=False)


def test_threads_and_processes_count_the_cores_that_may_be_used(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(hardware, "cores", lambda: 6)
    assert [fanout.threads(n) for n in (1, 3, 4, 9)] == [6, 2, 1, 1]
    assert fanout.processes(profiles.load("tiny", 0, {"machine.processes": 0})) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="copies are made on Linux")
@pytest.mark.parametrize(("gpu", "made"), [(False, "copies"), (True, "new")])
def test_a_process_is_not_copied_where_there_is_a_gpu(gpu, made, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(hardware, "cores", lambda: 2)
    monkeypatch.setattr(fanout, "_forked", lambda *_: "copies")
    monkeypatch.setattr(fanout, "_started", lambda *_: "new")
    assert fanout.run(double, range(2), 2, show=False) == made


def test_new_processes_do_the_same_as_copies_of_this_one(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert fanout.run(double, range(5), 2, show=False) == [0, 2, 4, 6, 8]


def die(x):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_told_and_not_waited_for():
    with pytest.raises(RuntimeError, match="terminated"):
        fanout.run(die, range(2), 2, show=False)


def multiply(n, threads=1):
    import torch

    torch.set_num_threads(threads)
    return float((torch.ones(n, n) @ torch.ones(n, n)).sum())


def test_copies_can_compute_after_this_process_has_with_many_threads():
    assert multiply(300, threads=2) == 300**3
    assert fanout.run(multiply, [300, 300], 2, show=False) == [300**3] * 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_run_that_is_stopped(how, tmp_path):
    code = "import time; from lib import fanout; fanout.run(time.sleep, [600, 600], 2, show=False)"
    with open(tmp_path / "said", "w") as said:
        run = subprocess.Popen([sys.executable, "-c", code], stderr=said)
    me, until = psutil.Process(run.pid), time.monotonic() + 60
    while len(children := me.children()) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    time.sleep(3)  # they have begun
    os.kill(run.pid, how)
    run.wait(20)
    assert len(children) == 2
    assert not psutil.wait_procs(children, 20)[1], (tmp_path / "said").read_text()


def test_jobs_through_submitit(tmp_path):
    assert fanout.run(math.sqrt, [4, 9], 2, cluster="local", logs=tmp_path, show=False) == [2, 3]


def test_a_cluster_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="slurm"):
        fanout.run(double, [1], 1, cluster="slurm", logs=tmp_path, show=False)


def add(a, b):
    return a + b


def test_functions_of_several_arguments_run_in_as_many_processes_as_the_profile_says():
    for processes in (0, 1, 2):
        settings = profiles.load("tiny", 0, {"machine.processes": processes})
        assert fanout.each(settings, add, [(1, 2), (3, 4), (5, 6)], show=False) == [3, 7, 11]
        assert fanout.each(settings, add, [], show=False) == []
    assert fanout.processes(settings) == 2


def test_jobs_of_several_kinds_share_the_processes():
    settings = profiles.load("smoke", overrides={"machine.processes": 2})
    jobs = [(double, 4), (math.pow, 2, 3), (double, 1)]
    assert fanout.each(settings, operator.call, jobs, show=False) == [8, 8.0, 2]
