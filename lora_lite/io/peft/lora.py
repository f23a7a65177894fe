"""PEFT's LoRA: rsLoRA, DoRA, lora_bias, PiSSA, OLoRA, ranks and alphas by layer. Folders as our configs, and back."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...base.matrices import ALL_CHANNELS
from ...core.names import check_shapes, file_key
from ...core.targets import Target
from ...core.variant import lookup
from ...errors import CheckpointError, brief
from ..factors import Layers
from . import forms
from .conversion import moved_keys, named_like_experts, old_keys
from .folder import PeftFolder
from .kinds import is_conv, is_plain_linear
from .parts import Part, Written, config_of, names_of, same_everywhere, written_at
from .patterns import alphas_of, check_rank
from .settings import flag_of, number_of
from .ties import tied_paths

# Starts of an init_lora_weights that writes the base, so that A and B belong to another one.
_REWRITES = ("pissa", "olora", "corda", "lora_ga", "loftq")


def parts(source: PeftFolder, targets: dict[str, Target], layers: Mapping[str, BaseLayer]) -> list[Part]:
    """One part, of the variant lora, dora, pissa or olora."""
    variant, init = _method(source)
    rslora = flag_of(source, "use_rslora")
    dropout = number_of(source, "lora_dropout", source.settings.get("lora_dropout", 0))
    if init in ("pissa", "olora") and dropout:
        problem = f"lora_dropout={dropout} with init_lora_weights={init!r} can't be kept here"
        raise source.error(f"{problem}\n  dropout acts in training only: set it to 0 in the file if you don't train on")
    if (stacks := [path for path, t in targets.items() if t.experts]) and (init or variant == "dora"):
        setting = f"init_lora_weights={init!r}" if init else "use_dora=true"
        raise source.error(f"{setting} on experts, {stacks[0]}, isn't supported: PEFT has no such adapter")
    bias, tokens = _has_bias(source, variant, init, layers), _invocation_tokens(source, variant, init, layers)
    shapes, alphas = forms.shapes(source, layers), alphas_of(source, targets)
    specs: dict[str, tuple[int, ...]] = {}
    ranks: dict[str, int] = {}
    settings: dict[str, tuple[int, float]] = {}  # path in the model -> (r, alpha)
    for path, target in targets.items():
        alpha, experts = alphas[path], (target.experts,) if target.experts else ()
        # A tensor that isn't there, or without dimensions, fails check_shapes.
        r = (*shapes.get(file_key(path, "lora_A"), ()), 1, 1)[len(experts)]
        # PEFT's r is of all groups of a convolution together.
        groups = target.experts if path in layers and layers[path].kind is ALL_CHANNELS else 1
        specs |= {file_key(path, "lora_A"): (*experts, r, target.d_in)}
        specs |= {file_key(path, "lora_B"): (*experts, target.d_out, r)}
        specs |= {file_key(path, "lora_m"): (target.d_out,)} if variant == "dora" else {}
        specs |= {file_key(path, "lora_bias"): (*experts, target.d_out)} if bias else {}
        ranks[path] = r * groups
        alpha /= math.sqrt(groups) if rslora else groups  # the same s
        alpha *= math.sqrt(r) if init and rslora else 1  # the s of these starts is α/r
        settings[target.path] = (r, alpha)
    check_shapes(shapes, specs, str(source.header.path))
    for path, r in ranks.items():
        check_rank(source, path, r)
    # The most frequent rank and alpha are the config's, the others its per_layer.
    ((most, _),) = Counter(settings.values()).most_common(1)
    overrides = {path: {"r": r, "alpha": alpha} for path, (r, alpha) in settings.items() if (r, alpha) != most}
    extra: dict[str, Any] = {} if init else {"rslora": rslora, "dropout": dropout}
    extra |= ({"bias": True} if bias else {}) | ({"invocation_tokens": tokens} if tokens else {})
    extra |= {"tied_weights": "together"} if flag_of(source, "ensure_weight_tying") else {}
    reads = lookup(variant).base_weight != "unused"
    cfg = config_of(source, variant, targets, layers, overrides, reads, r=most[0], alpha=most[1], **extra)
    return [Part(cfg, targets, overrides)]


def _has_bias(source: PeftFolder, variant: str, init: Any, layers: Mapping[str, BaseLayer]) -> bool:
    """lora_bias. Raises CheckpointError where PEFT has none, or leaves it out of what it computes."""
    if not flag_of(source, "lora_bias"):
        return False
    others = [path for path, layer in layers.items() if not (is_plain_linear(layer) or is_conv(layer))]
    if others or init or variant != "lora":
        place = f" on {others[0]}" if others else f" with use_dora={variant == 'dora'}, init_lora_weights={init!r}"
        raise source.error(f"lora_bias=true{place} isn't supported: PEFT has no such adapter")
    return True


def _invocation_tokens(source: PeftFolder, variant: str, init: Any, layers: Mapping[str, BaseLayer]) -> Any:
    """alora_invocation_tokens, which the config checks. Raises CheckpointError where PEFT has no such adapter."""
    tokens = source.settings.get("alora_invocation_tokens")
    if not (tokens is None or (isinstance(tokens, list) and all(type(t) is int for t in tokens))):
        raise source.error(f"alora_invocation_tokens={brief(repr(tokens))}: wanted a list of tokens")
    others = [path for path, layer in layers.items() if not is_plain_linear(layer)]
    if tokens is not None and (others or init or variant != "lora"):
        place = f"on {others[0]}" if others else f"with use_dora={variant == 'dora'}, init_lora_weights={init!r}"
        raise source.error(f"alora_invocation_tokens {place} isn't supported: PEFT has no such adapter")
    return tokens


def _method(source: PeftFolder) -> tuple[str, Any]:
    """Our variant, and the init where it is one that wrote the base in a way that is known here."""
    dora, init = flag_of(source, "use_dora"), source.settings.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else init
    if init is None or isinstance(init, bool) or init in ("gaussian", "eva", "orthogonal"):
        return "dora" if dora else "lora", None
    if init in ("pissa", "olora") and not dora:
        return init, init
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


def written(root: nn.Module, layers: Layers) -> Written:
    """A lora or a dora as it is."""
    is_dora = next(iter(layers.values()))[0].cfg.variant == "dora"
    (rslora, dropout), (bias,) = same_everywhere(layers, "rslora", "dropout"), same_everywhere(layers, "bias")
    (tokens,) = same_everywhere(layers, "invocation_tokens")
    tensors: dict[str, Tensor] = {}
    ranks = {}
    for path, (site,) in layers.items():
        groups = site.target.experts if site.base.kind is ALL_CHANNELS else 1  # PEFT's r is of all groups
        alpha = float(site.cfg.r if site.cfg.alpha is None else site.cfg.alpha)
        ranks[path] = (site.cfg.r * groups, alpha * (math.sqrt(groups) if rslora else groups))
        values = {name: site.tensor(name).detach() for name in site.specs if name not in ("lora_m", "lora_n0")}
        if is_dora:
            stored = {name: site.tensor(name).detach() for name in site.specs}
            values["lora_m"] = magnitude(site.base, site.cfg.scaling, stored)  # (o,)
        tensors |= written_at(root, layers, site, values)
    fields = {"use_rslora": rslora, "lora_dropout": dropout, "use_dora": is_dora} | (
        {"lora_bias": True} if bias else {}
    )
    if tokens:  # PEFT's other classes than PeftModelForCausalLM leave an aLoRA off
        fields |= {"alora_invocation_tokens": list(tokens), "task_type": "CAUSAL_LM", "auto_mapping": None}
    return tensors, settings_of(root, layers, ranks, **fields)


def written_orthogonal(root: nn.Module, layers: Layers) -> Written:
    """An orthogonal one: A and B alone, since B0 A0 is 0 but for rounding."""
    tensors: dict[str, Tensor] = {}
    for site, *_ in layers.values():
        tensors |= written_at(root, layers, site, {name: site.tensor(name).detach() for name in ("lora_A", "lora_B")})
    ranks = {path: (site.cfg.r, float(site.cfg.scaling * site.cfg.r)) for path, (site, *_) in layers.items()}
    return tensors, settings_of(root, layers, ranks, use_rslora=False, lora_dropout=0.0, use_dora=False)


@torch.no_grad()
def magnitude(layer: BaseLayer, scaling: float, tensors: Mapping[str, Tensor]) -> Tensor:
    """m (o,) of DoRA; where n0 was rounded to 16 bits, the m that gives the same outputs with norms of the live
    weight."""
    a, b, m, n0 = (tensors[f"lora_{name}"] for name in ("A", "B", "m", "n0"))
    if torch.promote_types(n0.dtype, torch.float32) == n0.dtype:
        return m
    weight = layer.as_it_is_now().dense_weight().double()  # (o, i)
    square = weight.square().sum(1)  # (o,)
    # Outputs are m / ‖W + s B A‖ times those of W + s B A: here with a norm that starts from the rounded n0.
    moved = (weight + scaling * b.double() @ a.double()).square().sum(1)
    return (m.double() * (moved / (n0.double().square() + moved - square)).sqrt()).float()


def settings_of(
    root: nn.Module, layers: Layers, ranks: Mapping[str, tuple[int, float]], **fields: Any
) -> dict[str, Any]:
    """The settings for these ranks and alphas by path. Raises CheckpointError for layers that PEFT would lose."""
    bare = [path for path in ranks if forms.is_parameter(layers[path][0])]
    called = [path for path in ranks if path not in bare]
    weights = {path: f"{path}.weight" for path in named_like_experts(root, called)}
    _check_kept(root, {path: layers[path] for path in called}, list(weights), fields)
    pairs: dict[str, set[tuple[int, float]]] = {}  # an attention's two projections share what PEFT calls the module's
    for path in called:
        pairs.setdefault(forms.module_path(layers[path][0]), set()).add(ranks[path])
    if uneven := [path for path, settings in pairs.items() if len(settings) > 1]:
        raise CheckpointError(f"{uneven[0]}: PEFT has one r and alpha for both projections of an attention")
    lacks = "DoRA" if fields["use_dora"] else "dropout" if fields["lora_dropout"] else None
    attention = [path for path in called if forms.in_attention(layers[path][0])]
    if bare and lacks:
        raise CheckpointError(f"{bare[0]}: PEFT has no {lacks} on a bare parameter\n  keep it as our file")
    if attention and fields["use_dora"]:
        cure = "keep it as our file, or give rank= to write a plain LoRA"
        raise CheckpointError(f"{attention[0]}: PEFT has no DoRA on nn.MultiheadAttention\n  {cure}")
    # PEFT 0.21.2 caches what the inner ones decode to before their adapters are on it.
    packed = [path for path in bare if layers[path][0].base.packed is not None]
    if len({path.rpartition(".")[0] for path in packed}) < len(packed):
        problem = "of several parameters in bitsandbytes' 4 bits on one module, PEFT applies one adapter"
        raise CheckpointError(f"{packed[0]}: {problem}\n  keep it as our file, or adapt one of them (target_names)")
    modules = [forms.module_path(layers[path][0]) for path in called if path not in weights]
    targets, _ = names_of(root, list(dict.fromkeys(modules)), []) if modules else ([], [])
    weights |= {path: path for path in bare}
    by_name = {forms.pattern_path(layers[path][0], weights.get(path, path)): pair for path, pair in ranks.items()}
    # PEFT takes those of a head from its own path, and its factors from the embedding.
    by_name |= {head: pair for path, pair in ranks.items() for head in tied_paths(root, layers[path][0])}
    return {
        "peft_type": "LORA",
        **patterns(by_name),
        "target_modules": targets,
        **({"target_parameters": sorted(weights.values())} if weights else {}),
        **({"ensure_weight_tying": True} if any(site.base.ties for site, *_ in layers.values()) else {}),
        "bias": "none",
        "fan_in_fan_out": any(site.base.transposed and not site.base.by_weight for site, *_ in layers.values()),
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        **fields,
    }


def patterns(by_name: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The settings for these ranks and alphas by the names that PEFT compares: the most frequent, and what differs."""
    r, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*by_name.values(), strict=True))
    by_pattern = {f"^{re.escape(name)}": pair for name, pair in by_name.items()}  # PEFT adds $; without ^, ends match
    return {
        "r": r,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {name: other for name, (other, _) in by_pattern.items() if other != r},
        "alpha_pattern": {name: _whole(other) for name, (_, other) in by_pattern.items() if other != alpha},
    }


