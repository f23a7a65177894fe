"""PEFT's methods that change a weight by products: LoHa, LoKr, HiRA, GraLoRA, GLoRA, MiSS, BEFT and PEANuT."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...base.layer import BaseLayer
from ...core.state import Site
from ...errors import CheckpointError
from ...ops.kronecker import shapes
from .kinds import is_conv, is_embedding, is_linear_module, is_plain_linear, pads_zeros
from .table import AtLayer, Format, Named, Setting, Shape

if TYPE_CHECKING:
    from .folder import PeftFolder

_NO_BIAS = ("bias", "fan_in_fan_out")


def _on_lycoris(layer: BaseLayer) -> bool:
    return layer.stored.ndim in (3, 4) and pads_zeros(layer) if is_conv(layer) else is_linear_module(layer)


LOHA = Format(
    "LOHA",
    "loha",
    tensors={"lora_*": "hada_*"},
    fields={
        "r": Setting("r", 8, "rank_pattern"),
        "alpha": Setting("alpha", 8.0, "alpha_pattern"),
        "rank_dropout": Setting("rank_dropout", 0.0),
        "module_dropout": Setting("module_dropout", 0.0),
        "use_effective_conv2d": Setting("use_effective_conv2d", False),
    },
    free=("init_weights",),
    lacks=_NO_BIAS,
    takes=_on_lycoris,
    sizes=lambda layer: (layer["lora_w1_b"][1], layer["lora_w1_a"][0]),
)


def _swaps(kernel: Shape, w1: Shape, w2: Shape) -> bool:
    """Does PEFT's LoKr on nn.Conv1d, which takes the rows of W2 for a third axis of W1, put numbers elsewhere?"""
    return len(kernel) == 1 and len(w2) == 3 and not (1 in (w1[0], w2[0]) and 1 in (w1[1], w2[1]))


_SWAPPED = "PEFT's LoKr on an nn.Conv1d with a whole W2 is no Kronecker product: it multiplies other axes"


def _lokr_at(place: AtLayer) -> dict[str, Any]:
    """No values: a check."""
    has_both = place.layer is not None and {"lora_w1", "lora_w2"} <= place.shapes.keys()
    w1, w2 = place.shapes.get("lora_w1", (0, 0)), place.shapes.get("lora_w2", ())
    if has_both and len(w1) == 2 and _swaps(place.target.kernel, w1, w2):
        raise place.source.error(f"{place.path}: {_SWAPPED}\n  train it on another layer, or with a lower rank")
    return {}


def _lokr_theirs(site: Site, tensors: Named) -> Named:
    cfg, target = site.cfg, site.target
    sizes = shapes(
        *(target.d_in, target.d_out, target.kernel, cfg.r, cfg.decompose_factor, False), cfg.has_core(target.kernel)
    )
    if "w2" in sizes and _swaps(target.kernel, sizes["w1"], sizes["w2"]):
        raise CheckpointError(f"{site.path}: {_SWAPPED}\n  keep it as our file (lora_lite.save), or merge it")
    return tensors


def _lokr_sizes(layer: Mapping[str, Shape]) -> tuple[int, int]:
    (low, m), (k, n) = (
        layer.get(name) or (layer[f"{name}_a"][0], layer[f"{name}_b"][1]) for name in ("lora_w1", "lora_w2")
    )
    return m * n, low * k


def _decompose_factor(source: "PeftFolder") -> int:
    factor = source.settings.get("decompose_factor", -1)
    if type(factor) is not int or not (factor > 0 or factor == -1):
        raise source.error(f"decompose_factor={factor!r}: wanted an integer above 0, or -1")
    return factor


LOKR = Format(
    "LOKR",
    "lokr",
    tensors={"lora_*": "lokr_*"},
    fields={
        **LOHA.fields,
        "decompose_both": Setting("decompose_both", False),
        "rank_dropout_scale": Setting("rank_dropout_scale", False),
    },
    free=("init_weights", "decompose_factor"),
    lacks=_NO_BIAS,
    takes=_on_lycoris,
    read=lambda source: {"decompose_factor": _decompose_factor(source)},
    write=lambda cfg: {"decompose_factor": cfg.decompose_factor},
    at_layer=_lokr_at,
    theirs=_lokr_theirs,
    sizes=_lokr_sizes,
)


def _on_hira(layer: BaseLayer) -> bool:
    if is_conv(layer):
        return layer.module.groups == 1 and pads_zeros(layer)
    return is_embedding(layer) or is_plain_linear(layer)


def _hira_theirs(site: Site, tensors: Named) -> Named:
    if not is_conv(site.base):
        return tensors
    kernel, (a, b) = site.target.kernel, (tensors["lora_A"], tensors["lora_B"])
    return {"lora_A": a.reshape(len(a), -1, *kernel), "lora_B": b.reshape(*b.shape, *[1] * len(kernel))}


