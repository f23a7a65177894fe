"""Many adapters at once, on SmolLM2-135M-Instruct: what it costs that each row of a batch has an adapter of its own.

    python benchmarks/rows.py               # five minutes of two cores
    python benchmarks/rows.py --attached 100 --rounds 10

8 rows by 8 LoRAs of rank 16, 16 tokens one by one after a prompt of 64 (decode) and 128 tokens a row, beside one
adapter for all rows, the base, and PEFT's `adapter_names`; how a step grows from 1 to 64 adapters in 64 rows; and what
adapters cost that are attached and unloaded. Ratios of interleaved runs, with their quartiles.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import torch
import typer
from contenders import RANK, load, settle, stored_in
from loguru import logger
from measure import Ratio, Times, interleaved
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache

import lora_lite as ll

PROMPT, LONG, ROWS, STEPS = 64, 128, 8, 16


def with_adapters(n: int) -> Any:
    model = load()
    for i in range(n):
        settle(ll.attach(model, ll.LoRAConfig(r=RANK), f"a{i}").parameters())
    return model.eval()


def with_peft(n: int) -> Any:
    model: Any = load()
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, n):
        model.add_adapter(f"a{i}", config)
    settle(p for name, p in model.named_parameters() if "lora_" in name)
    return model.eval()


def decode(model: Any, rows: int, names: Sequence[str] | None = None, **options: Any) -> Callable[[], Any]:
    """One step after a prompt, with a cache that is copied for each."""
    ids = torch.randint(9, 900, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(input_ids=ids, past_key_values=DynamicCache(), **options).past_key_values

    def step() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, **options)
        cache.crop(-1)

    return within(model, step, names)


def forward(model: Any, rows: int, names: Sequence[str] | None = None, **options: Any) -> Callable[[], Any]:
    ids = torch.randint(9, 900, (rows, LONG), generator=torch.Generator().manual_seed(0))
    return within(model, lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1, **options), names, 1)


def within(model: Any, step: Callable[[], Any], names: Sequence[str] | None, steps: int = STEPS) -> Callable[[], Any]:
    """Several steps, in one block of rows where there are names: a block is that of a whole `generate`."""

    @torch.no_grad()
    def run() -> None:
        if names is None:
            for _ in range(steps):
                step()
            return
        with ll.rows(model, list(names)):
            for _ in range(steps):
                step()

    return run


def show(times: Times, pairs: Sequence[tuple[str, str, float | None]], group: str) -> None:
    for one, other, mark in pairs:
        ratio = times.ratio(f"{one} / {other}", one, other, mark)
        verdict = "" if mark is None else f"  mark {mark:g} {'met' if ratio.met else 'missed'}"
        print(f"{group:8}{ratio.measure:44}{ratio.value:6.2f} ({ratio.low:.2f} to {ratio.high:.2f}){verdict}")


def mixed_batch(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """The section of `make bench`: the decoding of 8 rows."""
    names = [f"a{i}" for i in range(ROWS)]
    contenders = {
        "base": decode(load().eval().requires_grad_(False), ROWS),
        "1 adapter": decode(with_adapters(1), ROWS),
        "8 adapters": decode(with_adapters(ROWS), ROWS, names),
        "PEFT": decode(with_peft(ROWS), ROWS, adapter_names=names),
    }
    times = interleaved(contenders, rounds, "rows")
    yield times.ratio("decode 8 rows, 8 adapters / 1 adapter", "8 adapters", "1 adapter", 1.3, "rows")
    yield times.ratio("decode 8 rows, 8 adapters / PEFT", "8 adapters", "PEFT", 0.4, "rows")
    yield times.ratio("decode 8 rows, base / PEFT", "base", "PEFT", None, "rows")


def main(
    rounds: Annotated[int, typer.Option(help="runs of each contender, a block of rows a run")] = 8,
    attached: Annotated[int, typer.Option(help="adapters of which all but one are unloaded")] = 100,
    grow: Annotated[bool, typer.Option(help="also 1 to 64 adapters in 64 rows")] = True,
) -> None:
    names = [f"a{i}" for i in range(ROWS)]
    print(
        f"SmolLM2-135M-Instruct in {stored_in()}, {torch.get_num_threads()} threads, LoRA of rank {RANK}, {ROWS} rows"
    )
    base, one, many, theirs = (
        load().eval().requires_grad_(False),
        with_adapters(1),
        with_adapters(ROWS),
        with_peft(ROWS),
    )
    pairs = [
        ("8 adapters", "1 adapter", 1.3),
        ("8 adapters", "PEFT", 0.4),
        ("base", "PEFT", None),
        ("1 adapter", "base", None),
    ]
    for group, work in (("decode", decode), ("128", forward)):
        contenders = {
            "base": work(base, ROWS),
            "1 adapter": work(one, ROWS),
            "8 adapters": work(many, ROWS, names),
            "PEFT": work(theirs, ROWS, adapter_names=names),
        }
        show(interleaved(contenders, rounds, group), pairs, group)
    del many, theirs
    idle = with_adapters(1)
    ll.detach(idle)
    adapter = ll.attach(idle, ll.LoRAConfig(r=RANK), "a0")
    settle(adapter.parameters())
    for i in range(1, attached):
        ll.attach(idle, ll.LoRAConfig(r=RANK), f"a{i}")
        ll.unload_to(idle, "cpu", f"a{i}")
    label = f"1 of {attached}"
    times = interleaved({"1 adapter": decode(one, 1), label: decode(idle, 1)}, rounds, "unloaded")
    show(times, [(label, "1 adapter", None)], "unloaded")
    if grow:
        del idle
        model, contenders = with_adapters(64), {}
        for n in (1, 4, 16, 64):
            contenders[f"{n} in 64 rows"] = decode(model, 64, [f"a{i % n}" for i in range(64)])
        times = interleaved(contenders, rounds, "growth")
        show(times, [(name, "1 in 64 rows", None) for name in list(contenders)[1:]], "growth")


if __name__ == "__main__":
    logger.disable("lora_lite")
    typer.run(main)
