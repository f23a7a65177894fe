"""The equations of the methods that use the base's own directions."""

from typing import Any

import torch
from torch import Tensor


def scaling(cfg: Any) -> float:
    return (cfg.alpha or cfg.r) / (cfg.r**0.5 if cfg.rslora else cfg.r)


def mica(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    U = torch.linalg.svd(W.float()).U[:, : min(W.shape)].to(W)[:, -cfg.r :]
    assert torch.allclose(U.abs(), t["lora_B"].abs(), atol=1e-5)
    return x @ (W + scaling(cfg) * t["lora_B"] @ t["lora_A"]).T + b


def kasa(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    k = len(S) - cfg.r
    truncated = U[:, :k] @ S[:k].diag() @ Vt[:k]
    assert torch.allclose(W - truncated, t["lora_Ut"] @ t["lora_Vt"], atol=1e-5)
    return x @ (truncated + scaling(cfg) * t["lora_B"] @ t["lora_d"].diag() @ t["lora_A"]).T + b


def bdlora(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    A, B, n = t["lora_A"], t["lora_B"], cfg.nblocks
    if cfg.blocks == "A":
        A = torch.block_diag(*A.split(cfg.r // n))
    if cfg.blocks == "B":
        B = torch.block_diag(*B.split(len(W) // n))
    return x @ (W + scaling(cfg) * B @ A).T + b


def osf(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    U, S, V = t["lora_U"], t["lora_S"], t["lora_V"]
    if cfg.project == "update":
        eye_o, eye_i = torch.eye(len(W)).to(W), torch.eye(W.shape[1]).to(W)
        U = t["lora_U0"] + (eye_o - t["lora_Uh"] @ t["lora_Uh"].T) @ (U - t["lora_U0"])
        V = t["lora_V0"] + (V - t["lora_V0"]) @ (eye_i - t["lora_Vh"].T @ t["lora_Vh"])
    return x @ (W + U @ S.diag() @ V - t["lora_U0"] @ t["lora_S0"].diag() @ t["lora_V0"]).T + b


def adamss(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    W, b, has_bias = W.clone(), b.clone(), "lora_Nb" in t
    N = torch.cat([t["lora_N"], t["lora_Nb"][:, None]], 1) if has_bias else t["lora_N"]
    for row, c in enumerate(t["lora_cluster"].tolist()):  # of each output
        change = t["lora_Bs"][row] @ t["lora_As"][c] @ N
        W[row] += change[: W.shape[1]]
        b[row] += change[-1] if has_bias else 0
    return x @ W.T + b


def velora(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ (W + scaling(cfg) * t["lora_B"] @ t["lora_A"]).T + b


def frod(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    kind = next(name.removeprefix("lora_shared.V_") for name in t if ".V_" in name)
    V, (rows, columns) = t[f"lora_shared.V_{kind}"], t[f"lora_shared.places_{kind}"]
    U = W @ torch.linalg.inv(V).T
    norms = U.norm(dim=0)
    U = U / norms
    assert torch.allclose(t["lora_l0"], norms)
    S = torch.zeros_like(V)
    S[rows, columns] = t["lora_s"]
    return x @ (U @ (S + t["lora_l"].diag()) @ V.T).T + b


ORACLES = {"mica": mica, "kasa": kasa, "bdlora": bdlora, "osf": osf, "adamss": adamss, "frod": frod, "velora": velora}

FIELDS: dict[str, dict[str, Any]] = {
    "adamss": {"num_subspaces": 3, "subspace_rank": 2, "r": 12},
    "frod": {"sparse_rate": 0.05},
}
