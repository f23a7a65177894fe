"""The cost of adapters beside the frozen base and beside PEFT, as ratios in one run: a table, JSON and a picture.

    make bench [ARGS="--text gsm8k.jsonl"]

SmolLM2-135M-Instruct in the dtype that load_base chooses here, rank 16 on all 210 linear layers, 2 x 256 tokens;
decoding 64 tokens after 8.
Contenders take turns, in a random order each round; a ratio is the median of the rounds' ratios, with their quartiles.
Bytes, those that autograd keeps and those of all tensors, are exact. Times are wall-clock times of the whole step:
forward, backward, fused AdamW. A bare hook with nothing but a LoRA's products shows how much of a ratio they are, on
this machine.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from contenders import choose, stored_in, text
from experts import experts
from graphs import graphs
from growth import growth_of_starting
from layer import layer
from loguru import logger
from measure import Ratio, machine
from memory import memory, peaks
from merge import on_disk
from methods import methods
from picture import draw, show
from rows import mixed_batch
from starting import pissa, starting
from steps import compiled, decoding, quantised, training
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from lora_lite.base.load import product_milliseconds, product_times
from lora_lite.dtypes import dtype_name

Section = Callable[[Tensor, int], Iterator[Ratio]]
GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k/test.jsonl"
"""Beside the repository, where it is."""

SECTIONS: dict[str, Section] = {
    "layer": layer,
    "methods": methods,
    "memory": memory,
    "starting": starting,
    "growth": growth_of_starting,
    "on disk": on_disk,
    "pissa": pissa,
    "training": training,
    "quantised": quantised,
    "decoding": decoding,
    "rows": mixed_batch,
    "experts": experts,
    "peaks": peaks,
    "stack": compiled,
    "compiled": graphs,
}
QUICK = ["layer", "memory", "training", "decoding"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    file: Annotated[Path | None, typer.Option("--text", help="JSONL of questions and answers, such as GSM8K.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(SECTIONS)}.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Of each timed comparison.")] = 10,
    quick: Annotated[bool, typer.Option("--quick", help=f"3 rounds of {', '.join(QUICK)}.")] = False,
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], typer.Option(help="Of the base.")] = "auto",
    out: Annotated[Path, typer.Option(help="Where bench.json and bench.png go.")] = Path("runs", "bench"),
) -> None:
    """Measure, and print a line for each ratio, with its mark."""
    logger.remove()
    warnings.simplefilter("ignore")
    disable_progress_bar()  # of loading: each contender has its own model
    torch.manual_seed(0)
    choose(dtype)
    compared = torch.bfloat16, torch.float32
    print(f"the base is in {dtype_name(stored_in())}; {product_times(*compared)}", file=sys.stderr)
    ids = text(file or (GSM8K if GSM8K.exists() else None))
    started, ratios, names = time.perf_counter(), [], only or (QUICK if quick else [*SECTIONS])
    rounds = 3 if quick else rounds
    for i, name in enumerate(names, 1):
        begun = time.perf_counter()
        for ratio in SECTIONS[name](ids, rounds):
            ratios.append(ratio)
            print(f"{ratio.measure}: {ratio.value:.3f}", file=sys.stderr)
        print(f"{i} of {len(names)}, {name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    seconds = time.perf_counter() - started
    show(ratios, seconds)
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"machine": machine(), "dtype": dtype_name(stored_in())}
    record |= {"product_milliseconds": {dtype_name(d): product_milliseconds(d) for d in compared}}
    record |= {"seconds": seconds, "rounds": rounds}
    record["ratios"] = [ratio.record() for ratio in ratios]
    (out / "bench.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(ratios, out / "bench.png")


if __name__ == "__main__":
    app()
