"""Conditions that a model is run in: so that it is afterwards as it was, or so that it computes exactly."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .bitsandbytes import layout_kept


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Within the block: eval mode, no gradients, 4-bit layouts kept. Modes and random states are restored after it."""
    modes = {module: module.training for module in model.modules()}
    with random_kept(model), layout_kept(model):
        try:
            for module in modes:
                module.training = False  # not eval(): a class may do more in that than could be undone
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode  # not train(mode), which sets the children too: each has a mode of its own


@contextmanager
def random_kept(model: nn.Module) -> Iterator[None]:
    """Restore after the block the random states of torch, of numpy (SpecAugment, LayerDrop) and of Python."""
    tensors = (*model.parameters(), *model.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    numpy = sys.modules.get("numpy")  # what nobody has imported, nobody draws from
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(sorted(d.index or 0 for d in devices), device_type=kind):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Within the block, products are what they say: no gradients, no autocast, no tensors of inference mode."""
    devices = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():  # autograd can't save inference tensors
        for device in devices or {"cpu"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
