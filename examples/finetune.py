"""Fine-tune a language model with any method of lora-lite: train, save, compare, and load again.

    python examples/finetune.py                                  # lora on SmolLM2-135M; nothing is downloaded
    python examples/finetune.py --variant dora --quantization nf4
    python examples/finetune.py --model Qwen/Qwen3-0.6B --data my.jsonl

The data that it makes by itself: from the signature of a function in Python's standard library to the first line of
its docstring. Held-out loss and held-out answers are of modules that no training step saw.
"""

import dataclasses
import random
import time
from collections.abc import Iterable
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from batches import IGNORED, Batch, Example, batches, encode
from common import INTERRUPTED, check_reload, load, logits_of, plain_errors, progress_bar, set_up
from loguru import logger
from pairs import read_jsonl, split, stdlib_pairs
from report import History, plot, show, training_numbers, write_results
from smollm2 import smollm2_folder
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import lora_lite as ll

WARM_UP, CLIP, EVALUATIONS = 0.1, 1.0, 4
ANSWERS, ANSWER_TOKENS = 3, 48
DIVERGED = 1  # exit code

TRAINED = [name for name, method in ll.REGISTRY.items() if method.default_lr is not None]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclasses.dataclass(frozen=True)
class Task:
    """What to train on, what to measure the loss on, and what to show the answers to."""

    train: Iterable[Batch]
    held_out: list[Batch]
    shown: list[Example]


class DivergedError(Exception):
    """The gradients of a step are not finite."""


@app.command()
def main(
    variant: Annotated[str, typer.Option(help=f"The method: {', '.join(TRAINED)}.")] = "lora",
    quantization: Annotated[Literal["nf4", "fp4", "int8"] | None, typer.Option(help="Of the base.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder. Default: SmolLM2-135M-Instruct.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL with prompt/completion or question/answer.")] = None,
    r: Annotated[int | None, typer.Option(help="Rank. Default: the method's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the method's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 80,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in a step.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Longer pairs, in tokens, are left out.")] = 256,
    eval_pairs: Annotated[int, typer.Option(min=1, help="Held-out pairs to measure the loss on.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the adapter's first values and the order of the data.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Default: runs/<variant>[-<quantization>].")] = None,
) -> None:
    """Train an adapter, save it, show what it changes, and check that it loads again bit for bit."""
    started = time.perf_counter()
    set_up(seed)
    with plain_errors():
        cfg = adapter_config(variant, r)
        lr = learning_rate(variant) if lr is None else lr
        out = out or Path("runs", variant if quantization is None else f"{variant}-{quantization}")
        pairs = read_jsonl(data) if data else stdlib_pairs()
        source = model or str(smollm2_folder())
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        train_set, held_out = (encode(tokenizer, part, max_length) for part in split(pairs))
        base = load(source, quantization)
        adapter = ll.attach(base, cfg)
        held = (adapter.base["quantization"] or {"quant_type": None})["quant_type"]  # a folder may be quantised already

    measured = random.Random(seed).sample(held_out, min(eval_pairs, len(held_out)))
    logger.info(f"{len(train_set)} pairs to train on, {len(measured)} of {len(held_out)} held-out ones to measure")
    task = Task(
        batches(tokenizer, train_set, batch_size, seed),
        list(batches(tokenizer, measured, batch_size)),
        measured[:ANSWERS],
    )
    history = History()
    with ll.disabled(base):
        before = answers(base, tokenizer, task)
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
    after = answers(base, tokenizer, task)
    show([p.prompt for p in shown], before, after, references=[p.completion for p in shown])
    inputs = {"input_ids": task.held_out[0]["input_ids"]}
    expected, trainable = logits_of(base, inputs), sum(p.numel() for p in adapter.parameters())
    del base, adapter
    check_reload(load(source, quantization), out / "adapter.safetensors", inputs, expected)

    name = f"{Path(source).name} in {held or 'bfloat16'}"
    plot(history, f"{variant} on {name}, learning rate {lr:g}", out / "loss.png")
    settings = {"variant": variant, "config": cfg.to_dict(), "quantization": held, "model": source, "lr": lr}
    settings |= {"steps": steps, "batch_size": batch_size, "seed": seed, "trainable_parameters": trainable}
    seconds = time.perf_counter() - started
    results = settings | training_numbers(history) | {"seconds": seconds}
    write_results(results, out / "results.json")
    logger.info(
        f"held-out loss {history.held_out[0]:.3f} -> {history.held_out[steps]:.3f} in {seconds:.0f} s: see {out}"
    )


# ---- setting up ---------------------------------------------------------------------------------


def adapter_config(variant: str, r: int | None) -> Any:
    """The method's defaults, but for r. Raises VariantError or ConfigError."""
    config: Any = ll.config_for(variant)
    if r is None:
        return config()
    if "r" not in {field.name for field in dataclasses.fields(config)}:
        raise ll.ConfigError(f"--r {r}: {variant!r} has no rank")
    return config(r=r)


def learning_rate(variant: str) -> float:
    """The method's own. Raises ConfigError for a method that is computed, not trained."""
    rate = ll.REGISTRY[variant].default_lr
    if rate is None:
        raise ll.ConfigError(f"--variant {variant}: it is computed, not trained; use one of {', '.join(TRAINED)}")
    return rate


# ---- training and measuring ---------------------------------------------------------------------


def train(model: Any, adapter: ll.Adapter, task: Task, lr: float, steps: int, history: History) -> None:
    """AdamW with a linear warm-up and decay; history grows with each step.

    Raises DivergedError before a step that would spoil the adapter.
    """
    # No weight decay: it pulls to zero, which for some methods is far from where the adapter does nothing.
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    rise = max(1, int(WARM_UP * steps))
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
            if step == steps or step % max(1, steps // EVALUATIONS) == 0:
                measure(model, task, history)


def loss_of(model: Any, batch: Batch) -> Tensor:
    """The mean over the tokens of the completions."""
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
def answers(model: Any, tokenizer: Any, task: Task) -> list[str]:
    """The model's own answers to the prompts that are shown, by the likeliest token each time."""
    model.eval()
    texts = []
    for example in task.shown:
        prompt = torch.tensor([example.prompt], device=model.device)
        mask = torch.ones_like(prompt)
        output = model.generate(prompt, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False)
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
