"""The changes of full, norm, bias and tokens, written as PEFT keeps them: the base's own tensors with their new values.

Beside a method of PEFT's they are modules_to_save, bias= and trainable_token_indices; alone, LN_TUNING or
TRAINABLE_TOKENS. PEFT reads modules_to_save as ends of paths, and writes full paths as gladly.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...core.names import file_key
from ...core.state import Site
from ...errors import CheckpointError
from ..factors import Layers
from ..keys import PREFIX
from ..raw import base_tensors
from . import tokens
from .conversion import moved_keys
from .formats import FORMATS
from .parts import Written, names_of
from .ties import tied_paths

# The types whose config has bias=, and what it calls their targets' own.
_ONLY = {"LORA": "lora_only", "ADALORA": "lora_only"} | {t.peft_type: t.only for t in FORMATS if t.only}
# Tasks whose models PEFT gives modules_to_save of its own, by what the class of the model is called.
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
_HEADS = ("classifier", "score")
_KEEP = "keep it as our file (lora_lite.save)"


def with_the_rest(
    root: nn.Module, tensors: dict[str, Tensor], settings: dict[str, Any], main: Layers, sites: list[Site]
) -> Written:
    """A folder's tensors and settings with those of these sites.

    main    the layers of the folder's method; of none the settings are empty

    Raises:
        CheckpointError: for what PEFT can't hold beside that method.
    """
    rows = [site for site in sites if site.cfg.variant == "tokens"]
    at_layers: Layers = {}
    for site in sites:
        if site not in rows:
            at_layers.setdefault(site.path, []).append(site)
    with_rows = {path for site in rows for path in (site.path, *tied_paths(root, site))}
    kind = settings.get("peft_type")
    is_lora = kind in ("LORA", "ADALORA")
    if rows and kind is not None and not is_lora:
        raise CheckpointError(f"{rows[0].path}: PEFT trains tokens beside a LoRA only, and this is {kind}\n  {_KEEP}")
    if rows:
        weights = {path: _weight(at_layers[path][0].base, at_layers[path]) for path in at_layers if path in with_rows}
        more, fields = tokens.written(root, rows, weights, is_lora)
        tensors, settings = tensors | more, settings | fields
    biases = {path: s for path, s in at_layers.items() if all(site.cfg.variant == "bias" for site in s)}
    modules = {path: s for path, s in at_layers.items() if path not in biases}
    _check(root, kind, main, rows, biases, modules)
    if biases:
        more, fields = _biases(str(kind), main, biases)
        tensors, settings = tensors | more, settings | fields
    if modules:
        more, fields = _modules(root, kind is None, modules, with_rows)
        tensors, settings = tensors | more, settings | fields
        if kind == "LORA" and any(site.base.ties for s in modules.values() for site in s):
            settings |= {"ensure_weight_tying": True}
    return tensors, settings


def _check(root: nn.Module, kind: Any, main: Layers, rows: list[Site], biases: Layers, modules: Layers) -> None:
    """Raises CheckpointError."""
    problem, path = "", next(iter([*biases, *modules]), "")
    quantized = [p for p, (site, *_) in modules.items() if not site.base.storage.is_dense]
    if biases and kind not in _ONLY:
        problem = "PEFT trains biases beside a LoRA, an AdaLoRA or a VeRA only"
        problem += "" if kind is None else f", and this is {kind}"
    elif rows and modules and kind is None:
        problem = "PEFT has no trainable tokens with whole modules beside them, but for a LoRA's"
    elif "" in modules or "" in biases:
        path, problem = "", "PEFT saves modules of a model, and this is one alone"
    elif quantized:
        path, problem = quantized[0], f"PEFT would save the codes of this layer, {modules[quantized[0]][0].target.kind}"
    elif moved := moved_keys(root, [*modules, *biases]) if kind == "LORA" else {}:
        path, problem = (
            next(iter(moved)),
            "PEFT reads its key as an old checkpoint's, and has no other for a whole module",
        )
    elif both := [p for p in main if any(f"{p}.".startswith(f"{m}.") for m in _with_tied(root, modules))]:
        path, problem = both[0], "PEFT trains a layer whole, or with an adapter on it, and this has both"
    else:
        ends = tuple(path for path in _with_tied(root, modules) if path not in {site.path for site in rows})
        others = [p for p, _ in root.named_modules(remove_duplicate=False) if p.endswith(ends) and p not in ends]
        if kind is None or not ends or not others:
            return
        path, problem = others[0], f"PEFT reads modules_to_save as ends of paths, and would save it with {ends}"
    raise CheckpointError(f"{path or 'the model itself'}: {problem}\n  {_KEEP}, or merge it")


def _with_tied(root: nn.Module, modules: Layers) -> dict[str, Site]:
    """The paths of the modules that are written, with those of tied ones, and the site of each."""
    return {path: s[0] for s in modules.values() for path in (s[0].module_path, *tied_paths(root, s[0]))}


def _biases(kind: str, main: Layers, biases: Layers) -> Written:
    """Those of the method's targets as bias="<x>_only"; with others among them as "all"."""
    targets = {path: sites[0].base for path, sites in main.items() if sites[0].base.bias is not None}
    is_only = biases.keys() <= targets.keys()
    values = {path: _bias(sites[0].base, sites) for path, sites in biases.items()}
    if is_only:  # PEFT has those of all targets
        values = {path: _bias(base, []) for path, base in targets.items()} | values
    names = {path: "base_layer.bias" if path in main else "bias" for path in values}
    tensors = {f"{PREFIX}{path}.{names[path]}": value for path, value in values.items()}
    return tensors, {"bias": _ONLY[kind] if is_only else "all"}