HIRA = Format(
    "HIRA",
    "hira",
    tensors={"lora_A": "hira_A", "lora_B": "hira_B"},
    embedding={"lora_A": "hira_embedding_A", "lora_B": "hira_embedding_B"},
    fields={"r": Setting("r", 32), "dropout": Setting("hira_dropout", 0.0)},
    free=("init_weights", "rank_pattern"),  # PEFT 0.21 has the field, and gives every layer the rank r
    lacks=("bias",),
    takes=_on_hira,
    at_layer=lambda place: {"r": place.shapes["lora_A"][0]} if place.shapes.get("lora_A") else {},
    ours=lambda layer, tensors: {name: tensor.flatten(1) for name, tensor in tensors.items()},
    theirs=_hira_theirs,
    sizes=lambda layer: (math.prod(layer["lora_A"][1:]), layer["lora_B"][0]),
)
GRALORA = Format(
    "GRALORA",
    "gralora",
    tensors={
        "lora_a": "gralora_A",
        "lora_b": "gralora_B",
        "lora_general_a": "gralora_A_general.weight",
        "lora_general_b": "gralora_B_general.weight",
    },
    fields={
        "r": Setting("r", 32),
        "alpha": Setting("alpha", 64.0),
        "k": Setting("gralora_k", 2),
        "hybrid_r": Setting("hybrid_r", 0),
        "dropout": Setting("gralora_dropout", 0.0),
    },
    free=("init_weights",),
    only="gralora_only",
    takes=is_plain_linear,
    sizes=lambda layer: (math.prod(layer["lora_a"][:2]), layer["lora_b"][0] * layer["lora_b"][2]),
)


def _glora_forms(source: "PeftFolder") -> dict[str, Any]:
    """No values: a check. PEFT's A and D act on the biases as they are trained, ours on the base's."""
    if source.settings.get("bias", "none") != "none":
        cure = "train it with bias='none': E is a change of the bias"
        raise source.error(f"its parts act on biases that are trained beside them, which isn't supported\n  {cure}")
    return {}


GLORA = Format(
    "GLORA",
    "glora",
    tensors={f"lora_{part}_{x}": f"glora_{part}.{x}" for part in "ABCDE" for x in ("X", "Xd", "Xu")},
    fields={
        "r": Setting("r", 8),
        "a_b": Setting("config_A_B", "lora"),
        "c": Setting("config_C", "lora"),
        "d_e": Setting("config_D_E", "constant"),
    },
    zeros=tuple(f"glora_{part}.zeros" for part in "ABCDE"),
    free=("init_weights",),
    lacks=("fan_in_fan_out", "layers_to_transform", "layers_pattern"),
    only="glora_only",
    takes=is_linear_module,
    read=_glora_forms,
)
MISS = Format(
    "MISS",
    "miss",
    tensors={"lora_block": "miss_block"},
    fields={"r": Setting("r", 64), "mini_r": Setting("mini_r", 1), "dropout": Setting("miss_dropout", 0.0)},
    free=("init_weights",),
    lacks=("fan_in_fan_out",),
    only="MiSS_only",
    takes=is_linear_module,
    read=lambda source: {"form": _miss_form(source)},
    write=lambda cfg: {"init_weights": True if cfg.form == "miss" else cfg.form},
)


def _miss_form(source: "PeftFolder") -> str:
    """PEFT's init_weights is the form; in bat its dropout does nothing."""
    form = source.settings.get("init_weights", True)
    if not (isinstance(form, bool) or form in ("mini", "bat")):
        raise source.error(f"init_weights={form!r}: wanted true, false, 'mini' or 'bat'")
    if form == "bat" and source.settings.get("miss_dropout", 0.0):
        raise source.error("miss_dropout isn't 0, and bat has none: PEFT leaves it out\n  set it to 0 in its config")
    return "miss" if isinstance(form, bool) else form


BEFT = Format(
    "BEFT",
    "beft",
    tensors={"lora_shift": "beft_bias"},
    free=("init_weights",),
    lacks=(*_NO_BIAS, "layers_to_transform", "layers_pattern"),
    takes=is_linear_module,
    ours=lambda layer, tensors: {name: tensor.flatten() for name, tensor in tensors.items()},
    theirs=lambda site, tensors: {name: tensor[None] for name, tensor in tensors.items()},
)
PEANUT = Format(
    "PEANUT",
    "peanut",
    tensors={
        "lora_P": "peanut_A.weight",
        "lora_Q": "peanut_B.weight",
        **{f"lora_{kind}_{n}": f"peanut_{kind}s.{n}.weight" for kind in ("encoder", "decoder") for n in range(64)},
    },
    fields={
        "r": Setting("r", 32),
        "depth": Setting("depth", 0),
        "act_fn": Setting("act_fn", "relu"),
        "scaling": Setting("scaling", 1.0),
    },
    free=("init_weights",),
    lacks=_NO_BIAS,
    takes=is_linear_module,
)

FORMATS = (LOHA, LOKR, HIRA, GRALORA, GLORA, MISS, BEFT, PEANUT)
