"""PEFT's adapter folders as they lie on disk, and PEFT's names, which no other file knows.

    adapter_model.safetensors   base_model.model.<path>. with lora_A.weight (r, i), lora_B.weight (o, r),
                                lora_B.bias (o,), lora_magnitude_vector[.weight] (o,) of DoRA, ia3_l (o, 1), or (1, i)
                                on an input, vera_lambda_d (r,), vera_lambda_b (o,); once: base_model.vera_A, vera_B
    adapter_config.json         the settings
    <name>/                     such a folder of each adapter but the one called default

What is trained beside an adapter is in the file too, as PEFT 0.21.2 writes it, and is none that this library takes yet:

    modules_to_save             the module's state under its own keys, buffers and inner modules too: <path>.weight. A
                                target that is saved has no adapter. With task_type, the names classifier and score are
                                added, of which a model has one
    bias="<x>_only"             <path>.base_layer.bias of targets
    bias="all"                  that, and every other bias of the model: <path>.bias. Of a saved module there are also
                                <path>.original_module.bias and <path>.modules_to_save.bias, which is <path>.bias again
    trainable_token_indices     <path>.token_adapter.trainable_tokens_delta (n, d): new rows, not differences, in the
                                order of the setting: a list, of the input embedding, or lists by module. A tied head is
                                in the file only where its list differs
    resized embeddings          where the base's config.json has another vocabulary: whole weights of both embeddings,
                                under <path>.weight, or what wraps them: .base_layer, .token_adapter.base_layer,
                                .original_module and .modules_to_save; then tied heads and their tokens, too
    TRAINABLE_TOKENS            <path>.trainable_tokens_delta, of a tied head as well
    LN_TUNING                   <path>.ln_tuning_layers. and the names of the norm's parameters
    ADALORA                     lora_A, lora_B without .weight, lora_E (r, 1)

diffusers writes one file, pytorch_lora_weights.safetensors, with the same settings as JSON in its metadata. A model's
save_lora_adapter gives keys like <path>.lora_A.weight; in a pipeline's file, keys and settings begin with the name of
the component: unet.<path>.lora_A.weight and unet.r.

Both are untrusted: no pickle is opened, and no regex of the settings is run. The layers are those that have tensors.
"""

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from ...core.shared import PLACE
from ...errors import CheckpointError, brief
from ..keys import THEIRS, plain_key
from ..safetensors import Entry, Header, parse_json, read_header, read_json

