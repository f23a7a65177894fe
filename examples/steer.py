"""Steer between what two sets of prompts differ in: fit a vector, sweep its coefficient c; then train and keep rounds.

    python examples/steer.py                                # French against English on SmolLM2-135M
    python examples/steer.py --positive a.jsonl --negative b.jsonl --model Qwen/Qwen3-0.6B --quantization nf4

The vector is fitted on the first half of each set. Its effect is read on the second half: the log of the odds, at an
answer's first token, between the first tokens of the two sides (the gap). The price is the KL divergence from the base
on neutral prompts. On each side of 0, c breaks down where that first exceeds --break-kl: the answers show what that is.

The rounds: a LoRA is trained at c = +1 and c = -1 at once to answer as each side's system prompt asks for, without it;
c is calibrated to --max-kl from the base with the rounds before, and the round is kept at that c in a history.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import transformers
import typer
from common import INTERRUPTED, check_reload, load, logits_of, plain_errors, progress_bar, set_up
from finetune import DIVERGED, DivergedError
from jsonl import DataError
from loguru import logger
from poles import HISTORY, NAME, Round, mean_gap, play, taught
from prompt_sets import SHIPPED, Prompt, halves, question, read_prompts
from report import write_results
from smollm2 import smollm2_folder
from steer_report import Point, plot_sweep, repeated, show_answers, show_rounds, show_sweep
from task import SIDES, Task, chosen_words, make_task

import lora_lite as ll

QUESTIONS = 3
DEPTH = 0.6
"""Of the blocks: where the vector is added, if --layer doesn't say."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    positive: Annotated[Path, typer.Option(help="Prompts, JSONL or .txt: c > 0.")] = SHIPPED / "french.jsonl",
    negative: Annotated[Path, typer.Option(help="What they are contrasted with.")] = SHIPPED / "english.jsonl",
    neutral: Annotated[Path, typer.Option(help="Prompts to measure divergence on.")] = SHIPPED / "neutral.jsonl",
    model: Annotated[str | None, typer.Option(help="Hub id or folder. Default: SmolLM2-135M-Instruct.")] = None,
    quantization: Annotated[Literal["nf4", "fp4", "int8"] | None, typer.Option(help="Of the base.")] = None,
    positive_words: Annotated[str | None, typer.Option(help="First words, by commas. Default: the model's.")] = None,
    negative_words: Annotated[str | None, typer.Option(help="The same of the other side.")] = None,
    layer: Annotated[int | None, typer.Option(help="Block to add at, from 0. Default: at 60 % of the depth.")] = None,
    method: Annotated[ll.Method, typer.Option(help="How the direction is found.")] = ll.Method.DIFFERENCE,
    most: Annotated[float, typer.Option(min=0.0, help="The sweep is from -c to c.")] = 2.0,
    step: Annotated[float, typer.Option(help="Of the sweep.")] = 0.5,
    break_kl: Annotated[float, typer.Option(min=0.0, help="Nats beyond which c has broken down.")] = 1.0,
    max_kl: Annotated[float, typer.Option(help="Nats to calibrate c to: the vector's and each round's.")] = 0.1,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 24,
    rounds: Annotated[int, typer.Option(min=0, help="To train and keep.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of a round.")] = 12,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of each pole in a step.")] = 4,
    r: Annotated[int, typer.Option(min=1, help="Rank of a round.")] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate of a round.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the rounds' first values and the order of their data.")] = 0,
    out: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs", "steer"),
) -> None:
    """Fit, sweep, calibrate and save a vector; then train rounds, keep them, save the history, and load it again."""
    started = time.time()
    set_up(seed)
    with plain_errors():
        coefficients = grid(most, step)
        paths = {"positive": positive, "negative": negative}
        words = chosen_words(paths, positive_words, negative_words)
        sides = {side: halves(path) for side, path in paths.items()}
        neutral_prompts = read_prompts(neutral)
        for side in SIDES:
            if rounds > len(sides[side][0]):
                raise DataError(f"--rounds {rounds}: {paths[side]} has {len(sides[side][0])} prompts to learn from")
        source = model or str(smollm2_folder())
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        base = load(source, quantization)
        at = round(DEPTH * base.config.num_hidden_layers) if layer is None else layer
        task = make_task(base, tokenizer, sides, neutral_prompts, words)
        out.mkdir(parents=True, exist_ok=True)
        settings = {"model": source, "quantization": quantization, "layer": at, "method": str(method), "seed": seed}
        settings |= {"max_kl": max_kl, "break_kl": break_kl, "rounds": rounds, "steps": steps, "r": r, "lr": lr}
        name = f"{positive.stem} against {negative.stem}, block {at} of {Path(source).name} in "
        name += quantization or "bfloat16"
        try:
            results = steer(base, tokenizer, task, sides, coefficients, settings, answer_tokens, name, out)
            if rounds:
                played = play_all(base, tokenizer, task, sides, settings, answer_tokens, batch_size, out)
                results |= keep(base, source, quantization, task, played, out)
        except DivergedError as stop:
            logger.error(str(stop))
            raise typer.Exit(DIVERGED) from None
        except KeyboardInterrupt:
            logger.warning(f"interrupted: {finished(out, started)} of this run is in {out}")
            raise typer.Exit(INTERRUPTED) from None
    seconds = time.time() - started
    write_results(settings | results | {"seconds": seconds}, out / "results.json")
    logger.info(f"{seconds:.0f} s in all: see {out}")


