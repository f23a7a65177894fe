"""Steer between what two sets of prompts differ in: fit a vector, sweep its coefficient c; then train and keep rounds.

    python examples/steer.py                                # French against English on SmolLM2-135M
    python examples/steer.py --positive a.jsonl --negative b.jsonl --model Qwen/Qwen3-0.6B --quantization nf4

The vector is fitted on the first half of each set. Its effect is read on the second half: the log of the odds, at an
answer's first token, between the first tokens of the two sides (the gap). The price is the KL divergence from the base
on neutral prompts. On each side of 0, c breaks down where that first exceeds --break-kl: the answers show what that is.

The rounds: a LoRA is trained at c = +1 and c = -1 at once to answer as each side's system prompt asks for, without it;
c is calibrated to --max-kl from the base with the rounds before, and the round is kept at that c in a history.

What no option gives is fitted to --minutes: an answer, the gap and a training step are timed.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import transformers
import typer
from budget import Budget, seconds_of
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
from finetune import DIVERGED, DivergedError
from jsonl import DataError
from loguru import logger
from poles import HISTORY, NAME, Round, mean_gap, play, seconds_of_a_prompt, taught
from prompt_sets import SHIPPED, Prompt, halves, question, read_prompts
from report import write_results
from smollm2 import smollm2_folder
from steer_report import Point, plot_sweep, repeated, show_answers, show_rounds, show_sweep
from task import BATCH, SIDES, Task, chosen_words, make_task

import lora_lite as ll

QUESTIONS, PROBED_TOKENS = 3, 4
EVALUATIONS = 6
"""The most that a calibration takes."""

MOST_POINTS = 4
"""Points of the sweep on each side of 0."""
MOST_TOKENS, LEAST_TOKENS = 24, 8
"""Tokens of an answer."""
LEAST_NEUTRAL = 8
"""Prompts."""
MOST_STEPS, LEAST_STEPS, MOST_PROMPTS = 12, 4, 4
"""Steps of a round, and prompts of each pole in a step."""

DEPTH = 0.6
"""The share of the blocks below the one where the vector is added, if --layer doesn't say."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    positive: Annotated[Path, typer.Option(help="Prompts, JSONL or .txt: c > 0.")] = SHIPPED / "french.jsonl",
    negative: Annotated[Path, typer.Option(help="What they are contrasted with.")] = SHIPPED / "english.jsonl",
    neutral: Annotated[Path, typer.Option(help="Prompts to measure divergence on.")] = SHIPPED / "neutral.jsonl",
    model: Base = None,
    quantization: Annotated[Literal["nf4", "fp4", "int8"] | None, typer.Option(help="Of the base.")] = None,
    positive_words: Annotated[str | None, typer.Option(help="First words, by commas. Default: the model's.")] = None,
    negative_words: Annotated[str | None, typer.Option(help="The same of the other side.")] = None,
    layer: Annotated[int | None, typer.Option(help="Block to add at, from 0. Default: at 60 % of the depth.")] = None,
    method: Annotated[ll.Method, typer.Option(help="How the direction is found.")] = ll.Method.DIFFERENCE,
    most: Annotated[float, typer.Option(min=0.0, help="The sweep is from -c to c.")] = 2.0,
    step: Annotated[float | None, typer.Option(help="Of the sweep. Default: down to a quarter of --most.")] = None,
    break_kl: Annotated[float, typer.Option(min=0.0, help="Nats beyond which c has broken down.")] = 1.0,
    max_kl: Annotated[float, typer.Option(help="Nats to calibrate c to: the vector's and each round's.")] = 0.1,
    dtype: BaseDtype = "auto",
    minutes: Annotated[float, typer.Option(min=0.0, help=MINUTES)] = 5.0,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Of an answer. Default: up to {MOST_TOKENS}.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="To train and keep.")] = 2,
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Optimiser steps of a round. Default: up to {MOST_STEPS}.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help=f"Prompts of each pole in a step. Default: up to {MOST_PROMPTS}.")
    ] = None,
    r: Annotated[int, typer.Option(min=1, help="Rank of a round.")] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate of a round.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the rounds' first values and the order of their data.")] = 0,
    out: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs", "steer"),
) -> None:
    """Fit, sweep, calibrate and save a vector; then train rounds, keep them, save the history, and load it again."""
    time_left, started = Budget(minutes), time.time()
    set_up(seed)
    with plain_errors():
        grid(most, most / MOST_POINTS if step is None else step)  # whether they fit, before anything is loaded
        paths = {"positive": positive, "negative": negative}
        words = chosen_words(paths, positive_words, negative_words)
        sides = {side: halves(path) for side, path in paths.items()}
        neutral_prompts = read_prompts(neutral)
        for side in SIDES:
            if rounds > len(sides[side][0]):
                raise DataError(f"--rounds {rounds}: {paths[side]} has {len(sides[side][0])} prompts to learn from")
        source = model or str(smollm2_folder())
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        loading = time.perf_counter()
        base = load(source, quantization, dtype)
        loading = time.perf_counter() - loading
        block = round(DEPTH * base.config.num_hidden_layers) if layer is None else layer
        task = make_task(base, tokenizer, sides, neutral_prompts, words)
        out.mkdir(parents=True, exist_ok=True)
        settings = {"model": source, "layer": block, "method": str(method), "seed": seed, "minutes": minutes}
        settings |= {"max_kl": max_kl, "break_kl": break_kl, "rounds": rounds, "r": r, "lr": lr}
        sizes = fitted(
            time_left, base, tokenizer, task, questions_of(sides), rounds, loading, most, step, answer_tokens
        )
        task = replace(task, neutral=ll.prompt_batches(tokenizer, neutral_prompts[: sizes.neutral], BATCH))
        settings |= {"neutral_prompts": sizes.neutral, "answer_tokens": sizes.tokens}
        name = f"{positive.stem} against {negative.stem}, block {block} of {Path(source).name}"
        try:
            results = steer(base, tokenizer, task, questions_of(sides), sizes, settings, name, out)
            if rounds:
                rest = Rest(time_left, loading + rounds * (EVALUATIONS + 1) * sizes.divergence, steps, batch_size)
                played, steps = play_all(base, tokenizer, task, sides, settings, rest, out)
                results |= keep(base, load(source, quantization, dtype), task, played, out) | {"steps": steps}
        except DivergedError as stop:
            logger.error(str(stop))
            raise typer.Exit(DIVERGED) from None
        except KeyboardInterrupt:
            logger.warning(f"interrupted: {finished(out, started)} of this run is in {out}")
            raise typer.Exit(INTERRUPTED) from None
    seconds = time_left.spent
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


