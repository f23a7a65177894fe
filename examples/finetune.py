"""Fine-tune a language model with any method of lora-lite: train, save, compare, and load again.

    python examples/finetune.py                                  # lora on SmolLM2-135M; nothing is downloaded
    python examples/finetune.py --variant dora --quantization nf4 --minutes 10
    python examples/finetune.py --model Qwen/Qwen3-0.6B --data my.jsonl

The data that it makes by itself: from the signature of a function in Python's standard library to the first line of
its docstring. Held-out loss and held-out answers are of modules that no training step saw.

A step, an evaluation and an answer are timed first, and what no option gives is fitted to --minutes.
"""

import dataclasses
import random
import time
from collections.abc import Iterable
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Annotated, Any, Literal

import budget
import torch
import transformers
import typer
from batches import IGNORED, Batch, Example, batches, encode
from common import (
    INTERRUPTED,
    MINUTES,
    Base,
    BaseDtype,
    check_reload,
    load,
    logits_of,
    plain_errors,
    progress_bar,
    set_up,
    stored_in,
)
from learning_rates import TRAINED, learning_rate
from loguru import logger
from pairs import read_jsonl, split, stdlib_pairs
from report import History, plot, show, training_numbers, write_results
from smollm2 import smollm2_folder
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import lora_lite as ll

WARM_UP, CLIP, EVALUATIONS = 0.1, 1.0, 4
ANSWERS, PROBED_TOKENS = 3, 4

MOST_STEPS, LEAST_STEPS = 80, 16
MOST_PAIRS = 8
"""In a step."""
CALIBRATED = 32
"""Pairs that a start is computed from."""
MOST_EVAL_PAIRS, LEAST_EVAL_PAIRS = 64, 8
MOST_TOKENS, LEAST_TOKENS = 48, 8
"""Tokens of an answer."""
DIVERGED = 1  # exit code

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclasses.dataclass(frozen=True)
class Task:
    """The batches to train on, those to measure the loss on, and the pairs whose answers are shown."""

    train: Iterable[Batch]
    held_out: list[Batch]
    shown: list[Example]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything a run does. pairs: in a step. tokens: of an answer, at most."""

    steps: int
    pairs: int
    eval_pairs: int
    tokens: int


class DivergedError(Exception):
    """The gradients of a step are not finite."""


@app.command()
def main(
    variant: Annotated[str, typer.Option(help=f"The method: {', '.join(TRAINED)}.")] = "lora",
    quantization: Annotated[Literal["nf4", "fp4", "int8"] | None, typer.Option(help="Of the base.")] = None,
    model: Base = None,
    data: Annotated[Path | None, typer.Option(help="JSONL with prompt/completion or question/answer.")] = None,
    r: Annotated[int | None, typer.Option(help="Rank. Default: the method's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the method's.")] = None,
    dtype: BaseDtype = "auto",
    minutes: Annotated[float, typer.Option(min=0.0, help=MINUTES)] = 5.0,
    steps: Annotated[int | None, typer.Option(min=1, help=f"Optimiser steps. Default: up to {MOST_STEPS}.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help=f"Pairs in a step. Default: up to {MOST_PAIRS}.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longer pairs, in tokens, are left out.")] = 256,
    eval_pairs: Annotated[
        int | None,
        typer.Option(min=1, help=f"Held-out pairs to measure the loss on. Default: up to {MOST_EVAL_PAIRS}."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapter's first values and the order of the data.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Default: runs/<variant>[-<quantization>].")] = None,
) -> None:
    """Train an adapter, save it, show what it changes, and check that it loads again bit for bit."""
    time_left = budget.Budget(minutes)
    set_up(seed)
    with plain_errors():
        cfg = adapter_config(variant, r)
        lr = learning_rate(variant) if lr is None else lr
        out = out or Path("runs", variant if quantization is None else f"{variant}-{quantization}")
        pairs = read_jsonl(data) if data else stdlib_pairs()
        source = model or str(smollm2_folder())
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        train_set, held_out = (encode(tokenizer, part, max_length) for part in split(pairs))
        loading = time.perf_counter()
        base = load(source, quantization, dtype)
        loading = time.perf_counter() - loading
        adapter = ll.attach(base, cfg, calibration_data=calibration(variant, source, tokenizer, train_set))
        quantized, computed_in = stored_in(adapter)

    measured = random.Random(seed).sample(held_out, min(eval_pairs or MOST_EVAL_PAIRS, len(held_out)))
    sizes = fitted(base, tokenizer, measured, time_left, loading, steps, batch_size, eval_pairs)
    steps, measured = sizes.steps, measured[: sizes.eval_pairs]
    logger.info(f"{len(train_set)} pairs to train on, {len(measured)} of {len(held_out)} held-out ones to measure")
    task = Task(
        batches(tokenizer, train_set, sizes.pairs, seed),
        list(batches(tokenizer, measured, sizes.pairs)),
        measured[:ANSWERS],
    )
    with plain_errors():
        audited = ll.audit(base, task.held_out[0])
    logger.info(f"one batch forth and back: every parameter got a gradient\n{audited}")
    history = History()
    with ll.disabled(base):
        before = answers(base, tokenizer, task.shown, sizes.tokens)
        measure(base, task, history)
    try:
        train(base, adapter, task, lr, steps, history)
    except (KeyboardInterrupt, DivergedError) as stop:
        if isinstance(stop, DivergedError):
            logger.error(str(stop))
        keep(base, out, len(history.train), steps)
        raise typer.Exit(DIVERGED if isinstance(stop, DivergedError) else INTERRUPTED) from None
    ll.save(base, out / "adapter.safetensors")

    shown = [example.pair for example in task.shown]
    after = answers(base, tokenizer, task.shown, sizes.tokens)
    show([p.prompt for p in shown], before, after, references=[p.completion for p in shown])
    inputs = {"input_ids": task.held_out[0]["input_ids"]}
    expected, trainable = logits_of(base, inputs), sum(p.numel() for p in adapter.parameters())
    del base, adapter
    check_reload(load(source, quantization, dtype), out / "adapter.safetensors", inputs, expected)

    name = f"{Path(source).name} in {quantized or computed_in}"
    plot(history, f"{variant} on {name}, learning rate {lr:g}", out / "loss.png")
    settings = {"variant": variant, "config": cfg.to_dict(), "quantization": quantized, "dtype": computed_in}
    settings |= {"model": source, "lr": lr, "steps": steps, "batch_size": sizes.pairs, "eval_pairs": len(measured)}
    settings |= {"minutes": minutes, "seed": seed, "trainable_parameters": trainable}
    seconds = time_left.spent
    results = settings | training_numbers(history) | {"seconds": seconds}
    write_results(results, out / "results.json")
    logger.info(
        f"held-out loss {history.held_out[0]:.3f} -> {history.held_out[steps]:.3f} in {seconds:.0f} s: see {out}"
    )


# ---- setting up ---------------------------------------------------------------------------------


def calibration(variant: str, source: str, tokenizer: Any, examples: list[Example]) -> Any:
    """What a method starts from that starts from data: batches to train on, or for loftq the dense model."""
    if ll.REGISTRY[variant].needs_calibration is not True:
        return None
    return source if variant == "loftq" else list(batches(tokenizer, examples[:CALIBRATED], MOST_PAIRS))


def adapter_config(variant: str, r: int | None) -> Any:
    """The method's default config, with this rank if one is given. Raises VariantError or ConfigError."""
    config: Any = ll.config_for(variant)
    if r is None:
        return config()
    if "r" not in {field.name for field in dataclasses.fields(config)}:
        raise ll.ConfigError(f"--r {r}: {variant!r} has no rank")
    return config(r=r)


