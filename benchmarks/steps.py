"""A training step and a decoded token with adapters, beside the frozen base, PEFT and a bare hook.

Beside a ratio to the base stand two floors (gpu_costs.py): of the products alone, and of the passes over x and y, each
by itself and with no time for products, by two rates that are measured in the run.
"""

from collections.abc import Iterator
from functools import cache

import torch
from contenders import (
    RANK,
    bare,
    base,
    decoder,
    ours,
    peft,
    stack,
    stack_input,
    stack_ours,
    stack_peft,
    stored_in,
    train_step,
    within_cache,
)
from gpu_costs import Rates, Sizes
from measure import Ratio, floor, interleaved, saved
from torch import Tensor

import lora_lite as ll

NEW_TOKENS = 64


@cache
def rates() -> Rates:
    """Of this machine's processors."""
    return Rates.measured(torch.device("cpu"), stored_in(), 2048, 256, 5)


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
        "bare hook": bare(),
    }
    if in_bf16 := stored_in() == torch.bfloat16:  # PEFT's adapters are in the base's dtype
        models["PEFT bf16"] = peft(bf16=True)
    times = interleaved({name: train_step(model, ids) for name, model in models.items()}, rounds, "training")
    sizes = Sizes.of(models["base"], RANK)
    floors = sizes.flop_floor(), sizes.traffic(rates())
    yield times.ratio("LoRA step / frozen base", "lora", "base", None, "training", floors)
    yield times.ratio("LoRA step / bare hook", "lora", "bare hook", 1.03, "training")
    yield times.ratio("LoRA step / PEFT", "lora", "PEFT", 1.0, "training")
    if in_bf16:
        yield times.ratio("LoRA step / PEFT with bf16 adapters", "lora", "PEFT bf16", 1.0, "training")
    yield times.ratio("DoRA step / frozen base", "dora", "base", None, "training", floors)
    yield times.ratio("DoRA step / PEFT", "dora", "PEFT DoRA", 0.6, "training")
    yield times.ratio("LoRA step with 8 disabled adapters / without", "crowded", "lora", 1.05, "training")
    for name in ("PEFT", *(["PEFT bf16"] if in_bf16 else []), "PEFT DoRA", "bare hook"):
        yield times.ratio(f"{name} step / frozen base", name, "base", group="peers")


def quantised(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    models = {"base": base("nf4"), "lora": ours(quantization="nf4"), "PEFT": peft("nf4")}
    times = interleaved({name: train_step(model, ids) for name, model in models.items()}, rounds, "nf4")
    yield times.ratio("nf4: LoRA step / PEFT", "lora", "PEFT", 1.0, "training")
    yield times.ratio("nf4: LoRA step / frozen base", "lora", "base", group="training")


def decoding(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """A round is a token: all contenders are at the same one."""
    merged = ours()
    models = {"base": base(), "lora": ours(), "dora": ours("dora"), "merged": merged, "PEFT": peft()}
    models |= {"PEFT DoRA": peft(use_dora=True), "PEFT DoRA, cached": peft(use_dora=True), "bare hook": bare()}
    floors = (Sizes.of(models["base"], RANK).decode_floor(),)
    with ll.merged(merged):
        for batch in (1, 8):
            runs = {name: decoder(model, ids, batch) for name, model in models.items()}
            runs["PEFT DoRA, cached"] = within_cache(runs["PEFT DoRA, cached"])
            times = interleaved(runs, NEW_TOKENS, f"decoding, batch {batch}", warm=2)  # the prompt, and one token
            yield times.ratio(f"decode LoRA / base, batch {batch}", "lora", "base", None, "decoding", floors)
            yield times.ratio(f"decode LoRA / bare hook, batch {batch}", "lora", "bare hook", 1.05, "decoding")
            yield times.ratio(f"decode LoRA / PEFT, batch {batch}", "lora", "PEFT", 0.9, "decoding")
            added = times.above("base")
            yield added.ratio(f"decode, LoRA adds / PEFT adds, batch {batch}", "lora", "PEFT", 0.9, "decoding")
            yield times.ratio(f"decode within merged / base, batch {batch}", "merged", "base", 1.01, "decoding")
            yield times.ratio(f"decode DoRA / base, batch {batch}", "dora", "base", None, "decoding")
            yield times.ratio(f"decode DoRA / PEFT, batch {batch}", "dora", "PEFT DoRA", group="decoding")
            yield times.ratio(
                f"decode DoRA / PEFT, cached, batch {batch}", "dora", "PEFT DoRA, cached", group="decoding"
            )
            for name in ("PEFT", "PEFT DoRA", "PEFT DoRA, cached", "bare hook"):
                yield times.ratio(f"decode {name} / base, batch {batch}", name, "base", group="peers")


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
