"""What an adapter changes: distributions, answers, logits; the base is the same model with the adapter off."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import sharding
from .adapter import adapters, scaled
from .calibrate import Positions, as_inputs, check_several, select, with_progress
from .errors import BaseModelError, ConfigError, TargetError
from .prompts import Prompt, prompt_batches
from .session import session_of
from .still import still

ROUNDING = 1e-5
"""Nats by which a divergence of float32 log-probabilities may fall below zero."""

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""All of it: generate fills what is left open from the model's own config."""

MEMO_BYTES = 1 << 30
"""Of base-side results that a model with adapters keeps; the oldest goes first."""


def kl_divergence(
    model: nn.Module,
    batches: Iterable[Any],
    name: str | None = None,
    *,
    positions: Positions = "last",
    progress: bool = False,
) -> Float[Tensor, "n"]:
    """KL(base ‖ adapted) of the next token, in nats, at each position looked at: (n,) float64, in order.

    The base is the model with one adapter (or all) at scale 0; the adapted model is as it stands. Log-probabilities
    come from the raw logits in float32. batches and positions are as in `capture`.

    The base's side is computed once for a batch and remembered by its content while adapters stay attached (it is
    read-only then), unless another adapter takes part in it.

    Raises TargetError without an adapter, BaseModelError for a NaN or a divergence below zero by more than rounding.
    """
    return divergences(model, batches, name, positions, progress, {})


def divergences(
    model: nn.Module,
    batches: Iterable[Any],
    name: str | None,
    positions: Positions,
    progress: bool,
    base_side: dict[int, Tensor],
    overflow: bool = False,
) -> Float[Tensor, "n"]:
    """As `kl_divergence`, with the base's log-probabilities of each batch, by its number, kept for a next call; with
    `overflow`, NaN where the adapted model's are not finite, in place of an error."""
    if not adapters(model):
        raise TargetError(f"no adapter is attached to this {type(model).__name__}, so there is nothing to compare")
    found, whole_base = [], True
    for i, (content, logits) in enumerate(_each(model, batches, positions, progress)):
        adapted = _log_probabilities(logits)
        base = base_side.get(i)
        if base is None:
            with scaled(model, 0.0, name):
                base = _remembered(model, ("log-probabilities", content), partial(_log_probabilities, logits))
            if base.nbytes + sum(kept.nbytes for kept in base_side.values()) <= MEMO_BYTES:
                base_side[i] = base.cpu()
        base = base.to(adapted)
        whole_base = whole_base and bool(base.isfinite().all())
        found.append((base.exp() * (base - adapted)).sum(-1, dtype=torch.float64).cpu())
    kl = torch.cat(found)
    if overflow and whole_base and not kl.isfinite().all():
        return kl
    if not (kl.isfinite().all() and (kl >= -ROUNDING).all()):
        raise BaseModelError(
            f"KL divergences from {kl.min():.3g} to {kl.max():.3g}: below zero or not finite\n"
            f"  the two forwards differ by more than the adapter, or the dtype overflows: try another for the base"
        )
    return kl


def logit_gap(
    model: nn.Module,
    batches: Iterable[Any],
    positive: Sequence[int],
    negative: Sequence[int],
    *,
    positions: Positions = "last",
    progress: bool = False,
) -> Float[Tensor, "n"]:
    """log Σ exp of the logits of one set of tokens less that of another, at each position: (n,) float64, in order.

    It is the log of the odds between the two sets. Raises ConfigError for a set that is empty or shares a token.
    """
    if not positive or not negative or set(positive) & set(negative):
        sets = f"{list(positive)} and {list(negative)}"
        raise ConfigError(f"logit_gap: token sets {sets}: wanted two, none empty, without a common token")

    def gap(logits: Callable[[], Tensor]) -> Tensor:
        here = logits()
        sides = [here[:, list(ids)].double().logsumexp(-1) for ids in (positive, negative)]
        return sides[0] - sides[1]

    found = []
    for content, logits in _each(model, batches, positions, progress):
        key = ("gap", content, list(positive), list(negative))
        found.append(_remembered(model, key, partial(gap, logits)).cpu())
    return torch.cat(found)


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
    with still(model), _contiguous_into_head(model):
        for batch in with_progress(
            prompt_batches(tokenizer, prompts, batch_size, thinking=not skip_thinking), progress, "answers"
        ):
            inputs = as_inputs(batch, model)
            options = GREEDY | {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "eos_token_id": stop}
            run = partial(model.generate, **inputs, generation_config=GenerationConfig(**options))
            tokens = _remembered(model, ("answers", inputs, options), run)
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


