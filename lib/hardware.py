"""What the machine at hand is good at."""

import torch


def bf16():
    """Whether to compute in bf16: on a GPU that has units for it.

    Never on a processor. Few have such units, and rounding decides which emoji is drawn: in fp32 every machine comes to
    the same figures.
    """
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
