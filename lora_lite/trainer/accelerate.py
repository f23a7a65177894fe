"""Accelerate: `save_state` and `load_state` of a model with adapters keep the adapters, and no base.

    from lora_lite.trainer.accelerate import keep_adapters
    accelerator = Accelerator()
    keep_adapters(accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)    # ll.attach(model, ...) comes first
    accelerator.backward(loss)                # adapter.penalty() is added to the loss, where the method has one
    optimizer.step()
    if accelerator.sync_gradients:
        adapter.step()                        # a schedule, where the method has one

Optimizers, schedules and random states are Accelerate's own, as without adapters.
"""

import os
import re
from collections import Counter
from typing import Any
from weakref import WeakSet

from accelerate import Accelerator
from torch import nn

from ..core.adapter import adapters
from ..errors import ConfigError
from .files import check_saved, restore_all, save_all

__all__ = ["keep_adapters"]

KEPT: WeakSet[Accelerator] = WeakSet()
"""Accelerators that have the hooks."""


def keep_adapters(accelerator: Accelerator) -> None:
    """From now on the accelerator's `save_state` writes `<name>.safetensors` for each adapter of a prepared model, and
    not the model; `load_state` restores them, and leaves the base as it is. Of a second model with adapters the file is
    `<name>_1.safetensors`. Models without adapters go as ever. A second call changes nothing.

    Under DeepSpeed and FSDP these files come beside Accelerate's own checkpoint, which holds the base and which
    `load_state` reads: DeepSpeed leaves the base out with `save_state(folder, exclude_frozen_parameters=True)` and
    `load_state(folder, load_module_strict=False)`.

    Raises:
        ConfigError: at `save_state`, where two files would have one name, or that of Accelerate's own file.
        TargetError: at `save_state`, for trained parameters of such a model that are in no adapter.
        CheckpointError: at `load_state`, for a folder without the adapters' files, and what `restore` raises.
        LoraLiteError: where another process raised.
    """
    if accelerator in KEPT:
        return
    KEPT.add(accelerator)
    together = accelerator.num_processes > 1

    def adapted(models: list[nn.Module]) -> dict[int, nn.Module]:
        """Those with adapters by their places among all, from which another hook may have taken some."""
        places = {id(model): i for i, model in enumerate(accelerator._models)}
        return {places[id(model)]: model for model in models if adapters(model)}

    def save(models: list[nn.Module], weights: list[Any], folder: str | os.PathLike[str]) -> None:
        project = accelerator.project_configuration
        writes = accelerator.is_local_main_process if project.save_on_each_node else accelerator.is_main_process
        _check_files(adapted(models))
        for i, model in adapted(models).items():
            check_saved(model)
            save_all(model, folder, writes, together, _ending(i))
        ours = {key for model in adapted(models).values() for key in _keys(model)}
        weights[:] = [state for state in weights if ours.isdisjoint(state)]

    def load(models: list[nn.Module], folder: str | os.PathLike[str]) -> None:
        for i, model in adapted(models).items():  # no model is there that DeepSpeed or FSDP has loaded by itself
            restore_all(model, folder, together, _ending(i))
        models[:] = [model for model in models if not adapters(model)]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _check_files(models: dict[int, nn.Module]) -> None:
    files = Counter(f"{name}{_ending(i)}" for i, model in models.items() for name in adapters(model))
    for file, count in files.items():
        if count > 1 or re.fullmatch(r"model(_\d+)?", file):
            problem = f"{file}.safetensors would be the file of {'two adapters' if count > 1 else 'a model, too'}"
            raise ConfigError(f"{problem}\n  give the adapter another name: attach(model, cfg, name=...)")


def _keys(model: nn.Module) -> set[str]:
    """The keys of its adapters' tensors in its state_dict."""
    mine = {id(tensor) for adapter in adapters(model).values() for _, tensor in adapter.named_tensors()}
    return {key for key, tensor in (*model.named_parameters(), *model.named_buffers()) if id(tensor) in mine}


def _ending(i: int) -> str:
    return f"_{i}" if i else ""
