"""Where in a sequence methods act, as `Variant.positions` says it: (b, t + 1), the last column for what comes after."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from ..core.positions import Prompt
from ..errors import ConfigError

__all__ = ["at_the_ends", "from_invocation"]


def from_invocation(tokens: Sequence[int], prompt: Prompt) -> Bool[Tensor, "b t1"]:
    """aLoRA's positions: from the start of the last occurrence of these tokens on."""
    ids, n = prompt.tokens, len(tokens)  # (b, t)
    columns = torch.arange(ids.shape[1] + 1, device=ids.device)  # (t + 1,)
    starts = columns.new_full(ids.shape, -1)  # (b, t): the column, where the tokens start there
    if n <= ids.shape[1]:
        # PEFT looks at padding too; what a row doesn't attend to is no part of it.
        attended = prompt.attended.unfold(1, n, 1)  # (b, t - n + 1, n)
        is_start = (ids.unfold(1, n, 1) == ids.new_tensor(tokens)) & attended
        starts[:, : is_start.shape[1]] = torch.where(is_start.all(2), columns[: is_start.shape[1]], -1)
    start = starts.amax(1, keepdim=True)  # (b, 1), -1 in a row without them
    return (columns >= start) & (start >= 0)


def at_the_ends(first: int, last: int, prompt: Prompt) -> Bool[Tensor, "b t1"]:
    """The first and the last tokens of each prompt; nothing that comes after it."""
    if prompt.offset:
        problem = (
            f"{prompt.offset} tokens are in a cache that was made without the adapter, which acts at a prompt's ends"
        )
        raise ConfigError(f"{problem}\n  run the whole prompt with it")
    number = prompt.is_prompt.cumsum(1)  # (b, t), 1 for a prompt's first token
    return F.pad(prompt.is_prompt & ((number <= first) | (number > number[:, -1:] - last)), (0, 1))
