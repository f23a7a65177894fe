"""A trial of the arena: one method at one learning rate and seed, trained and measured, and kept in a file.

All methods have the same contract: AdamW without weight decay, clipped gradients, a linear warm-up and decay, the same
batches in the same order for one seed. What is kept is the loss of every token that is measured.
"""

import base64
import copy
import gc
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena_methods import SAME_START, Entrant, source_of
from arena_task import Task, loss_of, token_losses
from batches import Batch
from numpy.typing import NDArray
from torch.optim.lr_scheduler import LambdaLR

import lora_lite as ll
from lora_lite.core.variant import needs_data
from lora_lite.dtypes import dtype_name

FORMAT = 1
"""Of a trial's file, and of what a trial does: a change makes the results of older ones old."""

WARM_UP, CLIP = 0.1, 1.0
CALIBRATION = 4
"""Batches for a method that starts from data."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """kl_budget: nats per token of neutral text; then the loss is also measured with the adapter scaled to it. Without
    one, only the loss is measured: on the tuning split, or on the held-out rows."""

    entrant: Entrant
    lr: float
    seed: int
    steps: int
    is_tuning: bool = False
    kl_budget: float | None = None


class Arena:
    """The base, the data, and the folder of what is done. The base is shared by all replicas, which never write it."""

    def __init__(self, base: Any, task: Task, batch_size: int, folder: Path) -> None:
        self.base, self.task, self.batch_size, self.folder = base.requires_grad_(False), task, batch_size, folder
        self.setting = {
            "format": FORMAT,
            "lora_lite": ll.__version__,
            "model": getattr(base.config, "_name_or_path", ""),
            "dtype": dtype_name(base.dtype),
            "task": task.fingerprint,
            "batch_size": batch_size,
        }

    def replica(self) -> Any:
        """The base as a model of its own, on the same weights: hooks and adapters on it are its own."""
        shared = {id(tensor): tensor for tensor in (*self.base.parameters(), *self.base.buffers())}
        return copy.deepcopy(self.base, shared)

    def attached(self, entrant: Entrant, seed: int, steps: int) -> tuple[Any, ll.Adapter]:
        """A replica with a fresh adapter. The method's name is part of the seed, so that two are as independent as two
        methods are."""
        model, config = self.replica(), entrant.config(steps)
        torch.manual_seed(zlib.crc32(f"{entrant.name}:{seed}".encode()))
        known = digest([self.setting, config.to_dict(), source_of(entrant.variant)])
        start = self.folder / "starts" / f"{known}.safetensors"
        if entrant.variant in SAME_START and not needs_data(config) and start.exists():
            return model, ll.load(model, start)
        data = list(islice(self.task.batches(self.batch_size, seed), CALIBRATION)) if needs_data(config) else None
        adapter = ll.attach(model, config, calibration_data=data)
        if entrant.variant in SAME_START:
            ll.save(model, start)
        return model, adapter

    def facts(self, trial: Trial) -> Record:
        """All that a trial's result depends on, but the machine and other libraries."""
        entrant = trial.entrant
        return {
            **self.setting,
            "method": entrant.name,
            "config": entrant.config(trial.steps).to_dict(),
            "source": source_of(entrant.variant),
            **{name: value for name, value in vars(trial).items() if name != "entrant"},
        }

    def run(self, trial: Trial, stop: Callable[[], bool] = lambda: False) -> Record | None:
        """The trial's record: what the folder holds, or a new one. None if it would be new and `stop` says no."""
        facts = self.facts(trial)
        file = self.folder / "trials" / f"{trial.entrant.name.replace(' ', '-')}-{digest(facts)}.json"
        if file.exists():
            return read(file)
        if stop():
            return None
        gc.collect()  # hooks and models refer to each other: an earlier trial's may still be there
        started = time.perf_counter()
        model, adapter = self.attached(trial.entrant, trial.seed, trial.steps)
        training = train(model, adapter, self.task, trial, self.batch_size)
        results = self._measured(model, adapter, trial) if training["finite"] else {}
        seconds = time.perf_counter() - started
        write(file, facts | training | results | {"seconds": seconds})
        return read(file)

    def _measured(self, model: Any, adapter: ll.Adapter, trial: Trial) -> Record:
        task = self.task
        losses = token_losses(model, task.tuning if trial.is_tuning else task.held_out, task.pad)
        results: Record = {"losses": packed(losses.numpy())}
        if trial.kl_budget is None:
            return results
        # A ceiling: what is below it at scale 1 stays there, since a larger scale is nothing that was trained.
        found = ll.calibrate_scale(model, task.neutral, trial.kl_budget, positions="all", limit=1.0, tolerance=0.1)
        results |= {"kl": dict(found.curve)[1.0], "scale": found.c, "kl_at_scale": found.kl}
        if found.c == 1:
            return results | {"losses_at_budget": results["losses"]}
        adapter.scale = found.c
        return results | {"losses_at_budget": packed(token_losses(model, task.held_out, task.pad).numpy())}


def train(model: Any, adapter: ll.Adapter, task: Task, trial: Trial, batch_size: int) -> Record:
    """The training's losses; `finite` is False where it stopped since a gradient wasn't."""
    step, losses = training_step(model, adapter, trial.lr, trial.steps), list[float]()
    for batch in islice(task.batches(batch_size, trial.seed), trial.steps):
        loss = step(batch)
        if loss is None:
            break
        losses.append(round(loss, 4))
    return {"training_losses": losses, "finite": len(losses) == trial.steps}


def training_step(model: Any, adapter: ll.Adapter, lr: float, steps: int) -> Callable[[Batch], float | None]:
    """A function that takes one step, and returns its loss; None once gradients are not finite, without a step."""
    parameters = list(adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    rise = max(1, int(WARM_UP * steps))
    schedule = LambdaLR(optimizer, lambda done: min((done + 1) / rise, (steps - done) / (steps - rise + 1)))
    model.train()

    def step(batch: Batch) -> float | None:
        loss = loss_of(model, batch)
        penalty = adapter.penalty()
        (loss if penalty is None else loss + penalty).backward()
        is_finite = bool(torch.nn.utils.clip_grad_norm_(parameters, CLIP).isfinite())
        if is_finite:
            optimizer.step()
            adapter.step()
            schedule.step()
        optimizer.zero_grad()
        return loss.item() if is_finite and math.isfinite(loss.item()) else None

    return step


# ---- files --------------------------------------------------------------------------------------


def packed(values: NDArray[np.float32]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def unpacked(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def losses_of(record: Record, tokens: int, at_budget: bool = False) -> NDArray[np.float32]:
    """The loss of each token; infinite where the training has diverged."""
    text = record.get("losses_at_budget" if at_budget else "losses")
    losses = np.full(tokens, np.inf, dtype=np.float32) if text is None else unpacked(text)
    return np.where(np.isfinite(losses), losses, np.float32(np.inf))


def digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def read(file: Path) -> Record:
    record: Record = json.loads(file.read_text())
    return record


def write(file: Path, record: Mapping[str, Any]) -> None:
    """All or nothing: a run may be stopped at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(file)
