"""SmolLM2-135M under torch.compile: a training step with its blocks compiled, a token with the whole model compiled.

A step: 2 x 256 tokens, each block compiled, so that all share one graph. A token: batch 1 in a StaticCache, the model's
forward as one graph, after a prompt without one. Both change the scale and the adapter's values once they are compiled,
and say how many graphs that made and how often one broke off: it has to be none.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from contenders import base, ours, peft, train_step
from measure import Ratio, interleaved
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import StaticCache

import lora_lite as ll

PROMPT, MOST = 8, 128
Make = Callable[[], Any]


def graphs(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 64  # of one code object: all contenders share the model's
    makes: dict[str, Make] = {"base": base, "lora": ours, "dora": lambda: ours("dora"), "PEFT": peft}
    try:
        steps = makes | {"PEFT DoRA": lambda: peft(use_dora=True)}
        yield from _ratios("step", {name: (make, _step) for name, make in steps.items()}, ids, rounds)
        yield from _ratios("decode", {name: (make, _decode) for name, make in makes.items()}, ids, 4 * rounds)
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()


def _ratios(work: str, contenders: Mapping[str, tuple[Make, Any]], ids: Tensor, rounds: int) -> Iterator[Ratio]:
    runs: dict[str, Callable[[], object]] = {}
    models = {name: make() for name, (make, _) in contenders.items()}  # an attach has all graphs made anew
    torch._dynamo.reset()
    for name, (_, compiled) in contenders.items():
        counters.clear()
        started, model = time.perf_counter(), models[name]
        runs[name] = compiled(model, ids)
        for _ in range(3):
            runs[name]()
        before = counters["stats"]["unique_graphs"]
        breaks = sum(counters["graph_break"].values())
        print(f"  compiled {work}, {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        if name in ("lora", "dora"):
            change(model)
            runs[name]()
            ll.adapters(model)["default"].scale = 1.0
            more = counters["stats"]["unique_graphs"] - before
            yield Ratio(f"compiled {work}, {name}: graph breaks", breaks, 0, group="compiled")
            yield Ratio(f"compiled {work}, {name}: graphs for another scale and values", more, 0, group="compiled")
    times = interleaved(runs, rounds, f"compiled {work}")
    yield times.ratio(f"compiled {work}: LoRA / base", "lora", "base", 1.10, "compiled")
    yield times.ratio(f"compiled {work}: DoRA / base", "dora", "base", 1.10, "compiled")
    yield times.ratio(f"compiled {work}: LoRA / PEFT", "lora", "PEFT", 0.9, "compiled")
    if "PEFT DoRA" in runs:
        yield times.ratio(f"compiled {work}: DoRA / PEFT", "dora", "PEFT DoRA", 0.9, "compiled")


@torch.no_grad()
def change(model: Any) -> None:
    """Another scale, and other values."""
    adapter = ll.adapters(model)["default"]
    adapter.scale = 0.5
    for parameter in adapter.parameters():
        parameter.mul_(1.01)


def _step(model: Any, ids: Tensor) -> Callable[[], None]:
    for block in _llama(model).model.layers:
        block.compile()
    return train_step(model, ids)


def _decode(model: Any, ids: Tensor) -> Callable[[], None]:
    """A token a call; the cache is set back before it is full."""
    model.eval()
    inner = _llama(model)
    cache, prompt = StaticCache(config=inner.config, max_cache_len=MOST), ids.reshape(1, -1)[:, :PROMPT]
    forward = torch.compile(inner.forward)
    given: dict[str, Tensor] = {}

    def start() -> None:
        cache.reset()
        out = inner(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        given.update(input_ids=out.logits[:, -1].argmax(-1, keepdim=True), position_ids=torch.tensor([[PROMPT]]))

    @torch.no_grad()
    def token() -> None:
        if not given or int(given["position_ids"]) >= MOST - 1:
            start()
        out = forward(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        given.update(input_ids=out.logits[:, -1].argmax(-1, keepdim=True), position_ids=given["position_ids"] + 1)

    return token


def _llama(model: Any) -> Any:
    return model.base_model.model if hasattr(model, "peft_config") else model
