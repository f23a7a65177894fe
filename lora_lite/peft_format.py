"""PEFT's adapter folders, both ways, and PEFT's names, which no other file knows.

    adapter_model.safetensors   base_model.model.<path>. with lora_A.weight (r, i), lora_B.weight (o, r),
                                lora_magnitude_vector[.weight] (o,) of DoRA, ia3_l (o, 1), or (1, i) on an input
    adapter_config.json         the settings

A folder is untrusted: no pickle is opened, and no regex of its settings is run. The layers are those that have tensors.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from . import quant
from .adapter import Adapter, adapters, check_shapes, check_unmerged, file_key, get_adapter, session_of
from .config import STORAGE_DTYPES, BaseConfig, is_number
from .delta import change, factors
from .errors import CheckpointError, ConfigError, QuantizedWeightError, brief
from .files import DTYPES, Header, check_numbers, read_header, read_json, replacing
from .keys import resolve
from .layer import Slot
from .preflight import Changes, attachable, shapes_of
from .runtime import installed
from .targets import Target, place
from .variant import ParamSpec, config_for, lookup

WEIGHTS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"

_PREFIX = "base_model.model."
_OURS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_magnitude_vector": "lora_m", "ia3_l": "lora_l"}
"""PEFT's name of a tensor -> ours."""
_THEIRS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_m": "lora_magnitude_vector.weight",  # PEFT reads it without ".weight" too, but transformers 5.23 only so
    "lora_l": "ia3_l",
}
"""Our name of a tensor -> PEFT's in a file."""
_KEY = re.compile(
    r"(?P<path>.+)\.(?:(?P<ab>lora_[AB])(?:\.(?P<of>[^.]+))?\.weight"
    r"|(?P<vector>lora_magnitude_vector|ia3_l)(?:\.(?!weight$)(?P<of_vector>[^.]+))?(?:\.weight)?"
    r"|base_layer\.(?P<base>[^.]+))"
)
_LITERAL = re.compile(r"(\^?)((?:\\\W|[^\\^$*+?{}\[\]()|])+)\$?")
"""A regex that is plain text: an escaped sign is itself, and a dot any character."""
_CHARACTER = re.compile(r"\\.|.", re.DOTALL)
LONGEST_PATTERN, MOST_PATTERNS = 1000, 10_000
"""Each is compared with each layer's path."""

