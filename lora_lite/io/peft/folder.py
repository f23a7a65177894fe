"""PEFT's adapter folders as they lie on disk, and PEFT's names, which no other file knows.

    adapter_model.safetensors   base_model.model.<path>. with lora_A.weight (r, i), lora_B.weight (o, r),
                                lora_B.bias (o,), lora_magnitude_vector[.weight] (o,) of DoRA, ia3_l (o, 1), or (1, i)
                                on an input, vera_lambda_d (r,), vera_lambda_b (o,); once: base_model.vera_A, vera_B
    adapter_config.json         the settings
    <name>/                     such a folder of each adapter but the one called default

What is trained beside an adapter is in the file too, as PEFT 0.21.2 writes it:

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
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loguru import logger
from torch import nn

from ...core.shared import PLACE
from ...errors import CheckpointError, brief
from ..keys import PREFIX, THEIRS, plain_key
from ..safetensors import Entry, Header, parse_json, read_header, read_json
from . import unilora
from .formats import FORMATS, format_of
from .table import Format

WEIGHTS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
MLX_WEIGHTS = "adapters.safetensors"  # of a folder with a CONFIG of its own
DIFFUSERS, DIFFUSERS_SETTINGS = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
NO_MODULES: Mapping[str, nn.Module] = {}
MOST_COMPONENTS = 8  # models of a pipeline in one file
_READ = {  # the settings that are read, by peft_type
    "LORA": {"r", "rank_pattern", "lora_alpha", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora"}
    | {"ensure_weight_tying", "lora_bias", "alora_invocation_tokens"},
    "IA3": set[str](),
    "ADALORA": {"r", "lora_alpha", "lora_dropout", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2"}
    | {"orth_reg_weight", "total_step", "rank_pattern"},
    "LN_TUNING": set[str](),
    "TRAINABLE_TOKENS": {"token_indices"},
}
WHOLE = ("LN_TUNING", "TRAINABLE_TOKENS")  # the types whose tensors are all new values of the base's own
# Settings that say nothing which the tensors don't, or matter beside another one alone. All others must be neutral.
_FREE = (
    {"peft_type", "init_lora_weights", "init_ia3_weights", "init_weights", "task_type", "auto_mapping", "peft_version"}
    | {"base_model_name_or_path", "revision", "inference_mode", "runtime_config", "megatron_core", "fan_in_fan_out"}
    | {"target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
)
_BIASES = ("none", "all", "lora_only")  # whose biases were trained: they are tensors of the file
# What PEFT puts between a module's path and its tensors' names, where it wraps it.
_WRAPPED = re.compile(
    r"(?P<path>.+?)\.(?P<wrappers>(?:(?:base_layer|token_adapter|original_module|modules_to_save|ln_tuning_layers)\.)+)"
    r"(?P<name>.+)"
)
_TOKENS = re.compile(r"(?P<path>.+?)(?:\.token_adapter)?\.trainable_tokens_delta")
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
    whole: dict[str, str] = field(default_factory=dict)  # of new values of the base's own tensors: `<path>.weight`
    zeros: list[str] = field(default_factory=list)  # keys in the file of tensors that have to be zero
    unread: list[str] = field(default_factory=list)  # of tensors that say nothing which the others don't
    tokens: dict[str, str] = field(default_factory=dict)  # of new rows: `<path>.lora_delta` of an embedding or a head
    unused: dict[str, str] = field(default_factory=dict)  # of base tensors that PEFT uses while the adapter is off
    copies: dict[str, str] = field(default_factory=dict)  # a key in the file -> another one of the same tensor
    is_in_order: bool = False  # are the keys in the order of the model's modules?
    is_tied: bool = False  # are whole tensors those of all modules that share the weight?

    @property
    def paths(self) -> dict[str, None]:
        """The layers that have tensors, in the file's order."""
        return dict.fromkeys(key.rpartition(".")[0] for key in self.keys)

    @property
    def weights(self) -> set[str]:
        """The paths of those layers that target_parameters names by their weight."""
        return {name.removesuffix(".weight") for name in self.settings.get("target_parameters") or ()}

    @property
    def beside(self) -> dict[str, None]:
        """The layers that have whole tensors, or rows."""
        return dict.fromkeys(key.rpartition(".")[0] for key in (*self.whole, *self.tokens))

    @property
    def in_file(self) -> dict[str, str]:
        """The file's key of every tensor of the adapter, by ours."""
        return self.keys | self.shared | self.whole | self.tokens

    @property
    def entries(self) -> dict[str, Entry]:
        """The place of every tensor in the file that is of the method itself, by our key."""
        return {ours: self.header.entries[key] for ours, key in (self.keys | self.shared).items()}

    @property
    def trains_biases(self) -> bool:
        return self.settings.get("bias", "none") != "none"

    def is_saved(self, path: str) -> bool:
        """Is it, or does it lie in, one of modules_to_save?"""
        names, parts = tuple(self.settings.get("modules_to_save") or ()), path.split(".")
        return any(".".join(parts[:i]).endswith(names) for i in range(1, len(parts) + 1))

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")


def read_folder(path: Path, modules: Mapping[str, nn.Module] = NO_MODULES) -> PeftFolder:
    """A folder of PEFT, or a file of diffusers, or the folder with it. Nothing but headers and settings is read.

    modules     a model's modules by path: of several components in a file of diffusers, the one with its layers
                is meant, and what target_parameters name is looked up there (`forms.placed`)

    Raises:
        CheckpointError: for a pickle, a setting or a tensor that would be lost, and what isn't PEFT's at all.
    """
    file = path / DIFFUSERS if path.is_dir() else path
    if file.is_file() and not (path / CONFIG).is_file():
        return _with_settings(*_read_diffusers(file, modules), modules)
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
    return _with_settings(header, str(path / CONFIG), read_json(path / CONFIG), keys, modules)


