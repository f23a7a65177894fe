"""A plain LoRA by the names of its model's checkpoints, where transformers fuses layers that a checkpoint has apart.

    in the model    mlp.experts.gate_up_proj        A (experts, r, i)   B (experts, o, r)
    in the folder   mlp.experts.3.gate_proj         A (r, i)            B (o / 2, r)
                    mlp.experts.3.up_proj           the same A          B's other rows

Servers know a checkpoint's names, and one expert's matrix at a time. transformers turns a model back into its
checkpoint as it saves it. Here that runs on the numbers of the rows in place of the rows, and B's rows go where theirs
went: no number is computed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ...base.layer import BaseLayer, find_layers
from ...core.names import file_key
from ...errors import CheckpointError
from ..factors import Factors, Layers
from ..keys import PREFIX, THEIRS
from .kinds import is_plain_linear
from .lora import patterns
from .parts import Written

_CURE = "leave it out (exclude_names), or write the folder without per_expert"


def written(root: nn.Module, layers: Layers, factors: Mapping[str, Factors], **fields: Any) -> Written:
    """The tensors by PEFT's keys, each expert's and each part's by itself, and the settings.

    target_modules are last names: it is what servers read. PEFT, which reads them too, then has an adapter of zeros on
    other layers of these names.

    Raises:
        CheckpointError: for a layer that isn't linear, that the model's checkpoints keep fused, or join with another.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    names = places(root, layers)
    for path, (site, *_) in layers.items():
        a, b, r = factors[path].a, factors[path].b, factors[path].rank
        for name, rows in names[path].items():
            expert = int(rows[0]) // site.base.d_out
            matrix_a, matrix_b = (a[expert], b[expert]) if site.base.experts else (a, b)  # (r, i), (o, r)
            part = {"lora_A": matrix_a, "lora_B": matrix_b[rows - expert * site.base.d_out]}
            tensors |= {f"{PREFIX}{name}.{THEIRS[ours]}": tensor for ours, tensor in part.items()}
            ranks[name] = r, factors[path].alpha
    return tensors, patterns(ranks) | {
        "peft_type": "LORA",
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        "bias": "none",
        "fan_in_fan_out": any(site.base.transposed for site, *_ in layers.values()),
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        **fields,
    }


def places(root: nn.Module, layers: Layers) -> dict[str, dict[str, Int[Tensor, "n"]]]:
    """For each layer the modules that it is in a checkpoint of its model, and the rows of each, numbered over all
    experts.

    Raises:
        CheckpointError: for a layer that isn't linear, that the model's checkpoints keep fused, or join with another.
    """
    every = {path: layer for path, layer in find_layers(dict(root.named_modules())).items() if _is_split(layer)}
    if others := [path for path in layers if path not in every]:
        raise CheckpointError(f"{others[0]}: per_expert is for linear layers and fused experts\n  {_CURE}")
    heights = [max(layer.experts, 1) * layer.d_out for layer in every.values()]
    starts = torch.tensor([0, *heights]).cumsum(0)  # all layers are numbered at once: a checkpoint may join some
    columns = {
        path if layer.kind.prefix else file_key(path, "weight"): _column(layer, start)
        for (path, layer), start in zip(every.items(), starts[:-1].tolist(), strict=True)
    }
    parts: dict[str, dict[str, Tensor]] = {path: {} for path in layers}
    order, does = list(every), f"the checkpoints of a {type(root).__name__}"
    for key, column in _as_saved(root, columns).items():
        rows = column.flatten()
        sources = [order[i] for i in (torch.bucketize(rows, starts, right=True) - 1).unique().tolist()]
        adapted = [path for path in sources if path in layers]
        if adapted and len(sources) > 1:
            raise CheckpointError(f"{adapted[0]}: {does} join it with other layers in {key}\n  {_CURE}")
        for path in adapted:  # one
            layer, rows = every[path], rows - starts[order.index(path)]
            # Its own name is that of the stack, which tells where it has one expert alone.
            if len((rows // layer.d_out).unique()) > 1 or (layer.experts and key in columns):
                raise CheckpointError(f"{path}: {does} keep its experts in one tensor, {key}\n  {_CURE}")
            parts[path][key.removesuffix(".weight")] = rows
    for path, by_name in parts.items():
        rows = torch.cat([starts[:0], *by_name.values()]).sort().values
        if not torch.equal(rows, torch.arange(max(every[path].experts, 1) * every[path].d_out)):
            raise CheckpointError(f"{path}: {does} hold other numbers\n  {_CURE}")
    return parts


def _column(layer: BaseLayer, start: int) -> Tensor:
    """The numbers of a layer's rows as a column of its weight (*experts, o, 1), or a row of a transposed one."""
    rows = max(layer.experts, 1) * layer.d_out
    column = torch.arange(start, start + rows).view(-1, layer.d_out, 1)
    column = column.mT if layer.transposed else column
    return column if layer.experts else column[0]


def _is_split(layer: BaseLayer) -> bool:
    """Is it a linear layer, or the matrices of experts in one tensor?"""
    return is_plain_linear(layer) or (layer.kind.category == "experts" and bool(layer.kind.prefix))


def _as_saved(root: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the model's save_pretrained names and splits them."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # then nothing has fused them
        return tensors
    return dict(revert_weight_conversion(root, tensors)) if isinstance(root, PreTrainedModel) else tensors
