"""Fan-out keeps order, bounds threads and passes errors on, here and through submitit."""

import math

import pytest

from lib import fanout, profiles
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


def test_errors_come_through():
    with pytest.raises(ValueError, match="job 0"):
        fanout.run(fail, [0], show=False)


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