# ---- fitting to the time ------------------------------------------------------------------------


def fitted(
    model: Any,
    tokenizer: Any,
    pairs: list[Example],
    time_left: budget.Budget,
    loading: float,
    steps: int | None,
    batch_size: int | None,
    eval_pairs: int | None,
) -> Sizes:
    """The sizes that are given, the others as the time allows: a measurement, an answer and, unless `steps` is given, a
    step are timed on held-out pairs of middle length, one at a time and then as many as a step may have. They change
    nothing, the state of the random numbers included. loading: seconds for loading again.
    """
    rows = sorted(pairs, key=length)
    most_pairs = min(batch_size or MOST_PAIRS, MOST_PAIRS, len(rows))

    def loss(count: int) -> Tensor:
        (batch,) = batches(tokenizer, rows[(len(rows) - count) // 2 :][:count], count)
        return loss_of(model, batch)

    with torch.random.fork_rng(devices=[]):
        model.eval()
        step = 0.0 if steps else budget.seconds_of_one(lambda count: loss(count).backward(), most_pairs)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            evaluation = budget.seconds_of_one(loss, most_pairs)
        token = budget.seconds_of(lambda: answers(model, tokenizer, pairs[:ANSWERS], PROBED_TOKENS)) / PROBED_TOKENS
    # A batch that is drawn is padded to its longest pair.
    longer = padding(rows, most_pairs) / length(rows[len(rows) // 2])
    step, evaluation = longer * step, longer * evaluation

    plan = time_left.plan(later=loading + 2 * MOST_PAIRS * evaluation)  # the check of what was saved
    tokens = plan.take("tokens of each answer", 2 * token, MOST_TOKENS, LEAST_TOKENS, share=0.15)
    most, least = min(MOST_EVAL_PAIRS, len(pairs)), min(LEAST_EVAL_PAIRS, len(pairs))
    measurements = (EVALUATIONS + 1) * evaluation
    eval_pairs = plan.take("held-out pairs", measurements, most, least, share=0.25, given=eval_pairs)
    size = batch_size or (MOST_PAIRS if steps else plan.fits((1 + LEAST_STEPS) * step, MOST_PAIRS))
    plan.seconds -= size * step  # the audit's batch, forth and back
    steps = plan.take(f"steps of {size} pairs", size * step, MOST_STEPS, LEAST_STEPS, given=steps)
    plan.log()
    return Sizes(steps, size, eval_pairs, tokens)


def padding(examples: list[Example], count: int) -> float:
    """The tokens that each pair has, on average, in a batch of so many: as many as its longest."""
    lengths = [length(example) for example in examples]
    draws = [max(random.Random(i).choices(lengths, k=count)) for i in range(100)]
    return sum(draws) / len(draws)


def length(example: Example) -> int:
    """The number of tokens."""
    return len(example.prompt) + len(example.completion)


def measured_after(steps: int) -> set[int]:
    """The steps after which the held-out loss is measured: EVALUATIONS of them, the last included, or all if fewer."""
    return {round(i * steps / EVALUATIONS) for i in range(1, EVALUATIONS + 1)} - {0}


# ---- training and measuring ---------------------------------------------------------------------


def train(model: Any, adapter: ll.Adapter, task: Task, lr: float, steps: int, history: History) -> None:
    """AdamW with a linear warm-up and decay; history grows with each step.

    Raises DivergedError before a step that would spoil the adapter.
    """
    # No weight decay: it pulls to zero, which for some methods is far from where the adapter does nothing.
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    rise, evaluated = max(1, int(WARM_UP * steps)), measured_after(steps)
    schedule = LambdaLR(optimizer, lambda done: min((done + 1) / rise, (steps - done) / (steps - rise + 1)))
    with progress_bar("training", steps) as bar:
        for step, batch in enumerate(islice(chain.from_iterable(repeat(task.train)), steps), 1):
            started = time.perf_counter()
            model.train()
            loss = loss_of(model, batch)
            loss.backward()
            if not torch.nn.utils.clip_grad_norm_(adapter.parameters(), CLIP).isfinite():
                raise DivergedError(f"step {step}: the gradients are not finite\n  try a lower --lr than {lr:g}")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            history.train.append(loss.item())
            history.tokens += int(batch["attention_mask"].sum())
            history.seconds += time.perf_counter() - started
            speed = history.tokens / history.seconds
            bar.set_postfix_str(f"loss {history.smoothed[-1]:.2f}, {speed:.0f} tokens/s", refresh=False)
            bar.update()
            if step in evaluated:
                measure(model, task, history)


def loss_of(model: Any, batch: Batch) -> Tensor:
    """The mean loss over the tokens of the completions."""
    return model(**{key: value.to(model.device) for key, value in batch.items()}, use_cache=False).loss


@torch.no_grad()
def measure(model: Any, task: Task, history: History) -> None:
    """Put the held-out loss, the mean over tokens, into history."""
    model.eval()
    counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in task.held_out]
    losses = [loss_of(model, batch).item() for batch in task.held_out]
    step = len(history.train)
    history.held_out[step] = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
    logger.info(f"held-out loss {f'after step {step}' if step else 'before training'}: {history.held_out[step]:.3f}")


@torch.no_grad()
def answers(model: Any, tokenizer: Any, shown: list[Example], tokens: int) -> list[str]:
    """The model's own answers to the prompts, of so many tokens at most, by the likeliest token each time."""
    model.eval()
    texts = []
    for example in shown:
        prompt = torch.tensor([example.prompt], device=model.device)
        mask = torch.ones_like(prompt)
        output = model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        texts.append(tokenizer.decode(output[0, len(example.prompt) :], skip_special_tokens=True))
    return texts


# ---- saving -------------------------------------------------------------------------------------


def keep(model: Any, out: Path, done: int, steps: int) -> None:
    """The adapter of a run that stopped early, under a name of its own: no older result is overwritten."""
    file = out / f"adapter-step-{done}.safetensors"
    ll.save(model, file)
    logger.warning(f"stopped after {done} of {steps} steps: what they have trained is in {file}")


if __name__ == "__main__":
    app()
