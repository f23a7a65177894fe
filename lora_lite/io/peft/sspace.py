"""PEFT's methods in the weight's own directions: what they leave out of the file is made from the live weight."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...base.layer import BaseLayer
from ...core.names import category, shared_name
from ...core.shared import PLACE
from ...core.state import Site
from ...errors import CheckpointError, brief
from ...ops.joint import LEAST, joint_columns
from .kinds import is_embedding, is_linear_module, is_plain_linear
from .settings import flag_of, number_of
from .table import AtLayer, Format, Named, Setting, Shape

if TYPE_CHECKING:
    from .folder import PeftFolder

# ---- options of LoRA's --------------------------------------------------------------------------------

_FACTORS = {
    "r": Setting("r", 8, "rank_pattern"),
    "alpha": Setting("lora_alpha", 8.0, "alpha_pattern"),
    "rslora": Setting("use_rslora", False),
    "dropout": Setting("lora_dropout", 0.0),
}
_PAIR = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


def _part(source: "PeftFolder", setting: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """An object in the settings, and the start beside it, which must not have written the base. Raises
    CheckpointError."""
    start, options = source.settings.get("init_lora_weights", True), source.settings[setting]
    if not (start is None or isinstance(start, bool) or start in ("gaussian", "orthogonal", "eva")):
        raise source.error(f"init_lora_weights={brief(repr(start), 60)} with {setting} isn't supported")
    if not isinstance(options, dict) or not options.keys() <= known.keys():
        raise source.error(f"{setting}={brief(repr(options), 80)}: wanted an object of some of {sorted(known)}")
    return {**known, **options}


def _read_kasa(source: "PeftFolder") -> dict[str, Any]:
    options = _part(source, "kasa_config", {"beta": 1e-4, "gamma": 1e-3})
    return {name: number_of(source, f"kasa_config.{name}", value) for name, value in options.items()}


_STARTS = {"random": "random", "batch_average": "batch_average", "batch_average_once": "batch_average"}


def _read_velora(source: "PeftFolder") -> dict[str, Any]:
    options = _part(source, "velora_config", {"num_groups": 64, "scale": 1.0, "init_type": "batch_average"})
    if type(options["num_groups"]) is not int or options["init_type"] not in (*_STARTS,):
        raise source.error(f"velora_config={brief(repr(options), 120)}: wanted an integer of groups, and an init_type")
    scale = number_of(source, "velora_config.scale", options["scale"])
    return {
        "num_groups": options["num_groups"],
        "compression_scale": scale,
        "init_type": _STARTS[options["init_type"]],
    }


def _write_velora(cfg: Any) -> dict[str, Any]:
    options = {"num_groups": cfg.num_groups, "scale": cfg.compression_scale, "init_type": cfg.init_type}
    return {"velora_config": options}


_BLOCKS = {"target_modules_bd_a": None, "target_modules_bd_b": None, "nblocks": 1, "match_strict": True}


def _read_bdlora(source: "PeftFolder") -> dict[str, Any]:
    options = _part(source, "use_bdlora", _BLOCKS)
    for name in ("target_modules_bd_a", "target_modules_bd_b"):
        names = options[name]
        if not (names is None or (isinstance(names, list) and all(isinstance(text, str) for text in names))):
            raise source.error(f"use_bdlora: {name}={brief(repr(names), 80)}: wanted names")
    if type(options["nblocks"]) is not int:
        raise source.error(f"use_bdlora: nblocks={brief(repr(options['nblocks']), 60)}: wanted an integer")
    return {"nblocks": options["nblocks"]}


def _blocks_at(place: AtLayer) -> dict[str, Any]:
    """The factor that has blocks at a layer: PEFT looks for each of its names anywhere in the path."""
    options, matches = place.source.settings["use_bdlora"], []
    for factor in ("A", "B"):
        names = options.get(f"target_modules_bd_{factor.lower()}") or []
        matches += [factor] if any(name in place.path for name in names) else []
    if len(matches) > 1:
        raise place.source.error(f"{place.path} is named by both target_modules_bd_a and target_modules_bd_b")
    return {"blocks": matches[0] if matches else "none"}


def _write_bdlora(sites: Mapping[str, Site]) -> dict[str, Any]:
    paths = {factor: [path for path, site in sites.items() if site.cfg.blocks == factor] for factor in ("A", "B")}
    for factor in ("A", "B"):
        unnamed = [path for path in sites if path not in paths[factor] and any(name in path for name in paths[factor])]
        if unnamed:
            problem = f"{unnamed[0]}: PEFT finds a part of this path, which has {factor}'s blocks, and gives it them"
            raise CheckpointError(f"{problem}\n  keep it as our file (lora_lite.save), or give rank= for a plain LoRA")
    (nblocks,) = {site.cfg.nblocks for site in sites.values()}
    names = {f"target_modules_bd_{factor.lower()}": paths[factor] for factor in ("A", "B")}
    return {"use_bdlora": {**names, "nblocks": nblocks, "match_strict": False}}


def _lora(variant: str, setting: str, tensors: Mapping[str, str], **fields: Any) -> Format:
    return Format(
        "LORA",
        variant,
        tensors={**_PAIR, **tensors},
        fields=_FACTORS,
        when=lambda settings: bool(settings.get(setting)),
        free=(setting,),
        only="lora_only",
        **fields,
    )


MICA = Format(
    "LORA",
    "mica",
    tensors=_PAIR,
    embedding={"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"},
    fields=_FACTORS,
    when=lambda settings: str(settings.get("init_lora_weights")).lower() == "mica",
    given={"init_lora_weights": "mica"},
    only="lora_only",
    takes=lambda layer: is_plain_linear(layer) or is_embedding(layer),
)
KASA = _lora(
    "kasa",
    "kasa_config",
    {"lora_d": "lora_diag"},
    takes=is_linear_module,
    read=_read_kasa,
    write=lambda cfg: {"kasa_config": {"beta": cfg.beta, "gamma": cfg.gamma}},
    reads_base=True,
)
BDLORA = _lora(
    "bdlora", "use_bdlora", {}, takes=is_linear_module, read=_read_bdlora, at_layer=_blocks_at, by_layer=_write_bdlora
)

VELORA = _lora(
    "velora",
    "velora_config",
    {"lora_e": "lora_velora_embed"},
    takes=is_plain_linear,
    read=_read_velora,
    write=_write_velora,
)

# ---- OSF ----------------------------------------------------------------------------------------------


def _osf_theirs(site: Site, tensors: Named) -> Named:
    """U and V with what the projection takes off their change, which PEFT does to gradients alone."""
    if site.cfg.project == "gradient":
        return tensors
    t = {name: tensor.float() for name, tensor in tensors.items()}
    du, dv = t["lora_U"] - t["lora_U0"], t["lora_V"] - t["lora_V0"]
    u = t["lora_U"] - t["lora_Uh"] @ (t["lora_Uh"].mT @ du)
    v = t["lora_V"] - (dv @ t["lora_Vh"].mT) @ t["lora_Vh"]
    return tensors | {"lora_U": u, "lora_V": v}


def _osf_rank(place: AtLayer) -> dict[str, Any]:
    low = (*place.shapes.get("lora_S", ()), 0)[0]
    return {"effective_rank": min(place.target.d_in, place.target.d_out) - low}


def _write_osf(sites: Mapping[str, Site]) -> dict[str, Any]:
    ranks = {path: len(site.tensor("lora_Vh")) for path, site in sites.items()}
    common = next(iter(ranks.values()))
    pattern = {f"^{path}$".replace(".", r"\."): rank for path, rank in ranks.items() if rank != common}
    return {"effective_rank": common, "rank_pattern": pattern}


def _read_osf(source: "PeftFolder") -> dict[str, Any]:
    if source.settings.get("modules_to_save"):
        raise source.error("modules_to_save can't be kept here: PEFT's OSF trains and saves none of them")
    return {"project": "gradient"}


@torch.no_grad()
def _osf_of_base(layer: BaseLayer, cfg: Any, tensors: Named, shared: Named) -> Named:
    """With the SVD's parts as PEFT has them: rounded to the base's dtype."""
    k, base = cfg.effective_rank, layer.stored.dtype
    u, s, vt = (part.to(base) for part in torch.linalg.svd(layer.dense_weight(), full_matrices=False))
    parts = {"Uh": u[:, :k], "Vh": vt[:k], "U0": u[:, k:], "S0": s[k:], "V0": vt[k:]}
    return {**tensors, **{f"lora_{name}": part for name, part in parts.items()}}


OSF = Format(
    "OSF",
    "osf",
    tensors={f"lora_{name}": f"osf_svd_params.{name}_low" for name in ("U", "S", "V")},
    free=("effective_rank", "rank_pattern", "target_svd_config"),
    takes=is_linear_module,
    lacks=("bias", "fan_in_fan_out", "layers_to_transform", "layers_pattern"),
    read=_read_osf,
    at_layer=_osf_rank,
    by_layer=_write_osf,
    of_base=_osf_of_base,
    theirs=_osf_theirs,
    shapes=lambda site: {f"lora_{name}": site.specs[f"lora_{name}"].shape for name in ("U", "S", "V")},
    reads_base=True,
)

# ---- FRoD ---------------------------------------------------------------------------------------------


def _frod_of_base(layer: BaseLayer, cfg: Any, tensors: Named, shared: Named) -> Named:
    """With λ0 of the live weight. Raises CheckpointError for trained directions that V⁻¹ doesn't hold exactly."""
    name, weight = shared_name(layer.path), layer.dense_weight().double()
    columns = joint_columns(weight, shared[f"V_{name}"])  # (i, o)
    norms = columns.norm(dim=1)
    errors = (shared[f"inverse_{name}"].to(cfg.dtype).double() @ weight.mT - columns).norm(dim=1)
    lacking = (norms <= LEAST * norms.amax()) & (errors > 1e-3 * norms)  # PEFT divides their rounding by its length
    rows = shared[f"places_{name}"][0].to(norms.device)
    trained = tensors["lora_l"].to(norms).abs() > LEAST * norms.amax()
    trained = trained.index_put((rows[tensors["lora_s"].to(norms.device) != 0],), torch.tensor(True))
    if bool((lacking & trained).any()):
        number = f"{int(lacking.sum())} of V's {len(norms)} directions"
        raise CheckpointError(
            f"{layer.path}: its weight has no part in {number}, and PEFT trains what rounding leaves of them\n"
            f"  load it on its model (load_peft), or target more layers of that name"
        )
    return {**tensors, "lora_l0": norms.where(~lacking, 0).to(cfg.dtype)}


