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
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from contenders import (
    bare,
    base,
    choose,
    decoder,
    load,
    ours,
    peft,
    stack,
    stack_input,
    stack_ours,
    stack_peft,
    stored_in,
    text,
    train_step,
)
from growth import growth_of_starting
from layer import layer
from loguru import logger
from measure import Ratio, Times, floor, in_a_process, interleaved, machine, peak_of, saved
from merge import on_disk
from methods import methods
from peft import PeftModel
from picture import draw, show
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.base.load import product_milliseconds, product_times
from lora_lite.dtypes import dtype_name

Section = Callable[[Tensor, int], Iterator[Ratio]]
NEW_TOKENS = 64
GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k/test.jsonl"
"""Beside the repository, where it is."""


def memory(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """Bytes that autograd keeps above the frozen base: exact."""
    plain = base()
    frozen = saved(plain, ids)
    model = ours()
    least = floor(plain, ids, ll.adapters(model)["default"].targets)
    lora = saved(model, ids) - frozen
    theirs = saved(peft(), ids) - frozen
    dropped = saved(ours(dropout=0.05), ids) - frozen
    yield Ratio("LoRA: kept for backward / floor", lora / least, 1.05, group="memory")
    yield Ratio("LoRA: kept / PEFT", lora / theirs, group="memory")
    if stored_in() == torch.bfloat16:  # PEFT's adapters are in the base's dtype
        yield Ratio(
            "LoRA: kept / PEFT with bf16 adapters", lora / (saved(peft(bf16=True), ids) - frozen), group="memory"
        )
    yield Ratio("LoRA with dropout: kept / without", dropped / lora, 1.10, group="memory")
    yield Ratio(
        "DoRA: kept / PEFT",
        (saved(ours("dora"), ids) - frozen) / (saved(peft(use_dora=True), ids) - frozen),
        0.22,
        group="memory",
    )
    yield from growth(ids, frozen, lora, least)


def growth(ids: Tensor, frozen: int, lora: int, least: int) -> Iterator[Ratio]:
    """The bytes kept grow with layers, rank and tokens no faster than they do, and not with what is disabled."""
    half = saved(ours(layers=range(15)), ids) - frozen
    yield Ratio("kept by 30 blocks / 2 x 15 blocks", lora / (2 * half), 1.05, group="growth")
    more = saved(ours(r=64), ids) - frozen - least
    yield Ratio("kept beside x at rank 64 / 4 x rank 16", more / (4 * (lora - least)), 1.05, group="growth")
    quarter = ids[:, : ids.shape[1] // 4]
    few = saved(ours(), quarter) - saved(base(), quarter)
    yield Ratio("kept of 512 tokens / 4 x 128 tokens", lora / (4 * few), 1.05, group="growth")
    model = ours()
    for i in range(8):
        ll.attach(model, ll.LoRAConfig(r=16), f"off{i}").scale = 0.0
    yield Ratio("kept with 8 disabled adapters / without", (saved(model, ids) - frozen) / lora, 1.0, group="growth")


def training(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    crowded = ours()
    for i in range(8):
        ll.attach(crowded, ll.LoRAConfig(r=16), f"off{i}").scale = 0.0
        for parameter in ll.adapters(crowded)[f"off{i}"].parameters():
            parameter.requires_grad_(False)
    models = {
        "base": base(),
        "lora": ours(),
        "PEFT": peft(),
        "dora": ours("dora"),
        "PEFT DoRA": peft(use_dora=True),
        "crowded": crowded,
        "rank 64": ours(r=64),
        "15 blocks": ours(layers=range(15)),
        "bare hook": bare(),
    }
    if in_bf16 := stored_in() == torch.bfloat16:  # PEFT's adapters are in the base's dtype
        models["PEFT bf16"] = peft(bf16=True)
    times = interleaved({name: train_step(model, ids) for name, model in models.items()}, rounds, "training")
    yield times.ratio("LoRA step / frozen base", "lora", "base", 1.10, "training")
    yield times.ratio("LoRA step / PEFT", "lora", "PEFT", 0.85, "training")
    if in_bf16:
        yield times.ratio("LoRA step / PEFT with bf16 adapters", "lora", "PEFT bf16", 1.0, "training")
    yield times.ratio("DoRA step / frozen base", "dora", "base", 1.15, "training")
    yield times.ratio("DoRA step / PEFT", "dora", "PEFT DoRA", 0.5, "training")
    yield times.ratio("LoRA step with 8 disabled adapters / without", "crowded", "lora", 1.05, "training")
    added = times.above("base")
    yield added.ratio("step time added at rank 64 / at rank 16", "rank 64", "lora", 4.0, "training")
    yield added.ratio("step time added by 30 blocks / by 15", "lora", "15 blocks", group="training")
    for name in ("PEFT", *(["PEFT bf16"] if in_bf16 else []), "PEFT DoRA", "bare hook"):
        yield times.ratio(f"{name} step / frozen base", name, "base", group="peers")


def quantised(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    models = {"base": base("nf4"), "lora": ours(quantization="nf4"), "PEFT": peft("nf4")}
    times = interleaved({name: train_step(model, ids) for name, model in models.items()}, rounds, "nf4")
    yield times.ratio("nf4: LoRA step / PEFT", "lora", "PEFT", 0.9, "training")
    yield times.ratio("nf4: LoRA step / frozen base", "lora", "base", group="training")


def decoding(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """A round is a token: all contenders are at the same one."""
    merged = ours()
    ll.merge(merged, keep=False)
    models = {"base": base(), "lora": ours(), "dora": ours("dora"), "merged": merged, "PEFT": peft()}
    models |= {"PEFT DoRA": peft(use_dora=True), "bare hook": bare()}
    for batch in (1, 8):
        runs = {name: decoder(model, ids, batch) for name, model in models.items()}
        times = interleaved(runs, NEW_TOKENS, f"decoding, batch {batch}", warm=2)  # the prompt, and one token
        yield times.ratio(f"decode LoRA / base, batch {batch}", "lora", "base", 1.10, "decoding")
        yield times.ratio(f"decode DoRA / base, batch {batch}", "dora", "base", 1.15, "decoding")
        yield times.ratio(f"decode merged / base, batch {batch}", "merged", "base", 1.00, "decoding")
        yield times.ratio(f"decode LoRA / PEFT, batch {batch}", "lora", "PEFT", group="decoding")
        yield times.ratio(f"decode DoRA / PEFT, batch {batch}", "dora", "PEFT DoRA", group="decoding")
        for name in ("PEFT", "PEFT DoRA", "bare hook"):
            yield times.ratio(f"decode {name} / base, batch {batch}", name, "base", group="peers")


def starting(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """Attach and load on a model that is there, each on a fresh one; the import in processes of their own."""
    attached: dict[str, list[float]] = {"ours": [], "PEFT": []}
    loaded: dict[str, list[float]] = {"ours": [], "PEFT": []}
    with tempfile.TemporaryDirectory() as folder:
        ll.save(ours(), f"{folder}/a.safetensors")
        peft().save_pretrained(f"{folder}/peft")
        sizes = [Path(folder, file).stat().st_size for file in ("a.safetensors", "peft/adapter_model.safetensors")]
        yield Ratio("file of a LoRA / PEFT", sizes[0] / sizes[1], group="starting")
        order = random.Random(0)
        for _ in range(rounds):
            ways: dict[str, Callable[[nn.Module], object]] = {
                "ours": lambda model: ll.load(model, f"{folder}/a.safetensors"),
                "PEFT": lambda model: PeftModel.from_pretrained(model, f"{folder}/peft"),
            }
            for name in order.sample(list(ways), 2):
                loaded[name].append(timed(ways[name], load()))
            attaches = {"ours": lambda model: ll.attach(model, ll.LoRAConfig(r=16)), "PEFT": attach_peft}
            for name in order.sample(list(attaches), 2):
                attached[name].append(timed(attaches[name], load()))
    yield Times(attached).ratio("attach to 210 layers / PEFT", "ours", "PEFT", 0.1, "starting")
    yield Times(loaded).ratio("load a file / PEFT", "ours", "PEFT", 0.1, "starting")
    runs = {name: lambda name=name: in_a_process("-c", f"import {name}") for name in ("torch", "lora_lite")}
    times = interleaved(runs, rounds, "import")
    yield times.ratio("import lora_lite / import torch", "lora_lite", "torch", 1.04, "starting")
    yield from in_and_out(rounds)


def in_and_out(rounds: int) -> Iterator[Ratio]:
    """Seconds of this process on the processors to enter `merged` and to leave it: others' work doesn't count."""
    model, seconds = ours(), []
    for _ in range(rounds):
        started = time.process_time()
        with ll.merged(model):
            pass
        seconds.append(time.process_time() - started)
    low, middle, high = statistics.quantiles(seconds, n=4)
    yield Ratio("seconds to enter merged and to leave it", middle, 1.0, low, high, "starting")


def attach_peft(model: nn.Module) -> object:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))


def timed(run: Callable[[nn.Module], object], model: nn.Module) -> float:
    started = time.perf_counter()
    run(model)
    return time.perf_counter() - started


def pissa(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """On a 2048 x 2048 layer with the singular values of a real one, stretched to that many."""
    spectrum = torch.linalg.svdvals(load().model.layers[15].mlp.down_proj.weight.float())
    values = nn.functional.interpolate(spectrum[None, None], 2048, mode="linear", align_corners=True)[0, 0]
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(2048, 2048, generator=generator)).Q for _ in range(2))
    linear = nn.Linear(2048, 2048, bias=False)
    linear.weight.data = (u * values) @ v.mT
    layer = nn.Sequential(linear)
    times: dict[str, list[float]] = {"exact": [], "fast": []}
    products = {}
    for _ in range(max(3, rounds // 3)):
        for svd, seconds in times.items():
            cfg = ll.PiSSAConfig(r=16, svd=svd, target_names=r"^0$")
            seconds.append(timed(partial(ll.attach, cfg=cfg), layer))
            tensors = ll.adapters(layer)["default"].state_dict()
            products[svd] = tensors["0.lora_B"] @ tensors["0.lora_A"]  # (o, i)
            ll.detach(layer)
    error = float((products["fast"] - products["exact"]).norm() / products["exact"].norm())
    yield Times(times).ratio("PiSSA fast init / full SVD, 2048 x 2048", "fast", "exact", 0.1, "starting")
    yield Ratio("its relative error of the top 16", error, 0.01, group="starting")


def peaks(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """Bytes at the highest point of a step, above the frozen base's: exact."""
    frozen, lora, theirs = (peak_of(make, ids) for make in (base, ours, peft))
    yield Ratio("peak memory of a step above base / PEFT", (lora - frozen) / (theirs - frozen), 0.6, group="memory")


def compiled(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """A stack of 8 linear layers of 2048, which compiles in seconds."""
    x = stack_input()
    models = {"base": stack(), "lora": stack_ours(), "PEFT": stack_peft(), "dora": stack_ours("dora")}
    models["PEFT DoRA"] = stack_peft(use_dora=True)
    frozen = saved(models["base"], x)
    least = floor(models["base"], x, [str(i) for i in range(8)])
    yield Ratio("stack: LoRA kept / floor", (saved(models["lora"], x) - frozen) / least, 1.05, group="stack")
    yield Ratio(
        "stack: DoRA kept / PEFT",
        (saved(models["dora"], x) - frozen) / (saved(models["PEFT DoRA"], x) - frozen),
        group="stack",
    )
    times = interleaved({name: train_step(model, x) for name, model in models.items()}, rounds, "stack", 2)
    yield times.ratio("stack: LoRA step / frozen base", "lora", "base", group="stack")
    yield times.ratio("stack: LoRA step / PEFT", "lora", "PEFT", group="stack")
    yield times.ratio("stack: DoRA step / PEFT", "dora", "PEFT DoRA", group="stack")
    fast = {name: torch.compile(models[name]) for name in ("base", "lora", "PEFT")}
    times = interleaved({name: train_step(model, x) for name, model in fast.items()}, rounds, "compiled stack", 3)
    yield times.ratio("stack, compiled: LoRA step / PEFT", "lora", "PEFT", group="stack")
    yield times.ratio("stack, compiled: LoRA step / frozen base", "lora", "base", group="stack")


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
    "peaks": peaks,
    "compiled": compiled,
}

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    file: Annotated[Path | None, typer.Option("--text", help="JSONL of questions and answers, such as GSM8K.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(SECTIONS)}.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Of each timed comparison.")] = 10,
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], typer.Option(help="Of the base.")] = "auto",
    out: Annotated[Path, typer.Option(help="Where bench.json and bench.png go.")] = Path("runs", "bench"),
) -> None:
    """Measure, and print a line for each ratio, with its mark."""
    logger.remove()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    choose(dtype)
    compared = torch.bfloat16, torch.float32
    print(f"the base is in {dtype_name(stored_in())}; {product_times(*compared)}", file=sys.stderr)
    ids = text(file or (GSM8K if GSM8K.exists() else None))
    started, ratios = time.perf_counter(), []
    for name in only or SECTIONS:
        for ratio in SECTIONS[name](ids, rounds):
            ratios.append(ratio)
            print(f"{ratio.measure}: {ratio.value:.3f}", file=sys.stderr)
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
