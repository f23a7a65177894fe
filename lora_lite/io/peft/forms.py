"""Where PEFT keeps an adapter's tensors on layers that aren't linear ones, and in which shapes.

    convolution      A (r, channels, *k), B (o, r, 1, ...), magnitude (1, o, 1, ...), ia3_l (1, channels, 1, ...); of
                     AdaLoRA matrices
    with g groups    A sees all channels, and B (o, r / g, 1, ...) the r / g of its group: here g pairs of rank r / g
    embedding        lora_embedding_A (r, tokens), lora_embedding_B (d, r), with no `.weight`
    attention        nn.MultiheadAttention's own key is in_proj_weight's; `base_layer.out_proj` its output projection
    parameter        target_parameters: the key is the module's, without the parameter's name. Several on one module
                     nest in the order of its parameters (by name where bitsandbytes keeps them in 4 bits), the first
                     innermost: `base_layer.lora_A` is before `lora_A`
    experts          A (r experts, d_in), expert by expert; B (d_out, r experts), where the experts alternate

In the files of this library each has the shapes of a linear layer, with an axis for experts in front.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...base.kinds import bare_parameters, packed_in
from ...base.layer import BaseLayer, find_layers, on_all_channels
from ...base.matrices import ALL_CHANNELS
from ...core.state import Site
from ...errors import brief
from ..keys import PREFIX, THEIRS
from .folder import PeftFolder, ia3_on
from .formats import FORMATS
from .kinds import is_plain_linear, takes_adalora

_INNER = ".base_layer"
_EMBEDDING = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B", "lora_m": THEIRS["lora_m"]}


def placed(root: nn.Module, source: PeftFolder) -> PeftFolder:
    """The folder with the path of a weight of this model in each key, where PEFT's key names the module around it.

    Raises:
        CheckpointError: for a key whose parameter the settings don't tell.
    """
    modules, paths = dict(root.named_modules()), {}
    known = find_layers(modules) if source.settings.get("target_parameters") else {}
    for path in source.paths:
        plain = ".".join(part for part in path.split(".") if part != "base_layer")
        paths[path] = _parameter(modules.get(plain), plain, _depth(path), source, known)
    ends = {end for path in paths.values() for end in (*_ends(path), *_ends(f"{path}.weight"))}
    for name in source.settings.get("target_parameters") or ():
        if name not in ends:
            raise source.error(
                f"target_parameters={brief(repr(name))} can't be kept here, and nothing is dropped\n"
                f"  no weight of that name has tensors in the file"
            )
    keys = {
        f"{paths[path]}.{name}": key for ours, key in source.keys.items() for path, _, name in [ours.rpartition(".")]
    }
    numbers = {path: n for n, path in enumerate(modules)}  # some methods number their layers, in this order
    keys = dict(sorted(keys.items(), key=lambda item: numbers.get(item[0].rpartition(".")[0], len(numbers))))
    if len(keys) < len(source.keys):
        raise source.error("two of its keys are of the same weight, as far as target_parameters tells")
    return replace(source, keys=keys, is_in_order=True)


def _ends(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _depth(path: str) -> int:
    depth = 0
    while path.endswith(_INNER):
        path, depth = path.removesuffix(_INNER), depth + 1
    return depth


def _parameter(module: Any, path: str, depth: int, source: PeftFolder, known: Container[str]) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return f"{path}.in_proj_weight"
    names = set(source.settings.get("target_parameters") or ())
    adapted = [name for name in ([] if module is None else nested(module)) if names & _ends(f"{path}.{name}")]
    if depth >= max(len(adapted), 1):
        raise source.error(f"target_parameters doesn't tell which weight of {path} the tensors at depth {depth} are of")
    parameter = adapted[len(adapted) - 1 - depth] if adapted else "weight"
    is_layer = isinstance(getattr(module, "in_features", None), int) and f"{path}.weight" not in known
    return path if not adapted or (parameter == "weight" and is_layer) else f"{path}.{parameter}"


def nested(module: nn.Module) -> list[str]:
    """The parameters of a module in the order in which PEFT nests adapters on them, the innermost first."""
    names = list(bare_parameters(module))
    return sorted(names) if packed_in(module) else names


def as_peft_takes(source: PeftFolder, path: str, layer: BaseLayer) -> BaseLayer:
    """The layer, a convolution with groups as PEFT's LoRA takes it. Raises CheckpointError for one that only PEFT can.

    Its A is a convolution of its own, with the stride and the padding of the layer's, and nothing else of it.
    """
    if layer.kind.category != "conv":
        return layer
    has_groups, is_lora = layer.module.groups > 1, source.settings["peft_type"] == "LORA"
    problem = _own_convolution(layer) if is_lora else ""
    if has_groups and is_lora and source.settings.get("use_dora"):
        problem = "PEFT's DoRA divides by the norm of another matrix there than the one that it computes with"
    elif has_groups and not is_lora and ia3_on(source, path) == "ia3_ff":
        problem = "PEFT scales all of its channels, and a patch has those of a group"
    if problem:
        raise source.error(f"{path}: {problem}\n  such an adapter works with PEFT only")
    return (on_all_channels(layer) if is_lora else None) or layer


def _own_convolution(layer: BaseLayer) -> str:
    """How PEFT's A, without dilation and padded with zeros, sees other numbers than the layer's kernel; "" if not."""
    conv = layer.module
    if any(d > 1 and k > 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return "PEFT's A has no dilation, and this convolution has"
    if conv.padding_mode == "zeros" or conv.padding in ("valid", (0,) * len(conv.kernel_size)):
        return ""
    return f"PEFT's A is padded with zeros, and this convolution by padding_mode={conv.padding_mode!r}"


def ours(layer: BaseLayer, name: str, tensor: Tensor) -> Tensor:
    """A tensor of PEFT's as this library shapes it; one that has no such form is left as it is."""
    if name == "lora_l" and tensor.ndim <= 2:
        return tensor
    if layer.experts and layer.kind is not ALL_CHANNELS and tensor.ndim == 2 and tensor.numel():
        rows = name == "lora_A"
        if tensor.shape[0 if rows else 1] % layer.experts == 0:
            if rows:
                return tensor.reshape(layer.experts, -1, tensor.shape[1])  # (e r, i) -> (e, r, i)
            return tensor.reshape(len(tensor), -1, layer.experts).permute(2, 0, 1)  # (o, r e) -> (e, o, r)
    if _times(layer, name) > 1:
        return tensor * _times(layer, name)
    if name == "lora_bias" and layer.kind is ALL_CHANNELS and len(tensor) % layer.experts == 0:
        return tensor.reshape(layer.experts, -1)  # (o,) -> (g, o / g)
    if layer.kind.category == "conv" and tensor.ndim > 2:
        if name == "lora_m":
            return tensor.flatten()  # (1, o, 1, ...) -> (o,)
        if name == "lora_l":
            return tensor.flatten()  # (1, channels, 1, ...) -> (channels,)
        if name in ("lora_A", "lora_B"):
            groups, tensor = layer.experts, tensor.flatten(1)
            return tensor.unflatten(0, (groups, -1)) if groups and len(tensor) % groups == 0 else tensor
    return tensor