def _modules(root: nn.Module, is_alone: bool, modules: Layers, with_rows: set[str]) -> Written:
    """Each module's whole state, its weight and bias the new ones."""
    state, changed = base_tensors(root), {}
    paths: list[str] = []
    for sites in modules.values():
        base, path = sites[0].base, sites[0].module_path
        changed[file_key(path, base.kind.weight)] = _weight(base, sites)
        if base.bias is not None:
            changed[file_key(path, base.kind.bias)] = _bias(base, sites)
        tied = tied_paths(root, sites[0])
        changed |= {file_key(other, base.kind.weight): changed[file_key(path, base.kind.weight)] for other in tied}
        paths += [path, *tied]
    saved = [path for path in dict.fromkeys(paths) if not any(path.startswith(f"{other}.") for other in paths)]
    tensors: dict[str, Tensor] = {}
    for path in saved:
        between = "token_adapter.base_layer." if path in with_rows else "ln_tuning_layers." if is_alone else ""
        named = {name: changed.get(key, tensor) for key, tensor in state.items() if (name := _below(path, key))}
        tensors |= {f"{PREFIX}{path}.{between}{name}": tensor for name, tensor in named.items()}
    saved = [path for path in saved if path not in with_rows]
    if is_alone:
        targets, _ = names_of(root, saved, [])
        return tensors, {"peft_type": "LN_TUNING", "target_modules": targets}
    settings: dict[str, Any] = {"modules_to_save": saved or None}
    # PEFT gives such a model's head to modules_to_save by itself, and then wants all of it.
    task = next((task for end, task in _TASKS.items() if type(root).__name__.endswith(end)), None)
    heads = [path for path, _ in root.named_modules() if path.endswith(_HEADS)]
    inside = {key for key in state for head in heads if _below(head, key)}
    written = {key.removeprefix(PREFIX) for key in tensors}
    if task and heads and inside <= written:
        names = [path for path in saved if not any(f"{path}.".startswith(f"{head}.") for head in heads)]
        settings = {"modules_to_save": names + heads, "task_type": task, "auto_mapping": None}
    return tensors, settings


def _below(path: str, key: str) -> str:
    return key.removeprefix(f"{path}.") if key.startswith(f"{path}.") else ""


def _weight(base: BaseLayer, sites: Iterable[Site]) -> Tensor:
    """W + ΔW as the module has it, in float32 at least."""
    weight = base.stored.detach()
    for site in sites:
        if "lora_weight" in site.specs:
            delta = site.tensor("lora_weight").detach()
            delta = delta if site.target.is_diagonal else _like(base, delta, weight)
            weight = _plus(weight, delta)
    return weight


def _like(base: BaseLayer, delta: Tensor, weight: Tensor) -> Tensor:
    """A matrix (o, i) as the weight lies: a kernel (o, channels, *k), an embedding (tokens, d)."""
    return (delta.mT if base.transposed else delta).reshape(weight.shape)


def _bias(base: BaseLayer, sites: Iterable[Site]) -> Tensor:
    """b + Δb, in float32 at least."""
    assert base.bias is not None
    bias = base.bias.detach()
    for site in sites:
        bias = _plus(bias, site.tensor("lora_bias").detach()) if "lora_bias" in site.specs else bias
    return bias


def _plus(old: Tensor, delta: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(old.dtype, delta.dtype), torch.float32)
    return old.to(dtype) + delta.to(old.device, dtype)
