"""PEFT's IA3: one method there, and two here."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...core.names import check_shapes, file_key
from ...core.state import Tensors
from ...core.targets import Target
from ...errors import CheckpointError
from ..factors import Layers
from .folder import PeftFolder, ia3_on
from .parts import Part, Written, as_stored, config_of, names_of, written_at


def parts(source: PeftFolder, targets: Mapping[str, Target], layers: Mapping[str, BaseLayer]) -> list[Part]:
    """One part or two, by the shapes: (o, 1) scales outputs, (1, i) inputs; a convolution's by feedforward_modules."""
    entries, specs = source.entries, {}
    halves: dict[str, dict[str, Target]] = {"ia3": {}, "ia3_ff": {}}
    for path, target in targets.items():
        key = file_key(path, "lora_l")
        wanted: dict[str, tuple[int, ...]] = {"ia3": (target.d_out, 1), "ia3_ff": (1, target.d_in)}
        if path in layers and layers[path].kind.category == "conv":
            wanted = {ia3_on(source, path): _shape(source, path, layers[path])}
        fitting = [variant for variant, shape in wanted.items() if key in entries and entries[key].shape == shape]
        if len(fitting) > 1:
            raise CheckpointError(
                f"{source.header.path}: {source.keys[key]} is (1, 1), so it could scale input or output"
            )
        variant = fitting[0] if fitting else next(iter(wanted))
        halves[variant][path], specs[key] = target, wanted[variant]
    check_shapes(entries, specs, str(source.header.path))

    def values(stored: Tensors, path: str, layer: BaseLayer | None, base: BaseLayer | None) -> dict[str, Tensor]:
        tensors = as_stored(stored, path, layer)
        if layer is None or layer.kind.category != "conv" or ia3_on(source, path) != "ia3_ff":
            return tensors
        times = math.prod(layer.stored.shape[2:])  # here a factor for each element of a patch
        return {name: factors.repeat_interleave(times) for name, factors in tensors.items()}  # (i,) -> (i k,)

    present = {variant: half for variant, half in halves.items() if half}
    return [
        Part(config_of(source, variant, half, layers, {}, False), half, {}, values) for variant, half in present.items()
    ]


def _shape(source: PeftFolder, path: str, layer: BaseLayer) -> tuple[int, ...]:
    """The shape of PEFT's ia3_l on a convolution."""
    channels = layer.module.in_channels if ia3_on(source, path) == "ia3_ff" else layer.d_out
    return (1, channels, *(1,) * (layer.stored.ndim - 2))


def written(root: nn.Module, layers: Layers) -> Written:
    tensors: dict[str, Tensor] = {}
    inner: list[str] = []
    for path, (site,) in layers.items():
        scales, on_input = site.tensor("lora_l").detach(), site.cfg.variant == "ia3_ff"
        scales = scales[None] if on_input else scales[:, None]  # (1, i) or (o, 1)
        tensors |= written_at(root, layers, site, {"lora_l": scales})
        inner += [path] if on_input else []
    targets, feedforward = names_of(root, list(layers), inner)
    return tensors, {
        "peft_type": "IA3",
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "fan_in_fan_out": any(site.base.transposed and not site.base.by_weight for (site,) in layers.values()),
        "init_ia3_weights": True,
    }