_SAID = {
    "LORA": {"r", "rank_pattern", "lora_alpha", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora"},
    "IA3": set[str](),
}
"""Settings that are read, by peft_type."""
_FREE = {
    *("peft_type", "init_lora_weights", "init_ia3_weights", "task_type", "auto_mapping", "peft_version"),
    *("base_model_name_or_path", "revision", "inference_mode", "runtime_config", "megatron_core", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
"""Settings that say nothing which the tensors don't, or matter beside another one alone. All others must be neutral."""
_REWRITES = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts of an init_lora_weights that writes the base, so that A and B belong to another one."""


def plain_key(key: str) -> str:
    """PEFT's key in the words of this library: `<path>.lora_A`, `<path>.weight`; any other key as it is.

    Known are `[base_model.model.]<path>.` with `lora_A[.<adapter>].weight`, `lora_B[...]`, `lora_magnitude_vector[...]`
    (lora_m), `ia3_l[...]` (lora_l) and `base_layer.<tensor>`. Those of another adapter than "default" are suffixed as
    ours are: `<path>.lora_A__fr`.
    """
    plain = key.removeprefix(_PREFIX)
    match = _KEY.fullmatch(plain)
    if match is None:
        return plain
    name = match["ab"] or match["vector"]
    of = match["of"] or match["of_vector"] or "default"
    suffix = "" if of == "default" else f"__{of}"
    return f"{match['path']}.{_OURS[name] + suffix if name else match['base']}"


# ---- loading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """A folder whose settings are understood and whose tensors are an adapter's, by their keys."""

    header: Header
    settings: dict[str, Any]
    keys: dict[str, str]
    """Our key -> the file's."""

    @property
    def paths(self) -> dict[str, None]:
        """Of the layers that have tensors, in the file's order."""
        return dict.fromkeys(key.rpartition(".")[0] for key in self.keys)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by our key."""
        return {ours: self.header.entries[key].shape for ours, key in self.keys.items()}

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.header.path.parent / CONFIG}: {message}")


@dataclass(frozen=True)
class _Part:
    """One adapter of ours in a folder."""

    cfg: BaseConfig
    targets: dict[str, Target]
    """By the path in the file."""
    changes: Changes
    """By the path in the model."""


def load_peft(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> Adapter:
    """Attach the adapter of a PEFT folder: LoRA, rsLoRA, rank and alpha patterns, DoRA, IA3.

    Tensors are bit-equal, in the file's dtype. Mixed dtypes are promoted to one that holds them all; so are 16-bit
    tensors of DoRA, PiSSA and OLoRA to float32, since their maths compares them with numbers of the live weight.

    IA3 on both outputs and inputs (feedforward_modules) becomes two adapters: `name` of the variant ia3, which is
    returned, and `<name>_ff` of ia3_ff. A folder whose init wrote the base is loaded without writing it: "pissa" as the
    variant pissa, "olora" as a LoRA of rank 2r that takes the removed part out, on a dense base.

    Raises CheckpointError for a setting or a tensor that would be lost, naming it, and what attach raises; the model is
    then as it was.
    """
    root, source = attachable(model), _read(Path(folder))
    targets = _targets(root, source)
    parts = _ia3_parts(source, targets) if source.settings["peft_type"] == "IA3" else [_lora_part(source, targets)]
    held = _tensors(root, source, targets)

    def values(key: str, spec: ParamSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        return held[key].to(device, dtype, copy=True) if key in held else torch.zeros(spec.shape).to(device, dtype)

    loaded = []
    with ExitStack() as stack:
        for part, each in zip(parts, (name, f"{name}_ff"), strict=False):
            layers = list(part.targets.values())
            adapter = stack.enter_context(installed(root, part.cfg, each, layers, part.changes, values))
            with torch.no_grad():
                for view in adapter.views().values():  # n0, A0 and B0 are the base's; what else it fills comes next
                    lookup(part.cfg.variant).init(view, view.cfg)
            adapter.load_state_dict({key: held.get(key, tensor) for key, tensor in adapter.state_dict().items()})
            loaded.append(adapter)
    for adapter in loaded:
        logger.info(f"loaded {adapter} from PEFT's folder {folder}")
    return loaded[0]


@dataclass(frozen=True)
class PeftLayer:
    """One layer of a folder without its model: a size that no tensor tells is 0, a tensor of the base isn't there."""

    target: Target
    cfg: BaseConfig
    tensors: dict[str, Tensor]


def read_layers(folder: Path) -> tuple[list[PeftLayer], dict[str, Any]]:
    """What load_peft would attach, by layer, and the folder's settings. Raises CheckpointError as it does.

    OLoRA's A and B are relative to the base weight, so it is refused here.
    """
    source = _read(folder)
    targets = {at: _by_shapes(source, at) for at in source.paths}
    ia3 = source.settings["peft_type"] == "IA3"
    if not ia3 and _method(source)[1] == "olora":
        raise source.error("init_lora_weights='olora' wrote the base: its A and B are half of the adapter")
    held = _held(source)
    return [
        PeftLayer(
            target,
            part.cfg.at(part.changes.get(at, {})),
            {name: held[key] for name in _THEIRS if (key := file_key(at, name)) in held},
        )
        for part in (_ia3_parts(source, targets) if ia3 else [_lora_part(source, targets)])
        for at, target in part.targets.items()
    ], source.settings


def _by_shapes(source: _Folder, at: str) -> Target:
    """The layer as its tensors tell; 0 stands for a side that they don't."""
    shapes = source.shapes()
    a, b, scales = (shapes.get(file_key(at, name), ()) for name in ("lora_A", "lora_B", "lora_l"))
    d_in = a[-1] if len(a) == 2 else scales[1] if len(scales) == 2 and scales[0] == 1 else 0
    d_out = b[0] if len(b) == 2 else scales[0] if len(scales) == 2 and scales[1] == 1 else 0
    return Target(at, d_in, d_out, "?", *place(at))


def _read(folder: Path) -> _Folder:
    if not (folder / WEIGHTS).is_file() and (folder / PICKLE).is_file():
        raise CheckpointError(
            f"{folder / PICKLE} is a pickle, which is never opened: it can run code\n"
            f"  save it again with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    if not ((folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()):
        raise CheckpointError(f"{folder} is no adapter folder of PEFT: wanted {WEIGHTS} and {CONFIG} in it")
    settings = read_json(folder / CONFIG)
    header = read_header(folder / WEIGHTS)
    source = _Folder(header, settings, {plain_key(key): key for key in header.entries})
    _check_settings(source)
    unknown = [key for ours, key in source.keys.items() if ours.rpartition(".")[2] not in _THEIRS]
    unknown += [key for key in header.entries if source.keys[plain_key(key)] != key]
    if unknown or not source.keys:
        raise CheckpointError(
            f"{header.path}: {len(unknown)} of its {len(header.entries)} tensors have no place in an adapter on linear "
            f"layers\n  such as {'; '.join(unknown[:3]) or 'none'}\n"
            f"  embeddings, biases and whole modules beside the adapter aren't supported: nothing is dropped"
        )
    return source


def _check_settings(source: _Folder) -> None:
    kind = source.settings.get("peft_type")
    if not isinstance(kind, str) or kind not in _SAID:
        raise source.error(f"peft_type {brief(repr(kind))} isn't supported; wanted one of {sorted(_SAID)}")
    known = _SAID[kind] | _FREE
    odd = {field: value for field, value in source.settings.items() if field not in known and not _neutral(value)}
    if odd:
        some = [f"{brief(field, 60)}={brief(json.dumps(value), 60)}" for field, value in list(odd.items())[:5]]
        raise source.error(
            f"{', '.join(some)} can't be kept here, and nothing is dropped\n  such an adapter works with PEFT only"
        )


def _neutral(value: Any) -> bool:
    return value is None or value is False or value in ("none", "", [], {})


def _targets(root: nn.Module, source: _Folder) -> dict[str, Target]:
    """The model's linear layer for each path of the file. Raises CheckpointError."""
    modules = dict(root.named_modules())
    mapping = resolve(source.header.path, source.paths, set(modules), type(root).__name__)
    targets = {}
    for at, path in mapping.items():
        target = Target.at(path, modules[path])
        if target is None or target.experts:
            raise CheckpointError(
                f"{source.header.path}: {at} is no linear layer of this {type(root).__name__} but "
                f"{type(modules[path]).__name__}\n  convolutions, embeddings and fused experts aren't supported"
            )
        targets[at] = target
    return targets


def _lora_part(source: _Folder, targets: dict[str, Target]) -> _Part:
    variant, init = _method(source)
    rslora = _flag(source, "use_rslora")
    dropout = _number(source, "lora_dropout", source.settings.get("lora_dropout", 0))
    if init in ("pissa", "olora") and dropout:
        raise source.error(
            f"lora_dropout={dropout} with init_lora_weights={init!r} can't be kept here\n"
            f"  dropout acts in training only: set it to 0 in the file if you don't train on"
        )
    shapes, alphas = source.shapes(), _alphas(source, targets)
    at_layers: dict[str, tuple[int, float]] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for at, target in targets.items():
        r = (*shapes.get(file_key(at, "lora_A"), ()), 1)[0]
        wanted |= {file_key(at, "lora_A"): (r, target.d_in), file_key(at, "lora_B"): (target.d_out, r)}
        wanted |= {file_key(at, "lora_m"): (target.d_out,)} if variant == "dora" else {}
        alpha = alphas[at]
        if init == "olora":
            r, alpha = 2 * r, alpha * (math.sqrt(2) if rslora else 2)  # [B, -B0] [A; A0] at the same s
        elif init == "pissa" and rslora:
            alpha *= math.sqrt(r)  # PiSSA's s is α/r
        at_layers[target.path] = (r, alpha)
    check_shapes(shapes, wanted, str(source.header.path))
    for at in targets:
        _check_rank(source, at, shapes[file_key(at, "lora_A")][0])
    (r, alpha), _ = Counter(at_layers.values()).most_common(1)[0]
    differ = {path: {"r": here[0], "alpha": here[1]} for path, here in at_layers.items() if here != (r, alpha)}
    common: dict[str, Any] = {"r": r, "alpha": alpha}
    if variant != "pissa":
        common |= {"rslora": rslora, "dropout": dropout}
    reads = init == "olora" or lookup(variant).base_weight != "unused"
    return _Part(_config(source, variant, targets, differ, reads, **common), targets, differ)


def _method(source: _Folder) -> tuple[str, Any]:
    """Our variant, and the init where it is one that wrote the base in a way that is known here."""
    dora, init = _flag(source, "use_dora"), source.settings.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else init
    if init is None or isinstance(init, bool) or init in ("gaussian", "eva", "orthogonal"):
        return "dora" if dora else "lora", None
    if init in ("pissa", "olora") and not dora:
        return "pissa" if init == "pissa" else "lora", init
    if not str(init).startswith(_REWRITES):
        raise source.error(
            f"init_lora_weights={brief(repr(init))} isn't supported: what it does to the base or to training is lost"
        )
    both = " with use_dora" if dora else ""
    raise source.error(
        f"init_lora_weights={init!r}{both} wrote the base: its A and B belong to another one\n"
        f"  make a plain LoRA of it: PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...);\n"
        f"  or, if your model is the base that was written, set init_lora_weights to true in the file"
    )


def _ia3_parts(source: _Folder, targets: dict[str, Target]) -> list[_Part]:
    """By the shapes: (o, 1) scales outputs, (1, i) inputs."""
    shapes = source.shapes()
    of: dict[str, dict[str, Target]] = {"ia3": {}, "ia3_ff": {}}
    wanted = {}
    for at, target in targets.items():
        key = file_key(at, "lora_l")
        forms = {"ia3": (target.d_out, 1), "ia3_ff": (1, target.d_in)}
        fit = [variant for variant, shape in forms.items() if shapes.get(key) == shape]
        if len(fit) > 1:
            raise CheckpointError(
                f"{source.header.path}: {source.keys[key]} is (1, 1), so it could scale input or output"
            )
        variant = fit[0] if fit else "ia3"
        of[variant][at], wanted[key] = target, forms[variant]
    check_shapes(shapes, wanted, str(source.header.path))
    return [_Part(_config(source, variant, own, {}, False), own, {}) for variant, own in of.items() if own]


def _config(
    source: _Folder, variant: str, targets: Mapping[str, Target], differ: Changes, reads: bool, **values: Any
) -> BaseConfig:
    """Ours, with regexes of its own that find these layers exactly. `reads`: its maths reads the base weight."""
    dtype = _dtype(source, targets, reads)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, here in differ.items():
        groups.setdefault(tuple(here.items()), []).append(path)
    per_layer = {_exactly(paths): dict(items) for items, paths in groups.items()}
    names = (_exactly(target.path for target in targets.values()),)
    try:
        return config_for(variant)(variant=variant, target_names=names, dtype=dtype, per_layer=per_layer, **values)
    except ConfigError as error:
        raise source.error(str(error)) from error


def _exactly(paths: Iterable[str]) -> str:
    return f"^({'|'.join(map(re.escape, paths))})$"


def _dtype(source: _Folder, files: Mapping[str, Target], reads: bool) -> torch.dtype:
    entries = {key: source.header.entries[key] for ours, key in source.keys.items() if ours.rpartition(".")[0] in files}
    odd = [key for key, entry in entries.items() if DTYPES.get(entry.dtype) not in STORAGE_DTYPES]
    if odd:
        raise CheckpointError(f"{source.header.path}: {odd[0]} is stored as {entries[odd[0]].dtype}; wanted floats")
    dtypes = {DTYPES[entry.dtype] for entry in entries.values()} | ({torch.float32} if reads else set())
    return reduce(torch.promote_types, sorted(dtypes, key=str))


def _tensors(root: nn.Module, source: _Folder, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """The file's tensors by their key in the model, as this library shapes them."""
    held = {}
    for ours, value in _held(source).items():
        at, _, tensor = ours.rpartition(".")
        held[file_key(targets[at].path, tensor)] = value
    if _method(source)[1] == "olora":
        for target in targets.values():
            a, b = file_key(target.path, "lora_A"), file_key(target.path, "lora_B")
            b0, a0 = _removed_by_olora(root.get_submodule(target.path), target, r=held[a].shape[0])
            held[a], held[b] = torch.cat([held[a].to(a0), a0]), torch.cat([held[b].to(b0), -b0], dim=1)
    return held


def _held(source: _Folder) -> dict[str, Tensor]:
    """The file's tensors by our key, as this library shapes them."""
    read = source.header.read()
    check_numbers(read, str(source.header.path), "save the adapter again")
    return {ours: read[key].flatten() if ours.endswith("lora_l") else read[key] for ours, key in source.keys.items()}


def _removed_by_olora(module: quant.Linear, target: Target, r: int) -> tuple[Tensor, Tensor]:
    """(B0, A0): the first r columns and rows of W = Q R."""
    if quant.kind_of(module) is not quant.Kind.DENSE:
        raise QuantizedWeightError(
            f"{target.path}: OLoRA took a part out of a dense weight, and this one is {target.kind}\n"
            f"  load the base without quantization, or convert the folder (path_initial_model_for_weight_conversion)"
        )
    q, rest = torch.linalg.qr(quant.dense_weight(module, target.path))
    return q[:, :r].cpu(), rest[:r].cpu()


# ---- settings of a folder -----------------------------------------------------------------------


def _flag(source: _Folder, field: str) -> bool:
    value = source.settings.get(field, False)
    if not isinstance(value, bool):
        raise source.error(f"{field}={value!r}: wanted true or false")
    return value


def _number(source: _Folder, field: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= torch.finfo(torch.float64).max:
        raise source.error(f"{field} has {brief(value, 60)}: wanted a finite number")
    return float(value)


def _check_rank(source: _Folder, at: str, r: int) -> None:
    """The rank of the tensors must be one that the settings name, since the scaling rests on it."""
    patterns = source.settings.get("rank_pattern") or {}
    named = [source.settings.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else ())]
    if r not in named:
        raise source.error(f"{at} has tensors of rank {r}, and r and rank_pattern name {brief(named, 80)}")


def _alphas(source: _Folder, paths: Iterable[str]) -> dict[str, float]:
    """Each layer's lora_alpha: the first of alpha_pattern whose regex finds the end of its path."""
    patterns, default = _literal_patterns(source), source.settings.get("lora_alpha", 8)
    alphas, unsure = {}, []
    for at in paths:
        found = [value for start, text, value in patterns if _ends(at, start, text)]
        unsure += [at] if any(value != found[0] for value in found) else []
        alphas[at] = _number(source, "lora_alpha", found[0] if found else default)
    if unsure:
        logger.warning(
            f"{source.header.path.parent / CONFIG}: several entries of alpha_pattern find {', '.join(unsure[:3])}; "
            f"took the first, as PEFT does\n  it sorts them when it saves, so in training another may have been first"
        )
    return alphas


def _literal_patterns(source: _Folder) -> list[tuple[str, list[str], Any]]:
    """("^" or nothing, text by character, value) of each entry of alpha_pattern; "" is any character."""
    patterns = source.settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
        raise source.error(f"alpha_pattern is no object of at most {MOST_PATTERNS} entries")
    parsed = {at: _LITERAL.fullmatch(at) if len(at) <= LONGEST_PATTERN else None for at in patterns}
    odd = [repr(brief(pattern, 80)) for pattern, match in parsed.items() if match is None]
    if odd:
        raise source.error(
            f"alpha_pattern has {', '.join(odd[:3])}, and no regex of a file is run\n"
            f"  write the paths that it means, or their ends, in its place"
        )
    return [
        (match[1], ["" if each == "." else each[-1] for each in _CHARACTER.findall(match[2])], patterns[pattern])
        for pattern, match in parsed.items()
        if match
    ]


def _ends(path: str, start: str, text: Sequence[str]) -> bool:
    """Is `text` the end of the path from a dot on, or all of it after "^"?"""
    before, end = path[: max(len(path) - len(text), 0)], path[-len(text) :]
    if len(end) != len(text) or not all(char in ("", got) for char, got in zip(text, end, strict=True)):
        return False
    return not before or (before.endswith(".") and not start)


# ---- saving -------------------------------------------------------------------------------------

Layers = dict[str, tuple[nn.Module, list[Slot]]]
"""Path -> the layer, and the slots of the chosen adapters on it in the order attached."""


def save_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | Sequence[str] = "default",
    rank: int | None = None,
    max_error: float | None = None,
) -> float | None:
    """Write a PEFT folder: LoRA and DoRA (with `per_layer`), ia3, ia3_ff as they are, tensors bit-equal.

    name        one adapter, or several that make one of PEFT's: an ia3 and an ia3_ff on other layers
    rank        write what adapters of any kind, at their scales, change in the weights as a plain LoRA of this rank
                (less where a layer has fewer directions), alpha = r: its SVD, in float32 at least. Exact where the
                change has that rank: LoRA's r, PiSSA's 2r, abliteration's own in the modes none and pre. The relative
                error ‖W' - W - B A‖/‖W' - W‖ is logged
    max_error   refuse a layer with a greater one, before anything is written

    Returns the greatest relative error of a layer; None without a rank, where there is none.

    Magnitudes of a 16-bit DoRA are written in float32, for the norms that PEFT computes and not the rounded ones kept
    here. A crash leaves the old folder or the new one; at worst, one without its config, that nothing loads.

    Raises CheckpointError for what PEFT's format can't hold, TargetError for an unknown name, ConfigError for a bad
    argument, VariantError if a method is not affine; nothing is written then.
    """
    folder, (root, session) = Path(folder), session_of(model)
    check_unmerged(session, "export")
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; PEFT's format is a folder of two files")
    if not (rank is None or (type(rank) is int and rank > 0)):
        raise ConfigError(f"rank={rank!r}: wanted an integer of at least 1, or None")
    if max_error is not None and (rank is None or not is_number(max_error)):
        raise ConfigError(f"max_error={max_error!r} with rank={rank}: wanted a number beside a rank")
    chosen = [get_adapter(model, each) for each in ([name] if isinstance(name, str) else name)]
    layers, worst = _layers(model, chosen), None
    scaled = [adapter.name for adapter in chosen if adapter.scale != 1]
    if rank is None and scaled:
        raise CheckpointError(
            f"{scaled[0]!r} has a scale, which PEFT can't hold\n  set it to 1, or give rank= to include it"
        )
    if rank is not None:
        tensors, settings, worst = _low_rank(root, layers, rank, max_error)
    elif [adapter.variant for adapter in chosen] in (["lora"], ["dora"]):
        tensors, settings = _native_lora(root, chosen[0], layers)
    elif {adapter.variant for adapter in chosen} <= {"ia3", "ia3_ff"} and all(len(s) == 1 for _, s in layers.values()):
        tensors, settings = _native_ia3(root, layers)
    else:
        raise CheckpointError(
            f"PEFT has no adapter like {', '.join(f'{a.name!r} ({a.variant})' for a in chosen)}\n"
            f"  give rank= to write what they change as a plain LoRA: 2r is exact for pissa, its own rank for "
            f"abliteration in the modes none and pre"
        )
    check_numbers(tensors, f"{' and '.join(adapter.name for adapter in chosen)} in memory", "nothing was written")
    _write(folder, tensors, settings | _about(root, chosen[0]))
    logger.info(f"saved {' and '.join(map(str, chosen))} to {folder} in PEFT's format ({settings['peft_type']})")
    return worst


def _layers(model: nn.Module, chosen: Sequence[Adapter]) -> Layers:
    names = [adapter.name for adapter in chosen]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"name={names}: wanted one adapter, or several different ones")
    layers: Layers = {}
    for adapter in (each for each in adapters(model).values() if each.name in names):
        if adapter.is_sharded:
            raise CheckpointError(
                f"adapter {adapter.name!r} is sharded\n  use lora_lite.save, then load it in one process to convert it"
            )
        shapes = {key: tuple(tensor.shape) for key, tensor in adapter.state_dict().items()}
        check_shapes(shapes, shapes_of(adapter), f"adapter {adapter.name!r} in memory")
        for module, slot in adapter.slots():
            layers.setdefault(slot.path, (module, []))[1].append(slot)
    odd = [path or "the model itself" for path, (_, slots) in layers.items() if not path or slots[0].target.experts]
    if odd:
        raise CheckpointError(
            f"{odd[0]}: PEFT's format holds adapters of named linear layers; fused experts have no place"
        )
    return layers


def _native_lora(root: nn.Module, adapter: Adapter, layers: Layers) -> tuple[dict[str, Tensor], dict[str, Any]]:
    ways = {(slots[0].cfg.rslora, slots[0].cfg.dropout) for _, slots in layers.values()}
    if len(ways) > 1:
        raise CheckpointError(
            f"rslora and dropout differ by layer: {sorted(ways)}\n  PEFT has one of each for all layers"
        )
    held, tensors, at_layers = adapter.state_dict(), {}, {}
    for path, (module, (slot,)) in layers.items():
        at_layers[path] = (slot.cfg.r, float(slot.cfg.r if slot.cfg.alpha is None else slot.cfg.alpha))
        for tensor in ("lora_A", "lora_B"):
            tensors[_their_key(path, tensor)] = held[file_key(path, tensor)]
        if adapter.variant == "dora":
            tensors[_their_key(path, "lora_m")] = _magnitude(module, slot, held)
    ((rslora, dropout),) = ways
    return tensors, _lora_settings(
        root, at_layers, use_rslora=rslora, lora_dropout=dropout, use_dora=adapter.variant == "dora"
    )


def _magnitude(module: nn.Module, slot: Slot, held: Mapping[str, Tensor]) -> Tensor:
    """m of DoRA; where n0 was rounded to 16 bits, the m that gives the same outputs with norms of the live weight."""
    a, b, m, n0 = (held[file_key(slot.path, f"lora_{tensor}")] for tensor in ("A", "B", "m", "n0"))
    if torch.promote_types(n0.dtype, torch.float32) == n0.dtype:
        return m
    weight = quant.dense_weight(module, slot.path).double()
    square = weight.square().sum(1)
    moved = (weight + slot.cfg.scaling * b.double() @ a.double()).square().sum(1)
    return (m.double() * (moved / (n0.double().square() + moved - square)).sqrt()).float()


def _native_ia3(root: nn.Module, layers: Layers) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, inner = {}, []
    for path, (module, (slot,)) in layers.items():
        scales = getattr(module, slot.state.attribute("lora_l")).detach()
        on_input = slot.cfg.variant == "ia3_ff"
        tensors[_their_key(path, "lora_l")] = scales[None] if on_input else scales[:, None]
        inner += [path] if on_input else []
    targets, feedforward = _modules(root, list(layers), inner)
    return tensors, {
        "peft_type": "IA3",
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "fan_in_fan_out": _transposed(root, layers),
        "init_ia3_weights": True,
    }


def _low_rank(
    root: nn.Module, layers: Layers, rank: int, max_error: float | None
) -> tuple[dict[str, Tensor], dict[str, Any], float]:
    tensors: dict[str, Tensor] = {}
    at_layers, errors, square = {}, {}, [0.0, 0.0]
    for path, (module, slots) in layers.items():
        delta, moved_bias = change(module, slots)
        if moved_bias is not None:
            raise CheckpointError(f"{path}: {slots[0].cfg.variant!r} changes its bias, which a plain LoRA can't hold")
        dtype = reduce(torch.promote_types, (slot.cfg.dtype for slot in slots), torch.float32)
        a, b = (factor.to(dtype) for factor in factors(delta, rank))
        rest, size = float((delta - b.double() @ a.double()).norm()), float(delta.norm())
        errors[path] = rest / size if size else 0.0
        square = [square[0] + rest**2, square[1] + size**2]
        tensors |= {_their_key(path, "lora_A"): a, _their_key(path, "lora_B"): b}
        at_layers[path] = (len(a), float(len(a)))
    worst = max(errors, key=lambda path: errors[path])
    overall = math.sqrt(square[0] / square[1]) if square[1] else 0.0
    line = f"as a LoRA of rank {rank}: relative error {overall:.1e} overall, {errors[worst]:.1e} at worst ({worst})"
    logger.info(line)
    if max_error is not None and not errors[worst] <= max_error:
        raise CheckpointError(
            f"{line}\n  wanted at most max_error={max_error}; nothing was written: give a higher rank"
        )
    found = _lora_settings(root, at_layers, use_rslora=False, lora_dropout=0.0, use_dora=False)
    return tensors, found, errors[worst]


def _lora_settings(root: nn.Module, at_layers: Mapping[str, tuple[int, float]], **fields: Any) -> dict[str, Any]:
    """The settings for these ranks and alphas by path."""
    r, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*at_layers.values(), strict=True))
    targets, _ = _modules(root, list(at_layers), [])
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {f"^{re.escape(path)}": own for path, (own, _) in at_layers.items() if own != r},
        "alpha_pattern": {f"^{re.escape(path)}": _whole(own) for path, (_, own) in at_layers.items() if own != alpha},
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": _transposed(root, at_layers),
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        **fields,
    }


