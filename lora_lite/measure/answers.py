"""greedy_answers and marker_rate: the answers of a model, and the share of them that contain a marker."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..base.still import still
from ..errors import ConfigError
from .base_cache import remembered
from .batches import inputs_of
from .evaluate import contiguous_into_head
from .prompts import Prompt, prompt_batches


def marker_rate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    markers: Sequence[str],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    skip_thinking: bool = False,
    progress: bool = False,
) -> float:
    """The share of greedy answers, from 0 to 1, that contain one of the markers, whatever their case.

    skip_thinking looks only at the text after a thinking block, and asks the chat template for none.

    Raises:
        ConfigError: for no markers, and what `prompt_batches` refuses.
    """
    if isinstance(markers, str) or not markers or not all(markers):
        raise ConfigError(f"markers={markers!r}: wanted a list of strings, none of them empty")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
    answers = greedy_answers(model, tokenizer, prompts, skip_thinking=skip_thinking, **options)
    folded = [marker.casefold() for marker in markers]
    return sum(any(marker in answer.casefold() for marker in folded) for answer in answers) / len(answers)


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    skip_thinking: bool = False,
    progress: bool = False,
) -> list[str]:
    """The model's answers by the likeliest token each time, in order; skip_thinking as in `marker_rate`.

    Raises:
        ConfigError: for what `prompt_batches` refuses.
    """
    from transformers import GenerationConfig

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    stop = model.generation_config.eos_token_id
    # each has to be said: generate takes what is left open from the model's own config
    options = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    options |= {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "eos_token_id": stop}
    batches = prompt_batches(tokenizer, prompts, batch_size, thinking=not skip_thinking)
    answers: list[str] = []
    with still(model), contiguous_into_head(model):
        for inputs in inputs_of(model, batches, progress, "answer"):
            run = partial(model.generate, **inputs, generation_config=GenerationConfig(**options))
            tokens = remembered(model, ("answers", inputs, options), run)  # (b, t + new)
            t = inputs["input_ids"].shape[1]
            if skip_thinking:
                answers += [_answer(tokenizer, row[:t], row[t:]) for row in tokens]
            else:
                answers += tokenizer.batch_decode(tokens[:, t:], skip_special_tokens=True)
    return answers


def without_thinking(answer: str, opened: bool = False) -> str:
    """The answer after its thinking, in <think> tags or GPT-OSS's channels; nothing, if the thinking never ended.

    opened: the prompt ended with the opening tag, as those of some templates do.
    """
    if "<|channel|>" in answer:
        return answer.partition("<|channel|>final<|message|>")[2]
    if opened or "<think>" in answer or "</think>" in answer:
        return answer.partition("</think>")[2].lstrip()
    return answer


def _answer(tokenizer: Any, prompt: Tensor, new: Tensor) -> str:
    """The text of the new tokens after their thinking, without special ones."""
    opened = tokenizer.decode(prompt).rstrip().endswith("<think>")
    text = without_thinking(tokenizer.decode(new), opened)
    for special in tokenizer.all_special_tokens:  # GPT-OSS marks its channels by special tokens, so they go last
        text = text.replace(special, "")
    return text
