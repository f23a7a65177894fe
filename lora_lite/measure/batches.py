"""Batches of inputs, for all that runs a model over them: arguments from a batch, positions to look at, and checks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from loguru import logger
from torch import Tensor, nn

from ..errors import ConfigError

Batch = Mapping[str, Any]  # the keyword arguments of a model's forward
Positions = str | Tensor | Callable[[Batch], Tensor]  # "last", "all", a mask (b, t), or a function that gives one


def inputs_of(
    model: nn.Module, batches: Iterable[Any], progress: bool, purpose: str = "evaluate"
) -> Iterator[dict[str, Any]]:
    """The model's keyword arguments from each batch, with a progress bar if it is asked for and tqdm is installed.

    Raises ConfigError for no batches, one in place of several, and what can be none.
    """
    check_several(batches)
    inputs = None
    if progress:
        try:
            from tqdm import tqdm  # optional: it comes with the extra hf

            batches = tqdm(batches, desc=purpose, unit="batch", dynamic_ncols=True, leave=False)
        except ModuleNotFoundError:
            logger.debug(f"no progress bar while we {purpose}: tqdm is not installed")
    for batch in batches:
        inputs = _as_inputs(batch, model)
        yield inputs
    if inputs is None:
        raise ConfigError(f"there are no batches to {purpose} on\n  a generator gives its batches only once")


def _as_inputs(batch: Any, model: nn.Module) -> dict[str, Any]:
    """The model's keyword arguments, on its device. Raises ConfigError if the batch gives none, or for an encoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} has an encoder and a decoder\n  use a model with one sequence")
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    if not isinstance(inputs, Mapping) or not any(isinstance(value, Tensor) for value in inputs.values()):
        raise ConfigError(
            f"a batch is a {type(batch).__name__}: wanted a tensor of ids, or a mapping such as a tokenizer's\n"
            f'  use tokenizer(texts, return_tensors="pt", padding=True)'
        )
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def select(inputs: Batch, positions: Positions) -> Bool[Tensor, "b t"]:
    """The mask of the positions to look at. Raises ConfigError if it is empty, or holds padding, or a row has none."""
    tokens = inputs.get("attention_mask")
    if tokens is None:
        tensor = next(value for value in inputs.values() if isinstance(value, Tensor))
        tokens = torch.ones(tensor.shape[:2], device=tensor.device)
    tokens = tokens.bool()  # (b, t), false at padding
    if isinstance(positions, str):
        if positions not in ("last", "all"):
            raise ConfigError(f"positions={positions!r}: wanted 'last', 'all', a mask (b, t), or a function for one")
        if not tokens.any(1).all():
            raise ConfigError(f"a row of the batch {tuple(tokens.shape)} has no token: its attention_mask is all zero")
        if positions == "all":
            return tokens
        last = tokens.shape[1] - 1 - tokens.flip(1).long().argmax(1)  # (b,); argmax gives the first of equal values
        return nn.functional.one_hot(last, tokens.shape[1]).bool()
    mask = (positions if isinstance(positions, Tensor) else positions(inputs)).to(tokens.device).bool()
    if mask.shape != tokens.shape or (mask & ~tokens).any() or not mask.any():
        raise ConfigError(
            f"positions: got a mask {tuple(mask.shape)} with {int(mask.sum())} positions for tokens "
            f"{tuple(tokens.shape)}\n  wanted one of that shape, with some positions, none of them padding"
        )
    return mask


def check_sides(data: Any) -> None:
    """Raise ConfigError unless data has a positive and a negative side that can be gone through again."""
    if not isinstance(data, Mapping) or set(data) != {"positive", "negative"}:
        got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise ConfigError(f'calibration_data: got {got}; wanted {{"positive": batches, "negative": batches}}')
    for side, batches in data.items():
        check_batches(batches, f"calibration_data[{side!r}]")


def check_batches(batches: Any, what: str = "calibration_data") -> None:
    """Raise ConfigError unless the batches can be gone through again."""
    check_several(batches, what)
    if iter(batches) is batches:  # what a call that fails has read of it would be lost
        raise ConfigError(f"{what} is an iterator, which can be read once\n  use list(...)")


def check_several(batches: Any, what: str = "batches") -> None:
    """Raise ConfigError for a single batch, or anything else that isn't a collection of batches."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise ConfigError(f"{what} is a {type(batches).__name__}: wanted a list of batches")
