"""Keys of tensors, in a model's `state_dict()` and in files, and whether two sides have the same ones."""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from ..errors import CheckpointError, brief

SITES = "_lora_lite"  # the attribute of a module that holds what is attached to it
# The attribute of a module whose weight is adapted by the sites of another: {slot: that module}.
TIES = "_lora_lite_ties"

IN_EXPERT = re.compile(r"experts?[._]\d+\.")  # in the path of a layer that sees the tokens routed to one expert


def file_key(path: str, tensor: str) -> str:
    """The key of a tensor in `state_dict()` and in a file; the path of a bare layer is empty."""
    return f"{path}.{tensor}" if path else tensor


def numbered(tensor: str, number: int) -> str:
    """The name of a tensor of the `number`-th method of one adapter at one weight: `lora_A`, then `lora_2_A`."""
    return tensor if number == 1 else f"lora_{number}_{tensor.removeprefix('lora_')}"


@runtime_checkable
class HasShape(Protocol):
    """A tensor, a ParamSpec, an entry of a file's header."""

    @property
    def shape(self) -> Sequence[int]: ...


Shaped = HasShape | tuple[int, ...]


def check_shapes(tensors: Mapping[str, Shaped], specs: Mapping[str, Shaped], where: str) -> None:
    """CheckpointError unless both sides have the same keys with the same shapes."""
    got, wanted = (
        {key: value if isinstance(value, tuple) else tuple(value.shape) for key, value in side.items()}
        for side in (tensors, specs)
    )
    missing, extra = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    differ = [key for key in wanted if key in got and got[key] != wanted[key]]
    wrong = [f"{key} {brief(got[key])}, wanted {brief(wanted[key])}" for key in differ]
    for problem, keys in (("missing keys", missing), ("unexpected keys", extra), ("wrong shapes", wrong)):
        if keys:
            raise CheckpointError(
                f"{where}: {len(keys)} {problem}; {len(got)} tensors where {len(wanted)} are wanted\n"
                f"  such as {brief('; '.join(keys[:3]), 1200)}\n"
                f"  an adapter is loaded whole or not at all"
            )


def category(path: str) -> str:
    """The last two parts of a path, `self_attn_q_proj`, or the last alone after a block's number: FRoD's, as in PEFT.

    BERT's `attention.output.dense` is `attention_output`, as the feed-forward part ends in `output.dense`, too.
    """
    *first, before, last = ["", "", *path.split(".")]
    if not before or before.isdigit():
        return last
    return "attention_output" if (before, last, *first[-1:]) == ("output", "dense", "attention") else f"{before}_{last}"


def shared_name(path: str) -> str:
    """A layer's category as a part of the names of shared tensors."""
    return re.sub(r"[\W_]+", "_", category(path)).strip("_") or "layer"
