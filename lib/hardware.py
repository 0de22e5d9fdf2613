"""What the machine at hand is good at."""

import contextlib
import ctypes
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


def bf16():
    """Whether to compute in bf16: on a GPU that has units for it.

    Never on a processor. Few have such units, and rounding decides which emoji is drawn: in fp32 every machine comes to
    the same figures.
    """
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
