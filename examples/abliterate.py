"""Ablate what two sets of prompts differ in: find the directions, search how much of them to remove, save, load again.

    python examples/abliterate.py                                # French against English on SmolLM2-135M
    python examples/abliterate.py --positive a.jsonl --negative b.jsonl --model Qwen/Qwen3-0.6B --quantization nf4

Directions are fitted on the first half of each set. The search reads how much is left on the second half: the log of
the odds, at an answer's first token, between the first tokens of the two sides (the gap). The price is the KL
divergence from the base on neutral prompts. A trial is timed first, and as many are done as fit in --minutes. Run again
with the same --out, it goes on where it stopped.
"""

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import transformers
import typer
from abliterate_report import Block, describe, plot_directions, plot_front, show_directions, show_front
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
    set_up,
    stored_in,
)
from loguru import logger
from prompt_sets import SHIPPED, Prompt, halves, question, read_prompts
from report import show, write_results
from search import changes, front, measured, open_study, pick, search, tried
from smollm2 import smollm2_folder
from task import BATCH, SIDES, Task, chosen_words, make_task

import lora_lite as ll

ANSWERS, PROBED_TOKENS = 3, 4

MOST_TRIALS, LEAST_TRIALS = 60, 8
MOST_TOKENS, LEAST_TOKENS = 48, 8
"""Tokens of an answer."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    positive: Annotated[Path, typer.Option(help="Prompts, JSONL or .txt.")] = SHIPPED / "french.jsonl",
    negative: Annotated[Path, typer.Option(help="What they are contrasted with.")] = SHIPPED / "english.jsonl",
    neutral: Annotated[Path, typer.Option(help="Prompts that shouldn't change.")] = SHIPPED / "neutral.jsonl",
    model: Base = None,
    quantization: Annotated[Literal["nf4", "fp4", "int8"] | None, typer.Option(help="Of the base.")] = None,
    positive_words: Annotated[str | None, typer.Option(help="First words, by commas. Default: the model's.")] = None,
    negative_words: Annotated[str | None, typer.Option(help="The same of the other side.")] = None,
    markers: Annotated[str | None, typer.Option(help="By commas: count held-out answers with one of them.")] = None,
    dtype: BaseDtype = "auto",
    minutes: Annotated[float, typer.Option(min=0.0, help=MINUTES)] = 5.0,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Of an answer. Default: up to {MOST_TOKENS}.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help=f"Of the search, earlier ones in --out included. Default: up to {MOST_TRIALS}."),
    ] = None,
    max_kl: Annotated[float, typer.Option(min=0.0, help="The picked trial's, at most.")] = 0.1,
    pick_trial: Annotated[int | None, typer.Option("--pick", help="Pick this trial instead.")] = None,
    normalization: Annotated[ll.Normalization, typer.Option(help="Of what is left.")] = ll.Normalization.NONE,
    projected: Annotated[bool, typer.Option(help="Spare what both sides have in common.")] = True,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    out: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs", "abliterate"),
) -> None:
    """Fit, search, pick, save, and show what it changes."""
    time_left = Budget(minutes)
    set_up(seed)
    with plain_errors():
        paths = {"positive": positive, "negative": negative}
        words = chosen_words(paths, positive_words, negative_words)
        sides = {side: halves(path) for side, path in paths.items()}
        neutral_prompts = read_prompts(neutral)
        source = model or str(smollm2_folder())
        settings = {"model": source, "quantization": quantization, "words": words, "seed": seed}
        settings |= {"normalization": str(normalization), "projected": projected}
        settings |= {"prompts": digest([*sides.values(), neutral_prompts])}

        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        loading = time.perf_counter()
        base = load(source, quantization, dtype)
        loading = time.perf_counter() - loading
        task = make_task(base, tokenizer, sides, neutral_prompts, words)
        fitted = ll.contrast(base, task.fitted, projected=projected, progress=sys.stderr.isatty())
        blocks = describe_directions(base, task, fitted)
        show_directions(blocks)
        directions = {path: contrast.directions for path, contrast in fitted.items()}
        cfg = ll.AbliterationConfig(normalization=normalization, projected=projected)
        adapter = ll.attach(base, cfg, calibration_data={"directions": directions})
        quantized, computed_in = stored_in(adapter)
        settings |= {"dtype": computed_in}  # figures of two dtypes don't compare, so each has a search of its own
        study = open_study(out / "study.jsonl", settings, len(blocks))
        name = f"{positive.stem} against {negative.stem} on {Path(source).name} in {quantized or computed_in}"
        plot_directions(blocks, name, out / "directions.png")
    with ll.disabled(base):
        before = task.gaps(base)
    logger.info(f"gap before: {before['positive']:+.2f} on the positive side, {before['negative']:+.2f} on the other")

    earlier = tried(study)
    held_out = sides["positive"][1]
    shown = held_out[:ANSWERS]
    asked = [shown] if markers is None else [shown, held_out]
    answer_tokens, trials = fitted_to(time_left, base, tokenizer, task, asked, loading, earlier, answer_tokens, trials)
    searched = time.perf_counter()
    if earlier:
        going_on = f"the search goes on from there to {trials}" if earlier < trials else f"--trials {trials} are done"
        logger.info(f"{out} holds {earlier} trials: {going_on}")
    try:
        search(study, adapter, lambda: task.measure(base), trials, len(blocks), seed)
    except KeyboardInterrupt:
        logger.warning(f"interrupted after {tried(study)} of {trials} trials, which are kept: the same command goes on")
        raise typer.Exit(INTERRUPTED) from None
    searched, new = time.perf_counter() - searched, tried(study) - earlier

    with plain_errors():
        chosen = pick(measured(study), max_kl, pick_trial)
    show_front(measured(study), chosen)
    plot_front(measured(study), chosen, (before["positive"], before["negative"]), max_kl, name, out / "front.png")
    adapter.configure(**changes(chosen.params))
    after = task.gaps(base)
    divergences = ll.kl_divergence(base, task.neutral)
    answers = before_and_after(base, tokenizer, shown, answer_tokens)
    show([question(prompt) for prompt in shown], *answers)
    rates = marker_rates(base, tokenizer, held_out, markers, answer_tokens)

    ll.save(base, out / "adapter.safetensors")
    inputs = task.held_out["positive"][0]
    expected, config = logits_of(base, inputs), adapter.config.to_dict()
    del base, adapter
    check_reload(load(source, quantization, dtype), out / "adapter.safetensors", inputs, expected)

    seconds = time_left.spent
    results: dict[str, Any] = settings | {"quantization": quantized, "minutes": minutes}
    results |= {"config": config, "directions": [asdict(block) for block in blocks], "tokens": task.tokens}
    results |= {"gap_before": before, "gap_after": after, "kl_mean": divergences.mean().item()}
    results |= {"kl": divergences.tolist(), "marker_rate": rates, "answers": answers, "picked": chosen.number}
    results |= {"max_kl": max_kl, "front": [trial.number for trial in front(measured(study))]}
    results |= {
        "trials": [{"number": t.number, "gap": t.values[0], "kl": t.values[1]} | t.params for t in measured(study)]
    }
    results |= {"seconds": seconds, "search_seconds": searched, "new_trials": new}
    write_results(results, out / "results.json")
    logger.info(
        f"trial {chosen.number}: gap {before['positive']:+.2f} -> {after['positive']:+.2f} with a KL of "
        f"{results['kl_mean']:.3f}; {new} trials in {searched:.0f} s, {seconds:.0f} s in all: see {out}"
    )


# ---- fitting to the time ------------------------------------------------------------------------


def fitted_to(
    time_left: Budget,
    model: Any,
    tokenizer: Any,
    task: Task,
    asked: Sequence[Sequence[Prompt]],
    loading: float,
    earlier: int,
    answer_tokens: int | None,
    trials: int | None,
) -> tuple[int, int]:
    """(tokens of an answer, trials with the `earlier` ones): as given, or as the time allows.

    A trial and the answers to each set of prompts are timed. loading: the seconds that loading the base once more will
    take.
    """
    ask = partial(ll.greedy_answers, model, tokenizer, max_new_tokens=PROBED_TOKENS, batch_size=BATCH)
    token = sum(seconds_of(partial(ask, prompts)) for prompts in asked) / PROBED_TOKENS
    task.measure(model)  # which also runs the base; a trial doesn't
    trial = seconds_of(lambda: task.measure(model))
    plan = time_left.plan(later=loading + 3 * trial)  # what the picked trial leaves is measured again, and reloaded
    tokens = plan.take("tokens of each answer", 2 * token, MOST_TOKENS, LEAST_TOKENS, 0.15, given=answer_tokens)
    new = None if trials is None else max(0, trials - earlier)
    most = max(0, MOST_TRIALS - earlier)
    new = plan.take("trials", trial, most, min(most, LEAST_TRIALS), given=new)
    plan.log()
    return tokens, earlier + new if trials is None else trials


# ---- prompts ------------------------------------------------------------------------------------


def digest(prompts: Any) -> str:
    """A fingerprint of the prompts, which tells an earlier search with others."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


