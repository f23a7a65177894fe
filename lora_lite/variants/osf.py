"""OSF: training the low part of the weight's own SVD (Nayak et al. 2025, arXiv:2504.07097, Sculpting Subspaces).

    y = W x + b + (U diag(S) V - U0 diag(S0) V0) x      U (o, m)   S (m,)   V (m, i)   m = min(i, o) - k
    U0, S0, V0: the last m singular triplets of W; U_h (o, k), V_h (k, i): the first k, which are kept
    "gradient"  ∇U ← (I - U_h U_hᵀ) ∇U   ∇V ← ∇V (I - V_hᵀ V_h)
    "update"    U = U0 + (I - U_h U_hᵀ)(U' - U0)   V = V0 + (V' - V0)(I - V_hᵀ V_h), of trained U' and V'

Identity   U = U0, S = S0, V = V0, bit-exact: the change is [ΔU S + U0 ΔS, U0 S0] [V; ΔV]
Base       read once, at init, for its SVD; dequantised numbers do. Its parts stay in the file, so a load needs none
Departs    the paper and PEFT project gradients, and Adam's steps by them leave the subspace. That is "gradient";
           "update", the default, projects the change itself: it stays there. On a 16-bit base PEFT projects nothing
Checked    against PEFT OSFConfig: outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..errors import ConfigError
from ..families.dense import with_delta
from ..families.factors import at_inference, with_factors

__all__ = ["OSF", "OSFConfig"]


@dataclass(frozen=True, kw_only=True)
class OSFConfig(BaseConfig):
    """effective_rank: k, a number of directions, or a fraction of them. None: half. project: "update" or "gradient"."""

    variant: str = "osf"
    effective_rank: int | float | None = None
    project: str = "update"

    def __post_init__(self) -> None:
        super().__post_init__()
        k = self.effective_rank
        is_rank = (type(k) is int and k > 0) or (isinstance(k, float) and is_number(k) and 0 < k <= 1)
        self.require(k is None or is_rank, "effective_rank", "a rank of at least 1, a fraction as a float, or None")
        self.require(self.project in ("update", "gradient"), "project", '"update" or "gradient"')


@register
class OSF:
    name = "osf"
    config = OSFConfig
    base_weight = "read"
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: OSFConfig) -> dict[str, ParamSpec]:
        q, k = min(d_in, d_out), cfg.effective_rank
        k = q // 2 if k is None else int(q * k) if isinstance(k, float) else k
        if not 0 < k < q:
            raise ConfigError(
                f"OSFConfig(effective_rank={cfg.effective_rank}): of the {q} directions of a ({d_out}, {d_in}) weight "
                f"{k} would be kept\n  keep at least 1, and leave 1 to train; other layers take others with per_layer"
            )
        low = {"U": (d_out, q - k), "S": (q - k,), "V": (q - k, d_in)}
        frozen = {f"{name}0": shape for name, shape in low.items()} | {"Uh": (d_out, k), "Vh": (k, d_in)}
        specs = {f"lora_{name}": ParamSpec(shape, keep_dtype=True) for name, shape in low.items()}
        return specs | {f"lora_{n}": ParamSpec(s, trainable=False, keep_dtype=True) for n, s in frozen.items()}

    @staticmethod
    def init(layer: Layer, cfg: OSFConfig) -> None:
        u, s, vt = torch.linalg.svd(layer.dense_weight(), full_matrices=False)
        k = len(layer.lora_Vh)
        for name, part in {"Uh": u[:, :k], "Vh": vt[:k], "U0": u[:, k:], "S0": s[k:], "V0": vt[k:]}.items():
            getattr(layer, f"lora_{name}").copy_(part)
        for name in ("lora_U", "lora_S", "lora_V"):
            getattr(layer, name).copy_(getattr(layer, f"{name}0"))  # as stored, so that all differences are 0

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return LowRank(*_factors(layer.cfg.project, *_tensors(layer)), layer.scale)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        if not at_inference(layer):
            return with_factors(layer, x, y, partial(_factors, layer.cfg.project), *_tensors(layer))
        # At inference their one matrix, remembered, is less than the factors: half of all directions are trained.
        return with_delta(layer, x, y, lambda *t: torch.mm(*_factors(layer.cfg.project, *t)[::-1]), *_tensors(layer))


def _tensors(layer: Layer) -> list[Tensor]:
    return [getattr(layer, f"lora_{name}") for name in ("U", "S", "V", "U0", "S0", "V0", "Uh", "Vh")]


def _factors(project: str, u: Tensor, s: Tensor, v: Tensor, *frozen: Tensor) -> tuple[Tensor, Tensor]:
    u0, s0, v0, uh, vh = (t.to(s.dtype) for t in frozen)  # a cast of parameters alone must not part them
    u1, v1 = (u.detach(), v.detach()) if project == "gradient" else (u0, v0)  # where the projected step starts
    du, dv = u - u1, v - v1  # with "gradient" 0, but for its gradient
    du, dv = u1 - u0 + (du - uh @ (uh.mT @ du)), v1 - v0 + (dv - (dv @ vh.mT) @ vh)  # ΔU (o, m), ΔV (m, i)
    return torch.cat([v0 + dv, dv]), torch.cat([du * s + u0 * (s - s0), u0 * s0], 1)  # (2m, i), (o, 2m)