def _whole(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


def _modules(root: nn.Module, layers: Sequence[str], inner: Sequence[str]) -> tuple[Any, Any]:
    """target_modules, and feedforward_modules, that PEFT resolves to exactly these layers.

    A list reaches what ends with one of its entries, a string is a regex for the full path. Last names, where they
    reach nothing else, are what most tools know best; then full paths; then a regex.
    """
    paths = [path for path, _ in root.named_modules()]
    forms: tuple[Callable[[str], str], ...] = (lambda path: path.rpartition(".")[2], lambda path: path)
    for form in forms:
        names, inner_names = sorted({form(path) for path in layers}), sorted({form(path) for path in inner})
        ends = tuple(f".{name}" for name in names)
        reached = [path for path in paths if path in names or path.endswith(ends)]
        reached_inner = [path for path in layers if path.endswith(tuple(inner_names))]
        if set(reached) == set(layers) and set(reached_inner) == set(inner):
            return names, inner_names
    return "|".join(map(re.escape, layers)), "|".join(map(re.escape, inner)) if inner else []


def _transposed(root: nn.Module, layers: Iterable[str]) -> bool:
    return any(quant.is_transposed(root.get_submodule(path)) for path in layers)


def _their_key(path: str, tensor: str) -> str:
    return f"{_PREFIX}{path}.{_THEIRS[tensor]}"


def _about(root: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """The settings that say what the adapter goes on."""
    kind = type(root)
    causal = kind.__name__.endswith("ForCausalLM")
    return {
        "base_model_name_or_path": adapter.base["name_or_path"],
        "task_type": "CAUSAL_LM" if causal else None,
        "auto_mapping": None if causal else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "revision": None,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _write(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Both files are whole on disk before either takes its place; the config, without which nothing loads, is last."""
    whole = {key: tensor.cpu().clone().contiguous() for key, tensor in tensors.items()}
    with replacing(folder / CONFIG) as config, replacing(folder / WEIGHTS) as weights:
        config.write((json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
        weights.write(to_bytes(whole, metadata={"format": "pt"}))
        (folder / CONFIG).unlink(missing_ok=True)