@torch.no_grad()
def _frod_once(tensors: Named, layers: Mapping[str, BaseLayer]) -> Named:
    """V⁻¹, on its layers' rows where they are fewer than its columns. W V⁻ᵀ is the same, and in the directions that no
    layer has, what PEFT makes of float64's rounding isn't lost in float32's."""
    start, inverses = f"{PLACE}.V_", {}
    for name, v in {key.removeprefix(start): v for key, v in tensors.items() if key.startswith(start)}.items():
        inverse, info = torch.linalg.inv_ex(v.double())
        if info.any():
            raise CheckpointError(f"frod_V.{name} has no inverse\n  save the adapter again")
        named = [layer for layer in layers.values() if shared_name(layer.path) == name]
        if 0 < sum(layer.d_out for layer in named) < len(v):
            rows = torch.cat([layer.dense_weight().to(inverse) for layer in named])
            inverse = inverse @ torch.linalg.pinv(rows) @ rows
        inverses[f"{PLACE}.inverse_{name}"] = inverse
    return inverses


def _read_frod(source: "PeftFolder") -> dict[str, Any]:
    if not flag_of(source, "save_projection", default=True):
        cure = "save it again with save_projection=True"
        raise source.error(f"save_projection=false: V isn't in the file, and an SVD may give another\n  {cure}")
    return {}


