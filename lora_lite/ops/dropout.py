"""Dropout whose mask is made again from a seed, so that a backward keeps no mask."""

import torch
from torch import Tensor


def dropout_seed() -> int:
    """Out of the CPU's generator, which gradient checkpointing sets back for a second run."""
    return int(torch.randint(2**62, (), device="cpu"))


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """drop(x). The mask is the same for the same seed."""
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # one order of numbers, whatever the strides of x
    return x * mask.bernoulli_(1 - p, generator=generator).div_(1 - p)
