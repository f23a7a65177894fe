"""PEFT's rotations: OFT, BOFT, HRA, RoAd, PSOFT.

OFT      the exact Cayley form turns the other way than the series and than ours: its numbers change their sign.
         num_cayley_neumann_terms=3 means what 4 does; 1 and 2 are no terms of ours
BOFT     its block sizes and its factors are the tensors': without a CUDA extension PEFT makes one factor of any
HRA      apply_GS has no u0
PSOFT    no U and V: they are the live base's, as PEFT would make them there
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch

from ...base.layer import BaseLayer
from ...base.storage import Dense
from ...core.state import Site
from ...errors import CheckpointError
from ...ops.svd import principal_factors
from .kinds import is_conv, is_embedding, is_linear_module
from .settings import number_of, whole_of
from .table import AtLayer, Format, Named, Setting

if TYPE_CHECKING:
    from .folder import PeftFolder

_CLOSE = 1e-4  # of the largest number in U and in V: float32's SVD on another machine, but not another sign


def _terms(source: "PeftFolder") -> dict[str, Any]:
    """The series as our config counts its terms."""
    name, series = "num_cayley_neumann_terms", source.settings.get("use_cayley_neumann")
    terms = whole_of(source, name, 5)
    if series is False or (series is None and source.settings["peft_type"] == "PSOFT"):
        return {name: max(terms, 2)}  # it isn't used
    if terms < 3:
        raise source.error(f"{name}={terms}: wanted 3 or more; PEFT's form of fewer is a series of its own")
    return {name: max(terms, 4)}


def _check_terms(cfg: Any) -> dict[str, Any]:
    if cfg.use_cayley_neumann and cfg.num_cayley_neumann_terms < 4:
        raise CheckpointError(
            "num_cayley_neumann_terms: PEFT has no series of fewer than 4 terms\n  keep it as our file"
        )
    return {}


def _has_square_kernel(layer: BaseLayer) -> bool:
    """Is it an nn.Conv2d whose options PEFT's own call of F.conv2d hands on?"""
    if not is_conv(layer) or layer.stored.ndim != 4:
        return False
    conv = layer.module
    pairs = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    is_even = all(not isinstance(pair, str) and pair[0] == pair[1] for pair in pairs)
    is_near = conv.dilation[0] == 1 or conv.kernel_size[0] == 1
    has_zeros = conv.padding_mode == "zeros" or conv.padding == (0, 0)
    return bool(is_even and is_near and has_zeros and conv.groups == 1)


# ---- OFT ------------------------------------------------------------------------------------------


def _takes_oft(layer: BaseLayer) -> bool:
    # Where patches overlap, PEFT sums their turned copies into one picture: no weight does that.
    is_point = is_conv(layer) and layer.stored.ndim == 4 and layer.stored[0, 0].numel() == 1
    return is_linear_module(layer) or is_embedding(layer) or bool(is_point and layer.module.groups == 1)


def _oft_at_layer(place: AtLayer) -> dict[str, Any]:
    numbers = (*place.shapes["lora_R"], 0)[1]
    size = (1 + isqrt(1 + 8 * numbers)) // 2  # numbers = size (size - 1) / 2
    if place.layer is None and place.values["block_share"]:
        raise place.source.error("with block_share its tensors don't tell a layer's size\n  load it on its model")
    is_output = place.layer is not None and is_embedding(place.layer)
    return {"block_size": size, "side": "output" if is_output else "input"}


def _write_oft(site: Site, tensors: Named) -> Named:
    if (site.cfg.side == "output") != is_embedding(site.base):
        raise CheckpointError(f"{site.path}: PEFT turns outputs of embeddings alone, and of them nothing else")
    return tensors if site.cfg.use_cayley_neumann else _reversed(site.base, tensors)


def _reversed(_: BaseLayer, tensors: Named) -> Named:
    return {name: -tensor for name, tensor in tensors.items()}


def _is_exact(settings: Mapping[str, Any]) -> bool:
    return settings.get("use_cayley_neumann") is False


