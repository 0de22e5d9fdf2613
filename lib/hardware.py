"""What the machine at hand is good at."""

import torch


def bf16():
    """Whether it multiplies bf16 in units made for it; a processor without them takes four times as long as in fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return any(torch.cpu.get_capabilities().get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16"))
