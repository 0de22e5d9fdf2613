"""What the machine at hand is good at."""

import contextlib
import ctypes
import os
import resource
import sys

TOP_PAD, TRIM_THRESHOLD, MMAP_MAX = -2, -1, -4  # parameters of glibc's mallopt


def reuse_memory():
    """Have glibc keep freed memory for the next tensors, instead of asking for other pages each time.

    Every fresh page must be zeroed: with long prompts that took half of the time, most in a virtual machine. Other
    systems are left as they are.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
            mallopt = ctypes.CDLL(None).mallopt
            for parameter, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**26)):
                mallopt(parameter, value)


def cores():
    """How many processor cores this process may use; with taskset or a scheduler fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_gb():
    """The most memory held so far, in GB of 2^30 bytes: by tensors on a GPU where there is one, or by this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes; Linux counts in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def bf16():
    """Whether to compute in bf16: on a GPU that has units for it.

    Never on a processor. Few have such units, and rounding decides which emoji is drawn: in fp32 every machine comes to
    the same figures.
    """
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
