"""The cost of kept rounds: a forward of 256 tokens and a step of decoding, as ratios to the base in one run.

    python benchmarks/history.py [--rounds 1 20]

LoRAs of rank 8 on all 210 linear layers of SmolLM2-135M, on one thread: as rounds of one history and,
beside it, as adapters that are attached by name. Interleaved; medians of the rounds' ratios, with their quartiles.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contenders import load
from loguru import logger
from measure import interleaved
from torch import Tensor, nn

import lora_lite as ll

TOKENS, CONTEXT, RANK, REPEATS = 256, 64, 8, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 20])
    args = parser.parse_args()
    logger.remove()
    torch.set_num_threads(1)
    base = load()
    models = {"base": base}
    for rounds in args.rounds:
        models[f"history of {rounds}"] = with_history(copy.deepcopy(base), rounds)
        models[f"{rounds} attached"] = with_adapters(copy.deepcopy(base), rounds)
    ids = torch.randint(0, base.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for what, prepare in (("forward", forward), ("decode step", decode_step)):
            compare(what, {name: prepare(model, ids) for name, model in models.items()})


def compare(what: str, runs: dict[str, Callable[[], Any]]) -> None:
    times = interleaved(runs, REPEATS, what)
    print(f"{what:<20}{'ratio':>9}{'quartiles':>14}")
    for name in runs:
        ratio = times.ratio(name, name, "base")
        print(f"  {name:<18}{ratio.value:>9.2f}{ratio.low:>9.2f}{ratio.high:>6.2f}")


def with_history(model: nn.Module, rounds: int) -> nn.Module:
    for i in range(rounds):
        moved(ll.attach(model, ll.LoRAConfig(r=RANK)))
        ll.freeze_into(model, c=0.5, label=f"round-{i}")
    return model


def with_adapters(model: nn.Module, rounds: int) -> nn.Module:
    for i in range(rounds):
        adapter = ll.attach(model, ll.LoRAConfig(r=RANK), f"round-{i}")
        moved(adapter)
        adapter.scale = 0.5
    return model


@torch.no_grad()
def moved(adapter: ll.Adapter) -> None:
    for parameter in adapter.parameters():
        parameter.add_(1e-3 * torch.randn(parameter.shape))


def forward(model: Any, ids: Tensor) -> Callable[[], Any]:
    model(input_ids=ids)
    return partial(model, input_ids=ids)


def decode_step(model: Any, ids: Tensor) -> Callable[[], Any]:
    """One token more after CONTEXT of them, which stay in the cache as they are."""
    cache = model(input_ids=ids[:, :CONTEXT], use_cache=True).past_key_values

    def step() -> None:
        model(input_ids=ids[:, CONTEXT : CONTEXT + 1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    step()
    return step


if __name__ == "__main__":
    main()