def theirs(site: Site, name: str, tensor: Tensor) -> Tensor:
    """The inverse of `ours`."""
    layer = site.base
    if name == "lora_bias":
        return tensor.flatten()  # (o,), or (g, o / g)
    if layer.kind is ALL_CHANNELS:
        tensor = tensor.flatten(0, 1)  # (g r, i k), (o, r)
    elif layer.experts:
        return tensor.flatten(0, 1) if name == "lora_A" else tensor.permute(1, 2, 0).flatten(1)
    if layer.kind.category != "conv":
        return tensor / _times(layer, name) if _times(layer, name) > 1 else tensor
    ones = (1,) * (layer.stored.ndim - 2)
    if name == "lora_l":
        return tensor.reshape(1, -1, *ones)
    if name == "lora_A":
        return tensor.unflatten(1, (-1, *layer.stored.shape[2:]))  # (r, i k) -> (r, i, *k)
    return tensor.reshape(1, -1, *ones) if name == "lora_m" else tensor.reshape(*tensor.shape, *ones)


def key_of(site: Site, name: str, on_module: Sequence[Site]) -> str:
    """PEFT's key of a tensor; `on_module` are all written sites of its module, in the order of its parameters."""
    kind, path = site.base.kind, site.path
    if kind.category == "embedding":
        return f"{PREFIX}{path}.{_EMBEDDING[name]}"
    if isinstance(site.module, nn.MultiheadAttention):
        return f"{PREFIX}{path.removesuffix('.in_proj_weight')}.{THEIRS[name]}"
    if kind.prefix:
        module = path.removesuffix(f".{kind.prefix}")
        depth = len(on_module) - 1 - [other.path for other in on_module].index(path)
        return f"{PREFIX}{module}{_INNER * depth}.{THEIRS[name]}"
    if isinstance(site.base.reader, nn.MultiheadAttention):
        attention, _, last = path.rpartition(".")
        return f"{PREFIX}{attention}{_INNER}.{last}.{THEIRS[name]}"
    return f"{PREFIX}{path}.{THEIRS[name]}"


