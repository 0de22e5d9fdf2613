"""Kernels that are copies of a process: they work as ordinary ones do, and end with the process that asked for them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import project_copy
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
kernels.IMPORTED = ("colorsys",)  # quick to import, and by nothing else here
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


def test_a_copy_does_not_run_the_runner_again(tmp_path):
    """multiprocessing would run its main module again, with all imports, in every copy; not a package's `__main__`."""
    place = project_copy.make(tmp_path / "p")
    module = place / "lib" / "kernels.py"
    quick, changed = re.subn(r"^IMPORTED = .*$", 'IMPORTED = ("colorsys",)', module.read_text("utf-8"), flags=re.M)
    assert changed == 1
    module.write_text(quick, "utf-8")
    shutil.rmtree(place / "notebooks")
    (place / "notebooks").mkdir()
    given = nbformat.v4.new_code_cell('profile = "smoke"\nseed = 0\noverrides = {}', metadata={"tags": ["parameters"]})
    told = "import sys\nprint(*(n in sys.modules for n in ('colorsys', 'lib.steps')), end='')"
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    for name in ("01_first", "02_second"):
        book = nbformat.v4.new_notebook(cells=[given, nbformat.v4.new_code_cell(told)], metadata=kernel)
        nbformat.write(book, place / "notebooks" / f"{name}.ipynb")
    code, _, err = project_copy.run(place, "--profile", "smoke")
    assert code == 0, err
    second = nbformat.read(place / "results" / "smoke" / "notebooks" / "02_second.ipynb", as_version=4)
    assert [o.text for o in second.cells[-1].outputs] == ["True False"]  # only the runner imports lib.steps
