"""Every method of the registry under one contract, compared with LoRA by held-out losses with intervals.

    make arena [ARGS="--minutes 55"]            # SmolLM2-135M; GSM8K where ../shared is beside the project
    make arena ARGS="--quick"                   # five methods, two seeds, in some minutes
    make arena ARGS="--methods lora,dora --ranks 2,8,32"

Steps, rows and trials are the same for all. The learning rate of each is tuned on a split of its own; then each is
trained from several seeds. Tables go to the screen, every trial into a file of its own under --out: what is there isn't
run again, so the same command goes on after a stop, and a method that is registered later joins.
docs/arena.md says what is measured, and what it can't show.
"""

import json
import platform
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from loguru import logger

import lora_lite as ll
from lora_lite.dtypes import dtype_name

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from arena_contest import TUNING_SEED, Contest, Settings, options
from arena_methods import REFERENCE, Entrant, entrant, names, of_parameters, swept
from arena_picture import draw
from arena_report import Report, Result, text, write_section
from arena_statistics import mean_loss
from arena_task import Task, read_task, token_losses
from arena_trials import Arena, write
from common import Base, BaseDtype, load, plain_errors, set_up
from smollm2 import smollm2_folder

QUICK = ["lora", "dora", "pissa", "ia3", "vera"]
REFERENCE_RANK = 8
TUNING_ROWS, HELD_OUT_ROWS, NEUTRAL_PROMPTS = 16, 40, 8

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    methods: Annotated[str | None, typer.Option(help="Names, by commas. Default: all that are trained.")] = None,
    quick: Annotated[bool, typer.Option(help=f"{', '.join(QUICK)}; 3 learning rates, 2 seeds, 8 minutes.")] = False,
    minutes: Annotated[float | None, typer.Option(help="No trial begins that would end later. Default: 55.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Default: 3.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Learning rates of each method. Default: 5.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: as many as fit into --minutes.")] = None,
    parameters: Annotated[int | None, typer.Option(min=1, help="That ranks are chosen for. Default: LoRA's.")] = None,
    ranks: Annotated[str | None, typer.Option(help="By commas: each method that has one, at each of these.")] = None,
    kl_budget: Annotated[float, typer.Option(min=1e-4, help="Nats per token of neutral text, at most.")] = 0.05,
    equal_time: Annotated[bool, typer.Option(help="Seeds at the reference's training time, too.")] = True,
    model: Base = None,
    data: Annotated[Path | None, typer.Option(help="JSONL with prompt/completion or question/answer.")] = None,
    dtype: BaseDtype = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 4,
    max_length: Annotated[int, typer.Option(min=2, help="Longer rows, in tokens, are left out.")] = 112,
    held_out: Annotated[int, typer.Option(min=2, help="Rows that methods are compared on.")] = HELD_OUT_ROWS,
    out: Annotated[Path, typer.Option(help="Folder of the trials, the tables and the picture.")] = Path("runs/arena"),
    write_to: Annotated[Path | None, typer.Option("--write", help="A document to put the tables into.")] = None,
) -> None:
    """Compare, and print the tables."""
    started = time.perf_counter()
    set_up(0)
    warnings.simplefilter("ignore")
    logger.disable("lora_lite")
    with plain_errors():
        source = model or str(smollm2_folder())
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        base = load(source, None, dtype)
        rows = (TUNING_ROWS, held_out, NEUTRAL_PROMPTS)
        task = read_task(data, tokenizer, base, out, max_length, rows)
        arena = Arena(base, task, batch_size, out)
        chosen = list(dict.fromkeys([REFERENCE, *(methods.split(",") if methods else QUICK if quick else names())]))
        entrants, left_out = entering(
            arena, chosen, parameters, [int(rank) for rank in (ranks or "").split(",") if rank]
        )
    logger.info(
        f"{task.name}: {len(task.train)} rows to train on, {len(task.tuning)} to tune on, {len(task.held_out)} held out"
    )
    settings = Settings(
        entrants[0],
        trials or (3 if quick else 5),
        seeds or (2 if quick else 3),
        steps,
        minutes if minutes is not None else 8.0 if quick else 55.0,
        kl_budget,
        equal_time,
    )
    contest = Contest(arena, entrants, settings, left_out, started=started)
    results = contest.run()
    report = reported(contest, results, time.perf_counter() - started)
    tables = text(report)
    print(tables)
    (out / "arena.txt").write_text(tables + "\n")
    write(out / "arena.json", record(report, contest))
    if results:
        draw(report, out / "arena.png")
    if write_to is not None:
        picture = write_to.with_suffix(".png")
        picture.write_bytes((out / "arena.png").read_bytes())
        write_section(report, write_to, picture.name)