def _check_kept(root: nn.Module, layers: Layers, as_weights: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Raises CheckpointError if PEFT would lose layers, or fail, as it reads a folder with these settings.

    as_weights  those of the paths that target_parameters names; PEFT adapts a weight by its name without its layer
    """
    moved = moved_keys(root, layers)
    moved = {path: goal for path, goal in moved.items() if path not in old_keys(root, moved)}
    packed = [path for path in as_weights if not layers[path][0].base.as_it_is_now().storage.is_dense]
    lacks = "DoRA" if fields["use_dora"] else "dropout" if fields["lora_dropout"] else None
    cure = "keep it as our file (lora_lite.save), merge it, leave these layers out (exclude_names)"
    like_experts = "it takes their names for fused experts', and has no"
    if moved:
        lost, goal = list(moved), next(iter(moved.values()))
        why = f"it reads their keys as an old checkpoint's: the first would go to {goal}"
    elif packed:
        lost, why = packed, f"{like_experts} adapter on a packed weight by its name"
    elif as_weights and lacks:
        lost, why = list(as_weights), f"{like_experts} {lacks} on a weight by its name"
        cure += ", or give rank= to write a plain LoRA"
    else:
        return
    raise CheckpointError(
        f"PEFT would lose {len(lost)} of these {len(layers)} layers as it reads the folder onto this "
        f"{type(root).__name__}\n  {brief(', '.join(lost), 600)}\n  {why}\n  {cure}"
    )


def _whole(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha  # 16, as PEFT writes it, and not 16.0
