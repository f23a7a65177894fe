"""Residual quantisation on disk: a 16-bit folder becomes a 4-bit or 8-bit one, and an adapter that has what that lacks.

Memory: the adapter, and the largest weight in float32 with what its SVD takes, whatever the size of model or shards.
"""

import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loguru import logger
from torch import nn

from ..base.still import full_precision
from ..core.config import BaseConfig
from ..errors import CheckpointError, ConfigError
from ..io.safetensors import sync_folder
from .on_disk import Progress, other_files, write_folder
from .residual_plan import ADAPTER, NORMS, LayerErrors, ResidualPlan


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize_residual`."""

    folder: Path
    adapter: Path
    variant: str
    quantization: str
    layers: int  # that are quantised, with an adapter or without
    errors: dict[str, LayerErrors]  # Frobenius, by path, of those with an adapter
    size: int  # bytes of the checkpoint's files of tensors
    seconds: float

    def __str__(self) -> str:
        plain, residual = (
            sum(getattr(errors, name) for errors in self.errors.values()) / len(self.errors)
            for name in ("plain", "residual")
        )
        return (
            f"quantised {self.layers} layers to {self.quantization} in {self.folder}, {self.size / 1e9:.2f} GB in "
            f"{self.seconds:.1f} s\n  {self.adapter.name}: {self.variant} on {len(self.errors)} of them, mean error "
            f"{residual:.2%}, and {plain:.2%} without it"
        )


def quantize_residual(
    base_dir: str | os.PathLike[str],
    cfg: BaseConfig,
    out_dir: str | os.PathLike[str],
    quantization: str = "nf4",
    *,
    iterations: int = 5,
    double_quant: bool = True,
    skip_modules: Sequence[str] = (),
    progress: Progress | None = None,
) -> Quantized:
    """Write the checkpoint folder `base_dir`, quantised, to `out_dir`, and in it `adapter.safetensors`: a LoRA with
    which the weights are nearer to the original ones.

        model = ll.load_base(out_dir)                       # or AutoModelForCausalLM.from_pretrained
        adapter = ll.load(model, f"{out_dir}/adapter.safetensors")

    cfg           PiSSAConfig or LoftQConfig: rank, alpha, layers, and the SVD of PiSSA's first round. Layers without an
                  adapter are quantised plainly
    quantization  "nf4", "fp4" (4-bit) or "int8", by bitsandbytes
    iterations    T of the papers. 1: of PiSSA q(W - s B A), of LoftQ the SVD of W - q(W). More: A, B and Q in turns
    double_quant  quantise the 4-bit scales too
    skip_modules  names of modules that stay in 16 bits beside those that transformers leaves so, such as the head
    progress      called with (bytes written, bytes in all)

    The adapter's file is of the variant `loftq`, of either start: a LoRA that belongs to these codes, and is refused on
    other weights. There is `out_dir` as a whole, or none; what is there already is refused.

    Raises:
        ConfigError: for another variant, quantisation or number of iterations, and a rank above a layer's directions.
        TargetError: where a target isn't quantised, and what `attach` raises.
        QuantizedWeightError: for a base that is quantised already, or stored in another dtype.
        BaseModelError: where a weight is NaN or infinite.
        CheckpointError: for a folder that isn't whole, a weight that lies in parts, a full disk, an `out_dir`.
        ImportError: without transformers (extra "hf") or bitsandbytes ("bnb").
    """
    started, out = time.monotonic(), Path(out_dir).absolute()
    if os.path.lexists(out):
        raise CheckpointError(f"{out} is there already\n  nothing is written over it: choose another folder")
    with full_precision(nn.Module()):  # which is global: no module is asked
        plan = ResidualPlan(base_dir, cfg, quantization, iterations, double_quant, skip_modules)
        shards = plan.shards()
        with _whole(out) as folder:
            write_folder(folder, shards, plan.base.path, other_files(plan.base.path), progress)
            plan.write_rest(folder, shards, out)
    size, seconds = sum(shard.size for shard in shards), time.monotonic() - started
    result = Quantized(out, out / ADAPTER, cfg.variant, quantization, len(plan.locations), plan.errors, size, seconds)
    logger.info(str(result).replace("\n ", ","))
    return result


def residual_errors(
    base_dir: str | os.PathLike[str],
    cfg: BaseConfig,
    quantization: str = "nf4",
    *,
    iterations: int = 5,
    double_quant: bool = True,
    norm: str = "fro",
) -> dict[str, LayerErrors]:
    """The error at each layer of the config, by path, that `quantize_residual` would leave; nothing is written.

    norm    "fro" (Frobenius), or "nuc", the sum of singular values, in which the PiSSA paper compares

    Raises:
        As `quantize_residual`.
    """
    if norm not in NORMS:
        raise ConfigError(f"norm={norm!r}: wanted one of {NORMS}\n  they are those of torch.linalg.matrix_norm")
    with full_precision(nn.Module()):
        plan = ResidualPlan(base_dir, cfg, quantization, iterations, double_quant, (), norm)
        for path in plan.sites:
            plan.quantize(path)
    return plan.errors


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder that takes the name of `out` if the block succeeds, and goes away if it doesn't."""
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder} can't be made: {error.strerror}\n  choose another folder") from error
    try:
        yield folder
        if os.path.lexists(out):  # another process was faster
            raise CheckpointError(f"{out} has come meanwhile\n  nothing is written over it: choose another folder")
        os.replace(folder, out)
        sync_folder(out.parent)  # or the rename may be lost in a power cut
    finally:
        shutil.rmtree(folder, ignore_errors=True)
