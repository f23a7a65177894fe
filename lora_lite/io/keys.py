"""Layer paths and tensor keys in files and models: what wrappers add to a path, which is meant, which keys fit."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from ..base.layer import BaseLayer, find_layers, layer_of, shapes_of
from ..base.stacks import find_stacks
from ..core.shared import PLACE
from ..core.targets import Target, block_layers
from ..errors import CheckpointError

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.")  # of DDP, torch.compile, PEFT, transformers
INFIXES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of wrappers around inner modules
PREFIX = "base_model.model."  # of PEFT's keys

THEIRS = {  # our name of a tensor -> PEFT's in a file
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_E": "lora_E",  # of AdaLoRA, whose A and B have no ".weight"
    "lora_bias": "lora_B.bias",
    "lora_m": "lora_magnitude_vector.weight",  # PEFT reads it without ".weight" too, but transformers 5.23 only so
    "lora_l": "ia3_l",
    "lora_d": "vera_lambda_d",
    "lora_b": "vera_lambda_b",
}
_OURS = {name: ours for ours, name in THEIRS.items()}  # by PEFT's name
_OURS |= {"lora_magnitude_vector": "lora_m", "ia3_l.weight": "lora_l"}
_OURS |= {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
_NAMES = "|".join(sorted({name.removesuffix(".weight").removesuffix(".bias") for name in _OURS}))
_KEY = re.compile(  # between a name and its end PEFT has the adapter's in memory
    rf"(?P<path>.+)\.(?:(?P<name>{_NAMES})(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?P<end>\.weight|\.bias)?"
    r"|base_layer\.(?P<base>[^.]+))"
)
_SHARED = re.compile(r"base_model\.vera_(?P<name>[AB])(?:\.(?P<adapter>[^.]+))?")


def resolve(
    file: Path | str, in_file: Iterable[str], paths: set[str], model: str, noun: str = "target layers"
) -> dict[str, str]:
    """File path -> model path: the same, or the one that remains the same without what wrappers add.

    Raises:
        CheckpointError: which calls them by the `noun`, unless each of the file's has one of the model, and each its
            own.
    """
    in_file = list(in_file)
    if set(in_file) <= paths:
        return {path: path for path in in_file}
    by_core = defaultdict(list)
    for path in paths:
        by_core[core(path)].append(path)
    candidates = {path: by_core[core(path)] for path in in_file}
    uses = Counter(matches[0] for matches in candidates.values() if matches)  # two of the file's may share a core
    bad = {path: matches for path, matches in candidates.items() if len(matches) != 1 or uses[matches[0]] > 1}
    if bad:
        path, matches = next(iter(bad.items()))
        near = sorted(p for p in paths if p.rpartition(".")[2] == path.rpartition(".")[2])[:3]
        raise CheckpointError(
            f"{file}: {len(bad)} of its {len(candidates)} {noun} "
            f"{'match more than one layer' if matches else 'are not'} in this {model}\n"
            f"  file:  {path}\n"
            f"  model: {', '.join(matches or near) or 'no layer of such a name'}\n"
            f"  prefixes that are understood: {', '.join(PREFIXES)}"
        )
    return {path: matches[0] for path, matches in candidates.items()}


def layers_of(
    root: nn.Module, file: Path, in_file: Iterable[str], kinds: Sequence[str] = ()
) -> tuple[dict[str, Target], dict[Target, BaseLayer]]:
    """The model's layer for each path of a file: its target by the path in the file, and the layer by its target.

    `kinds` are those of the adapter's config: the paths are of blocks, or of norms too, only where these say so.

    Raises:
        CheckpointError: as `resolve`, and for a path that leads to no linear layer.
    """
    modules, model = dict(root.named_modules()), type(root).__name__
    known, targets, layers, on_blocks = find_layers(modules), {}, {}, "block" in kinds
    stacks = find_stacks(modules, shapes_of(known.values()))
    known = block_layers(root, modules, stacks) if on_blocks else known
    for name, path in resolve(file, in_file, {*modules, *known}, model).items():
        layer = known.get(path) or (None if on_blocks else layer_of(modules[path], path))
        if layer is None or not (layer.kind.has_matrix or layer.kind.category in kinds):
            kind, noun = type(modules[path]).__name__, "block" if on_blocks else "linear layer"
            raise CheckpointError(f"{file}: {name} is no {noun} of this {model} but {kind}\n  load it on its own model")
        targets[name] = target = Target.of(layer, stacks)
        layers[target] = layer
    return targets, layers


def core(path: str) -> str:
    """The path without what wrappers add."""
    if any(infix in path for infix in INFIXES):
        path = ".".join(part for part in path.split(".") if part not in INFIXES)
    while path.startswith(PREFIXES):  # wrappers nest: module._orig_mod.model.
        path = path.removeprefix(next(prefix for prefix in PREFIXES if path.startswith(prefix)))
    return path


def plain_key(key: str) -> str:
    """PEFT's key in the words of this library: `<path>.lora_A`, `<path>.weight`; any other key as it is.

    Known are `[base_model.model.]<path>.` with `lora_A[.<adapter>].weight`, `lora_B[...]`, `lora_magnitude_vector[...]`
    (lora_m), `ia3_l[...]` (lora_l), `vera_lambda_d[...]` and `base_layer.<tensor>`, and `base_model.vera_A[...]`. Those
    of another adapter than "default" are suffixed as ours are: `<path>.lora_A__fr`, `lora_shared__fr.A`.
    """
    plain = key.removeprefix(PREFIX)
    match = _KEY.fullmatch(plain) or _SHARED.fullmatch(plain)
    if match is None:
        return plain
    parts = match.groupdict()
    suffix = "" if parts["adapter"] in (None, "default") else f"__{parts['adapter']}"
    if "path" not in parts:
        return f"{PLACE}{suffix}.{parts['name']}"
    if parts["base"]:
        return f"{parts['path']}.{parts['base']}"
    name = _OURS.get(parts["name"] + (parts["end"] or ""))
    return f"{parts['path']}.{name}{suffix}" if name else plain
