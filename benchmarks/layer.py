"""One layer 576 -> 1536 on one thread, without gradients, of few tokens: what decoding adds to every layer.

Bare layer, a bare hook with nothing but LoRA's products, PEFT's LoRA and ours, rank 16 in float32. They take turns in a
random order, each with BURST calls, since in a model the same code runs at one layer after the other; a time is the
minimum of all calls, which is what the code takes where nothing else runs.
"""

import random
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from contenders import RANK, configured, settle
from measure import Ratio
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_lite as ll

D_IN, D_OUT, TOKENS, TURNS, BURST = 576, 1536, (1, 8), 250, 4
"""TURNS: of each contender in a round."""


def layer(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in TOKENS:
                contenders, x = _contenders(dtype), torch.randn(1, tokens, D_IN).to(dtype)
                out = contenders["LoRA"](x)
                for name in ("PEFT", "bare hook"):  # the same work, up to rounding
                    torch.testing.assert_close(contenders[name](x), out, rtol=0.02, atol=0.005)
                best = _fastest(contenders, x, TURNS * rounds)
                name = f"one layer, {str(dtype).removeprefix('torch.')}, {tokens} token{'s' if tokens > 1 else ''}"
                print(f"{name}, µs: " + ", ".join(f"{contender} {µs:.0f}" for contender, µs in best.items()))
                added = {contender: µs - best["bare layer"] for contender, µs in best.items()}
                for other, mark in (("PEFT", 1.0), ("bare hook", 1.15)):
                    ratio = added["LoRA"] / added[other]
                    yield Ratio(f"{name}: LoRA adds / {other} adds", ratio, mark, group="layer", of="fastest")
    finally:
        torch.set_num_threads(threads)


def _contenders(dtype: torch.dtype) -> dict[str, nn.Module]:
    ours, bare = _plain(dtype), _plain(dtype)
    settle(ll.attach(ours, configured("lora", target_names="^0$")).parameters())
    hooked: Any = bare[0]
    hooked.bare_a, hooked.bare_b = (nn.Parameter(torch.empty(shape)) for shape in ((RANK, D_IN), (D_OUT, RANK)))
    settle((hooked.bare_a, hooked.bare_b))
    hooked.register_forward_hook(_bare_hook)
    theirs: Any = get_peft_model(_plain(dtype), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]))
    settle(p for p in theirs.parameters() if p.requires_grad)
    return {
        "bare layer": _plain(dtype)[0],
        "bare hook": hooked,
        "PEFT": theirs.base_model.model[0].eval(),
        "LoRA": ours[0],
    }


def _plain(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False, dtype=dtype)).requires_grad_(False).eval()


def _bare_hook(layer: Any, args: tuple[Tensor], y: Tensor) -> Tensor:
    return y.add_(F.linear(F.linear(args[0].float(), layer.bare_a), layer.bare_b))


@torch.no_grad()
def _fastest(contenders: dict[str, nn.Module], x: Tensor, turns: int) -> dict[str, float]:
    """Microseconds by contender."""
    best, order = dict.fromkeys(contenders, float("inf")), random.Random(0)
    for _ in range(turns):
        for name in order.sample(list(contenders), len(contenders)):
            run = contenders[name]
            for _ in range(BURST):
                started = time.perf_counter_ns()
                run(x)
                best[name] = min(best[name], (time.perf_counter_ns() - started) / 1000)
    return best