def _check_names(sites: Mapping[str, Site]) -> dict[str, Any]:
    if others := [path for path in sites if category(path) != shared_name(path)]:
        raise CheckpointError(f"{others[0]}: PEFT calls V of it {category(others[0])!r}, and no file here does")
    return {}


FROD = Format(
    "FROD",
    "frod",
    tensors={"lora_l": "frod_lambda_l", "lora_s": "frod_lambda_s_values"},
    shared={"V_*": "frod_V.*", "places_*": "frod_s_indices.*"},
    unread=("frod_s_size.*",),
    fields={
        "sparse_rate": Setting("sparse_rate", 0.01),
        "regularization_alpha": Setting("regularization_alpha", 1e-3),
        "seed": Setting("projection_prng_key", 0),
        "dropout": Setting("frod_dropout", 0.0),
    },
    free=("save_projection", "progressbar", "runtime_offload_base_weight"),
    only="frod_only",
    takes=is_plain_linear,
    read=_read_frod,
    write=lambda cfg: {"save_projection": True},
    by_layer=_check_names,
    of_base=_frod_of_base,
    once=_frod_once,
    sizes=lambda layer: (layer["lora_l"][0], 0),
    tables=("places_*",),
    reads_base=True,
)

# ---- AdaMSS -------------------------------------------------------------------------------------------


def _adamss_shapes(site: Site, in_file: Mapping[str, Shape]) -> dict[str, Shape]:
    """Each cluster's as the file has them: its rows, which `_adamss_of_base` compares, and its rank, at most k."""
    (clusters, k, rank), i = site.specs["lora_As"].shape, site.target.d_in + site.target.has_bias
    wanted: dict[str, Shape] = {"lora_N": (rank, i)}
    for c in range(clusters):
        rows, ranks = (*in_file.get(f"lora_Bs_{c}", ()), 0, 0)[:2]
        ranks = max(1, min(ranks, k))
        wanted |= {f"lora_As_{c}": (ranks, rank), f"lora_Bs_{c}": (rows, ranks)}
    return wanted


