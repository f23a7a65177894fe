"""Each variant's equation on explicit float64 matrices: the paper's formula, with no runtime and no shortcut.

An oracle takes the dense weight W (o, i), the bias b (o,) or zeros, the config, the adapter's tensors by name and the
input x (n, i), and gives y (n, o).
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Oracle = Callable[[Tensor, Tensor, Any, dict[str, Tensor], Tensor], Tensor]


def lora(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    alpha = cfg.alpha or cfg.r
    s = alpha / cfg.r**0.5 if cfg.rslora else alpha / cfg.r
    return x @ (W + s * t["lora_B"] @ t["lora_A"]).T + b + s * t.get("lora_bias", torch.zeros(()))


def pissa(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    s = (cfg.alpha or cfg.r) / cfg.r
    residual = W - s * t["lora_B0"] @ t["lora_A0"]
    return x @ (residual + s * t["lora_B"] @ t["lora_A"]).T + b


def dora(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    s = (cfg.alpha or cfg.r) / (cfg.r**0.5 if cfg.rslora else cfg.r)
    direction = W + s * t["lora_B"] @ t["lora_A"]
    unit = direction / direction.norm(dim=1, keepdim=True)
    return x @ (t["lora_m"][:, None] * unit).T + b


def ia3(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    return t["lora_l"] * (x @ W.T + b)


def ia3_ff(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    return (x * t["lora_l"]) @ W.T + b


def abliteration(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ weight_form(W, t["lora_v"], t["lora_strength"], cfg.normalization).T + b


def steer(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ W.T + b + cfg.strength * t["lora_own"]


def weight_form(W: Tensor, V: Tensor, s: Tensor, mode: str) -> Tensor:
    """W (o, i) with the rows of V (k, o) taken out of what it writes, in one of four ways of keeping norms."""
    rows, columns = W.norm(dim=1, keepdim=True), W.norm(dim=0)
    unit = W / rows
    without, unit_without = W - s * V.T @ V @ W, unit - s * V.T @ V @ unit
    forms = {
        "none": without,
        "pre": rows * unit_without,
        "full": rows * unit_without / unit_without.norm(dim=1, keepdim=True),
        "column": without * (columns / without.norm(dim=0)),
    }
    return forms[mode]


def ssteer(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ (W + t["lora_U"] @ t["lora_ds"].diag() @ t["lora_V"].T).T + b


def antipasto(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor, c: float = 1.0) -> Tensor:
    U, S, V = t["lora_U"], t["lora_S"].diag(), t["lora_V"]
    R = torch.eye(len(S), dtype=W.dtype)
    if cfg.rotate != "none":
        A = c * skew(t["lora_theta"], min(cfg.block, len(S)), len(S))
        R = (R - A / 2) @ torch.linalg.inv(R + A / 2)
    U_rot, V_rot = (U @ R, V) if cfg.rotate == "U" else (U, V @ R)
    return x @ (W - U @ S @ V.T + U_rot @ (S + c * t["lora_ds"].diag()) @ V_rot.T).T + b


def skew(theta: Tensor, b: int, r: int) -> Tensor:
    """The block-diagonal A = -Aᵀ (r, r), each row of theta above the diagonal of a block, row by row."""
    A = torch.zeros(r, r, dtype=theta.dtype)
    for n, row in enumerate(theta):
        pairs = [(i, j) for i in range(b) for j in range(i + 1, b)]
        for (i, j), angle in zip(pairs, row, strict=True):
            A[n * b + i, n * b + j], A[n * b + j, n * b + i] = angle, -angle
    return A


def vera(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    o, i = W.shape
    A, B = t["lora_shared.A"][:, :i], t["lora_shared.B"][:o]
    return x @ (W + t["lora_b"].diag() @ B @ t["lora_d"].diag() @ A).T + b


def full(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ (W + t["lora_weight"]).T + b + t.get("lora_bias", 0 * b)


def bias(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ W.T + (b + t["lora_bias"])


def norm(w: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    n = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return (w + t["lora_weight"]) * n + b + t.get("lora_bias", 0 * b)


def tokens(E: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    rows = E.clone()
    rows[list(cfg.token_ids)] += t["lora_delta"].T
    return rows[x]


def adalora(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    s = cfg.alpha / (cfg.init_r + 1e-5)
    return x @ (W + s * t["lora_B"] @ t["lora_E"][:, 0].diag() @ t["lora_A"]).T + b


def reft(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    h, rows = x @ W.T + b, []
    for row in t["lora_R"]:  # Gram-Schmidt
        row = row - sum((row @ other) * other for other in rows)
        rows.append(row / row.norm())
    R = torch.stack(rows)
    return h + (h @ t["lora_W"].T + t["lora_b"] - h @ R.T) @ R


def history(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ (W + t["lora_B"] @ (t["lora_s"] * torch.tensor(cfg.coefficients).to(W)).diag() @ t["lora_A"]).T + b


ORACLES: dict[str, Oracle] = {
    "lora": lora,
    "pissa": pissa,
    "dora": dora,
    "ia3": ia3,
    "ia3_ff": ia3_ff,
    "abliteration": abliteration,
    "steer": steer,
    "ssteer": ssteer,
    "antipasto": antipasto,
    "vera": vera,
    "full": full,
    "bias": bias,
    "norm": norm,
    "tokens": tokens,
    "adalora": adalora,
    "reft": reft,
    "history": history,
}

AT_SCALE: dict[str, Callable[..., Tensor]] = {"antipasto": antipasto}
"""Those whose c is no blend of base and method, with c as one more argument."""

FIELDS: dict[str, dict[str, Any]] = {}
"""What a method's config needs on the small layers of the tests, whose sides are 16, 24, 32, 64 and 128."""

DATA: dict[str, Callable[..., Any]] = {}
"""calibration_data of (model, {path: (d_in, d_out)}) for a method that needs it, where that is no direction."""

NOT_AFFINE: set[str] = set()
"""Methods for which no weight stands."""

DRAWS: set[str] = set()
"""Methods that draw random numbers in training by their paper, so that no two forwards are alike."""

# A family of methods has a file with ORACLES and what it needs of the others.
for _file in sorted(Path(__file__).parent.glob("oracles_*.py")):
    _family = import_module(_file.stem)
    ORACLES |= _family.ORACLES
    AT_SCALE |= getattr(_family, "AT_SCALE", {})
    FIELDS |= getattr(_family, "FIELDS", {})
    DATA |= getattr(_family, "DATA", {})
    NOT_AFFINE |= getattr(_family, "NOT_AFFINE", set())
    DRAWS |= getattr(_family, "DRAWS", set())
