"""Rotations of a layer's input or output, on explicit float64 matrices."""

from typing import Any

import torch
from oracles import Oracle
from torch import Tensor


def skew(row: Tensor, s: int) -> Tensor:
    """Q = -Qᵀ, one number after the other."""
    Q, numbers = torch.zeros(s, s, dtype=row.dtype), iter(row)
    for i in range(s):
        for j in range(i + 1, s):
            Q[i, j] = next(numbers)
    return Q - Q.T


def rotation(Q: Tensor, cfg: Any) -> Tensor:
    eye = torch.eye(len(Q), dtype=Q.dtype)
    if not cfg.use_cayley_neumann:
        return (eye + Q) @ torch.linalg.inv(eye - Q)
    series = sum((torch.linalg.matrix_power(Q, k) for k in range(cfg.num_cayley_neumann_terms - 1)), 0 * Q)
    return (eye + Q) @ series


def oft(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    d, s = W.shape[1 if cfg.side == "input" else 0], cfg.block_size
    rows = t["lora_R"].expand(d // s, -1)
    Qs = [skew(row, s) for row in rows]
    if cfg.coft:
        bound = cfg.eps / len(t["lora_R"]) ** 0.5
        Qs = [Q * min(1.0, bound / float(Q.norm())) for Q in Qs]
    R = torch.block_diag(*(rotation(Q, cfg) for Q in Qs))
    return x @ R @ W.T + b if cfg.side == "input" else x @ W.T @ R + b


def hra(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    eye, u = torch.eye(W.shape[1], dtype=W.dtype), t["lora_u"]
    if cfg.apply_GS:
        H = (eye - 2 * u @ torch.linalg.pinv(u)) @ (eye - 2 * t["lora_u0"] @ torch.linalg.pinv(t["lora_u0"]))
        return x @ (W @ H).T + b
    H = eye
    for column in u.T:
        unit = column / column.norm()
        H = H @ (eye - 2 * torch.outer(unit, unit))
    return x @ (W @ H).T + b


def road(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    y, half = x @ W.T + b, cfg.group_size // 2
    theta, alpha = t["lora_theta"], t["lora_alpha"]
    new = torch.zeros_like(y)
    for j in range(y.shape[1]):
        group, within = divmod(j, cfg.group_size)
        first = within < half
        p, q = {
            1: (group * half + within % half,) * 2,
            2: (j, j),
            4: (2 * group * cfg.group_size + within, (2 * group + 1) * cfg.group_size + within),
        }[cfg.form]
        partner = -y[:, j + half] if first else y[:, j - half]
        new[:, j] = alpha[p] * theta[p].cos() * y[:, j] + alpha[q] * theta[q].sin() * partner
    return new


def boft(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor, c: float = 1.0) -> Tensor:
    i, (m, _, k, _) = W.shape[1], t["lora_R"].shape
    eye, B = torch.eye(k, dtype=W.dtype), torch.eye(i, dtype=W.dtype)
    for j in range(m):
        K = (t["lora_R"][j] - t["lora_R"][j].mT) / 2
        C = torch.block_diag(*((eye - one) @ torch.linalg.inv(eye + one) for one in K))
        # the half-block n is the first of a pair if n // 2ʲ is even, and its partner is 2ʲ further
        order = [n for n in range(2 * i // k) if n // 2**j % 2 == 0]
        halves = [h for n in order for h in (n, n + 2**j)] if j else list(range(2 * i // k))
        P = torch.zeros_like(B)
        for place, h in enumerate(halves):
            for q in range(k // 2):
                P[h * k // 2 + q, place * k // 2 + q] = 1
        P = P if k % 2 == 0 else torch.eye(i, dtype=W.dtype)
        B = P @ C @ P.T @ B
    eye = torch.eye(i, dtype=W.dtype)
    return ((1 + c * (t["lora_s"] - 1)) * (W @ (eye + c * (B - eye)).T) @ x.T).T + b


def psoft(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    C = t["lora_R"]
    if cfg.orth:
        Q = skew(C, cfg.r)
        is_bounded = cfg.use_cayley_neumann and cfg.cayley_neumann_eps
        C = rotation(Q * min(1.0, cfg.cayley_neumann_eps / float(Q.norm())) if is_bounded else Q, cfg)
    one = torch.ones(cfg.r, dtype=W.dtype)
    M = t.get("lora_vector_b", one).diag() @ C @ t.get("lora_vector_a", one).diag()
    U, S, V = torch.linalg.svd(W)
    top = U[:, : cfg.r] @ S[: cfg.r].diag() @ V[: cfg.r] if cfg.svd == "full" else t["lora_U"] @ t["lora_V"]
    torch.testing.assert_close(t["lora_U"] @ t["lora_V"], top)
    return x @ (W - top + t["lora_U"] @ M @ t["lora_V"]).T + b


ORACLES: dict[str, Oracle] = {"oft": oft, "boft": boft, "hra": hra, "road": road, "psoft": psoft}
AT_SCALE = {"boft": boft}
FIELDS: dict[str, dict[str, Any]] = {
    "oft": {"block_size": 8},
    "boft": {"n_butterfly_factor": 2},
    "road": {"group_size": 8},
}
