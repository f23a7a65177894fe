"""prompt_batches: from prompts to batches of tokens, as a chat model was taught to read them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import ConfigError

# the words of the user, or a whole chat: [{"role": "system", "content": ...}, {"role": "user", "content": ...}]
Prompt = str | Sequence[Mapping[str, str]]


def prompt_batches(
    tokenizer: Any, prompts: Sequence[Prompt], batch_size: int = 8, *, thinking: bool = True
) -> list[dict[str, Tensor]]:
    """The prompts through the tokenizer's chat template, up to where the answer starts, padded on the left.

    A tokenizer without a template takes strings as they are. thinking=False asks the template for an answer without a
    thinking block, where it knows how. Returns a list of {input_ids (b, t), attention_mask (b, t)}, for `capture`,
    `contrast`, `kl_divergence`, ...

    Raises:
        ConfigError: for no prompts, chats without a template, or a chat that the template refuses.
    """
    if isinstance(prompts, str) or not prompts or batch_size < 1:
        raise ConfigError(f"prompts={prompts!r}, batch_size={batch_size}: wanted a list with some prompts, in batches")
    bare = tokenizer.chat_template is None  # a template writes the special tokens itself
    texts = [_text(tokenizer, prompt, thinking) for prompt in prompts]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # any id: it is masked
    left = partial(pad_sequence, batch_first=True, padding_side="left")
    batches = []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        rows = [torch.tensor(ids) for ids in tokenizer(part, add_special_tokens=bare).input_ids]  # (t_i,) each
        mask = left([torch.ones_like(row) for row in rows])  # (b, t)
        batches.append({"input_ids": left(rows, padding_value=pad), "attention_mask": mask})
    return batches


def _text(tokenizer: Any, prompt: Prompt, thinking: bool) -> str:
    """The prompt as the template writes it, or as it is without one. Raises ConfigError for a chat that can't be."""
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ConfigError("this tokenizer has no chat template, and a prompt is a chat\n  give prompts as strings")
        return prompt
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    options = {} if thinking else {"enable_thinking": False}
    from jinja2 import TemplateError  # transformers brings it

    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options)
    except TemplateError as error:
        roles = [turn.get("role") for turn in chat]
        raise ConfigError(
            f"the tokenizer's chat template refuses a chat with the roles {roles}: {error}\n"
            f"  some know no system prompt: put it into the user's turn"
        ) from error
    return text
