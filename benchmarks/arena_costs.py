"""What a method costs: step time beside the reference's, bytes that its backward keeps, bytes at the peak, a file.

Bytes are exact and above those of the frozen base, beside PEFT's own class on the same layers where it has the method.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from arena_methods import Entrant, source_of
from arena_trials import Arena, Record, digest, read, training_step, write
from batches import Batch
from contenders import differentiable
from measure import interleaved, peak_of, saved

import lora_lite as ll

ROUNDS = 3
STEPS = 100
"""For a config that must know them; costs don't depend on it."""


def base_costs(arena: Arena) -> Record:
    """Bytes of the frozen base, with the gradient of its input, and seconds of the parts of a trial."""
    batch = costed(arena)

    def make() -> Any:
        return differentiable(arena.replica())

    def measure() -> Record:
        return {"kept": saved(make(), batch), "peak": peak_of(make, batch)}

    return _remembered(arena, "base", {}, measure)


def costs(arena: Arena, entrant: Entrant, reference: Entrant) -> Record:
    """Raises LoraLiteError for a method that can't go on the model."""
    batch, frozen, config = costed(arena), base_costs(arena), entrant.config(STEPS)

    def ours() -> Any:
        model, adapter = arena.attached(entrant, 0, STEPS)
        _nudge(adapter.parameters())
        if adapter.penalty() is not None:
            model.register_forward_hook(lambda _, args, output: _with_penalty(output, adapter))
        return differentiable(model)

    def measure() -> Record:
        started = time.perf_counter()
        model, adapter = arena.attached(entrant, 0, STEPS)
        record: Record = {"attach_seconds": time.perf_counter() - started}
        record["parameters"] = sum(parameter.numel() for parameter in adapter.parameters())
        with tempfile.TemporaryDirectory() as folder:
            ll.save(model, Path(folder, "adapter.safetensors"))
            record["file_bytes"] = Path(folder, "adapter.safetensors").stat().st_size
        record |= _times(arena, entrant, reference, batch)
        record |= _bytes(lambda: ours, batch, frozen)
        with tempfile.TemporaryDirectory() as folder:
            try:
                ll.save_peft(model, folder)
            except ll.LoraLiteError:  # PEFT has no such method
                return record
            return record | {"peft": _bytes(lambda: theirs(arena, Path(folder)), batch, frozen)}

    known = {"method": entrant.name, "config": config.to_dict(), "source": source_of(entrant.variant)}
    return _remembered(arena, entrant.name, known, measure)


def theirs(arena: Arena, folder: Path) -> Callable[[], Any]:
    """PEFT's adapter of a folder, on a copy of the weights that is made before anything is counted."""
    from peft import PeftModel

    own = copy.deepcopy(arena.base)

    def make() -> Any:
        model: Any = PeftModel.from_pretrained(own, str(folder), is_trainable=True)
        _nudge(parameter for parameter in model.parameters() if parameter.requires_grad)
        return differentiable(model)

    return make


def costed(arena: Arena) -> Batch:
    """The batch that costs are measured with: rows of middle length."""
    return next(islice(arena.task.batches(arena.batch_size, 0), 1))


def _times(arena: Arena, entrant: Entrant, reference: Entrant, batch: Batch) -> Record:
    """Of whole steps, the two by turns: the median of the rounds' ratios, and their quartiles."""
    steps: dict[str, Callable[[], object]] = {}
    for name, member in (("reference", reference), ("method", entrant)):
        model, adapter = arena.attached(member, 0, STEPS)
        step = training_step(model, adapter, 1e-5, STEPS)
        steps[name] = lambda step=step: step(batch)  # type: ignore[misc]
    times = interleaved(steps, ROUNDS, entrant.name)
    seconds = sorted(times.seconds["method"])[ROUNDS // 2]
    if entrant.name == reference.name:  # what it differs by from itself is noise
        return {"step_ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0, "step_seconds": seconds}
    ratio = times.ratio("", "method", "reference")
    return {"step_ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high, "step_seconds": seconds}


def _bytes(maker: Callable[[], Callable[[], Any]], batch: Batch, frozen: Record) -> Record:
    """Above the frozen base's, of a model that a function makes; what `maker` itself takes isn't counted."""
    return {"kept": saved(maker()(), batch) - frozen["kept"], "peak": peak_of(maker(), batch) - frozen["peak"]}


@torch.no_grad()
def _nudge(parameters: Any) -> None:
    """As after some training: with zeros some products could be skipped."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def _with_penalty(output: Any, adapter: ll.Adapter) -> Any:
    """PEFT's models add theirs themselves."""
    output.loss = output.loss + adapter.penalty()
    return output


def _remembered(arena: Arena, name: str, facts: Record, measure: Callable[[], Record]) -> Record:
    shape = list(costed(arena)["input_ids"].shape)
    facts = {**arena.setting, **facts, "threads": torch.get_num_threads(), "shape": shape}
    file = arena.folder / "costs" / f"{name.replace(' ', '-')}-{digest(facts)}.json"
    if not file.exists():
        write(file, facts | measure())
    return read(file)
