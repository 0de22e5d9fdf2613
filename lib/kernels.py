"""Kernels that start at once: copies of a process that has imported the libraries.

Every notebook has a kernel of its own, and importing torch, transformers and peft anew takes each of them longer than
many a cell. multiprocessing's fork server imports them once, beside the first notebook.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver

from jupyter_client.manager import AsyncKernelManager

IMPORTED = ("lib", "seaborn", "shap", "lime.lime_text", "lib.alignment", "lib.icl", "lib.interventions", "lib.origins")
GPUS = ("/dev/nvidiactl", "/dev/kfd")  # a process that has asked for a GPU cannot be copied
_context = multiprocessing.get_context("forkserver") if sys.platform == "linux" else None


def prepare():
    """Begin to import in the background, where kernels can be copies: Linux, no GPU. Returns whether they can."""
    if _context is None or any(map(os.path.exists, GPUS)):
        return False
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as ipykernel has it
    os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # as lib.explain has it
    _context.set_forkserver_preload(["ipykernel.kernelapp", *IMPORTED])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the runner to answer
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    return True


class Copied(AsyncKernelManager):
    """Manages a kernel that is a copy of the fork server, and in all else an ordinary one."""

    async def _async_launch_kernel(self, kernel_cmd, **kw):
        own = self.provisioner
        arguments = kernel_cmd[kernel_cmd.index("ipykernel_launcher") + 1 :]
        told = (arguments, kw.get("cwd") or os.getcwd(), dict(kw.get("env") or os.environ))
        own.process = _Started(_context.Process(target=_serve, args=told))
        own.pid = own.pgid = own.process.pid
        self._reconcile_connection_info(own.connection_info)


class _Started:
    """A process of multiprocessing with the methods of subprocess.Popen that jupyter_client calls."""

    stdin = stdout = stderr = None

    def __init__(self, process):
        process.start()
        self.process, self.pid, self.terminate, self.kill = process, process.pid, process.terminate, process.kill

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


def _serve(arguments, folder, environment):
    """Be an IPython kernel until asked to stop, or until the runner ends."""
    from ipykernel.kernelapp import IPKernelApp

    gc.freeze()  # what was imported stays; a collection that looks through it takes half a second, in trainings often
    os.setsid()  # Ctrl-C is for the runner, which then stops this process and those it has started
    os.chdir(folder)
    os.environ.update(environment)
    threading.Thread(target=_follow, daemon=True).start()
    IPKernelApp.launch_instance([*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])


def _follow():
    multiprocessing.parent_process().join()
    os._exit(1)
