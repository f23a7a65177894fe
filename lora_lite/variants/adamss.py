"""AdaMSS: a small update for each cluster of the weight's rows (Zheng et al. 2025, NeurIPS, openreview 8ZdWmpYxT0).

    y_c = (W x + b)_c + B_c A_c N [x; 1]     c: one of K clusters of the outputs    N (R, i + 1), or (R, i) without b
    N = V_Rᵀ of the SVD [W | b] = U S Vᵀ;  clusters: k-means of the rows of U_R (o, R)
    A_c (k, R): the first right singular vectors of U_R's rows in c    B_c (o_c, k)    A (K, k, R)  B (o, k) as stacks
    on_step    with use_asa, the least important subspaces stop training; families/asa.py

Identity   B = 0, bit-exact
Base       read once, at init, for its SVD; dequantised numbers do. N and each row's cluster stay in the file
Departs    our own k-means, once; PEFT asks scikit-learn at every load. ASA keeps one subspace more than PEFT's does
Checked    against PEFT AdamssConfig: outputs, gradients, masks, three AdamW steps
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.targets import Target
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.asa import ASAConfig, asa_specs, freeze_subspaces
from ..families.factors import with_factors
from ..ops.clusters import clustered_factors, kmeans
from ..ops.svd import leading_svd

__all__ = ["AdaMSS", "AdaMSSConfig"]


@dataclass(frozen=True, kw_only=True)
class AdaMSSConfig(ASAConfig):
    """r: R, at most. num_subspaces: K. subspace_rank: k, and use_dynamic_rank takes those of it whose squared singular
    value is above svd_threshold times the first. A's other rows, as in smaller clusters, are 0. The rest is ASA's."""

    variant: str = "adamss"
    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"num_subspaces": 1, "subspace_rank": 1, "seed": 0}.items():
            value = getattr(self, name)
            self.require(type(value) is int and least <= value < 2**63, name, f"a whole number, {least} or more")
        self.require(is_number(self.svd_threshold) and 0 <= self.svd_threshold < 1, "svd_threshold", "a share below 1")


@register
class AdaMSS:
    name = "adamss"
    config = AdaMSSConfig
    base_weight = "read"
    handles_scale = True

    @staticmethod
    def layer_specs(target: Target, cfg: AdaMSSConfig) -> dict[str, ParamSpec]:
        o, i, rank = target.d_out, target.d_in, min(cfg.r, target.d_out, target.d_in + target.has_bias)
        clusters, k = min(cfg.num_subspaces, o), min(cfg.subspace_rank, rank)  # a cluster has R directions at most
        specs = {
            "lora_As": ParamSpec((clusters, k, rank), keep_dtype=True),
            "lora_Bs": ParamSpec((o, k), keep_dtype=True),
            "lora_N": ParamSpec((rank, i), trainable=False, keep_dtype=True),
            "lora_cluster": ParamSpec((o,), dtype=torch.int32, below=clusters),
        } | (asa_specs(clusters, k, rank, o) if cfg.use_asa else {})
        last = {"lora_Nb": ParamSpec((rank,), trainable=False, keep_dtype=True, is_shift=True)}  # N's last column
        return specs | (last if target.has_bias else {})

    @staticmethod
    def init(layer: Layer, cfg: AdaMSSConfig) -> None:
        w, bias = layer.dense_weight(), layer.bias
        w = w if bias is None else torch.cat([w, bias[:, None].to(w)], 1)  # (o, i + 1)
        u, _, v = leading_svd(w, len(layer.lora_N))
        layer.lora_cluster.copy_(kmeans(u, len(layer.lora_As), cfg.seed))
        layer.lora_N.copy_(v.mT[:, : layer.in_features])
        if bias is not None:
            layer.lora_Nb.copy_(v[-1])
        for c, stack in enumerate(layer.lora_As):  # (k, R)
            s, vt = torch.linalg.svd(u[layer.lora_cluster == c], full_matrices=False)[1:]
            large = int((s.square() > cfg.svd_threshold * s[0].square()).sum()) if cfg.use_dynamic_rank else len(s)
            stack[:large].copy_(vt[: min(large, len(stack))])

    on_step = staticmethod(freeze_subspaces)

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        a, b = clustered_factors(layer.lora_As, layer.lora_Bs, layer.lora_cluster)  # (K k, R), (o, K k)
        shift = layer.scale * (b @ (a @ layer.lora_Nb.to(a.dtype))) if layer.has_bias else None
        return LowRank(a @ layer.lora_N.to(a.dtype), b, layer.scale, shift=shift)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        last = layer.lora_Nb.to(x.dtype) if layer.has_bias else None
        z = F.linear(x, layer.lora_N.to(x.dtype), last)  # N [x; 1] (*b, R): N is frozen, so z is kept in x's place
        return with_factors(layer, z, y, clustered_factors, layer.lora_As, layer.lora_Bs, layer.lora_cluster)