def entering(
    arena: Arena, chosen: list[str], parameters: int | None, ranks: list[int]
) -> tuple[list[Entrant], dict[str, str]]:
    """Those that can go on this model, the reference first, and why the others can't.

    Raises LoraLiteError if the reference can't, and VariantError for a name that is unknown.
    """
    model = arena.replica()
    first = of_parameters(REFERENCE, model, parameters) if parameters else entrant(REFERENCE, REFERENCE_RANK)
    goal = ll.plan(model, first.config(1)).parameters
    entrants, left_out = [first], dict[str, str]()
    for name in chosen:
        try:
            if ranks:
                entrants += swept(name, model, ranks, goal)
            elif name != REFERENCE:
                entrants.append(of_parameters(name, model, goal))
        except ll.VariantError:
            raise
        except ll.LoraLiteError as error:
            left_out[name] = str(error).splitlines()[0]
    return entrants, left_out


def reported(contest: Contest, results: list[Result], seconds: float) -> Report:
    arena, settings = contest.arena, contest.settings
    task: Task = arena.task
    computed = sum(json.loads(file.read_text()).get("seconds", 0) for file in (arena.folder / "trials").glob("*.json"))
    base_loss = mean_loss({0: token_losses(arena.base, task.held_out, task.pad).numpy()})
    arguments = " ".join(sys.argv[1:])
    head = [
        f"{datetime.now(UTC):%Y-%m-%d}: make arena{f' ARGS={arguments!r}' if arguments else ''}",
        f"{Path(str(arena.setting['model'])).name} in {dtype_name(arena.base.dtype)}; {task.name}",
        f"{processor()}, threads: {torch.get_num_threads()}",
        f"{contest.steps} steps of {arena.batch_size} rows; {len(task.held_out)} rows held out, {sum(contest.rows())} "
        f"tokens of answers; {settings.seeds} seeds",
        f"{settings.trials} learning rates tried for each (* where the best was at the end of them)",
        f"{computed / 3600:.1f} hours of trials; this run took {seconds / 60:.0f} minutes",
    ]
    return Report(
        results, settings.reference.name, contest.rows(), base_loss, settings.kl_budget, head, contest.left_out
    )


def record(report: Report, contest: Contest) -> dict[str, Any]:
    """All that the tables hold, as numbers."""
    found = {}
    for result in report.results:
        views = {}
        for view, losses in result.losses.items():
            one = report.difference(result, view)
            views[view] = {"loss": mean_loss(losses), "seeds": sorted(losses)} | (vars(one) if one else {})
        found[result.name] = {
            "rank": result.rank,
            "lr": result.lr,
            "is_at_edge": result.is_at_edge,
            "kl": result.kl,
            "scale": result.scale,
            "steps_in_time": result.steps_in_time,
            "views": views,
            "costs": result.costs,
        }
    return {"settings": options(contest), "setting": contest.arena.setting, "base_loss": report.base_loss} | {
        "left_out": dict(report.left_out),
        "methods": found,
        "tuning_seed": TUNING_SEED,
    }


def processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    app()
