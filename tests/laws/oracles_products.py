"""The equations of the methods that change the weight by products: Hadamard's, Kronecker's, blocks, and of W itself."""

from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def loha(W: Tensor, b: Tensor, cfg: Any, t: Tensors, x: Tensor) -> Tensor:
    s = (cfg.alpha or cfg.r) / cfg.r
    return x @ (W + s * (t["lora_w1_a"] @ t["lora_w1_b"]) * (t["lora_w2_a"] @ t["lora_w2_b"])).T + b


def lokr(W: Tensor, b: Tensor, cfg: Any, t: Tensors, x: Tensor) -> Tensor:
    s = (cfg.alpha or cfg.r) / cfg.r
    w1 = t["lora_w1"] if "lora_w1" in t else t["lora_w1_a"] @ t["lora_w1_b"]
    w2 = t["lora_w2"].flatten(1) if "lora_w2" in t else t["lora_w2_a"] @ t["lora_w2_b"]
    (rows, m), (k, n) = w1.shape, w2.shape
    delta = torch.empty(rows * k, m * n, dtype=W.dtype)
    for i in range(rows):
        for j in range(m):
            delta[i * k : (i + 1) * k, j * n : (j + 1) * n] = w1[i, j] * w2
    return x @ (W + s * delta).T + b


def hira(W: Tensor, b: Tensor, cfg: Any, t: Tensors, x: Tensor) -> Tensor:
    return x @ (W + W * (t["lora_B"] @ t["lora_A"])).T + b


def gralora(W: Tensor, b: Tensor, cfg: Any, t: Tensors, x: Tensor) -> Tensor:
    (o, i), k, r = W.shape, cfg.k, cfg.r
    q, s, delta = r // k, cfg.alpha / (r + cfg.hybrid_r), torch.zeros_like(W)
    for j in range(k):
        for n in range(k):
            up, down = t["lora_b"][j][n * q : (n + 1) * q].T, t["lora_a"][n][:, j * q : (j + 1) * q].T
            delta[j * o // k : (j + 1) * o // k, n * i // k : (n + 1) * i // k] = up @ down
    if cfg.hybrid_r:
        delta = delta + t["lora_general_b"] @ t["lora_general_a"]
    return x @ (W + s * delta).T + b


def glora(W: Tensor, b: Tensor, cfg: Any, t: Tensors, x: Tensor) -> Tensor:
    def part(name: str) -> Tensor:
        if f"lora_{name}_Xd" in t:
            return t[f"lora_{name}_Xd"] @ t[f"lora_{name}_Xu"]
        return t.get(f"lora_{name}_X", torch.zeros(1, dtype=W.dtype))

    C = part("C").flatten().expand(W.shape[1])
    return x @ (W + W * part("A") + part("B")).T + b + b * part("D").flatten() + part("E").flatten() + W @ C


def miss(W: Tensor, b: Tensor, cfg: Any, t: Tensors, x: Tensor) -> Tensor:
    (o, i), r, D, delta = W.shape, cfg.r, t["lora_block"], torch.zeros_like(W)
    if cfg.form == "bat":
        for a in range(o // r):
            for k in range(i // r):
                rows, columns = slice(a * r, (a + 1) * r), slice(k * r, (k + 1) * r)
                delta[rows, columns] = W[rows, columns] @ D[a] + D[a]
    else:
        for q in range(i):
            delta[:, q] = D[q % r].repeat(o // D.shape[1])
    return x @ (W + delta).T + b


def beft(W: Tensor, b: Tensor, cfg: Any, t: Tensors, x: Tensor) -> Tensor:
    return x @ W.T + b + t["lora_shift"]


FUNCTIONS = {
    "relu": lambda z: z.clamp(min=0),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
}


def peanut(W: Tensor, b: Tensor, cfg: Any, t: Tensors, x: Tensor) -> Tensor:
    act = FUNCTIONS[cfg.act_fn]
    states = [act(W.T @ t["lora_P"].T)]  # (i, r)
    for n in range(cfg.depth):
        states.append(act(states[-1] @ t[f"lora_encoder_{n}"].T))
    h = states[-1]
    for n in range(cfg.depth):
        h = act(h @ t[f"lora_decoder_{n}"].T) + states[cfg.depth - 1 - n]
    return x @ (W + cfg.scaling * (h @ t["lora_Q"].T).T).T + b


ORACLES = {
    "loha": loha,
    "lokr": lokr,
    "hira": hira,
    "gralora": gralora,
    "glora": glora,
    "miss": miss,
    "beft": beft,
    "peanut": peanut,
}
FIELDS = {"beft": {"target_names": ("_proj$",)}}
