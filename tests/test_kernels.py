"""Kernels that are copies of a process: they work as ordinary ones do, and end with the process that asked for them."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lib import kernels, paths

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux", reason="other systems start ordinary kernels"),
]
RUN = """
import sys
import nbformat
from nbclient import NotebookClient
from lib import kernels
kernels.RUNNER, kernels.IMPORTED = (), ("colorsys",)  # quick to import, and by nothing else here
assert kernels.prepare()
cells = [nbformat.v4.new_code_cell(source) for source in sys.argv[1:]]
notebook = nbformat.v4.new_notebook(cells=cells)
NotebookClient(notebook, kernel_manager_class=kernels.Copied, extra_arguments=["--log-level=ERROR"]).execute()
print([o["text"] for c in cells for o in c["outputs"] if o["output_type"] == "stream"])
"""


def start(folder, *cells):
    env = os.environ | {"PYTHONPATH": str(paths.ROOT)}
    command = [sys.executable, "-c", RUN, *cells]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def test_a_copy_has_imported_stands_in_the_folder_and_starts_processes_of_its_own(tmp_path):
    cells = (
        "import os, sys\nprint('colorsys' in sys.modules, os.getcwd(), os.getpgrp() == os.getpid(), end='')",
        "def double(x):\n    return 2 * x",  # by name, as notebooks hand functions to lib.fanout
        "from lib import fanout\nprint(fanout.run(double, [1, 2, 3], workers=2, show=False), end='')",
    )
    process = start(tmp_path, *cells)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert out.strip() == str([f"True {tmp_path} True", "[2, 4, 6]"])
    assert not err.strip()


def test_an_error_in_a_cell_is_the_cells_own(tmp_path):
    process = start(tmp_path, "1 / 0")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "ZeroDivisionError" in err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_copy_ends_when_the_runner_is_killed(tmp_path, number):
    told = tmp_path / "pid"
    cell = "import os, pathlib, time\npathlib.Path('half').write_text(str(os.getpid()))\nos.rename('half', 'pid')"
    process = start(tmp_path, f"{cell}\ntime.sleep(100)")
    _until(told.exists)
    kernel = psutil.Process(int(told.read_text()))
    process.send_signal(number)
    process.communicate(timeout=20)
    _until(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE)


def _until(holds):
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("waited a minute in vain")


def test_no_copies_where_there_is_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "GPUS", (str(tmp_path),))
    assert not kernels.prepare()


def test_a_copy_need_not_import_what_the_runner_imports():
    """multiprocessing runs the main module again in every copy, `lib.run` in a run: only itself may be left to load."""
    told = "import importlib, sys\nfrom lib import kernels\n"
    told += "for name in ('ipykernel.kernelapp', *kernels.RUNNER):\n    importlib.import_module(name)\n"
    told += "before = set(sys.modules)\nimport lib.run\nprint(*(set(sys.modules) - before))"
    env = os.environ | {"PYTHONPATH": str(paths.ROOT)}
    found = subprocess.run([sys.executable, "-c", told], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["lib.run"]
