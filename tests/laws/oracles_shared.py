"""Oracles of the methods whose layers share tensors."""

import math
from typing import Any

import torch
from torch import Tensor


def pvera(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    o, i = W.shape
    A, B = t["lora_shared.A"][: cfg.r, :i], t["lora_shared.B"][:o]
    return x @ (W + t["lora_b"].diag() @ B @ t["lora_d"][: cfg.r].diag() @ A).T + b


def randlora(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    o, i = W.shape
    q, p = min(o, i), max(o, i)
    N, r = math.ceil(q / cfg.r), cfg.r
    A, B = t["lora_shared.A"], t["lora_shared.B"]
    D = torch.zeros(p, q, dtype=W.dtype)
    for flat in range(r * N):
        row = t["lora_lambda"][flat // N, flat % N] * A[flat // N, 0, :q] * t["lora_gamma"][flat % N]
        D += cfg.alpha / r * torch.outer(B[:p, flat // r, flat % r], row)
    return x @ (W + (D if q == i else D.T)).T + b


def vblora(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    def vector(logits: Tensor) -> Tensor:
        order = logits.argsort(descending=True)[: cfg.topk]
        return logits[order].softmax(0) @ t["lora_shared.bank"][order]

    A = torch.stack([torch.cat([vector(logits) for logits in row]) for row in t["lora_logits_A"]])
    columns = t["lora_logits_B"].transpose(0, 1)
    B = torch.stack([torch.cat([vector(logits) for logits in column]) for column in columns], 1)
    return x @ (W + B @ A).T + b


def unilora(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    entries = torch.cat([t["lora_indices_A"].flatten(), t["lora_indices_B"].flatten()]).tolist()
    c = torch.tensor([max(1, entries.count(j)) ** -0.5 for j in range(cfg.theta_d_length)], dtype=W.dtype)
    values = t["lora_shared.theta"] * c
    return x @ (W + values[t["lora_indices_B"].long()] @ values[t["lora_indices_A"].long()]).T + b


def tinylora(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    R = sum(v * P for v, P in zip(t["lora_shared.v"][int(t["lora_group"])], t["lora_P"], strict=True))
    return x @ (W + t["lora_U"] @ R @ t["lora_V"]).T + b


def lily(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    A = next(tensor for name, tensor in t.items() if name.startswith("lora_shared.A"))
    B = next(tensor for name, tensor in t.items() if name.startswith("lora_shared.B"))
    p = (x @ A.T @ t["lora_router"].T).softmax(1).mean(0)
    mixed = sum(p[e] * B[e * cfg.r : (e + 1) * cfg.r] for e in range(cfg.num_B))
    return x @ W.T + b + cfg.scaling * x @ A.T @ mixed


ORACLES = {
    "pvera": pvera,
    "randlora": randlora,
    "vblora": vblora,
    "unilora": unilora,
    "tinylora": tinylora,
    "lily": lily,
}

FIELDS: dict[str, dict[str, Any]] = {
    "pvera": {"r": 6},
    "randlora": {"r": 5, "alpha": 20.0},
    "vblora": {"num_vectors": 12, "vector_length": 8},
    "unilora": {"theta_d_length": 50, "init_theta_d_bound": 0.5},
    "tinylora": {"u": 5},
    "lily": {"r": 4},
}

NOT_AFFINE = {"lily"}  # its experts are mixed by the mean over a batch

DRAWS = {"pvera"}
