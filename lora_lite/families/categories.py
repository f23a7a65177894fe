"""Layers of one name, in whatever block, which share tensors."""

import re


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