def questions_of(sides: Mapping[str, tuple[list[Prompt], list[Prompt]]]) -> list[str]:
    """The held-out questions whose answers are shown."""
    return [question(prompt) for prompt in sides["positive"][1][:QUESTIONS]]


# ---- fitting to the time ------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How much of everything the sweep does.

    coefficients
    tokens       of an answer, at most
    neutral      prompts to measure the divergence on
    divergence   the seconds that one measurement of it takes
    """

    coefficients: list[float]
    tokens: int
    neutral: int
    divergence: float


@dataclass(frozen=True)
class Rest:
    """For the rounds: the time, the seconds that their calibrations and the last check take, and what is given."""

    time_left: Budget
    later: float
    steps: int | None
    batch_size: int | None


def fitted(
    time_left: Budget,
    model: Any,
    tokenizer: Any,
    task: Task,
    questions: Sequence[str],
    rounds: int,
    loading: float,
    most: float,
    step: float | None,
    answer_tokens: int | None,
) -> Sizes:
    """The sizes that are given, the others as the time allows: an answer and the gap of all prompts are timed."""
    asked = partial(ll.greedy_answers, model, tokenizer, questions, max_new_tokens=PROBED_TOKENS)
    token = seconds_of(asked) / PROBED_TOKENS
    gap = seconds_of(lambda: mean_gap(model, task))
    held_out = sum(batch["input_ids"].numel() for side in SIDES for batch in task.held_out[side])
    prompts = sum(len(batch["input_ids"]) for batch in task.neutral)
    prompt = gap / held_out * sum(batch["input_ids"].numel() for batch in task.neutral) / prompts

    # Fitting the vector reads as many prompts as the gap; each calibration ends with one.
    plan = time_left.plan(later=loading + (2 + rounds) * gap)
    pair = 2 * (gap + (answer_tokens or MOST_TOKENS) * token + prompts / 2 * prompt)
    # Halves and quarters of --most alone are numbers that one can read.
    half = 2 ** (plan.fits(pair, MOST_POINTS, share=0.5).bit_length() - 1)
    coefficients = grid(most, most / half if step is None else step)
    points = len(coefficients)
    plan.take("points of the sweep", gap, points, points, given=None if step is None else points)
    answered = points + (2 * BATCH / len(questions) if rounds else 0)  # and the prompts that the rounds learn from
    tokens = plan.take("tokens of each answer", answered * token, MOST_TOKENS, LEAST_TOKENS, 0.25, given=answer_tokens)
    measured = points + EVALUATIONS + rounds * (EVALUATIONS + 1)
    neutral = plan.take("neutral prompts", measured * prompt, prompts, min(LEAST_NEUTRAL, prompts), 0.4)
    plan.log()
    return Sizes(coefficients, tokens, neutral, neutral * prompt)


# ---- the vector ---------------------------------------------------------------------------------


def steer(
    model: Any,
    tokenizer: Any,
    task: Task,
    questions: Sequence[str],
    sizes: Sizes,
    settings: Mapping[str, Any],
    name: str,
    out: Path,
) -> dict[str, Any]:
    """Fit, sweep, calibrate, save, and take it off again."""
    cfg = ll.SteerConfig(layers=[settings["layer"]], method=settings["method"])
    adapter = ll.attach(model, cfg, calibration_data=task.fitted)
    quantized, computed_in = stored_in(adapter)
    points = []
    with progress_bar("sweep", len(sizes.coefficients)) as bar:
        for c in sizes.coefficients:
            with ll.scaled(model, c):
                gap, kl = mean_gap(model, task), ll.kl_divergence(model, task.neutral).mean().item()
                answers = ll.greedy_answers(model, tokenizer, questions, max_new_tokens=sizes.tokens)
            points.append(Point(c, gap, kl, repeated(answers), answers))
            bar.update()
    show_answers(questions, points)
    show_sweep(points, settings["break_kl"])
    calibrated = ll.calibrate_scale(model, task.neutral, settings["max_kl"], name=adapter.name, apply=True)
    gap = mean_gap(model, task)
    logger.info(
        f"KL {calibrated.kl:.3f} at c = {calibrated.c:.3f}, found in {calibrated.evaluations} evaluations: "
        f"gap {next(p.gap for p in points if p.c == 0):+.2f} -> {gap:+.2f}"
    )
    plot_sweep(
        points, settings["break_kl"], calibrated, gap, f"{name} in {quantized or computed_in}", out / "sweep.png"
    )
    ll.save(model, out / "steer.safetensors")
    ll.detach(model)
    results = {
        "quantization": quantized,
        "dtype": computed_in,
        "questions": questions,
        "sweep": [asdict(p) for p in points],
    }
    return results | {"calibrated": asdict(calibrated) | {"gap": gap}}


# ---- the rounds ---------------------------------------------------------------------------------


def play_all(
    model: Any,
    tokenizer: Any,
    task: Task,
    sides: Mapping[str, tuple[list[Prompt], list[Prompt]]],
    settings: Mapping[str, Any],
    rest: Rest,
    out: Path,
) -> tuple[list[Round], int]:
    """(the rounds, the steps of each): each on prompts of its own; the history is saved after each."""
    before, count = mean_gap(model, task), settings["rounds"]
    examples = taught(model, tokenizer, {side: sides[side][0] for side in SIDES}, settings["answer_tokens"])
    prompt = 0.0
    if rest.steps is None:
        at_once = min(rest.batch_size or MOST_PROMPTS, MOST_PROMPTS)
        prompt = count * seconds_of_a_prompt(model, tokenizer, examples, at_once, settings["r"])
    plan = rest.time_left.plan(rest.later)
    size = rest.batch_size or (MOST_PROMPTS if rest.steps else plan.fits(LEAST_STEPS * prompt, MOST_PROMPTS))
    what = f"steps of {size} prompts of each pole in each round"
    steps = plan.take(what, size * prompt, MOST_STEPS, LEAST_STEPS, given=rest.steps)
    plan.log()
    options = {"steps": steps, "batch_size": size, "r": settings["r"], "lr": settings["lr"]}
    done: list[Round] = []
    for i in range(count):
        part = {side: examples[side][i::count] for side in SIDES}
        label, seed = f"{NAME}-{i + 1}", settings["seed"] + i
        played = play(model, tokenizer, task, part, label, **options, budget=settings["max_kl"], seed=seed)
        ll.save(model, out / "history.safetensors", HISTORY)
        logger.info(f"{label}: loss {played.losses[0]:.2f} -> {played.losses[-1]:.2f}; kept {ll.history(model)[-1]}")
        done.append(played)
    show_rounds(ll.history(model), done, before)
    return done, steps


def keep(model: Any, fresh: Any, task: Task, played: Sequence[Round], out: Path) -> dict[str, Any]:
    """Check that the saved history gives the same on a fresh base."""
    inputs = task.held_out["positive"][0]
    check_reload(fresh, out / "history.safetensors", inputs, logits_of(model, inputs), HISTORY)
    rounds = zip(played, ll.history(model), strict=True)
    return {"history": [asdict(result) | {"c": kept.c} for result, kept in rounds]}


if __name__ == "__main__":
    app()