def grid(most: float, step: float) -> list[float]:
    """From -most to most, 0 included. Raises DataError."""
    count = round(most / step) if step > 0 else 0
    if not 0 < count <= 100:
        raise DataError(f"--most {most:g}, --step {step:g}: wanted 1 to 100 steps from 0 to the most")
    return [i * step for i in range(-count, count + 1)]


def finished(out: Path, started: float) -> str:
    """The adapters that this run has saved, by name."""
    return (
        ", ".join(file.name for file in sorted(out.glob("*.safetensors")) if file.stat().st_mtime >= started)
        or "no file"
    )


# ---- the vector ---------------------------------------------------------------------------------


def steer(
    model: Any,
    tokenizer: Any,
    task: Task,
    sides: Mapping[str, tuple[list[Prompt], list[Prompt]]],
    coefficients: Sequence[float],
    settings: Mapping[str, Any],
    answer_tokens: int,
    name: str,
    out: Path,
) -> dict[str, Any]:
    """Fit, sweep, calibrate, save, and take it off again."""
    cfg = ll.SteerConfig(layers=[settings["layer"]], method=settings["method"])
    adapter = ll.attach(model, cfg, calibration_data=task.fitted)
    questions = [question(prompt) for prompt in sides["positive"][1][:QUESTIONS]]
    points = []
    with progress_bar("sweep", len(coefficients)) as bar:
        for c in coefficients:
            with ll.scaled(model, c):
                gap, kl = mean_gap(model, task), ll.kl_divergence(model, task.neutral).mean().item()
                answers = ll.greedy_answers(model, tokenizer, questions, max_new_tokens=answer_tokens)
            points.append(Point(c, gap, kl, repeated(answers), answers))
            bar.update()
    show_answers(questions, points)
    show_sweep(points, settings["break_kl"])
    found = ll.calibrate_scale(model, task.neutral, settings["max_kl"], name=adapter.name, apply=True)
    gap = mean_gap(model, task)
    logger.info(
        f"KL {found.kl:.3f} at c = {found.c:.3f}, found in {found.evaluations} evaluations: "
        f"gap {next(p.gap for p in points if p.c == 0):+.2f} -> {gap:+.2f}"
    )
    plot_sweep(points, settings["break_kl"], found, gap, name, out / "sweep.png")
    ll.save(model, out / "steer.safetensors")
    ll.detach(model)
    return {"questions": questions, "sweep": [asdict(p) for p in points], "calibrated": asdict(found) | {"gap": gap}}


# ---- the rounds ---------------------------------------------------------------------------------


def play_all(
    model: Any,
    tokenizer: Any,
    task: Task,
    sides: Mapping[str, tuple[list[Prompt], list[Prompt]]],
    settings: Mapping[str, Any],
    answer_tokens: int,
    batch_size: int,
    out: Path,
) -> list[Round]:
    """Each round on prompts of its own; the history is saved after each."""
    before, count = mean_gap(model, task), settings["rounds"]
    examples = taught(model, tokenizer, {side: sides[side][0] for side in SIDES}, answer_tokens)
    options = {"steps": settings["steps"], "batch_size": batch_size, "r": settings["r"], "lr": settings["lr"]}
    done: list[Round] = []
    for i in range(count):
        own = {side: examples[side][i::count] for side in SIDES}
        label = f"{NAME}-{i + 1}"
        each = play(model, tokenizer, task, own, label, **options, budget=settings["max_kl"], seed=settings["seed"] + i)
        ll.save(model, out / "history.safetensors", HISTORY)
        logger.info(f"{label}: loss {each.losses[0]:.2f} -> {each.losses[-1]:.2f}; kept {ll.history(model)[-1]}")
        done.append(each)
    show_rounds(ll.history(model), done, before)
    return done


def keep(
    model: Any, source: str, quantization: str | None, task: Task, played: Sequence[Round], out: Path
) -> dict[str, Any]:
    """Check that the saved history gives the same on a fresh base."""
    inputs = task.held_out["positive"][0]
    check_reload(load(source, quantization), out / "history.safetensors", inputs, logits_of(model, inputs), HISTORY)
    return {"history": [asdict(each) | {"c": kept.c} for each, kept in zip(played, ll.history(model), strict=True)]}


if __name__ == "__main__":
    app()
