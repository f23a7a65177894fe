"""How much of W does a quantised base keep with its adapter's start? Plain, LoftQ and QPiSSA on SmolLM2-135M-Instruct.

    python benchmarks/residual.py --blocks 0 15 29 --iterations 1 5        # about a minute of one core
    python benchmarks/residual.py --rows 48                                # and the held-out loss; four minutes in all

For each kind of layer, the mean over the blocks of 1 - ‖W - W'‖ / ‖W - q(W)‖: what share of the quantiser's error the
adapter takes away, in the nuclear norm, which the PiSSA paper takes (arXiv:2404.02948), and in Frobenius'.
With --rows: the loss of answers of GSM8K for the whole model, written in each way; nothing is trained.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from loguru import logger

import lora_lite as ll

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from smollm2 import smollm2_folder
from suggest import DATA, held_out, tokens

CONFIGS: dict[str, Any] = {"LoftQ": ll.LoftQConfig, "QPiSSA": ll.PiSSAConfig}
NORMS = {"nuc": "nuclear", "fro": "Frobenius"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 15, 29])
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--rows", type=int, default=0, help="rows of text whose loss is measured; 0: none")
    args = parser.parse_args()
    logger.remove()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = str(smollm2_folder())
    ways = {f"{name}-{t}": (config, t) for t in args.iterations for name, config in CONFIGS.items()}
    for norm, label in NORMS.items():
        table = {way: saved(folder, *ways[way], norm, args) for way in ways}
        print_table(f"{args.quantization}, r={args.r}, blocks {args.blocks}: share of the error, {label}", table)
    if args.rows:
        losses(folder, ways, args)


def saved(folder: str, config: Any, iterations: int, norm: str, args: argparse.Namespace) -> dict[str, float]:
    """The share of the quantiser's error that the adapter takes away, by kind of layer."""
    cfg = config(r=args.r, layers=args.blocks)
    errors = ll.residual_errors(folder, cfg, args.quantization, iterations=iterations, norm=norm)
    kinds: dict[str, list[float]] = {}
    for path, error in errors.items():
        kinds.setdefault(path.rpartition(".")[2], []).append(1 - error.residual / error.plain)
    return {kind: fmean(values) for kind, values in kinds.items()} | {
        "all": fmean(1 - error.residual / error.plain for error in errors.values())
    }


def print_table(title: str, table: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n{'':<10}{''.join(f'{kind:>10}' for kind in next(iter(table.values())))}")
    for way, figures in table.items():
        print(f"{way:<10}{''.join(f'{figure:>10.1%}' for figure in figures.values())}", flush=True)


def losses(folder: str, ways: dict[str, tuple[Any, int]], args: argparse.Namespace) -> None:
    """The loss of answers in 16 bits, quantised plainly, and with each start."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    rows = tokens(tokenizer, DATA / "test.jsonl", args.rows, 4, 192)
    base = held_out(ll.load_base(folder), rows)
    plain = held_out(ll.load_base(folder, quantization=args.quantization), rows)
    print(f"\nloss of {args.rows} answers: {base:.4f} in 16 bits; {args.quantization} plain +{plain - base:.4f}")
    for way, (config, iterations) in ways.items():
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "out"
            result = ll.quantize_residual(folder, config(r=args.r), out, args.quantization, iterations=iterations)
            model = ll.load_base(str(out))
            ll.load(model, result.adapter)
            loss = held_out(model, rows)
        print(f"{way:<10}{loss - base:+.4f}, {result.seconds:.0f} s to write", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
