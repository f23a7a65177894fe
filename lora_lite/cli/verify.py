"""A merged checkpoint beside base and adapter: both are run on a text, one after the other, never at once."""

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..base.load import load_as_recorded, load_base
from ..errors import BaseModelError, ConfigError
from ..io.checkpoint import load
from ..io.safetensors import read_header, read_json, write_tensors
from .bases import class_of
from .stored import read_adapter

WINDOW = 512  # tokens that a forward sees at most


@dataclass(frozen=True)
class Verification:
    """How far the merged model's next-token distributions are from those of base and adapter."""

    tokens: int
    mean_kl: float  # KL(base and adapter ‖ merged) of a token, in nats
    max_kl: float
    max_logit: float  # the largest difference of a logit

    def __str__(self) -> str:
        return (
            f"KL(base + adapter || merged): mean {self.mean_kl:.3g}, max {self.max_kl:.3g} nats a token, over "
            f"{self.tokens:,} tokens\nlargest difference of a logit: {self.max_logit:.3g}"
        )


def verify_merge(
    base_dir: Path, adapter: Path, merged_dir: Path, text: str, base_weights: str = "original"
) -> Verification:
    """Compare base + adapter with the merged folder on a text; with "as_trained" the base is quantised, and both run in
    the dtype, as recorded.

    Raises:
        ConfigError: for an unknown base_weights, and what `tokens` refuses.
        BaseModelError: for logits that aren't finite; and what load_base and load raise.
    """
    if base_weights not in ("original", "as_trained"):
        raise ConfigError(f"base_weights={base_weights!r}: wanted 'original' or 'as_trained'")
    ids, as_trained = tokens(base_dir, text), base_weights == "as_trained"
    record = read_adapter(adapter).record if as_trained else None
    with tempfile.TemporaryDirectory(prefix="lora-lite-") as folder:
        paths = []
        model = load_as_recorded(str(base_dir), record)
        load(model, adapter, verify_base=as_trained)
        for i, logits in enumerate(_logits(model, ids)):
            paths.append(Path(folder) / f"{i}.safetensors")  # tokens times vocabulary may not fit into memory
            write_tensors(paths[-1], {"logits": logits}, {})
        del model
        gc.collect()  # a module and its hooks refer to each other, and the next model needs the room
        merged = load_base(str(merged_dir), "auto" if record is None else record.dtype)
        parts = [
            _differences(read_header(path).read()["logits"], logits)
            for path, logits in zip(paths, _logits(merged, ids), strict=True)
        ]
    kl, logit = torch.cat([part[0] for part in parts]), max(part[1] for part in parts)
    return Verification(len(kl), float(kl.mean()), float(kl.max()), logit)


def tokens(base_dir: Path, text: str) -> Int64[Tensor, "1 n"]:
    """The ids of the text's tokens, by the base's tokenizer.

    Raises:
        ConfigError: for fewer than two tokens, and a base that is no causal language model.
        OSError: for a folder without a tokenizer.
    """
    import transformers

    config = read_json(base_dir / "config.json")
    kind = class_of(config)
    is_causal = kind is None or (kind.can_generate() and kind.config_class in transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    if config.get("is_encoder_decoder") or not is_causal:
        problem = f"{base_dir}: a merge is verified by the next tokens of a causal language model"
        cure = "merge without --verify, and compare the outputs that you use"
        raise ConfigError(f"{problem}, which a {kind.__name__ if kind else 'encoder-decoder'} isn't\n  {cure}")
    ids: Tensor = transformers.AutoTokenizer.from_pretrained(base_dir)(text, return_tensors="pt").input_ids
    if ids.shape[1] < 2:
        raise ConfigError(f"the text has {ids.shape[1]} tokens; wanted two or more")
    return ids


def _logits(model: Any, ids: Tensor) -> Iterator[Float[Tensor, "n v"]]:
    """The logits of each window of the text, every one seen without those before."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    for window in ids.split(min(WINDOW, longest), dim=1):
        with torch.no_grad():
            logits = model(input_ids=window.to(model.device), use_cache=False).logits[0].cpu()
        if not logits.isfinite().all():
            raise BaseModelError("the logits are not finite\n  try another dtype for the base")
        yield logits


def _differences(a: Float[Tensor, "n v"], b: Float[Tensor, "n v"]) -> tuple[Float[Tensor, "n"], float]:
    """KL(a ‖ b) of each token, and the largest difference of a logit."""
    if a.shape != b.shape:
        raise BaseModelError(f"base and merged folder give logits {tuple(a.shape)} and {tuple(b.shape)}")
    log_a, log_b = (logits.float().log_softmax(-1) for logits in (a, b))  # (n, v)
    kl = (log_a.exp() * (log_a - log_b)).sum(-1, dtype=torch.float64)  # (n,)
    return kl, float((a.double() - b.double()).abs().max())
