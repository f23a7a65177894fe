"""A search for where and how strongly to ablate: least effect left against least change of all else, with Optuna.

Each trial sets the attached adapter to a direction and to kernels of strength over depth, and measures. The study is
a file: an interrupted search goes on from there, and one that was finished goes on to more trials.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from common import progress_bar
from jsonl import DataError
from loguru import logger
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

import lora_lite as ll

Measure = Callable[[], tuple[float, float]]
"""The two objectives with the adapter as it stands: the gap left, and the KL divergence."""

ATTENTION = r"att(?:n|ention)|mixer|ssm"
COMPONENTS = {"attention": rf"(?i){ATTENTION}", "mlp": rf"(?i)^(?!.*(?:{ATTENTION}))"}
"""The parts of a block, each with a kernel of its own. The second is all that is not in the first."""

DEEPEST, SHALLOWEST = 0.9, 0.2
"""Shares of the model's depth between which directions are taken. The last blocks' are about the next token itself."""

STRONGEST = 1.5
STARTUP = 10
"""Trials at random before the sampler learns from them."""


# ---- what is searched ---------------------------------------------------------------------------


def suggest(trial: optuna.Trial, depth: int) -> dict[str, Any]:
    """One point of the space, as config changes; depth is the number of blocks."""
    last = depth - 1
    trial.suggest_float("layer", SHALLOWEST * last, DEEPEST * last)
    for component in COMPONENTS:
        trial.suggest_float(f"{component}.max_weight", 0, STRONGEST)
        trial.suggest_float(f"{component}.position", 0, last)
        trial.suggest_float(f"{component}.min_share", 0, 1)
        trial.suggest_float(f"{component}.distance", 1, depth)
    return changes(trial.params)


def uniform(depth: int) -> dict[str, float]:
    """The point where a search starts: one direction taken out of every layer in full."""
    point = {"layer": 0.6 * (depth - 1)}
    for component in COMPONENTS:
        flat = {"max_weight": 1.0, "position": (depth - 1) / 2, "min_share": 1.0, "distance": float(depth)}
        point |= {f"{component}.{name}": value for name, value in flat.items()}
    return point


def changes(params: Mapping[str, float]) -> dict[str, Any]:
    """A trial's parameters as what `Adapter.configure` takes."""
    return {"layer": params["layer"], "kernels": {COMPONENTS[name]: kernel_of(params, name) for name in COMPONENTS}}


def kernel_of(params: Mapping[str, float], component: str) -> ll.Kernel:
    greatest = params[f"{component}.max_weight"]
    least = greatest * params[f"{component}.min_share"]
    return ll.Kernel(greatest, params[f"{component}.position"], least, params[f"{component}.distance"])


# ---- searching ----------------------------------------------------------------------------------


def open_study(file: Path, settings: dict[str, Any], depth: int) -> optuna.Study:
    """The study in a file, made if need be. Raises DataError if it was made with other settings."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(file))),
        study_name="abliterate",
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    known = study.user_attrs.get("settings")
    if known is None:
        study.set_user_attr("settings", settings)
        study.enqueue_trial(uniform(depth))
    elif known != settings:
        differing = [name for name in settings if known.get(name) != settings[name]]
        raise DataError(
            f"{file} is a search with another {', '.join(differing)}\n  give another --out, or remove the file"
        )
    for stopped in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(stopped.number, state=TrialState.FAIL)
    return study


def tried(study: optuna.Study) -> int:
    """Trials that count: measured, or refused by the method."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def search(study: optuna.Study, adapter: ll.Adapter, measure: Measure, trials: int, depth: int, seed: int) -> None:
    """Try points until the study has so many trials. Each is stored at once, so that Ctrl-C loses one at most."""
    with progress_bar("search", trials, tried(study)) as bar:
        while tried(study) < trials:
            # Seeded by trial, not by run: a search in two parts tries what one in a single part does.
            number = len(study.get_trials(deepcopy=False))
            trial_seed = (100_003 * seed + number) % 2**32
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=trial_seed)
            trial = study.ask()
            try:
                adapter.configure(**suggest(trial, depth))
                gap, kl = measure()
                study.tell(trial, (gap, kl))
                bar.set_postfix_str(f"gap {gap:+.2f}, KL {kl:.3f}", refresh=False)
            except ll.BaseModelError as error:
                logger.warning(f"trial {trial.number} is left out: {error}")
                study.tell(trial, state=TrialState.PRUNED)
            except BaseException:
                study.tell(trial, state=TrialState.FAIL)
                raise
            bar.update()


# ---- choosing -----------------------------------------------------------------------------------


def measured(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def front(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that no other beats in one objective without losing in the other, by rising KL."""
    best: list[FrozenTrial] = []
    for trial in sorted(trials, key=lambda t: (t.values[1], t.values[0], t.number)):
        if not best or trial.values[0] < best[-1].values[0]:
            best.append(trial)
    return best


def pick(trials: Sequence[FrozenTrial], max_kl: float, number: int | None = None) -> FrozenTrial:
    """The trial of that number; without one, of the front the least gap within max_kl, or else the least KL.

    Raises DataError.
    """
    if not trials:
        raise DataError("no trial was measured, so there is none to pick\n  give more --trials")
    if number is not None:
        by_number = {trial.number: trial for trial in trials}
        if number not in by_number:
            raise DataError(f"--pick {number}: no such trial\n  measured: {', '.join(map(str, sorted(by_number)))}")
        return by_number[number]
    best = front(trials)
    within = [trial for trial in best if trial.values[1] <= max_kl]
    if not within:
        logger.warning(f"no trial has a KL of {max_kl:g} or less: the least is {best[0].values[1]:.3f}")
    return within[-1] if within else best[0]