# ---- measuring ----------------------------------------------------------------------------------


def describe_directions(model: Any, task: Task, fitted: Mapping[str, ll.Contrast]) -> list[Block]:
    bars = sys.stderr.isatty()
    sides = [ll.capture(model, task.fitted[side], reduce=("mean", "std"), progress=bars) for side in SIDES]
    return describe(fitted, *sides)


def before_and_after(model: Any, tokenizer: Any, prompts: Sequence[Prompt], tokens: int) -> tuple[list[str], list[str]]:
    """The greedy answers without the adapter and with it."""
    with ll.disabled(model):
        before = ll.greedy_answers(model, tokenizer, prompts, max_new_tokens=tokens)
    return before, ll.greedy_answers(model, tokenizer, prompts, max_new_tokens=tokens)


def marker_rates(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], markers: str | None, tokens: int
) -> dict[str, float] | None:
    """The share of answers with a marker, without the adapter and with it; spaces in a marker count."""
    if markers is None:
        return None

    def rate() -> float:
        texts = [marker for marker in markers.split(",") if marker]
        return ll.marker_rate(model, tokenizer, prompts, texts, max_new_tokens=tokens, batch_size=BATCH)

    with ll.disabled(model):
        before = rate()
    rates = {"before": before, "after": rate()}
    logger.info(f"answers with a marker: {rates['before']:.0%} before, {rates['after']:.0%} after")
    return rates


if __name__ == "__main__":
    app()
