"""What it takes before the first token: import, attach, load, a start by SVD, and to go in and out of the weights."""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from contenders import load, ours, peft
from measure import Ratio, Times, in_a_process, interleaved
from peft import PeftModel
from torch import Tensor, nn

import lora_lite as ll

FIRST_ATTACH = (
    "import torch, lora_lite as ll\n"
    "ll.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), ll.LoRAConfig(r=2, target_names='0'))"
)
"""In a process without transformers or an optimizer: `torch._dynamo` is imported."""


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
    codes = {"torch": "import torch", "lora_lite": "import lora_lite", "attach": FIRST_ATTACH}
    runs = {name: lambda code=code: in_a_process("-c", code) for name, code in codes.items()}
    times = interleaved(runs, rounds, "import")
    yield times.ratio("import lora_lite / import torch", "lora_lite", "torch", 1.04, "starting")
    yield times.ratio("import and first attach / import torch", "attach", "torch", None, "starting")
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