WEIGHTS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
DIFFUSERS, DIFFUSERS_SETTINGS = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
# A regex that is plain text: an escaped sign is itself, and a dot any character.
_LITERAL = re.compile(r"(\^?)((?:\\\W|[^\\^$*+?{}\[\]()|])+)\$?")
_CHARACTER = re.compile(r"\\.|.", re.DOTALL)
LONGEST_PATTERN, MOST_PATTERNS = 1000, 10_000  # each is compared with each layer's path
MOST_COMPONENTS = 8  # models of a pipeline in one file
_READ = {  # the settings that are read, by peft_type
    "LORA": {"r", "rank_pattern", "lora_alpha", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora"}
    | {"ensure_weight_tying", "lora_bias"},
    "IA3": set[str](),
    "VERA": {"r", "projection_prng_key", "save_projection", "d_initial", "vera_dropout"},
}
# Settings that say nothing which the tensors don't, or matter beside another one alone. All others must be neutral.
_FREE = (
    {"peft_type", "init_lora_weights", "init_ia3_weights", "init_weights", "task_type", "auto_mapping", "peft_version"}
    | {"base_model_name_or_path", "revision", "inference_mode", "runtime_config", "megatron_core", "fan_in_fan_out"}
    | {"target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
)
# Which biases were trained. Those would be tensors of the file, which have no place here; a base may have no bias.
_BIASES = ("none", "all", "lora_only", "vera_only")
_NEUTRAL: tuple[Any, ...] = (None, "none", "", [], {})  # and False, but not 0, which equals it


@dataclass(frozen=True)
class PeftFolder:
    """A folder, or a file of diffusers, whose settings are understood and whose tensors are an adapter's."""

    header: Header
    where: str  # the place of the settings, for messages
    settings: dict[str, Any]
    keys: dict[str, str]  # our key -> the file's
    base: dict[str, str]  # the same of base tensors of these layers: PEFT adds lm_head's weight
    shared: dict[str, str] = field(default_factory=dict)  # the same of those that all layers share

    @property
    def paths(self) -> dict[str, None]:
        """The layers that have tensors, in the file's order."""
        return dict.fromkeys(key.rpartition(".")[0] for key in self.keys)

    @property
    def weights(self) -> set[str]:
        """The paths of those layers that target_parameters names by their weight."""
        return {name.removesuffix(".weight") for name in self.settings.get("target_parameters") or ()}

    @property
    def in_file(self) -> dict[str, str]:
        """The file's key of every tensor of the adapter, by ours."""
        return self.keys | self.shared

    @property
    def entries(self) -> dict[str, Entry]:
        """The place of every tensor in the file, by our key."""
        return {ours: self.header.entries[key] for ours, key in self.in_file.items()}

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")


def read_folder(path: Path, modules: Container[str] = ()) -> PeftFolder:
    """A folder of PEFT, or a file of diffusers, or the folder with it. Nothing but headers and settings is read.

    modules     the paths of a model's modules: of several components in a file of diffusers, the one with its layers
                is meant, and what target_parameters name is looked up there (`forms.placed`)

    Raises:
        CheckpointError: for a pickle, a setting or a tensor that would be lost, and what isn't PEFT's at all.
    """
    file = path / DIFFUSERS if path.is_dir() else path
    if file.is_file() and not (path / CONFIG).is_file():
        return _with_settings(*_read_diffusers(file, modules), has_model=bool(modules))
    if not (path / WEIGHTS).is_file() and (path / PICKLE).is_file():
        raise CheckpointError(
            f"{path / PICKLE} is a pickle, which is never opened: it can run code\n"
            f"  save it again with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    if not ((path / WEIGHTS).is_file() and (path / CONFIG).is_file()):
        inside = sorted(config.parent.name for config in path.glob(f"*/{CONFIG}"))
        names = brief(", ".join(inside), 600)
        hint = f"\n  {len(inside)} of its folders are: {names}; load one of them" if inside else ""
        raise CheckpointError(f"{path} is no adapter folder of PEFT: wanted {WEIGHTS} and {CONFIG} in it{hint}")
    header = read_header(path / WEIGHTS)
    keys = {key: key for key in header.entries}
    return _with_settings(header, str(path / CONFIG), read_json(path / CONFIG), keys, has_model=bool(modules))


def _with_settings(
    header: Header, where: str, settings: dict[str, Any], names: Mapping[str, str], has_model: bool
) -> PeftFolder:
    """`names`: a key as PEFT writes it -> as it is in the file. Raises CheckpointError."""
    by_ours = {plain_key(name): key for name, key in names.items()}
    keys = {ours: key for ours, key in by_ours.items() if ours.rpartition(".")[2] in THEIRS}
    shared = {ours: key for ours, key in by_ours.items() if ours.startswith(f"{PLACE}.")}
    paths = {ours.rpartition(".")[0] for ours in keys}
    inner = {plain_key(name): key for name, key in names.items() if ".base_layer." in name}  # under PEFT's wrapper
    base = {ours: key for ours, key in inner.items() if ours.rpartition(".")[0] in paths and ours not in keys}
    source = PeftFolder(header, where, settings, keys, base, shared)
    _check_settings(source, has_model)
    unknown = sorted(header.entries.keys() - {*keys.values(), *base.values(), *shared.values()})
    if unknown or not keys:
        raise CheckpointError(
            f"{header.path}: {len(unknown)} of its {len(header.entries)} tensors have no place in an "
            f"adapter\n  such as {'; '.join(unknown[:3]) or 'none'}\n"
            f"  single tokens, biases and whole modules beside the adapter aren't supported: nothing is dropped"
        )
    return source


def _read_diffusers(file: Path, modules: Container[str]) -> tuple[Header, str, dict[str, Any], dict[str, str]]:
    """The arguments of _with_settings. Raises CheckpointError."""
    header, where = read_header(file), f"{file}: its {DIFFUSERS_SETTINGS}"
    if DIFFUSERS_SETTINGS not in header.metadata:
        raise CheckpointError(
            f"{file} has no {DIFFUSERS_SETTINGS}, in which diffusers writes the settings\n"
            f"  give a folder with {CONFIG}, or use lora_lite.load(model, path, cfg=...)"
        )
    components: dict[str, dict[str, Any]] = {}  # "unet." -> its settings; "" in the file of a model alone
    for setting, value in parse_json(header.metadata[DIFFUSERS_SETTINGS], where).items():
        component, dot, name = setting.partition(".") if "." in setting else ("", "", setting)
        components.setdefault(component + dot, {})[name] = value
    prefixes = list(components)[:MOST_COMPONENTS]
    keys = {prefix: [key for key in header.entries if key.startswith(prefix)] for prefix in prefixes}
    first = {prefix: plain_key(of[0].removeprefix(prefix)).rpartition(".")[0] for prefix, of in keys.items() if of}
    fitting = [prefix for prefix in keys if len(components) == 1 or first.get(prefix, ".") in modules]
    if len(fitting) != 1 or len(components) > (1 if "" in components else MOST_COMPONENTS):
        names = brief(", ".join(prefix.removesuffix(".") for prefix in components)) or "none"
        raise CheckpointError(
            f"{where} is of {len(components)} models: {names}\n  load it on one of them, whose layers it names"
        )
    (prefix,) = fitting
    others = {key: other.removesuffix(".") for other in keys if other != prefix for key in keys[other]}
    if others:
        left = f"{len(others)} tensors of {', '.join(sorted(set(others.values())))} left there"
        logger.info(f"{file}: {prefix.removesuffix('.')} is this model's; {left}")
    header = replace(header, entries={key: entry for key, entry in header.entries.items() if key not in others})
    return header, where, components[prefix], {key.removeprefix(prefix): key for key in keys[prefix]}


def _check_settings(source: PeftFolder, has_model: bool) -> None:
    """Raises CheckpointError for a setting that would be lost; one of a later PEFT, too, unless it is neutral."""
    kind = source.settings.get("peft_type")
    if not isinstance(kind, str) or kind not in _READ:
        raise source.error(f"peft_type {brief(repr(kind))} isn't supported; wanted one of {sorted(_READ)}")
    known = _READ[kind] | _FREE | ({"target_parameters"} if _names_weights(source, has_model) else set())
    known |= {"bias"} if source.settings.get("bias") in _BIASES else set()
    lost = {
        field: value
        for field, value in source.settings.items()
        if field not in known and not (value is False or value in _NEUTRAL)
    }
    if lost:
        some = [f"{brief(field, 60)}={brief(json.dumps(value), 60)}" for field, value in list(lost.items())[:5]]
        raise source.error(
            f"{', '.join(some)} can't be kept here, and nothing is dropped\n  such an adapter works with PEFT only"
        )


def _names_weights(source: PeftFolder, has_model: bool) -> bool:
    """Is each of target_parameters the weight of a layer with tensors here? With a model, `forms.placed` asks it."""
    names, paths = source.settings.get("target_parameters"), source.paths
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return False
    return has_model or all(name.endswith(".weight") and name.removesuffix(".weight") in paths for name in names)


def flag_of(source: PeftFolder, field: str, default: bool = False) -> bool:
    """A setting that is true or false. Raises CheckpointError."""
    value = source.settings.get(field, default)
    if not isinstance(value, bool):
        raise source.error(f"{field}={value!r}: wanted true or false")
    return value


def whole_of(source: PeftFolder, field: str, default: int) -> int:
    """A setting that is an integer of at least 0. Raises CheckpointError."""
    value = source.settings.get(field, default)
    if type(value) is not int or value < 0:  # a bool is an int to isinstance
        raise source.error(f"{field}={brief(repr(value), 60)}: wanted an integer of at least 0")
    return value


def number_of(source: PeftFolder, field: str, value: Any) -> float:
    """A setting that is a finite number. Raises CheckpointError."""
    if type(value) not in (int, float) or not abs(value) <= torch.finfo(torch.float64).max:  # NaN fails it, too
        raise source.error(f"{field} has {brief(value, 60)}: wanted a finite number")
    return float(value)


def ia3_on(source: PeftFolder, path: str) -> str:
    """ "ia3_ff" if feedforward_modules names the layer, so that its input is scaled, else "ia3"."""
    names = source.settings.get("feedforward_modules") or []
    if not isinstance(names, list | str):
        raise source.error(f"feedforward_modules={brief(repr(names))}: wanted names")
    if isinstance(names, str):  # a regex for full paths; only one that is a choice of them is understood
        names = [re.sub(r"\\(.)", r"\1", name) for name in names.split("|")]
        return "ia3_ff" if path in names else "ia3"
    ends = tuple(f".{name}" for name in names if isinstance(name, str))
    return "ia3_ff" if f".{path}".endswith(ends) else "ia3"


def check_rank(source: PeftFolder, path: str, r: int) -> None:
    """The rank of the tensors must be one that the settings name, since the scaling rests on it."""
    patterns = source.settings.get("rank_pattern") or {}
    ranks = [source.settings.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else ())]
    if r not in ranks:
        raise source.error(f"{path} has tensors of rank {r}, and r and rank_pattern name {brief(ranks, 80)}")


def alphas_of(source: PeftFolder, paths: Iterable[str]) -> dict[str, float]:
    """Each layer's lora_alpha: the first of alpha_pattern whose regex finds the end of its path."""
    alphas, unsure = _by_pattern(source, paths, "alpha_pattern", "lora_alpha")
    if unsure:
        logger.warning(
            f"{source.where}: several entries of alpha_pattern find {', '.join(unsure[:3])}; "
            f"took the first, as PEFT does\n  it sorts them when it saves, so in training another may have been first"
        )
    return alphas


def ranks_of(source: PeftFolder, paths: Iterable[str]) -> dict[str, float]:
    """Each layer's r as PEFT takes it from the settings, whatever the rank of its tensors."""
    ranks, _ = _by_pattern(source, paths, "rank_pattern", "r")
    if wrong := [path for path, r in ranks.items() if r < 1]:
        raise source.error(f"{wrong[0]} has r={ranks[wrong[0]]:g}: wanted at least 1")
    return ranks


def _by_pattern(
    source: PeftFolder, paths: Iterable[str], patterns: str, field: str
) -> tuple[dict[str, float], list[str]]:
    """A setting at each layer, and the layers that several entries of its patterns find, with other values."""
    entries, default, weights = _literal_patterns(source, patterns), source.settings.get(field, 8), source.weights
    result, unsure = {}, []
    for path in paths:
        name = f"{path}.weight" if path in weights else path
        values = [value for start, text, value in entries if _ends(name, start, text)] or [default]
        unsure += [path] if any(value != values[0] for value in values) else []
        result[path] = number_of(source, field, values[0])
    return result, unsure


def _literal_patterns(source: PeftFolder, field: str) -> list[tuple[str, list[str], Any]]:
    """("^" or nothing, text by character, value) of each entry of such a setting; "" is any character."""
    patterns = source.settings.get(field) or {}
    if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
        raise source.error(f"{field} is no object of at most {MOST_PATTERNS} entries")
    matches = {regex: _LITERAL.fullmatch(regex) if len(regex) <= LONGEST_PATTERN else None for regex in patterns}
    refused = [repr(brief(regex, 80)) for regex, match in matches.items() if match is None]
    if refused:
        names = ", ".join(refused[:3])
        raise source.error(f"{field} has {names}, and no regex of a file is run\n  write paths, or their ends")
    return [
        (match[1], ["" if sign == "." else sign[-1] for sign in _CHARACTER.findall(match[2])], patterns[regex])
        for regex, match in matches.items()
        if match
    ]


def _ends(path: str, start: str, text: Sequence[str]) -> bool:
    """Is `text` the end of the path from a dot on, or all of it after "^"?"""
    before, end = path[: max(len(path) - len(text), 0)], path[-len(text) :]
    if len(end) != len(text) or not all(char in ("", got) for char, got in zip(text, end, strict=True)):
        return False
    return not before or (before.endswith(".") and not start)  # PEFT's regex is rf"(.*\.)?({pattern})$"
