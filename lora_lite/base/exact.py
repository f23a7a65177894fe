"""Where torch computes what is written and no more."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Within the block, products are what they say: no gradients, no autocast, no tensors of inference mode."""
    kinds = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in kinds or {"cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
