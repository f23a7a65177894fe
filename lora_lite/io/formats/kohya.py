"""Files of kohya's sd-scripts and of LyCORIS, which ComfyUI, A1111, Forge, InvokeAI and diffusers read.

    <name>.lora_down.weight (r, i[, *k])   .lora_up.weight (o, r[, 1, 1])   .lora_mid.weight (r, r, *k), a small core
    <name>.dora_scale (o, 1, ...)          of DoRA, beside them
    <name>.hada_w1_a (o, r)   .hada_w1_b (r, i k)   .hada_w2_a   .hada_w2_b   .hada_t1, .hada_t2 (r, r, *k)   of LoHa
    <name>.lokr_w1 (l, m)     .lokr_w2 (k, n, ...), or factors .lokr_w1_a, .lokr_w1_b, ..., .lokr_t2          of LoKr
    <name>.alpha ()                        scale alpha / r; r where it is missing or 0

Names: kohya_names.py. LoKr with two whole matrices has the scale 1, whatever its alpha. A small core in a LoRA is
multiplied into A, which is exact. What isn't known here is refused by name: nothing of this model is left out.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loguru import logger
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ...base.layer import BaseLayer, find_layers, shapes_of
from ...base.matrices import ALL_CHANNELS
from ...base.stacks import find_stacks
from ...core.targets import Target
from ...errors import CheckpointError, ConfigError, brief
from ..peft.kinds import is_conv, is_linear_module
from ..safetensors import Header, read_any
from .format import Contents, Format, Piece, Pieces
from .kohya_kinds import ENDS, MARKS, fused, in_file, parts_of
from .kohya_names import PREFIXES, Names, Place, component_of, split_prefix

_CURE = "leave it out (exclude_names), keep it as our file (lora_lite.save), or merge it"
Keys = dict[str, dict[str, str]]
"""name of a layer in the file -> end of a key -> the key."""


def is_header(header: Header) -> bool:
    """True for a file with factors by kohya's or LyCORIS' names."""
    return any(key.endswith(MARKS) for key in header.entries)


def takes(layer: BaseLayer) -> bool:
    """Is it a kind of layer that these programs adapt: linear, or a convolution?"""
    return is_linear_module(layer) or (is_conv(layer) and layer.kind is not ALL_CHANNELS)


# ---- read -------------------------------------------------------------------------------------------


def read(root: nn.Module, path: Path) -> Pieces:
    """The pieces of a file, of the one model in it that has the layers of this one."""
    (header, *_) = read_any(path)
    modules = dict(root.named_modules())
    layers = find_layers(modules)
    known, stacks = Names(root, layers), find_stacks(modules, shapes_of(layers.values()))
    pieces: Pieces = {}
    for name, keys in _component(header, known, layers).items():
        (place,) = known.find(split_prefix(name)[1])
        targets = [Target.of(layers[p], stacks) for p in place.paths]
        for target in targets:
            if not takes(layers[target.path]):
                kind = layers[target.path].kind.category
                raise CheckpointError(f"{path}: {name} is of {target.path}, a layer of the kind {kind!r}\n  {_CURE}")
            if target.path in pieces:
                raise CheckpointError(f"{path}: {name} is of {target.path}, as another name in the file is")
        for target, (cfg, tensors) in zip(targets, parts_of(header, name, keys, place, targets), strict=True):
            pieces[target.path] = Piece(target, layers[target.path], cfg, tensors)
    return pieces


def _component(header: Header, known: Names, layers: Mapping[str, BaseLayer]) -> Keys:
    """The keys of the model in the file that is this one. Raises CheckpointError unless there is one, whole."""
    by_prefix: dict[str, Keys] = defaultdict(lambda: defaultdict(dict))
    for key in header.entries:
        name, _, end = key.partition(".")
        prefix, rest = split_prefix(name)
        if not (prefix and rest and end):
            cure = f"names that are understood begin with {', '.join(PREFIXES)}"
            raise CheckpointError(f"{header.path}: {brief(key)} is of no model that is known here\n  {cure}")
        by_prefix[prefix][name][end] = key
    absent = {p: [name for name in keys if not known.find(split_prefix(name)[1])] for p, keys in by_prefix.items()}
    fitting = [prefix for prefix, names in absent.items() if not names]
    if not fitting:
        prefix = min(absent, key=lambda p: len(absent[p]) / len(by_prefix[p]), default="")
        lost, model = absent.get(prefix, []), type(known.root).__name__
        near = ", ".join(known.paths[:3]) or "no layers"
        raise CheckpointError(
            f"{header.path}: {len(lost)} of its {len(by_prefix[prefix])} layers of {prefix.removesuffix('_')} "
            f"are not in this {model}\n"
            f"  file:  {brief(', '.join(lost[:3]))}\n"
            f"  model: {brief(near)}\n"
            f"  names are the model's paths with underscores, or those of SDXL's and Flux's own models"
        )
    if len(fitting) > 1:  # two text encoders have one set of names, and other widths
        fitting = [p for p in fitting if all(_fits(header, by_prefix[p][n], known, n, layers) for n in by_prefix[p])]
    if len(fitting) != 1:
        named = ", ".join(prefix.removesuffix("_") for prefix in by_prefix)
        problem = f"of {named}, {len(fitting)} have names and sizes of this {type(known.root).__name__}'s layers"
        raise CheckpointError(f"{header.path}: {problem}\n  write the one that you mean into a file of its own")
    (prefix,) = fitting
    names = by_prefix[prefix]
    if shared := [name for name in names if len(known.find(split_prefix(name)[1])) > 1]:
        paths = ", ".join(place.paths[0] for place in known.find(split_prefix(shared[0])[1])[:3])
        raise CheckpointError(f"{header.path}: {brief(shared[0])} is the name of {paths}\n  rename it in the file")
    others = {p: keys for p, keys in by_prefix.items() if p != prefix}
    for name, keys in (pair for of_prefix in others.values() for pair in of_prefix.items()):
        if known.find(split_prefix(name)[1]) and _fits(header, keys, known, name, layers):
            problem = f"{brief(name)} is this {type(known.root).__name__}'s, too, beside {prefix.removesuffix('_')}"
            raise CheckpointError(
                f"{header.path}: {problem}\n  give all of them one prefix, or take them out of the file"
            )
    for keys in names.values():
        if unknown := sorted(keys.keys() - ENDS):
            cure = "nothing is left out in silence: LoRA, LoCon, DoRA, LoHa and LoKr are read"
            raise CheckpointError(f"{header.path}: {brief(keys[unknown[0]])} is of no kind that is known\n  {cure}")
    if others:
        count = sum(len(keys) for of_prefix in others.values() for keys in of_prefix.values())
        left = f"{count} tensors of {', '.join(p.removesuffix('_') for p in others)} left there"
        logger.info(f"{header.path}: {prefix.removesuffix('_')} is this model's; {left}")
    return dict(names)


def _fits(header: Header, keys: Mapping[str, str], known: Names, name: str, layers: Mapping[str, BaseLayer]) -> bool:
    """Has the layer as many rows as the tensors of a LoRA or a LoHa of this name?"""
    places = known.find(split_prefix(name)[1])
    rows = sum(layers[path].d_out for path in places[0].paths)
    tall = [header.entries[keys[end]].shape for end in ("lora_up.weight", "hada_w1_a") if end in keys]
    return all(shape[:1] == (rows,) for shape in tall)


# ---- write ------------------------------------------------------------------------------------------


def write(root: nn.Module, pieces: Pieces, path: Path, prefix: Any = None, names: Any = "diffusers") -> Contents:
    """The contents of a file.

    prefix      the model's: "lora_unet", "lora_te1", "lycoris"; None: `component_of` the model
    names       "diffusers": the model's own paths, which all readers but sd-scripts know of SDXL and Flux, too;
                "original": SGM's of a UNet, BFL's of Flux, as sd-scripts trains them
    """
    prefix = component_of(root) if prefix is None else prefix
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; kohya's format is one file, such as {path / 'adapter.safetensors'}")
    for p, piece in pieces.items():
        if not takes(piece.layer):
            problem = f"kohya's format has no adapter on a layer of the kind {piece.layer.kind.category!r}"
            raise CheckpointError(f"{p or 'the model itself'}: {problem}\n  {_CURE}")
    known, tensors = Names(root, find_layers(dict(root.named_modules()))), dict[str, Tensor]()
    for name, place in _places(known, pieces, names).items():
        parts = [pieces[p] for p in place.paths]
        by_end = in_file(parts[0], place) if len(parts) == 1 else fused(parts, name)
        tensors |= {f"{prefix}_{name}.{end}": tensor.cpu().contiguous().clone() for end, tensor in by_end.items()}
    return {path: to_bytes(tensors, metadata={"format": "pt"})}


def _check_prefix(prefix: Any) -> None:
    if prefix is not None and f"{prefix}_" not in PREFIXES:
        raise ConfigError(f"prefix={prefix!r}: wanted one of {', '.join(p.removesuffix('_') for p in PREFIXES)}")


def _check_names(names: Any) -> None:
    if names not in ("diffusers", "original"):
        raise ConfigError(f"names={names!r}: wanted 'diffusers' or 'original'")


def _places(known: Names, pieces: Pieces, names: str) -> dict[str, Place]:
    """The names of the file, with the layers of each. Raises CheckpointError for a layer that has none of its own."""
    if names == "diffusers":
        return {known.written(p, f"{p or 'the model itself'}"): Place((p,)) for p in pieces}
    cure = "write it with names='diffusers', or leave it out (exclude_names)"
    by_path = {p: (name, place) for name, place in known.original.items() for p in place.paths}
    for p in pieces:
        if p not in by_path:
            raise CheckpointError(f"{p}: the original of a {type(known.root).__name__} has no such layer\n  {cure}")
        name, place = by_path[p]
        if absent := [other for other in place.paths if other not in pieces]:
            problem = f"{p} is a part of {name} there, and {absent[0]}, which is another, has no adapter"
            raise CheckpointError(f"{problem}\n  {cure}; or adapt all of its parts")
    return {by_path[p][0]: by_path[p][1] for p in pieces}


FORMAT = Format(
    "kohya",
    "file of kohya's",
    ("lora", "dora", "loha", "lokr"),
    read,
    write,
    is_header=is_header,
    options={"prefix": _check_prefix, "names": _check_names},
)
