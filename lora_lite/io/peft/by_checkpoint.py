"""A plain LoRA by the names of its model's checkpoints, where transformers fuses layers that a checkpoint has apart.

    in the model    mlp.experts.gate_up_proj        A (experts, r, i)   B (experts, o, r)
    in the folder   mlp.experts.3.gate_proj         A (r, i)            B (o / 2, r)
                    mlp.experts.3.up_proj           the same A          B's other rows

Servers know a checkpoint's names, and one expert's matrix at a time. transformers turns a model back into its
checkpoint as it saves it. Here that runs on the numbers of the rows in place of the rows, and B's rows go where theirs
went: no number is computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.names import file_key
from ...core.state import Site
from ...errors import CheckpointError
from ..keys import PREFIX, THEIRS
from .kinds import is_plain_linear
from .lora import patterns
from .parts import Layers, Written

_CURE = "leave it out (exclude_names), or write the folder without per_expert"


@dataclass(frozen=True)
class Factors:
    """The update of a layer, alpha / r B A; of fused experts, with an axis for them in front."""

    a: Float[Tensor, "*e r i"]
    b: Float[Tensor, "*e o r"]
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


def written(root: nn.Module, layers: Layers, factors: Mapping[str, Factors], **fields: Any) -> Written:
    """The tensors by PEFT's keys, each expert's and each part's by itself, and the settings.

    target_modules are last names: it is what servers read. PEFT, which reads them too, then has an adapter of zeros on
    other layers of these names.

    Raises:
        CheckpointError: for a layer that isn't linear, or that the model's checkpoints keep fused.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for path, (site, *_) in layers.items():
        a, b, r = factors[path].a, factors[path].b, factors[path].rank
        for name, rows in places(root, site).items():
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


def places(root: nn.Module, site: Site) -> dict[str, Int[Tensor, "n"]]:
    """The modules that a layer is in a checkpoint of its model, and the rows of each, numbered over all experts.

    Raises:
        CheckpointError: for a layer that isn't linear, or that the model's checkpoints keep fused.
    """
    layer = site.base
    if not (is_plain_linear(layer) or (layer.experts and layer.kind.category == "experts")):
        raise CheckpointError(f"{site.path}: per_expert is for linear layers and fused experts\n  {_CURE}")
    numbers = torch.arange(max(layer.experts, 1) * layer.d_out).view(-1, layer.d_out, 1)  # a column of each matrix
    numbers = numbers.mT if layer.transposed else numbers
    key = site.path if site.prefix else file_key(site.path, "weight")
    moved = _as_saved(root, {key: numbers if layer.experts else numbers[0]})
    parts = {name.removesuffix(".weight"): tensor.flatten() for name, tensor in moved.items()}
    if not torch.equal(torch.cat(list(parts.values())).sort().values, numbers.flatten()):
        raise CheckpointError(f"{site.path}: the checkpoints of a {type(root).__name__} hold other numbers\n  {_CURE}")
    mixed = [name for name, rows in parts.items() if len((rows // layer.d_out).unique()) > 1]
    if mixed or (layer.experts and key in moved):  # which also holds for a block of one expert
        problem = f"the checkpoints of a {type(root).__name__} keep its experts in one tensor, {(mixed or [key])[0]}"
        raise CheckpointError(f"{site.path}: {problem}\n  {_CURE}")
    return parts


def _as_saved(root: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the model's save_pretrained names and splits them."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # then nothing has fused them
        return tensors
    return dict(revert_weight_conversion(root, tensors)) if isinstance(root, PreTrainedModel) else tensors
