"""What a model answers, and how often an answer has a marker in it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from ..base.still import still
from ..errors import ConfigError
from .base_cache import remembered
from .batches import as_inputs, with_progress
from .evaluate import contiguous_into_head
from .prompts import Prompt, prompt_batches

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""All of it: generate fills what is left open from the model's own config."""


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

    skip_thinking looks at what comes after a thinking block only, and asks the chat template for none. Raises
    ConfigError for no markers or no prompts.
    """
    if isinstance(markers, str) or not markers or not all(markers):
        raise ConfigError(f"markers={markers!r}: wanted a list of strings, none of them empty")
    answers = greedy_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        skip_thinking=skip_thinking,
        progress=progress,
    )
    wanted = [marker.casefold() for marker in markers]
    return sum(any(marker in answer.casefold() for marker in wanted) for answer in answers) / len(answers)


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
    """The model's own answers by the likeliest token each time, in order; skip_thinking as in `marker_rate`."""
    from transformers import GenerationConfig

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    stop = model.generation_config.eos_token_id
    answers: list[str] = []
    with still(model), contiguous_into_head(model):
        for batch in with_progress(
            prompt_batches(tokenizer, prompts, batch_size, thinking=not skip_thinking), progress, "answers"
        ):
            inputs = as_inputs(batch, model)
            options = GREEDY | {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "eos_token_id": stop}
            run = partial(model.generate, **inputs, generation_config=GenerationConfig(**options))
            tokens = remembered(model, ("answers", inputs, options), run)
            for prompt, ids in zip(inputs["input_ids"], tokens[:, inputs["input_ids"].shape[1] :], strict=True):
                answer = tokenizer.decode(ids, skip_special_tokens=not skip_thinking)
                if skip_thinking:
                    answer = without_thinking(answer, opened=tokenizer.decode(prompt).rstrip().endswith("<think>"))
                    for special in tokenizer.all_special_tokens:
                        answer = answer.replace(special, "")
                answers.append(answer)
    return answers


def without_thinking(answer: str, opened: bool = False) -> str:
    """The answer after its thinking, in <think> tags or GPT-OSS's channels; nothing, if that never ended.

    opened: the prompt ended with the opening tag, as some templates' do.
    """
    if "<|channel|>" in answer:
        return answer.partition("<|channel|>final<|message|>")[2]
    if opened or "<think>" in answer or "</think>" in answer:
        return answer.partition("</think>")[2].lstrip()
    return answer
