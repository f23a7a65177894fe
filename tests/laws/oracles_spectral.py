"""Oracles of the methods that train a few entries, coefficients or directions of the weight."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_lite.ops.wavelets import scaling_filter


def shira(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    W = W.clone()
    for v, place in zip(t["lora_weight"], t["lora_indices"].tolist(), strict=True):
        W[place // W.shape[1], place % W.shape[1]] += v
    return x @ W.T + b


def supertuning(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    A, B = (t.get(name, torch.zeros(1, 1, dtype=W.dtype)) for name in ("lora_A", "lora_B"))
    s = (cfg.alpha or 2 * (cfg.r or 1)) / (cfg.r or 1)
    return shira(W, b, cfg, t | {"lora_weight": t["lora_values"]}, x) + s * x @ (B @ A).T


def places(W: Tensor, cfg: Any, n: int) -> list[tuple[int, int]]:
    order = torch.randperm(W.numel(), generator=torch.Generator().manual_seed(cfg.seed))[:n]
    return [divmod(place, W.shape[1]) for place in order.tolist()]


def fourierft(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    c, (o, i) = t["lora_spectrum"], W.shape
    p, q = torch.arange(o, dtype=W.dtype)[:, None], torch.arange(i, dtype=W.dtype)
    waves = [(2 * math.pi * (p * u / o + q * v / i)).cos() for u, v in places(W, cfg, len(c))]
    return x @ (W + cfg.scaling / (o * i) * sum(c_k * wave for c_k, wave in zip(c, waves, strict=True))).T + b


def synthesis(half: int, h: list[float]) -> Tensor:
    """(2 half, 2 half + L - 2): row n of the first half is the scaling filter at 2n, of the second the wavelet's."""
    L = len(h)
    rows = torch.zeros(2 * half, 2 * half + L - 2, dtype=torch.float64)
    for n in range(half):
        rows[n, 2 * n : 2 * n + L] = torch.tensor(h, dtype=torch.float64)
        rows[half + n, 2 * n : 2 * n + L] = torch.tensor([(-1) ** k * h[L - 1 - k] for k in range(L)])
    return rows


def waveft(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    (o, i), c, h = W.shape, t["lora_spectrum"], list(scaling_filter(cfg.wavelet_family))
    L = len(h)
    height, width = o + L - 2 + (o + L) % 2, i + L - 2 + (i + L) % 2
    S = torch.zeros(height, width, dtype=W.dtype)
    for c_k, (p, q) in zip(c, places(W, cfg, len(c)), strict=True):
        S[p + (height - o) // 2, q + (width - i) // 2] = c_k
    top, left = slice(None, height // 2), slice(None, width // 2)
    bottom, right = slice(height // 2, None), slice(width // 2, None)
    rows, columns = synthesis(height // 2, h), synthesis(width // 2, h)
    full = torch.zeros(height + L - 2, width + L - 2, dtype=W.dtype)
    for row, column in ((top, left), (top, right), (bottom, left), (bottom, right)):
        f = rows[bottom if column == right else top]  # cH, on the right, is high-pass along the rows
        g = columns[right if row == bottom else left]
        full += f.to(W.dtype).T @ S[row, column] @ g.to(W.dtype)
    delta = full[L - 2 :, L - 2 :][:o, :i] if cfg.use_idwt else S[(height - o) // 2 :, (width - i) // 2 :][:o, :i]
    return x @ (W + cfg.scaling * delta).T + b


def delora(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    A, B = t["lora_A"], t["lora_B"]
    terms = [
        torch.outer(B[:, k] / B[:, k].norm().clamp(min=1e-4), A[k] / A[k].norm().clamp(min=1e-4)) for k in range(cfg.r)
    ]
    return x @ (W + t["lora_lambda"] / cfg.r * sum(terms) * W.norm(dim=0)).T + b


def deft(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    Q, E = (t["lora_P"], t["lora_P"].relu()) if cfg.decomposition == "relu" else 2 * (torch.linalg.qr(t["lora_P"]).Q,)
    R = torch.zeros(Q.shape[1], W.shape[1], dtype=W.dtype) if cfg.para else t["lora_R"]
    s = (cfg.alpha or Q.shape[1]) / Q.shape[1]
    return x @ (W - Q @ E.T @ W + s * Q @ R).T + b


def c3a(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    w = t["lora_kernel"]
    g, delta = w.shape[2], torch.zeros_like(W)
    for p in range(W.shape[0]):
        for q in range(W.shape[1]):
            delta[p, q] = w[p // g, q // g, (q - p) % g] / W.shape[1]
    return x @ (W + delta).T + b


ORACLES: dict[str, Callable[..., Tensor]] = {
    "shira": shira,
    "supertuning": supertuning,
    "fourierft": fourierft,
    "waveft": waveft,
    "delora": delora,
    "deft": deft,
    "c3a": c3a,
}

FIELDS: dict[str, dict[str, Any]] = {
    "supertuning": {"sparsity": 0.9, "r": 3},
    "fourierft": {"n_frequency": 60},
    "waveft": {"n_frequency": 60, "wavelet_family": "db2"},
}
