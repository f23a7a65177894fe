"""The parts that the examples share: one voice, errors without a traceback, the base, the check of a saved adapter."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from jsonl import DataError
from loguru import logger
from torch import Tensor
from tqdm import tqdm

import lora_lite as ll

INTERRUPTED = 130  # what a shell reports for Ctrl-C

Dtype = Literal["auto", "bfloat16", "float32"]

# Options that several commands have.
Base = Annotated[str | None, typer.Option(help="Hub id or folder. Default: SmolLM2-135M-Instruct.")]
BaseDtype = Annotated[
    Dtype, typer.Option(help="Of the base. auto: the faster of the checkpoint's and float32, measured on a CPU.")
]
Rank = Annotated[int, typer.Option(min=1, help="Rank.")]
LearningRate = Annotated[float, typer.Option(help="Learning rate.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
MostTokens = Annotated[int, typer.Option(min=1, help="Of an answer, at most.")]
MINUTES = "Sizes that no option gives are fitted to this time."


def set_up(seed: int) -> None:
    """One seed and one voice: our log lines make room for the progress bar, and libraries report only errors."""
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(seed)
    logger.remove()
    form = "<dim>{time:HH:mm:ss}</dim> <level>{message}</level>"
    logger.add(partial(tqdm.write, file=sys.stderr, end=""), format=form, level="INFO", colorize=sys.stderr.isatty())


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that the user can mend come without a traceback."""
    try:
        yield
    except (ll.LoraLiteError, DataError, ModuleNotFoundError, OSError) as error:
        logger.error(str(error))
        raise typer.Exit(1) from None


def load(source: str, quantization: str | None, dtype: Dtype = "auto") -> Any:
    """The base on the accelerator, there in bfloat16 unless another dtype is asked for, or else on the CPU."""
    if torch.accelerator.is_available():
        return ll.load_base(source, "bfloat16" if dtype == "auto" else dtype, quantization, device_map="auto")
    # On a CPU, fused attention's backward pass alone takes a quarter of a training step.
    return ll.load_base(source, dtype, quantization, attn_implementation="eager")


def stored_in(adapter: ll.Adapter) -> tuple[str | None, str]:
    """(how the base is quantised, its dtype): as it is, whatever was asked for. A folder may be quantised already."""
    quantization = adapter.base["quantization"]
    return quantization and quantization["quant_type"], adapter.base["dtype"]


def progress_bar(what: str, total: int, done: int = 0) -> Any:
    form = "{desc} {percentage:3.0f}% |{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]"
    seldom = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=done, desc=what, bar_format=form, dynamic_ncols=True, mininterval=seldom)


@torch.no_grad()
def logits_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    model.eval()
    return model(**{key: value.to(model.device) for key, value in inputs.items()}).logits.cpu()


def check_reload(fresh: Any, file: Path, inputs: Mapping[str, Tensor], expected: Tensor, name: str = "default") -> None:
    """Load the file onto a fresh base. Raises RuntimeError unless its logits are the saved model's, bit for bit."""
    ll.load(fresh, file, name)
    logits = logits_of(fresh, inputs)
    if not torch.equal(logits, expected):
        worst = (logits.float() - expected.float()).abs().max()
        raise RuntimeError(f"{file} on a fresh base: logits differ by up to {worst:.2g} from the saved model's")
    logger.info(f"{file} on a fresh base gives the saved model's logits, bit for bit")
