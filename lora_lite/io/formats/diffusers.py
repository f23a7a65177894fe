"""Files of diffusers: `pipeline.load_lora_weights(folder)` and `model.load_lora_adapter(folder, prefix=...)` read them.

    pytorch_lora_weights.safetensors    <component>.<path>.lora_A.weight, lora_B.weight, in PEFT's shapes; DoRA's
                                        <component>.<path>.lora_magnitude_vector.weight
    lora_adapter_metadata               in its metadata, as JSON: PEFT's settings, as <component>.<setting>

A component is a pipeline's name for the model: "unet", "transformer", "text_encoder". diffusers 0.42 loads nothing, and
only warns, where it looks for another one than the file has. `load_lora_adapter` looks for "transformer" unless its
`prefix` says otherwise, of a UNet too; a pipeline knows its own.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ...base.matrices import ALL_CHANNELS
from ...core.resolve import make_site
from ...core.state import Site
from ...errors import CheckpointError, ConfigError
from ..keys import PREFIX, layers_of
from ..peft import forms, lora
from ..peft.folder import DIFFUSERS, DIFFUSERS_SETTINGS, read_folder
from ..peft.load import parts_of, stored_tensors
from ..peft.parts import written_at
from .format import Contents, Format, Piece, Pieces

_CURE = "leave it out (exclude_names), keep it as our file (lora_lite.save), or merge it"


def component_of(root: nn.Module) -> str:
    """The name that diffusers' pipelines have for a model: "unet" of every UNet, "text_encoder" of a model of
    transformers, "transformer" of any other."""
    if "UNet" in type(root).__name__:
        return "unet"
    return "text_encoder" if type(root).__module__.startswith("transformers.") else "transformer"


def read(root: nn.Module, path: Path) -> Pieces:
    """The pieces of a file, or of the folder with it, that has one component of this model."""
    source = read_folder(path, dict(root.named_modules()))
    targets, by_target = layers_of(root, source.header.path, source.paths)
    layers = {p: forms.as_peft_takes(source, p, by_target[target]) for p, target in targets.items()}
    targets = {p: target.on(layers[p]) for p, target in targets.items()}
    parts, stored = parts_of(source, targets, layers), stored_tensors(source, layers)
    return {
        target.path: Piece(
            target,
            layers[p],
            part.cfg.with_overrides(part.overrides.get(target.path, {})),
            part.values(stored, p, layers[p], layers[p]),
        )
        for part in parts
        for p, target in part.targets.items()
    }


def write(root: nn.Module, pieces: Pieces, path: Path, prefix: Any = None) -> Contents:
    """The contents of a file, or of the one in a folder.

    prefix      the component; None: `component_of` the model; "": none, as a model's save_lora_adapter writes it
    """
    prefix = component_of(root) if prefix is None else prefix
    kinds = {piece.cfg.variant for piece in pieces.values()}
    if len(kinds) > 1:
        cure = "give rank= or energy= to write what they change as a plain LoRA"
        raise CheckpointError(f"diffusers' file holds one method, and here are {', '.join(sorted(kinds))}\n  {cure}")
    layers = {p: [make_site(piece.target, piece.layer, piece.cfg, {})] for p, piece in pieces.items()}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for p, (site,) in layers.items():
        if problem := forms.lacks(site):
            raise CheckpointError(f"{p or 'the model itself'}: {problem}\n  {_CURE}")
        if site.base.ties:
            raise CheckpointError(f"{p}: it is tied to another layer, and diffusers adapts one alone\n  {_CURE}")
        groups = site.target.experts if site.base.kind is ALL_CHANNELS else 1  # PEFT's r is of all groups
        ranks[p] = site.cfg.r * groups, float(site.cfg.r * groups)
        tensors |= written_at(root, layers, site, _values(site, pieces[p]))
    fields = {"use_rslora": False, "lora_dropout": 0.0, "use_dora": kinds == {"dora"}}
    settings: dict[str, Any] = lora.settings_of(root, layers, ranks, **fields)
    start = f"{prefix}." if prefix else ""
    whole = {start + key.removeprefix(PREFIX): tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
    described = json.dumps({f"{start}{setting}": value for setting, value in settings.items()}, sort_keys=True)
    file = path if path.suffix == ".safetensors" else path / DIFFUSERS
    return {file: to_bytes(whole, metadata={"format": "pt", DIFFUSERS_SETTINGS: described})}


def _check_prefix(prefix: Any) -> None:
    parts = prefix.split(".") if isinstance(prefix, str) and prefix else []
    if not isinstance(prefix, str | None) or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"prefix={prefix!r}: wanted a component's name, such as 'unet', or '' for none")


def _values(site: Site, piece: Piece) -> dict[str, Tensor]:
    b, s = piece.tensors["lora_B"], site.cfg.scaling
    tensors = {"lora_A": piece.tensors["lora_A"], "lora_B": b if s == 1 else b * s}
    if "lora_m" not in piece.tensors:
        return tensors
    return tensors | {"lora_m": lora.magnitude(piece.layer, s, piece.tensors)}


# Not known by anything in it: `load` gives what has diffusers' settings to load_peft, which reads more of it.
FORMAT = Format("diffusers", "file of diffusers", ("lora", "dora"), read, write, options={"prefix": _check_prefix})
