"""Bytes that adapters take in training above the frozen base: kept for the backward, and at a step's highest point."""

from collections.abc import Iterator

import torch
from contenders import base, ours, peft, stored_in
from measure import Ratio, floor, peak_of, saved
from torch import Tensor

import lora_lite as ll


def memory(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """Bytes that autograd keeps above the frozen base: exact."""
    plain = base()
    frozen = saved(plain, ids)
    model = ours()
    least = floor(plain, ids, ll.adapters(model)["default"].targets)
    lora = saved(model, ids) - frozen
    theirs = saved(peft(), ids) - frozen
    dora = saved(ours("dora"), ids) - frozen
    dropped = saved(ours(dropout=0.05), ids) - frozen
    yield Ratio("LoRA: kept for backward / floor", lora / least, 1.05, group="memory")
    yield Ratio("LoRA: kept / PEFT", lora / theirs, group="memory")
    if stored_in() == torch.bfloat16:  # PEFT's adapters are in the base's dtype
        yield Ratio(
            "LoRA: kept / PEFT with bf16 adapters", lora / (saved(peft(bf16=True), ids) - frozen), group="memory"
        )
        bf16 = peft(bf16=True, use_dora=True)
        yield Ratio("DoRA: kept / PEFT with bf16 adapters", dora / (saved(bf16, ids) - frozen), group="memory")
    yield Ratio("LoRA with dropout: kept / without", dropped / lora, 1.10, group="memory")
    yield Ratio(
        "DoRA: kept / PEFT",
        dora / (saved(peft(use_dora=True), ids) - frozen),
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


def peaks(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """Bytes at the highest point of a step, above the frozen base's: exact."""
    frozen, lora, theirs = (peak_of(make, ids) for make in (base, ours, peft))
    yield Ratio("peak memory of a step above base / PEFT", (lora - frozen) / (theirs - frozen), 0.6, group="memory")