@torch.no_grad()
def clusters_of_peft(layer: BaseLayer, cfg: Any, bias: Tensor | None) -> Tensor:
    """The clusters of the rows as PEFT 0.21.2 finds them at every load. Raises CheckpointError without scikit-learn."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        problem = "PEFT keeps no clusters in its files, and scikit-learn, by which it makes them again, isn't here"
        raise CheckpointError(f"{layer.path}: {problem}\n  pip install scikit-learn") from error
    w = layer.dense_weight().float()
    w = w if bias is None else torch.cat([w, bias.detach()[:, None].to(w)], 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        u = torch.svd_lowrank(w, q=min(cfg.r, *w.shape), niter=2)[0]  # (o, R)
    settings = {"init": "random", "n_init": 1, "max_iter": 10, "random_state": 123456789}
    labels = KMeans(n_clusters=min(cfg.num_subspaces, len(w)), **settings).fit_predict(u.cpu().numpy())
    return torch.from_numpy(labels).long()


def _adamss_of_base(layer: BaseLayer, cfg: Any, tensors: Named, shared: Named) -> Named:
    cluster = clusters_of_peft(layer, cfg, layer.bias)
    clusters = int(cluster.max()) + 1
    a, b = ([tensors[f"lora_{name}s_{c}"] for c in range(clusters)] for name in ("A", "B"))
    if [len(part) for part in b] != torch.bincount(cluster).tolist():
        raise CheckpointError(
            f"{layer.path}: this weight's rows fall into other clusters than those that the file was trained with\n"
            f"  load it on the same base, in the same dtype"
        )
    k = min(cfg.subspace_rank, a[0].shape[1])
    stack, rows = a[0].new_zeros(clusters, k, a[0].shape[1]), b[0].new_zeros(len(cluster), k)
    for c in range(clusters):
        stack[c, : len(a[c])] = a[c]
        rows[cluster == c, : len(a[c])] = b[c]
    n, *last = tensors["lora_N"].split(layer.d_in, 1)
    return {"lora_As": stack, "lora_Bs": rows, "lora_cluster": cluster, "lora_N": n} | (
        {"lora_Nb": last[0][:, 0]} if last else {}
    )


def _adamss_theirs(site: Site, tensors: Named) -> Named:
    layer, cluster = site.base.as_it_is_now(), tensors["lora_cluster"].long().cpu()
    if not torch.equal(cluster, clusters_of_peft(layer, site.cfg, layer.bias)):
        raise CheckpointError(
            f"{site.path}: its clusters aren't those that PEFT would find as it loads the folder\n"
            f"  keep it as our file (lora_lite.save), or give rank= to write a plain LoRA"
        )
    a, b = tensors["lora_As"], tensors["lora_Bs"]
    n = tensors["lora_N"]
    theirs = {"lora_N": torch.cat([n, tensors["lora_Nb"][:, None]], 1) if "lora_Nb" in tensors else n}
    for c, stack in enumerate(a):
        ranks = max(1, int(stack.any(1).sum()))
        theirs |= {f"lora_As_{c}": stack[:ranks], f"lora_Bs_{c}": b[cluster.to(b.device) == c][:, :ranks]}
    return theirs


ADAMSS = Format(
    "ADAMSS",
    "adamss",
    tensors={"lora_As_*": "adamss_A.*", "lora_Bs_*": "adamss_B.*", "lora_N": "adamss_newB"},
    fields={
        "r": Setting("r", 100),
        "num_subspaces": Setting("num_subspaces", 5),
        "subspace_rank": Setting("subspace_rank", 1),
        "use_dynamic_rank": Setting("use_dynamic_rank", False),
        "svd_threshold": Setting("svd_threshold", 0.1),
        "seed": Setting("random_seed", 0),
        "use_asa": Setting("use_asa", False),
        "asa_target_subspaces": Setting("asa_target_subspaces", 50),
        "init_warmup": Setting("init_warmup", 50),
        "final_warmup": Setting("final_warmup", 1000),
        "mask_interval": Setting("mask_interval", 100),
        "asa_importance_beta": Setting("asa_importance_beta", 0.85),
        "asa_uncertainty_beta": Setting("asa_uncertainty_beta", 0.85),
        "asa_schedule_exponent": Setting("asa_schedule_exponent", 3.0),
    },
    takes=is_linear_module,
    lacks=("bias", "fan_in_fan_out"),
    of_base=_adamss_of_base,
    theirs=_adamss_theirs,
    shapes_by=_adamss_shapes,
    reads_base=True,
)

FORMATS = (MICA, KASA, BDLORA, VELORA, OSF, FROD, ADAMSS)
