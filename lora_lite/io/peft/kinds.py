"""The kinds of layer that PEFT's methods go on."""

from torch import nn

from ...base.layer import BaseLayer


def is_plain_linear(layer: BaseLayer) -> bool:
    """Is it a linear layer that is called, and no projection of nn.MultiheadAttention?"""
    is_bare = bool(layer.kind.prefix) or isinstance(layer.reader, nn.MultiheadAttention)
    return layer.kind.category == "linear" and not is_bare and not layer.experts


def takes_adalora(layer: BaseLayer) -> bool:
    """Is it a linear layer, or an nn.Conv2d whose patches PEFT's update sees as they are?"""
    if not is_conv(layer) or layer.stored.ndim != 4 or layer.module.groups > 1:
        return is_plain_linear(layer)
    return pads_zeros(layer)


def is_linear_module(layer: BaseLayer) -> bool:
    """As `is_plain_linear`, but for transformers' Conv1D."""
    return is_plain_linear(layer) and not layer.transposed


def pads_zeros(layer: BaseLayer) -> bool:
    """Does a convolution see zeros around its input, as PEFT's own call of it does?"""
    return layer.module.padding_mode == "zeros" or layer.module.padding in ("valid", (0,) * (layer.stored.ndim - 2))


def is_conv(layer: BaseLayer) -> bool:
    return layer.kind.category == "conv"


def is_embedding(layer: BaseLayer) -> bool:
    return layer.kind.category == "embedding"