def _with_settings(
    header: Header, where: str, settings: dict[str, Any], names: dict[str, str], modules: Mapping[str, nn.Module]
) -> PeftFolder:
    """`names`: a key as PEFT writes it -> as it is in the file. Raises CheckpointError."""
    source, table = PeftFolder(header, where, settings, {}, {}), format_of(settings)
    source = replace(source, header=unilora.with_tables(source, modules))
    names |= {key: key for key in source.header.entries.keys() - header.entries.keys()}
    header = source.header
    saved = settings.get("modules_to_save")
    if not (saved is None or (isinstance(saved, list) and all(isinstance(name, str) and name for name in saved))):
        raise source.error(f"modules_to_save={brief(repr(saved))}: wanted names")
    for name, key in names.items():
        if table is None or not _sort_by(table, source, name, key):
            _sort(source, name, key)
    paths = source.paths
    for ours in [ours for ours in source.base if ours.rpartition(".")[0] not in paths]:
        del source.base[ours]
    _check_settings(source, table, bool(modules))
    sorted_keys = {*source.in_file.values(), *source.base.values(), *source.unused.values()}
    sorted_keys |= {*source.copies, *source.zeros, *source.unread}
    unknown = sorted(header.entries.keys() - sorted_keys)
    if unknown or not (source.keys or (settings["peft_type"] in WHOLE and source.beside)):
        raise CheckpointError(
            f"{header.path}: {len(unknown)} of its {len(header.entries)} tensors have no place in an "
            f"adapter\n  such as {'; '.join(unknown[:3]) or 'none'}\n"
            f"  nothing is dropped: what they are isn't known here"
        )
    return source


def _sort_by(table: Format, source: PeftFolder, name: str, key: str) -> bool:
    """Is it a key of the table's method, now put where it belongs?"""
    if (shared := table.shared_of(name.removeprefix("base_model."))) is not None:
        _add_shared(source, shared, key)
        return True
    if table.is_unread(name.removeprefix("base_model.")):
        source.unread.append(key)
        return True
    parts = name.removeprefix(PREFIX).split(".")
    for i in range(1, len(parts)):
        path, end = ".".join(parts[:i]), ".".join(parts[i:])
        if (ours := table.ours_of(end)) is not None:
            source.keys[f"{path}.{ours}"] = key
        elif end in table.copies:
            _add_shared(source, table.copies[end], key)
        elif end in table.zeros:
            source.zeros.append(key)
        else:
            continue
        return True
    return False


def _add_shared(source: PeftFolder, name: str, key: str) -> None:
    ours = f"{PLACE}.{name}"
    if ours in source.shared:
        source.copies[key] = source.shared[ours]
    else:
        source.shared[ours] = key


def _sort(source: PeftFolder, name: str, key: str) -> None:
    """Put a key where it belongs; one that isn't known goes nowhere."""
    plain, ours = name.removeprefix(PREFIX), plain_key(name)
    if ours.rpartition(".")[2] in THEIRS:
        source.keys[ours] = key
    elif ours.startswith(f"{PLACE}."):
        source.shared[ours] = key
    elif match := _TOKENS.fullmatch(plain):
        source.tokens[f"{match['path']}.lora_delta"] = key
    elif match := _WRAPPED.fullmatch(plain):
        wrappers, inner = match["wrappers"].split("."), f"{match['path']}.{match['name']}"
        if "original_module" in wrappers:
            source.unused[inner] = key
        elif wrappers[0] != "base_layer" or (source.trains_biases and inner.endswith(".bias")):
            _add_whole(source, inner, key)
        else:
            source.base[ours] = key
    elif plain.endswith((".weight", ".bias")) or source.is_saved(plain.rpartition(".")[0]):
        _add_whole(source, plain, key)


def _add_whole(source: PeftFolder, ours: str, key: str) -> None:
    if ours in source.whole:  # `<path>.modules_to_save.bias` is `<path>.bias` again
        source.copies[key] = source.whole[ours]
    else:
        source.whole[ours] = key


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


def _check_settings(source: PeftFolder, table: Format | None, has_model: bool) -> None:
    """Raises CheckpointError for a setting that would be lost; one of a later PEFT, too, unless it is neutral."""
    kind = source.settings.get("peft_type")
    if table is None and (not isinstance(kind, str) or kind not in _READ):
        wanted = sorted({*_READ, *(known.peft_type for known in FORMATS)})
        raise source.error(f"peft_type {brief(repr(kind))} isn't supported; wanted one of {wanted}")
    known = (_READ[str(kind)] if table is None else table.settings) | _FREE
    known |= {"modules_to_save"} if any(map(source.is_saved, source.beside)) else set()
    known |= {"trainable_token_indices"} if source.tokens and kind in ("LORA", "ADALORA") else set()
    known |= {"target_parameters"} if _names_weights(source, has_model) else set()
    bias = source.settings.get("bias")  # PEFT takes every "<x>_only" alike, and tells of "fourier_only" for WaveFT
    is_only = table is not None and bool(table.only) and isinstance(bias, str) and bias.endswith("_only")
    known |= {"bias"} if is_only or bias in _BIASES else set()
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