def _each(
    model: nn.Module, batches: Iterable[Any], positions: Positions, progress: bool
) -> Iterator[tuple[dict[str, Any], Callable[[], Tensor]]]:
    """For each batch, its content and a function that runs the model and gives float32 logits at the positions."""
    check_several(batches)
    counted = 0
    with still(model), _contiguous_into_head(model):
        for batch in with_progress(batches, progress, "evaluation"):
            inputs = as_inputs(batch, model)
            mask = select(inputs, positions)
            counted += 1
            yield {**inputs, "positions": mask}, partial(_logits, model, inputs, mask)
    if not counted:
        raise ConfigError("there are no batches to evaluate on\n  a generator gives its batches only once")


def _log_probabilities(logits: Callable[[], Tensor]) -> Float[Tensor, "n v"]:
    return logits().log_softmax(-1)


def _logits(model: nn.Module, inputs: dict[str, Any], mask: Tensor) -> Float[Tensor, "n v"]:
    """Without those of earlier positions, where the model can leave them out: the output head is a large layer."""
    t = mask.shape[1]
    tail = t - int(mask.any(0).long().argmax())
    can_skip = tail < t and "logits_to_keep" in inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": tail} if can_skip else {}
    logits: Tensor = model(**inputs, **keep).logits
    return logits[mask[:, -logits.shape[1] :].to(logits.device)].float()


@contextmanager
def _contiguous_into_head(model: nn.Module) -> Iterator[None]:
    """The output head gets the hidden states of the last positions as a copy, not as a view of all of them.

    torch multiplies such a view by a matrix that needs no gradient in a batch of products, with a copy of the matrix
    for each row: 9.7 s instead of 0.1 s for 20 prompts on SmolLM2-135M (two CPU cores).
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: tuple(each.contiguous() for each in args))
    try:
        yield
    finally:
        handle.remove()


# ---- what is remembered of the base -------------------------------------------------------------


def _remembered(model: nn.Module, key: Sequence[Any], compute: Callable[[], Tensor]) -> Tensor:
    """compute(), or what it gave before for the same content, while every adapter is off and the base is untouched."""
    root, session = session_of(model)
    own = {id(tensor) for adapter in adapters(model).values() for _, tensor in adapter.named_tensors()}
    base = [t for t in (*root.parameters(), *root.buffers()) if id(t) not in own]
    on = not session.adapters or any(state.scale for state in session.adapters.values())
    if on or any(map(sharding.is_sharded, base)):  # of a sharded model, all processes must run the same forwards
        return compute()
    hashed = hashlib.sha256()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    for part in (*key, autocast, *map(_mark, base)):
        _digest(hashed, part)
    digest = hashed.digest()
    if digest in session.memo:
        return session.memo[digest]
    value = session.memo[digest] = compute().cpu()
    while sum(kept.nbytes for kept in session.memo.values()) > MEMO_BYTES:
        del session.memo[next(iter(session.memo))]
    return value


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor of the base is cast, swapped or edited (as nobody should while adapters are on)."""
    return str(tensor.dtype), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _digest(hashed: Any, part: Any) -> None:
    """Feed a tensor's type, shape and bytes, or a structure of plain values, to a hash."""
    if isinstance(part, Tensor):
        hashed.update(f"{part.dtype}{tuple(part.shape)}".encode())
        hashed.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(part, Mapping):
        for key in sorted(part):
            hashed.update(f"{key}:".encode())
            _digest(hashed, part[key])
    else:
        hashed.update(f"{part!r};".encode())
