"""PEFT's methods with tensors that all layers share."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...base.layer import BaseLayer
from ...core.shared import PLACE
from ...core.state import Site
from ...core.variant import seeded
from ...errors import CheckpointError
from ..keys import PREFIX
from .kinds import is_embedding, is_plain_linear
from .table import Format, Named, Setting

if TYPE_CHECKING:
    from ..factors import Layers
    from .folder import PeftFolder

VERA = Format(
    "VERA",
    "vera",
    tensors={"lora_d": "vera_lambda_d", "lora_b": "vera_lambda_b"},
    shared={"A": "vera_A", "B": "vera_B"},
    fields={
        "r": Setting("r", 256),
        "seed": Setting("projection_prng_key", 0),
        "save_projection": Setting("save_projection", True),
        "d_initial": Setting("d_initial", 0.1),
        "dropout": Setting("vera_dropout", 0.0),
    },
    only="vera_only",
    takes=is_plain_linear,
    sizes=lambda layer: (0, layer["lora_b"][0]),  # A has as many columns as the widest layer
)

PVERA = Format(
    "PVERA",
    "pvera",
    tensors={"lora_d": "pvera_lambda_d", "lora_b": "pvera_lambda_b"},
    shared={"A": "pvera_A", "B": "pvera_B"},
    fields={
        "r": Setting("r", 256),
        "seed": Setting("projection_prng_key", 0),
        "save_projection": Setting("save_projection", True),
        "d_initial": Setting("d_initial", 0.1),
        "dropout": Setting("pvera_dropout", 0.0),
        "sample_at_inference": Setting("sample_at_inference", False),
    },
    free=("generator_seed",),  # of samples, which no file holds
    only="pvera_only",
    takes=is_plain_linear,
    sizes=lambda layer: (0, layer["lora_b"][0]),
)


def _with_bases(source: "PeftFolder") -> dict[str, Any]:
    if not source.shared:
        problem = "PEFT draws its bases again in the dtype of the machine that it runs on, and they aren't in the file"
        raise source.error(f"{problem}\n  save it once more with save_projection=True where it was trained")
    return {}


def _check_bases(cfg: Any) -> dict[str, Any]:
    if not cfg.save_projection:
        problem = "PEFT draws RandLoRA's bases in the dtype of the machine that it runs on"
        raise CheckpointError(f"{problem}\n  attach with save_projection=True, or give rank=")
    return {}


RANDLORA = Format(
    "RANDLORA",
    "randlora",
    tensors={"lora_lambda": "randlora_lambda", "lora_gamma": "randlora_gamma"},
    shared={"A": "randlora_A", "B": "randlora_B"},
    copies={"randlora_A": "A", "randlora_B": "B"},
    fields={
        "r": Setting("r", 32),
        "alpha": Setting("randlora_alpha", 640.0),
        "seed": Setting("projection_prng_key", 0),
        "save_projection": Setting("save_projection", True),
        "sparse": Setting("sparse", False),
        "very_sparse": Setting("very_sparse", False),
        "dropout": Setting("randlora_dropout", 0.0),
    },
    only="randlora_only",
    takes=is_plain_linear,
    read=_with_bases,
    write=_check_bases,
)

_VBLORA: dict[str, Any] = {
    "shared": {"bank": "vblora_vector_bank"},
    "fields": {
        "r": Setting("r", 4),
        "num_vectors": Setting("num_vectors", 256),
        "vector_length": Setting("vector_length", 256),
        "topk": Setting("topk", 2),
        "dropout": Setting("vblora_dropout", 0.0),
        "init_vector_bank_bound": Setting("init_vector_bank_bound", 0.02),
        "init_logits_std": Setting("init_logits_std", 0.1),
    },
    "only": "vblora_only",
    "takes": is_plain_linear,
}
VBLORA = Format(
    "VBLORA",
    "vblora",
    tensors={"lora_logits_A": "vblora_logits_A", "lora_logits_B": "vblora_logits_B"},
    when=lambda settings: settings.get("save_only_topk_weights") is not True,
    given={"save_only_topk_weights": False},
    **_VBLORA,
)


def _top_shapes(site: Site) -> dict[str, tuple[int, ...]]:
    """Indices (.., k) and softmaxed weights (.., k - 1) of each piece: the last weight is the rest."""
    k, specs = site.cfg.topk, {name: spec.shape[:-1] for name, spec in site.specs.items()}
    indices = {f"{name}_topk_indices": (*shape, k) for name, shape in specs.items()}
    return indices | {f"{name}_topk_weights": (*shape, k - 1) for name, shape in specs.items()}


def _logits(layer: BaseLayer, tensors: Named) -> Named:
    """Logits whose softmax over the top k is the weights; all others are too low to be among them."""
    result, length = {}, len(tensors[f"{PLACE}.bank"])
    for name in ("lora_logits_A", "lora_logits_B"):
        first, indices = tensors[f"{name}_topk_weights"].float(), tensors[f"{name}_topk_indices"].long()
        weights = torch.cat([first, (1 - first.sum(-1, keepdim=True)).clamp_min(0)], -1)  # (.., k)
        if not ((weights >= 0).all() and int(indices.min()) >= 0 and int(indices.max()) < length):
            problem = f"its top {indices.shape[-1]} weights and indices are none, of {length} vectors"
            raise CheckpointError(f"{layer.path}: {problem}\n  save the adapter again")
        low = weights.new_full((*weights.shape[:-1], length), 2 * _LEAST)
        result[name] = low.scatter_(-1, indices, weights.log().clamp_min(_LEAST))
    return result


_LEAST = -5e3  # softmax makes 0 of it, and float16 holds its double
_TOP = {
    f"lora_logits_{ab}_topk_{what}": f"vblora_logits_{ab}_topk_{what}" for ab in "AB" for what in ("indices", "weights")
}
VBLORA_TOP = Format(
    "VBLORA",
    "vblora",
    tensors=_TOP,
    given={"save_only_topk_weights": True},
    shapes=_top_shapes,
    ours=_logits,
    tables=("lora_logits_A_topk_indices", "lora_logits_B_topk_indices"),
    **_VBLORA,
)


def _tiny(layer: BaseLayer, tensors: Named) -> Named:
    """PEFT's A (r, i), B (o, r) and P; on an embedding they are of its transpose: A (r, d), B (tokens, r)."""
    if layer.kind.category != "embedding":
        return tensors
    return tensors | {"lora_V": tensors["lora_U"].mT, "lora_U": tensors["lora_V"].mT, "lora_P": tensors["lora_P"].mT}