def is_parameter(site: Site) -> bool:
    """Does PEFT reach it by target_parameters?"""
    return bool(site.prefix) and not isinstance(site.module, nn.MultiheadAttention)


def module_path(site: Site) -> str:
    """The path of the module that target_modules names for it."""
    return site.path.rpartition(".")[0] if in_attention(site) else site.path


def in_attention(site: Site) -> bool:
    """Is it on a projection of nn.MultiheadAttention?"""
    return any(isinstance(module, nn.MultiheadAttention) for module in (site.module, site.base.reader))


def _times(layer: BaseLayer, name: str) -> int:
    """How often PEFT 0.21.2 adds what this tensor is of: an update of nn.MultiheadAttention's out_proj twice
    (MultiheadAttention.merge, which every forward calls; outputs agree to 2e-7). A power of two rounds nothing."""
    return 2 if name == "lora_B" and isinstance(layer.reader, nn.MultiheadAttention) and not layer.kind.prefix else 1


def pattern_path(site: Site, path: str) -> str:
    """The name that PEFT compares with rank_pattern and alpha_pattern: an attention's two projections have one."""
    attention = site.module if site.prefix else site.base.reader
    return module_path(site) if isinstance(attention, nn.MultiheadAttention) else path


def lacks(site: Site, is_plain: bool = False) -> str | None:
    """The reason why PEFT's format has no place for an adapter, or for it as a plain LoRA; None if it has one."""
    layer, variant = site.base, site.cfg.variant
    if not site.path:  # a bare layer
        return "PEFT's format holds adapters of named linear layers"
    if layer.experts and not layer.by_weight:
        return "PEFT's format holds adapters of named linear layers; fused experts have no place"
    if layer.is_block:
        return "it acts on the residual stream at a block's output, and PEFT's format holds adapters of layers"
    if site.positions is not None and not (variant == "lora" and is_plain_linear(layer)):  # PEFT's aLoRA
        return "it acts at some positions of a sequence, which PEFT's format doesn't say of it"
    category = layer.kind.category
    if category == "norm":
        return "PEFT has no such method on a norm"
    if category == "linear" and layer.by_weight and not site.prefix and not in_attention(site):
        return "PEFT adapts the call of a layer, and here the model reads its weight without calling it"
    if category == "conv" and not is_plain and any(table.variant == variant for table in FORMATS):
        return None  # the table says which convolutions it takes
    if category == "conv" and layer.module.groups > 1 and layer.kind is not ALL_CHANNELS and variant != "ia3":
        return "PEFT's A sees all channels of a convolution with groups, and this one those of a group"
    if category == "conv" and variant not in ("ia3", "ia3_ff", "adalora") and (problem := _own_convolution(layer)):
        return problem
    on_plain_layer = category in ("linear", "conv") and not site.prefix
    if not on_plain_layer and variant in ("ia3", "ia3_ff"):
        return "PEFT has no IA3 on it"
    if variant == "adalora" and not takes_adalora(layer):
        return "PEFT has no AdaLoRA on it"
    if variant == "lora" and site.cfg.bias and not (on_plain_layer and not in_attention(site)):
        return "PEFT has no lora_bias on it"
    if category == "conv" and variant == "ia3_ff" and layer.stored[0, 0].numel() > 1:
        return "PEFT scales the channels of a convolution's input, and this one each element of a patch"
    return None


def shapes(source: PeftFolder, layers: Mapping[str, BaseLayer]) -> dict[str, tuple[int, ...]]:
    """The shape of each of the file's tensors as `ours` makes it, by our key; nothing is read."""
    result = {}
    for key, entry in source.entries.items():
        path, _, name = key.rpartition(".")
        shape = tuple(entry.shape)
        if path in layers and 0 < len(shape) <= 5:  # a folder is anyone's
            shape = tuple(ours(layers[path], name, torch.empty(shape, device="meta")).shape)
        result[key] = shape
    return result
