"""A copy of the project that a test may run and spoil, and its command line."""

import os
import shutil
import subprocess
import sys

from lib import paths

ONCE = 900  # seconds a smoke run may take on a slow machine before it counts as hanging


def make(place):
    """Copy what a run needs into the folder `place`; returns it."""
    for name in ("lib", "notebooks", "profiles", "data"):
        shutil.copytree(paths.ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    return place


def start(place, *args, **kwargs):
    env = os.environ | {"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lib", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=kwargs.pop("cwd", place), **pipes, **kwargs)


def run(place, *args, **kwargs):
    process = start(place, *args, **kwargs)
    out, err = process.communicate(timeout=ONCE)
    return process.returncode, out, err
