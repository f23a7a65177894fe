"""The adapters of a model as files of a trainer's checkpoint: `<name>.safetensors` for each, and no base."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loguru import logger
from torch import nn

from ..base import sharding
from ..base.layer import find_layers
from ..core.adapter import adapters
from ..core.ran import grouped
from ..core.variant import config_for
from ..errors import CheckpointError, TargetError
from ..io.adapter_file import read_file
from ..io.checkpoint import restore, save

__all__ = ["check_saved", "restore_all", "restore_settings", "save_all", "step_all", "warn_of_heads"]


def save_all(
    model: nn.Module, folder: str | os.PathLike[str], writes: bool, together: bool = False, ending: str = ""
) -> None:
    """Write every adapter to `<name><ending>.safetensors` in a folder, with the state of its schedule.

    writes      this process writes whole adapters; sharded ones all processes save together
    together    all processes call this: if one of them fails, all raise
    """
    tensors = [tensor for adapter in adapters(model).values() for _, tensor in adapter.named_tensors()]
    for name, adapter in adapters(model).items():
        if adapter.is_sharded:  # processes agree within `save`, which makes collective calls
            save(model, _file(folder, name, ending), name, resume=True)
            continue
        # `save` of a whole one gathers those of ZeRO-3 too: all processes do that, though one of them writes.
        with sharding.gathered(tensors if together else ()), sharding.all_or_none(together):
            if writes:
                save(model, _file(folder, name, ending), name, resume=True)


def restore_all(model: nn.Module, folder: str | os.PathLike[str], together: bool = False, ending: str = "") -> None:
    """Copy the values of such files into the adapters of the model.

    Raises:
        CheckpointError: before the first one is copied, if one is missing; and what `restore` raises.
        LoraLiteError: for what another process raised, where they do this together.
    """
    every = adapters(model)
    with sharding.all_or_none(together):  # a disk of its own may lack a file
        files = {name: _file(folder, name, ending) for name in every}
        if missing := [str(file) for file in files.values() if not file.is_file()]:
            raise CheckpointError(f"{folder} is no checkpoint of these adapters\n  missing: {', '.join(missing)}")
    for name, file in files.items():
        with sharding.all_or_none(together and not every[name].is_sharded):
            restore(model, file, name)


def restore_settings(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Take the scales and the counts of steps of such files: the values come from a checkpoint of DeepSpeed's own."""
    with sharding.all_or_none(True):
        files = {name: read_file(_file(folder, name, "")) for name in adapters(model)}
    for name, adapter in adapters(model).items():
        adapter.scale = files[name].scale
        if (steps := files[name].steps) is not None:
            adapter.steps = steps


def step_all(model: nn.Module) -> None:
    """The schedules of the adapters that are trained take a step: after the optimizer's."""
    for adapter in adapters(model).values():
        if adapter.in_training:
            adapter.step()


def check_saved(model: nn.Module) -> None:
    """TargetError for a parameter that is trained, and in no adapter: no checkpoint would hold it."""
    inside = {id(parameter) for adapter in adapters(model).values() for parameter in adapter.parameters()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if lost:
        problem = f"{len(lost)} parameters would be trained and are in no adapter, so no checkpoint would hold them"
        freeze = "freeze them (requires_grad_(False))"
        put = next(
            (f"put them into the adapter: attach(model, [cfg, {full}]); or " for full in _fulls(model, lost)), ""
        )
        raise TargetError(f"{problem}: {grouped(lost)}\n  {put}{freeze}")


def warn_of_heads(model: nn.Module) -> None:
    """Log a warning for a head in no adapter: if it started at random, no file holds it, and a reload has another."""
    if heads := _heads(model):
        put = next((f"attach(model, [cfg, {full}])" for full in _fulls(model, heads)), "put it into the adapter")
        logger.warning(
            f"{type(model).__name__}: the head is in no adapter, so it stays as it is: {grouped(heads)}\n"
            f"  that is right for a head that was loaded with the model; one that started at random is in no file, and "
            f"a reload gives another\n  to train it: {put}"
        )


def _heads(model: Any) -> list[str]:
    """The parameters beside the base_model of a transformers model that has one, but for those in an adapter or below
    one, and for the head of a language model, which is loaded with it."""
    body, embeddings = getattr(model, "base_model", model), getattr(model, "get_output_embeddings", None)
    if body is model or embeddings is None or embeddings() is not None:
        return []
    inside = {id(parameter) for parameter in body.parameters()}
    inside |= {id(parameter) for adapter in adapters(model).values() for parameter in adapter.parameters()}
    below = {path for adapter in adapters(model).values() for path in adapter.targets}
    others = (name for name, parameter in model.named_parameters() if id(parameter) not in inside)
    return [name for name in others if below.isdisjoint((name, name.rpartition(".")[0]))]


def _fulls(model: nn.Module, lost: list[str]) -> Iterator[str]:
    """For each of these parameters that an adapter can train, the config that does."""
    layers = find_layers(dict(model.named_modules()))
    for path in (path for name in lost for path in (name, name.rpartition(".")[0]) if path in layers):
        kind = layers[path].kind.category
        kinds = "" if kind in config_for("full").kinds else f", kinds={kind!r}"
        yield f"ll.FullConfig(target_names={path.rpartition('.')[2]!r}{kinds})"


def _file(folder: str | os.PathLike[str], name: str, ending: str) -> Path:
    return Path(folder) / f"{name}{ending}.safetensors"