def _group(cfg: Any, index: int, count: int, tensors: Named) -> Named:
    return {"lora_group": torch.tensor([cfg.group(index, count)])}


def _group_and_p(cfg: Any, index: int, count: int, tensors: Named) -> Named:
    p = torch.empty(cfg.u, *tensors["lora_V"].shape[:1] * 2)
    r = p.shape[-1]
    seeded(lambda t, g: t.normal_(0, r**-0.5, generator=g), cfg.seed + index)(p)
    return {"lora_P": p} | _group(cfg, index, count, tensors)


def _is_linear_or_embedding(layer: BaseLayer) -> bool:
    return is_plain_linear(layer) or is_embedding(layer)


_TINYLORA: dict[str, Any] = {
    "peft_type": "TINYLORA",
    "variant": "tinylora",
    "shared": {"v.*": "tinylora_v.*"},
    "rows": ("v",),
    "fields": {
        "r": Setting("r", 2),
        "u": Setting("u", 64),
        "weight_tying": Setting("weight_tying", 0.0),
        "seed": Setting("projection_seed", 42),
        "dropout": Setting("tinylora_dropout", 0.0),
    },
    "free": ("init_v_bound",),
    "only": "tinylora_only",
    "takes": _is_linear_or_embedding,
    "ours": _tiny,
    "theirs": lambda site, tensors: _tiny(site.base, tensors),
}
_FROZEN = {"lora_V": "tinylora_A", "lora_U": "tinylora_B"}
TINYLORA = Format(
    tensors=_FROZEN | {"lora_P": "tinylora_P"},
    when=lambda settings: settings.get("save_projection") is not False,
    given={"save_projection": True},
    at_place=_group,
    **_TINYLORA,
)
TINYLORA_SEEDED = Format(tensors=_FROZEN, given={"save_projection": False}, at_place=_group_and_p, **_TINYLORA)


def _own_pair(site: Site, tensors: Named) -> Named:
    """Each layer's A and B, which several may share."""
    shared, names = site.method.shared, site.cfg.names(site.path, site.target.place)
    pair = {} if shared is None else dict(zip(("lora_down", "lora_up"), map(shared.tensor, names), strict=True))
    return tensors | {name: tensor.detach() for name, tensor in pair.items()}


def _lily_shapes(site: Site) -> dict[str, tuple[int, ...]]:
    r, n = site.cfg.r, site.cfg.num_B
    return {"lora_down": (r, site.target.d_in), "lora_up": (n * r, site.target.d_out), "lora_router": (n, r)}


