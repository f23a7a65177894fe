"""Every method that PEFT has, beside PEFT's: one layer 576 -> 1536 on one thread, the same adapter on both sides.

few tokens     without gradients, in eval mode: (ours - bare layer) / (PEFT - bare layer), in float32 and bfloat16
training step  forward and backward of 2 x 256 tokens, with the gradients of x and of the adapter; no optimizer, which
               is the same code: ours / PEFT's
               Ours may remember what it makes of its tensors, where PEFT's makes it again; docs/limits.md says how much
kept           bytes that autograd keeps from the forward for the backward: ours / PEFT's, exact

Rank 16 where r is a LoRA's rank, and the defaults otherwise. PEFT's side opens the folder that `save_peft` writes, and
its outputs are compared before anything is measured. A time is the minimum of all calls, which take turns in a random
order, as in layer.py: what the code takes where nothing else runs.
"""

import copy
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from contenders import BATCH, RANK, TOKENS
from measure import Ratio
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lora_lite as ll
from lora_lite.dtypes import dtype_name
from lora_lite.io.peft.formats import FORMATS

METHODS = sorted({"lora", "dora"} | {form.variant for form in FORMATS})
FIELDS: dict[str, dict[str, object]] = {
    "adamss": {"num_subspaces": 1},  # or of a random W both find other clusters
    "randlora": {"save_projection": True},
    "vblora": {"vector_length": 64},
}
OTHER_RANKS = {"adamss", "pvera", "randlora", "supertuning", "tinylora", "unilora", "vblora", "vera"}
"""Whose r isn't a LoRA's: it keeps its default."""
D_IN, D_OUT, FEW, BURST = 576, 1536, (1, 8), 4
DTYPES = torch.float32, torch.bfloat16
SECONDS = 0.04
"""Of each timing at a time, of a round."""
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far the outputs may lie apart, as a share of their norm."""
OF = {"few tokens": "fastest", "training step": "fastest", "kept": "exact"}
MARKS = {"few tokens": 0.8, "training step": 0.85, "kept": 0.5}
Side = tuple[nn.Module, nn.Module]
"""A layer, and the model that has its tensors: those that layers share lie elsewhere."""


def methods(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """A line for each method and kind of cost, the worst of its cases, then the medians over methods."""
    threads, costs = torch.get_num_threads(), dict[str, dict[str, dict[str, float]]]()  # by kind, case and method
    torch.set_num_threads(1)
    try:
        for method in METHODS:
            refused = []
            for dtype in DTYPES:
                sides = _sides(method, dtype)
                if sides is None:
                    refused.append(dtype_name(dtype))
                    continue
                for kind, case, ratio in _costs(method, sides, dtype, rounds):
                    costs.setdefault(kind, {}).setdefault(case, {})[method] = ratio
            for kind, cases in costs.items():
                ratios = [of_methods[method] for of_methods in cases.values() if method in of_methods]
                name = f"{method}: {kind} / PEFT" + "".join(f", which refuses {dtype}" for dtype in refused)
                if ratios:
                    yield Ratio(name, max(ratios), None, min(ratios), max(ratios), "methods")
    finally:
        torch.set_num_threads(threads)
    for kind, cases in costs.items():
        for case, of_methods in cases.items():
            median = statistics.median(of_methods.values())
            name = f"median of {len(of_methods)} methods: {kind}, {case}"
            yield Ratio(name, median, MARKS[kind], group="medians", of=OF[kind])
        worst, method = max((ratio, method) for of_methods in cases.values() for method, ratio in of_methods.items())
        yield Ratio(f"largest of all: {kind}, {method}", worst, 1.0, group="medians", of=OF[kind])


def _costs(method: str, sides: dict[str, Side], dtype: torch.dtype, rounds: int) -> Iterator[tuple[str, str, float]]:
    """The kind, the case and the ratio. Without a line where neither side keeps a byte."""
    seconds, name = SECONDS * rounds, dtype_name(dtype)
    for tokens in FEW:
        with torch.no_grad():
            x = torch.randn(1, tokens, D_IN).to(dtype)
            best = _fastest({side: _call(layer.eval(), x) for side, (layer, _) in sides.items()}, seconds)
        ratio = (best["ours"] - best["bare"]) / (best["PEFT"] - best["bare"])
        case = f"{name}, {tokens} token{'s' if tokens > 1 else ''}"
        _note(method, case, {side: f"{µs:.1f} µs" for side, µs in best.items()}, ratio)
        yield "few tokens", case, ratio
    steps = {side: _step(*layers, dtype) for side, layers in sides.items() if side != "bare"}
    best = _fastest(steps, 2 * seconds)
    ratio = best["ours"] / best["PEFT"]
    _note(method, f"{name}, step", {side: f"{µs / 1000:.2f} ms" for side, µs in best.items()}, ratio)
    yield "training step", name, ratio
    kept = {side: _kept(*layers, dtype) for side, layers in sides.items() if side != "bare"}
    if kept["PEFT"] or kept["ours"]:
        ratio = kept["ours"] / kept["PEFT"] if kept["PEFT"] else float("inf")
        _note(method, f"{name}, kept", {side: f"{size / 2**20:.3f} MiB" for side, size in kept.items()}, ratio)
        yield "kept", name, ratio


def _sides(method: str, dtype: torch.dtype) -> dict[str, Side] | None:
    """The bare layer, ours and PEFT's, which are compared; None where PEFT refuses the dtype.

    Raises:
        ValueError: if the two give other outputs.
    """
    torch.manual_seed(0)
    model, generator = nn.Sequential(), torch.Generator().manual_seed(0)
    model.add_module("proj", nn.Linear(D_IN, D_OUT, bias=False, dtype=dtype))
    model.requires_grad_(False)
    bare, base = copy.deepcopy(model), copy.deepcopy(model)
    config: Any = ll.config_for(method)
    has_rank = "r" in {field.name for field in fields(config)} and method not in OTHER_RANKS
    chosen = ({"r": RANK} if has_rank else {}) | FIELDS.get(method, {})
    adapter = ll.attach(model, config(target_names="proj", target_roles=(), **chosen))
    with torch.no_grad():
        for parameter in adapter.parameters():  # as after some training: with zeros some products could be skipped
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
    with tempfile.TemporaryDirectory() as folder:
        ll.save_peft(model, folder)
        theirs: Any = PeftModel.from_pretrained(base, folder, is_trainable=True)
    x = torch.randn(BATCH, TOKENS, D_IN, generator=generator).to(dtype)
    with torch.no_grad():
        mine = model.eval()(x)
        try:
            other = theirs.base_model.model.eval()(x)
        except (RuntimeError, TypeError) as error:
            print(f"  {method}, {dtype_name(dtype)}: PEFT's raises {str(error).splitlines()[0]}", file=sys.stderr)
            return None
    apart = float((mine.float() - other.float()).norm() / other.float().norm())
    if apart > CLOSE[dtype]:
        raise ValueError(
            f"{method}: in {dtype_name(dtype)} the outputs of ours and PEFT's are {apart:.1e} of their norm apart\n"
            f"  wanted {CLOSE[dtype]:.0e} at most: compare the settings that save_peft writes"
        )
    return {
        "bare": (bare.proj, bare),
        "ours": (model.proj, model),
        "PEFT": (theirs.base_model.model.proj, theirs),
    }


def _call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def _step(layer: nn.Module, model: nn.Module, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward, with fresh gradients each time."""
    x, u = (torch.randn(BATCH, TOKENS, side).to(dtype) for side in (D_IN, D_OUT))
    x.requires_grad_()
    trained = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    layer.train()

    def step() -> None:
        for tensor in trained:
            tensor.grad = None
        layer(x).backward(u)

    return step


def _kept(layer: nn.Module, model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the storages that autograd keeps, each once, parameters and buffers aside."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return tensor

    x = torch.randn(BATCH, TOKENS, D_IN).to(dtype).requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer.train()(x)
    of_model = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    del y  # only now, so that no storage's address was used again
    return sum(size for address, size in storages.items() if address not in of_model)


def _fastest(contenders: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Microseconds by contender."""
    best, order, ends = dict.fromkeys(contenders, float("inf")), random.Random(0), time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for name in order.sample(list(contenders), len(contenders)):
            run = contenders[name]
            for _ in range(BURST):
                started = time.perf_counter_ns()
                run()
                best[name] = min(best[name], (time.perf_counter_ns() - started) / 1000)
    return best


def _note(method: str, case: str, costs: dict[str, str], ratio: float) -> None:
    print(f"  {method}, {case}: {', '.join(map(' '.join, costs.items()))}; {ratio:.2f}", file=sys.stderr)
