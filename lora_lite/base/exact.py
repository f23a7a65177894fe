"""Where torch computes what is written and no more."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Within the block, products are what they say: no gradients, no autocast, no tensors of inference mode."""
    devices = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # autograd can't save a tensor that was made in it
        stack.enter_context(torch.no_grad())
        for device in devices or {"cpu"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