OFT = Format(
    "OFT",
    "oft",
    tensors={"lora_R": "oft_R.weight"},
    embedding={"lora_R": "oft_embedding_R.weight"},
    fields={
        "block_size": Setting("oft_block_size", 32),
        "block_share": Setting("block_share", False),
        "coft": Setting("coft", False),
        "eps": Setting("eps", 6e-5),
        "use_cayley_neumann": Setting("use_cayley_neumann", True),
        "num_cayley_neumann_terms": Setting("num_cayley_neumann_terms", 5),
    },
    given={"r": 0},
    free=("module_dropout",),  # PEFT makes the layer, and never calls it
    only="oft_only",
    takes=_takes_oft,
    read=_terms,
    write=_check_terms,
    at_layer=_oft_at_layer,
    theirs=_write_oft,
    sizes=lambda layer: (layer["lora_R"][0] * ((1 + isqrt(1 + 8 * layer["lora_R"][1])) // 2), 0),
)
OFT_EXACT = replace(OFT, when=_is_exact, ours=_reversed)

# ---- BOFT, HRA, RoAd ------------------------------------------------------------------------------


def _boft_at_layer(place: AtLayer) -> dict[str, Any]:
    m, _, size, _ = (*place.shapes["lora_R"], 0, 0, 0, 0)[:4]
    return {"n_butterfly_factor": m, "block_size": size}


def _boft(layer: BaseLayer, tensors: Named, shape: tuple[int, int]) -> Named:
    return tensors | {"lora_s": tensors["lora_s"].reshape(shape if is_conv(layer) else (-1, 1))}


BOFT = Format(
    "BOFT",
    "boft",
    tensors={"lora_R": "boft_R", "lora_s": "boft_s"},
    fields={
        "block_size": Setting("boft_block_size", 4),
        "n_butterfly_factor": Setting("boft_n_butterfly_factor", 1),
        "dropout": Setting("boft_dropout", 0.0),
    },
    given={"boft_block_num": 0},
    only="boft_only",
    takes=lambda layer: is_linear_module(layer) or _has_square_kernel(layer),
    at_layer=_boft_at_layer,
    ours=lambda layer, tensors: _boft(layer, tensors, (-1, 1)),
    theirs=lambda site, tensors: _boft(site.base, tensors, (1, -1)),  # (1, o) of a convolution
    sizes=lambda layer: (layer["lora_R"][1] * layer["lora_R"][2], layer["lora_s"][0]),
)


def _write_hra(site: Site, tensors: Named) -> Named:
    start = tensors.get("lora_u0")
    if start is not None and not start.is_meta and start.any():
        raise CheckpointError(f"{site.path}: PEFT's apply_GS has no u0\n  keep it as our file (lora_lite.save)")
    return tensors


HRA = Format(
    "HRA",
    "hra",
    tensors={"lora_u": "hra_u"},
    fields={"r": Setting("r", 8), "apply_GS": Setting("apply_GS", False)},
    lacks=("fan_in_fan_out",),
    only="hra_only",
    takes=lambda layer: is_linear_module(layer) or _has_square_kernel(layer),
    theirs=_write_hra,
    sizes=lambda layer: (layer["lora_u"][0], 0),
)
HRA_GS = replace(
    HRA,
    when=lambda settings: settings.get("apply_GS") is True,
    ours=lambda layer, tensors: tensors | {"lora_u0": torch.zeros_like(tensors["lora_u"])},
)


def _read_road(source: "PeftFolder") -> dict[str, Any]:
    forms = {f"road_{form}": form for form in (1, 2, 4)}
    form = source.settings.get("variant", "road_1")
    if not isinstance(form, str) or form not in forms:
        raise source.error(f"variant={form!r}: wanted one of {', '.join(forms)}")
    return {"form": forms[form]}


def _write_road(site: Site, tensors: Named) -> Named:
    if not tensors["lora_theta"].is_meta and site.cfg.form != site.method.cfg.form:
        raise CheckpointError(f"{site.path}: its form is {site.cfg.form}, and PEFT has one for all layers")
    return tensors


ROAD = Format(
    "ROAD",
    "road",
    tensors={"lora_theta": "road_theta", "lora_alpha": "road_alpha"},
    fields={"group_size": Setting("group_size", 64)},
    given={"variant": "road_1"},
    lacks=("bias", "fan_in_fan_out", "layers_to_transform", "layers_pattern"),
    takes=is_linear_module,
    read=_read_road,
    write=lambda cfg: {"variant": f"road_{cfg.form}"},
    theirs=_write_road,
)

# ---- PSOFT ----------------------------------------------------------------------------------------


def _read_psoft(source: "PeftFolder") -> dict[str, Any]:
    eps = source.settings.get("cayley_neumann_eps")
    eps = None if eps is None else number_of(source, "cayley_neumann_eps", eps)
    return {**_terms(source), "cayley_neumann_eps": eps}


def _write_psoft(site: Site, tensors: Named) -> Named:
    """Raises CheckpointError where PEFT would make other U and V of this base."""
    if tensors["lora_U"].is_meta:
        return tensors
    wanted = dict(
        zip(("lora_U", "lora_V"), principal_factors(site.base.dense_weight(), *site.cfg.factors), strict=True)
    )
    if any((tensors[name] - t.to(tensors[name])).abs().max() > _CLOSE * t.abs().max() for name, t in wanted.items()):
        raise CheckpointError(
            f"{site.path}: PEFT's file has no U and V, and of this base it would make others\n"
            f"  keep it as our file (lora_lite.save), or write it as a plain LoRA (rank=)"
        )
    return tensors


PSOFT = Format(
    "PSOFT",
    "psoft",
    tensors={"lora_R": "psoft_R.weight", "lora_vector_b": "psoft_R.vector_b", "lora_vector_a": "psoft_R.vector_a"},
    fields={
        "r": Setting("r", 32),
        "dropout": Setting("psoft_dropout", 0.0),
        "ab_svd_init": Setting("ab_svd_init", "psoft_init"),
        "svd": Setting("psoft_svd", "full"),
        "svd_lowrank_niter": Setting("psoft_svd_lowrank_niter", 10),
        "random_seed": Setting("random_seed", 0),
        "orth": Setting("psoft_orth", True),
        "mag_b": Setting("psoft_mag_b", True),
        "mag_a": Setting("psoft_mag_a", True),
        "use_cayley_neumann": Setting("use_cayley_neumann", False),
        "num_cayley_neumann_terms": Setting("num_cayley_neumann_terms", 5),
    },
    given={"psoft_alpha": 32, "cayley_neumann_eps": None},  # what α scales, PEFT divides U by
    lacks=("bias",),
    takes=lambda layer: is_linear_module(layer) and isinstance(layer.storage, Dense),
    read=_read_psoft,
    write=lambda cfg: {"psoft_alpha": cfg.r, "cayley_neumann_eps": cfg.cayley_neumann_eps, **_check_terms(cfg)},
    theirs=_write_psoft,
    reads_base=True,
)

FORMATS = (OFT_EXACT, OFT, BOFT, HRA_GS, HRA, ROAD, PSOFT)