def _named_apart(settings: dict[str, Any], tensors: Named, layers: "Layers") -> dict[str, Any]:
    """Settings with names by which PEFT's layers share nothing that differs: it loads one tensor for those of a suffix
    and a shape, in the order of the model. Raises CheckpointError where there are none."""
    full = list(layers)
    for names in [settings["target_modules"], *([full] if len(full) < FEWEST_SHORTENED else [])]:
        leaders: dict[Any, list[str]] = {}
        for path, (site,) in layers.items():
            suffixes = tuple(name for name in names if path.endswith(name)) if isinstance(names, list) else ()
            leaders.setdefault((suffixes, site.target.d_in, site.target.d_out), []).append(path)
        # Of several suffixes PEFT takes any.
        apart = isinstance(names, list) and all(len(suffixes) == 1 for suffixes, _, _ in leaders)
        stride = settings["stride_A"]
        pairs = [(p, paths[n // stride * stride], "A") for paths in leaders.values() for n, p in enumerate(paths)]
        pairs += [(p, paths[0], "B") for paths in leaders.values() for p in paths]
        keys = [[f"{PREFIX}{path}.lily_{ab}.weight" for path in two] for *two, ab in pairs]
        if apart and all(torch.equal(*(tensors[key] for key in two)) for two in keys):
            return settings | {"target_modules": names}
    problem = "PEFT's layers of one name and shape share A and B, and here they differ"
    raise CheckpointError(f"{problem}\n  keep it as our file (lora_lite.save)")


FEWEST_SHORTENED = 20  # names from which PEFT shortens them to their ends
LILY = Format(
    "LILY",
    "lily",
    tensors={"lora_down": "lily_A.weight", "lora_up": "lily_B.weight", "lora_router": "lily_router.weight"},
    fields={
        "r": Setting("r", 32),
        "stride_A": Setting("stride_A", 1),
        "num_B": Setting("num_B", 2),
        "scaling": Setting("scaling", 1.0),
    },
    lacks=("bias", "fan_in_fan_out"),
    takes=is_plain_linear,
    read=lambda source: {"share": False},
    theirs=_own_pair,
    shapes=_lily_shapes,
    sizes=lambda layer: (layer["lora_down"][1], layer["lora_up"][1]),
    settle=_named_apart,
)


def _norms(tensors: Named, _: Mapping[str, BaseLayer]) -> Named:
    """One factor for each index, of PEFT's one for each entry. Raises CheckpointError where two of an index differ."""
    norms = torch.ones(len(tensors[f"{PLACE}.theta"]))
    pairs = [
        (t.long(), tensors[key.replace("_indices_", "_scales_")].float())
        for key, t in tensors.items()
        if "_indices_" in key
    ]
    for indices, scales in pairs:
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(norms):
            raise CheckpointError(
                f"unilora_indices are out of the range of {len(norms)} numbers\n  save the adapter again"
            )
        norms[indices] = scales
    if not all(torch.equal(norms[indices], scales) for indices, scales in pairs):
        raise CheckpointError("unilora_scales differ at one index\n  save the adapter again")
    return {f"{PLACE}.norms": norms}


def _unilora_shapes(site: Site) -> dict[str, tuple[int, ...]]:
    shapes = {name: spec.shape for name, spec in site.specs.items()}
    return shapes | {name.replace("indices", "scales"): shape for name, shape in shapes.items()}


def _with_scales(site: Site, tensors: Named) -> Named:
    tables = {name: table.long() for name, table in tensors.items()}
    norms = site.method.shared.tensor("norms").detach() if site.method.shared else torch.ones(0)
    return tables | {name.replace("indices", "scales"): norms[table] for name, table in tables.items()}


_INDICES = ("lora_indices_A", "lora_indices_B")
UNILORA = Format(
    "UNILORA",
    "unilora",
    tensors={f"lora_{what}_{ab}": f"unilora_{what}_{ab}" for what in ("indices", "scales") for ab in "AB"},
    shared={"theta": "unilora_theta_d"},
    fields={
        "r": Setting("r", 4),
        "theta_d_length": Setting("theta_d_length", 256),
        "init_theta_d_bound": Setting("init_theta_d_bound", 0.02),
        "seed": Setting("proj_seed", 42),
        "dropout": Setting("unilora_dropout", 0.0),
    },
    given={"save_indices": True},
    only="unilora_only",
    takes=is_plain_linear,
    once=_norms,
    ours=lambda layer, tensors: {name: tensor for name, tensor in tensors.items() if "scales" not in name},
    theirs=_with_scales,
    shapes=_unilora_shapes,
    sizes=lambda layer: (layer["lora_indices_A"][1], layer["lora_indices_B"][0]),
    tables=_INDICES,
)

FORMATS = (VERA, PVERA, RANDLORA, VBLORA, VBLORA_TOP, TINYLORA, TINYLORA_SEEDED, LILY, UNILORA)
