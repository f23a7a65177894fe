"""The cost of adapters on one CUDA device, beside the frozen base and PEFT: a table, JSON and a picture.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --model FOLDER --only training --checkpointing --tokens 8192

SmolLM2-135M-Instruct, or any folder, in bfloat16 and in nf4, rank 16 on all linear layers but the head.
Training: a row of 1k, 8k and 32k random tokens; forward, backward, fused AdamW; peak GiB of a contender with its base.
Decoding: batch 1 and 8 in a StaticCache, eager, compiled, and as a CUDA graph that goes on with another scale and other
values of the adapter, which is checked in the run (`lora_lite.capturable`).
Contenders share the base's weights and take turns, in a random order each round. A ratio to the frozen base is the
median of the rounds' ratios, with their quartiles; times are of the wall clock, between synchronisations. Beside each
ratio stand the floors of gpu_costs.py, by the rates of this device in this run.
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import RANK
from gpu_contenders import CONTENDERS, IN_A_GRAPH, Decoding, Run, Training, Turns, row, turns
from gpu_costs import Rates, Sizes
from gpu_decode import StaticDecoder, captured
from gpu_table import draw, show
from loguru import logger
from measure import machine
from smollm2 import smollm2_folder

import lora_lite as ll

WARM, PROMPT, TOKENS_A_CALL = 2, 8, 8
Capture = Callable[[StaticDecoder], Callable[[], None]]


@dataclass(frozen=True)
class Cost:
    """One line of the table."""

    work: str  # "training" or "decoding"
    base: str
    way: str  # "eager", "compiled" or "graph"; with "checkpointed"
    size: int  # tokens of a row, or rows
    contender: str
    is_out: bool = False  # of memory
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    ratio: float | None = None  # of its time to the frozen base's
    low: float | None = None  # the quartiles of that
    high: float | None = None
    to_peft: float | None = None  # of its time to PEFT's
    floor: float | None = None
    traffic: float | None = None

    @property
    def setting(self) -> str:
        unit = "tokens" if self.work == "training" else "rows"
        return f"{self.work}, {self.base}, {self.way}, {self.size} {unit}"


@dataclass(frozen=True)
class Bench:
    """What all sections go by."""

    device: torch.device
    rates: Rates
    rounds: int
    capture: Capture = captured
    checkpointing: bool = False

    def training(self, base: Any, base_name: str, tokens: int, is_compiled: bool) -> Iterator[Cost]:
        """A line for each contender at one length."""
        torch._dynamo.reset()
        ids, sizes = row(base, 1, tokens, self.device), Sizes.of(base, RANK)
        steps = {n: Training(base, n, ids, is_compiled, self.checkpointing) for n in CONTENDERS}
        runs = {name: Run(step.make, self.device) for name, step in steps.items()}
        way = ("compiled" if is_compiled else "eager") + (", checkpointed" if self.checkpointing else "")
        done = turns(runs, self.rounds, f"training, {base_name}, {way}, {tokens} tokens")
        for name in CONTENDERS:
            cost = Cost("training", base_name, way, tokens, name, **_measured(done, name, tokens))
            floors = {"floor": sizes.flop_floor(self.checkpointing), "traffic": sizes.traffic(self.rates)}
            peak = steps[name].peak(runs[name])
            yield _with(cost, peak_bytes=peak, **(floors if name != "frozen base" and cost.ratio else {}))

    def decoding(self, base: Any, base_name: str, batch: int, way: str) -> Iterator[Cost]:
        """A line for each contender at one batch."""
        torch._dynamo.reset()
        ids, sizes = row(base, batch, PROMPT, self.device), Sizes.of(base, RANK)
        length = PROMPT + TOKENS_A_CALL * (WARM + self.rounds)
        names = IN_A_GRAPH if way == "graph" else CONTENDERS
        with ExitStack() as blocks:
            works = {n: Decoding(base, n, ids, length, way, self.capture, TOKENS_A_CALL, blocks) for n in names}
            runs = {name: Run(work.make, self.device) for name, work in works.items()}
            done = turns(runs, self.rounds, f"decoding, {base_name}, {way}, {batch} rows")
        for name in names:
            cost = Cost("decoding", base_name, way, batch, name, **_measured(done, name, TOKENS_A_CALL * batch))
            # In a graph DoRA's norm is computed at each token: W is read once more.
            floor = sizes.decode_floor(reads_weights_again=way == "graph" and name == "DoRA")
            yield _with(cost, floor=floor if name != "frozen base" and cost.ratio else None)


def _measured(done: Turns, name: str, tokens: int) -> dict[str, Any]:
    """The fields of a `Cost` that the times say."""
    if name in done.out:
        return {"is_out": True}
    fields: dict[str, Any] = {"tokens_per_second": tokens / statistics.median(done.times.seconds[name])}
    if "frozen base" not in done.out:
        ratio = done.times.ratio(name, name, "frozen base")
        fields |= {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
    if f"PEFT {name}" in done.times.seconds:
        fields["to_peft"] = done.times.ratio(name, name, f"PEFT {name}").value
    return fields


def _with(cost: Cost, **fields: Any) -> Cost:
    return Cost(**(asdict(cost) | fields))


def sections(
    bench: Bench,
    load: Callable[[str], Any],
    bases: list[str],
    tokens: list[int],
    batches: list[int],
    ways: list[str],
    only: list[str],
) -> Iterator[Cost]:
    """All lines, base by base: one is in memory at a time."""
    for base_name in bases:
        try:
            base = load(base_name).requires_grad_(False)
        except torch.OutOfMemoryError:
            yield Cost("loading", base_name, "", 0, "frozen base", is_out=True)
            continue
        for way in ways:
            if "training" in only and way != "graph":
                for length in tokens:
                    yield from bench.training(base, base_name, length, way == "compiled")
            if "decoding" in only:
                for batch in batches:
                    yield from bench.decoding(base, base_name, batch, way)
        del base


app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Base(StrEnum):
    BF16 = "bf16"
    NF4 = "nf4"


class Way(StrEnum):
    EAGER = "eager"
    COMPILED = "compiled"
    GRAPH = "graph"


class Work(StrEnum):
    TRAINING = "training"
    DECODING = "decoding"


@app.command()
def main(
    model: Annotated[Path | None, typer.Option(help="A folder; SmolLM2-135M-Instruct by default.")] = None,
    base: Annotated[list[Base], typer.Option(help="Of the weights.")] = [*Base],  # noqa: B006
    way: Annotated[list[Way], typer.Option(help="Of running.")] = [*Way],  # noqa: B006
    only: Annotated[list[Work], typer.Option(help="Of the two.")] = [*Work],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(min=2, help="In a row, in training.")] = [1024, 8192, 32768],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="Rows, in decoding.")] = [1, 8],  # noqa: B006
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Gradient checkpointing.")] = False,
    rounds: Annotated[int, typer.Option(min=3, help="Of each comparison.")] = 10,
    out: Annotated[Path, typer.Option(help="Where gpu.json and gpu.png go.")] = Path("runs", "gpu"),
) -> None:
    """Measure, and print a line for each contender."""
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py measures a CUDA device, and this PyTorch finds none", file=sys.stderr)
        raise typer.Exit(1)
    logger.remove()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    device, folder, started = torch.device("cuda", 0), str(model or smollm2_folder()), time.perf_counter()

    def load(name: str) -> Any:
        return ll.load_base(folder, torch.bfloat16, None if name == "bf16" else name, device_map=device)

    bench = Bench(device, Rates.measured(device, torch.bfloat16), rounds, checkpointing=checkpointing)
    costs = []
    for cost in sections(bench, load, [*base], tokens, batch, [*way], [*only]):
        costs.append(cost)
        print(f"{cost.setting}: {cost.contender}: {cost.ratio}", file=sys.stderr)
    write(costs, bench, out, folder, time.perf_counter() - started)


def write(costs: list[Cost], bench: Bench, out: Path, model: str, seconds: float) -> None:
    """The table, runs/gpu/gpu.json and gpu.png."""
    show(costs, bench.rates, device_name(bench.device))
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "device": device_name(bench.device), "model": model, "rank": RANK}
    record |= {"rates": asdict(bench.rates), "rounds": bench.rounds, "seconds": seconds}
    record["costs"] = [asdict(cost) for cost in costs]
    (out / "gpu.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(costs, out / "gpu.png", device_name(bench.device))


def device_name(device: torch.device) -> str:
    """The GPU, its memory, and the CUDA that PyTorch was built with."""
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    app()
