"""How the cost of starting grows: with blocks, with adapters, with experts. 1.0 is linear; up to 1.1 is noise.

    python benchmarks/growth.py [--rounds 7]

Tiny Llamas of 30 and 120 blocks (7 linear layers each), so that Python is what takes time and not memory; 64 adapters
on one of 30 blocks; 94 blocks of 128 experts, as Qwen3-MoE 235B has them, beside 32 experts: `plan` of experts that are
layers, on the meta device, and the plan of a merge on disk into a checkpoint that holds them one by one, from its
headers. Each is the median of the rounds' ratios, with their quartiles. Times are those of this process on the
processor, and no garbage is collected while one is taken.
"""

import gc
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from loguru import logger
from measure import Ratio, Times
from picture import show
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_lite as ll
from lora_lite.merging.adapter_source import open_adapter
from lora_lite.merging.base_folder import BaseFolder
from lora_lite.merging.plan import MergePlan

FEW, MANY = 30, 120
ADAPTERS = 64
BLOCKS, EXPERTS = 94, 128
WIDTH, GROUP = 64, "growth of starting"
CONFIG = ll.LoRAConfig(r=4)


def growth_of_starting(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    """The section of `make bench`, in few rounds: they are long, and their times are of this process alone."""
    rounds = min(rounds, 4)
    yield from by_blocks(rounds)
    yield from by_adapters(rounds)
    yield from by_experts(3)


def by_blocks(rounds: int) -> Iterator[Ratio]:
    plans, attaches, loads = (seconds_by((FEW, MANY)) for _ in range(3))
    models = {blocks: llama(blocks) for blocks in (FEW, MANY)}
    with tempfile.TemporaryDirectory() as folder:
        for blocks, model in models.items():
            ll.attach(model, CONFIG)
            ll.save(model, f"{folder}/{blocks}.safetensors")
            ll.detach(model)
        for _ in range(rounds):
            for blocks, model in models.items():
                plans[blocks].append(seconds_of(ll.plan, model, CONFIG))
                attaches[blocks].append(seconds_of(ll.attach, model, CONFIG))
                ll.detach(model)
                loads[blocks].append(seconds_of(ll.load, model, f"{folder}/{blocks}.safetensors"))
                ll.detach(model)
    for what, seconds in (("plan", plans), ("attach", attaches), ("load", loads)):
        yield linear(f"{what}: {MANY} blocks / 4 x {FEW}", seconds[MANY], seconds[FEW], 4)


def by_adapters(rounds: int) -> Iterator[Ratio]:
    model = llama(FEW)
    runs: list[list[float]] = []
    for _ in range(rounds):
        runs.append([seconds_of(ll.attach, model, CONFIG, f"a{i}") for i in range(ADAPTERS)])
        ll.detach(model)
    first = [run[0] for run in runs]
    yield linear(f"attach of the {ADAPTERS}th adapter / the first", [run[-1] for run in runs], first, 1)
    yield linear(f"{ADAPTERS} attaches / {ADAPTERS} x the first", [sum(run) for run in runs], first, ADAPTERS)


def by_experts(rounds: int) -> Iterator[Ratio]:
    numbers = EXPERTS // 4, EXPERTS
    plans, merges = (seconds_by(numbers) for _ in range(2))
    models = {number: listed_experts(number) for number in numbers}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {number: Path(temporary, str(number)) for number in numbers}
        for number, folder in folders.items():
            checkpoint(folder, number)
        for _ in range(rounds):
            for number, folder in folders.items():
                plans[number].append(seconds_of(ll.plan, models[number], CONFIG))
                merges[number].append(seconds_of(merge_plan, folder))
    few, many = numbers
    yield linear(f"plan: {BLOCKS} blocks of {many} experts / 4 x {few}", plans[many], plans[few], 4)
    yield linear(f"merge plan from headers: {many} experts / 4 x {few}", merges[many], merges[few], 4)


def linear(measure: str, large: list[float], small: list[float], times: int) -> Ratio:
    seconds = Times({"large": large, "small": [times * value for value in small]})
    return seconds.ratio(measure, "large", "small", 1.0, GROUP)


def seconds_by(sizes: tuple[int, ...]) -> dict[int, list[float]]:
    return {size: [] for size in sizes}


def seconds_of(run: Callable[..., object], *args: Any) -> float:
    gc.collect()
    gc.disable()
    started = time.process_time()
    run(*args)
    seconds = time.process_time() - started
    gc.enable()
    return seconds


def llama(blocks: int) -> nn.Module:
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=blocks))


def qwen(experts: int) -> Qwen3MoeConfig:
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8}
    routing: dict[str, Any] = {
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "architectures": ["Qwen3MoeForCausalLM"],
    }
    return Qwen3MoeConfig(**sizes, **heads, **routing, num_hidden_layers=BLOCKS, dtype=torch.float32)


class Expert(nn.Module):
    """A feed-forward part whose matrices are layers, as models with code of their own have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(16, 8, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(8, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def listed_experts(experts: int) -> Any:
    """Qwen3-MoE on the meta device, each expert a module of its own."""
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(qwen(experts))
        for layer in model.model.layers:
            layer.mlp.experts = nn.ModuleList(Expert() for _ in range(experts))
    return model


def checkpoint(folder: Path, experts: int) -> None:
    """A folder as the hub has such models, each expert's matrices by themselves, and an adapter on fused ones."""
    config = qwen(experts)
    model = Qwen3MoeForCausalLM(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    save_file(dict(one_by_one(model.state_dict())), folder / "model.safetensors", {"format": "pt"})
    ll.attach(model, ll.LoRAConfig(r=1, kinds=("linear", "experts")))
    ll.save(model, folder.with_suffix(".safetensors"))


def one_by_one(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in tensors.items():
        stack, _, name = key.rpartition(".experts.")
        if not stack:
            yield key, tensor.contiguous()
        for i, matrix in enumerate(tensor if stack else ()):
            names = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
            for part, rows in zip(names, matrix.chunk(len(names)), strict=True):
                yield f"{stack}.experts.{i}.{part}.weight", rows.contiguous()


def merge_plan(folder: Path) -> MergePlan:
    base = BaseFolder(folder)
    return MergePlan(open_adapter(folder.with_suffix(".safetensors"), base.model), base, "original", False, True)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(rounds: Annotated[int, typer.Option(min=3, help="Of each comparison.")] = 7) -> None:
    """Measure, and print a line for each ratio; its mark is 1.0."""
    logger.remove()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    started = time.perf_counter()
    show(list(growth_of_starting(torch.empty(0), rounds)), time.perf_counter() - started)


if __name__ == "__main__":
    app()
