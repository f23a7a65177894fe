"""Merging into a checkpoint on disk: time and peak memory beside PEFT's way, on the same files.

    python benchmarks/merge.py [--layers 14] [--rounds 2] [--variant lora] [--base-weights original]

A synthetic Llama of 4096² matrices in bfloat16, seven a layer, 3.3 GB at 14 layers, in shards of 0.5 GB; LoRA of rank
16 on all of them. PEFT: from_pretrained, PeftModel.from_pretrained, merge_and_unload, save_pretrained. Each run is a
process of its own, alternating; both end with their files on the disk (os.sync). "Above start": the peak of resident
memory less what it was once the same code had merged a tiny model, so imports don't count. Linux only.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lora_lite as ll

if TYPE_CHECKING:
    from measure import Ratio

WIDTH, RANK, SHARD = 4096, 16, 16
"""Matrices are WIDTH², SHARD of them in a file."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variant", default="lora", help="PEFT is run beside lora alone")
    parser.add_argument("--base-weights", default="original")
    parser.add_argument("--folder", type=Path, help="where 7 GB are free; default: a temporary folder")
    parser.add_argument("--run", choices=["ours", "peft"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    logger.remove()
    if args.run:
        print(json.dumps(measured({"ours": ours, "peft": peft}[args.run], args.folder, args.base_weights)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        make(folder / "tiny", 1, 64, args)
        make(folder / "big", args.layers, WIDTH, args)
        compare(folder, args)


def on_disk(ids: Tensor, rounds: int) -> Iterator["Ratio"]:
    """The section of `make bench`: 4 layers, 0.94 GB; the ids are those that the other sections take."""
    from measure import Ratio, Times

    args = argparse.Namespace(layers=4, rounds=max(3, rounds // 3), variant="lora", base_weights="original")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder / "tiny", 1, 64, args)
        make(folder / "big", args.layers, WIDTH, args)
        results, adapter = run_all(folder, args), (folder / "big" / "adapter.safetensors").stat().st_size
    times = Times({way: [seconds for seconds, _ in runs] for way, runs in results.items()})
    yield times.ratio("merge on disk / PEFT's merge_and_unload and save", "ours", "peft", 0.8, "on disk")
    peak = max(peak for _, peak in results["ours"]) - adapter / 2**20
    yield Ratio("its peak above start less the adapter, MiB", peak, 64, group="on disk", of="highest")


def run_all(folder: Path, args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """(seconds, MiB above start) of each run by way, each in a process of its own."""
    ways = ["ours", "peft"] if args.variant == "lora" and args.base_weights == "original" else ["ours"]
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}  # (seconds, MiB)
    for _ in range(args.rounds):
        for way in ways:
            command = [sys.executable, __file__, "--run", way, "--folder", str(folder)]
            command += ["--base-weights", args.base_weights]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results[way].append(tuple(json.loads(done.stdout.splitlines()[-1])))
    return results


def compare(folder: Path, args: argparse.Namespace) -> None:
    size = sum(file.stat().st_size for file in (folder / "big" / "base").iterdir())
    adapter = (folder / "big" / "adapter.safetensors").stat().st_size
    results = run_all(folder, args)
    print(f"checkpoint {size / 1e9:.2f} GB, {args.base_weights}; {args.variant} of {adapter / 2**20:.0f} MiB")
    print(f"{'':<8}{'seconds':>20}{'peak above start, MiB':>24}")
    for way, runs in results.items():
        seconds, peaks = zip(*runs, strict=True)
        print(f"{way:<8}{' '.join(f'{s:.1f}' for s in seconds):>20}{' '.join(f'{p:.0f}' for p in peaks):>24}")
    if len(results) == 2:
        medians = [[statistics.median(column) for column in zip(*runs, strict=True)] for runs in results.values()]
        print(f"ours / PEFT: time {medians[0][0] / medians[1][0]:.2f}, memory {medians[0][1] / medians[1][1]:.3f}")


def make(folder: Path, layers: int, width: int, args: argparse.Namespace) -> None:
    """A checkpoint in shards, an adapter of ours and the same in PEFT's format, all with random numbers."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in LlamaForCausalLM(config).state_dict().items()}
    base = folder / "base"
    base.mkdir(parents=True)
    config.save_pretrained(base)
    names: dict[str, str] = {}
    keys = list(shapes)
    for i in range(0, len(keys), SHARD):
        name = f"model-{i // SHARD + 1:05}-of-{-(-len(keys) // SHARD):05}.safetensors"
        tensors = {key: (torch.randn(shapes[key]) * 0.02).bfloat16() for key in keys[i : i + SHARD]}
        save_file(tensors, base / name, {"format": "pt"})
        names |= dict.fromkeys(tensors, name)
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    model = ll.load_base(str(base), torch.bfloat16, "nf4" if args.base_weights == "as_trained" else None)
    known = ll.config_for(args.variant).__dataclass_fields__
    rank: dict[str, Any] = {"r": RANK} if "r" in known else {}
    adapter = ll.attach(model, ll.config_for(args.variant)(variant=args.variant, **rank))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.02)
    ll.save(model, folder / "adapter.safetensors")
    if args.variant == "lora":
        ll.save_peft(model, folder / "peft")


def measured(run: Callable[[Path, Path, str], None], folder: Path, base_weights: str) -> tuple[float, float]:
    """(seconds, MiB above start)"""
    run(folder / "tiny", folder / "tiny" / "out", base_weights)
    out = folder / "out"
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, started = memory("VmRSS"), time.perf_counter()
    run(folder / "big", out, base_weights)
    os.sync()
    seconds, peak = time.perf_counter() - started, memory("VmHWM")
    shutil.rmtree(out)
    shutil.rmtree(folder / "tiny" / "out")
    return seconds, peak - before


def memory(what: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def ours(folder: Path, out: Path, base_weights: str) -> None:
    ll.merge_checkpoint(folder / "base", folder / "adapter.safetensors", out, base_weights)


def peft(folder: Path, out: Path, base_weights: str) -> None:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, folder / "peft").merge_and_unload()
    merged.save_pretrained(out, max_shard_size="512MB")


if __name__ == "__main__":
    main()
