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


ORACLES = {"mica": mica, "kasa": kasa, "bdlora": bdlora, "osf": osf}

FIELDS: dict[str, dict[str, Any]] = {}
