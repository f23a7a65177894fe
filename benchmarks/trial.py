"""The cost of one trial of an ablation search before its first forward, as ratios in one run.

    python benchmarks/trial.py

The same 60 layers of SmolLM2-135M (every writer of the residual stream). Peers: loading the model again, as a search
that edits weights must; and zeroing the B of PEFT LoRAs (rank 3), as one that writes its deltas into them must, before
it computes the new ones. Medians; interleaved, since machines are shared and noisy.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from loguru import logger
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_lite as ll

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from smollm2 import smollm2_folder

KERNELS = {"attn": ll.Kernel(1.0, 17.0, 0.2, 12.0), "mlp": ll.Kernel(0.7, 17.0, 0.0, 9.0)}
ROUNDS, REPEATS = 7, 5
WRITERS = ["o_proj", "down_proj"]
RELOAD = "load the model again"


def main() -> None:
    logger.remove()
    folder = str(smollm2_folder())
    ours = {}
    for mode in ll.Normalization:
        model = ll.load_base(folder)
        directions = {"directions": torch.randn(30, 1, 576, generator=torch.Generator().manual_seed(0))}
        ours[mode] = ll.attach(model, ll.AbliterationConfig(normalization=mode), calibration_data=directions)
    peft = get_peft_model(ll.load_base(folder), LoraConfig(r=3, target_modules=WRITERS))
    trials: dict[str, Callable[[int], None]] = {}
    for mode, adapter in ours.items():
        trials[f"{mode}: strength, kernels"] = partial(new_strength, adapter)
        trials[f"{mode}: layer"] = partial(new_layer, adapter)
    trials["PEFT: zero B"] = lambda i: zero_b(peft)
    times: dict[str, list[float]] = {name: [] for name in (*trials, RELOAD)}
    for round_ in range(ROUNDS):
        for name, trial in trials.items():
            started = time.perf_counter()
            for i in range(REPEATS):
                trial(round_ * REPEATS + i)
            times[name].append((time.perf_counter() - started) / REPEATS)
    for _ in range(3):
        started = time.perf_counter()
        ll.load_base(folder)
        times[RELOAD].append(time.perf_counter() - started)

    unit = statistics.median(times["none: strength, kernels"])
    print(f"{'one trial':<34}{'milliseconds':>14}{'ratio':>9}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:<34}{median * 1e3:>14.3f}{median / unit:>9.1f}")


def new_strength(adapter: ll.Adapter, i: int) -> None:
    adapter.configure(strength=1 + i / 1e3, kernels=KERNELS)


def new_layer(adapter: ll.Adapter, i: int) -> None:
    adapter.configure(layer=i % 29 + 0.5)


@torch.no_grad()
def zero_b(peft: nn.Module) -> None:
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.zero_()


if __name__ == "__main__":
    main()
