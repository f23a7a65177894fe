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
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..core.adapter import adapters
from .files import check_saved, restore_all, save_all

__all__ = ["keep_adapters"]


def keep_adapters(accelerator: Accelerator) -> None:
    """From now on the accelerator's `save_state` writes `<name>.safetensors` for each adapter of a prepared model, and
    not the model; `load_state` restores them, and leaves the base as it is. Of a second model with adapters the file is
    `<name>_1.safetensors`. Models without adapters go as ever.

    Under DeepSpeed and FSDP these files come beside Accelerate's own checkpoint, which holds the base and which
    `load_state` reads: DeepSpeed leaves the base out with `save_state(folder, exclude_frozen_parameters=True)` and
    `load_state(folder, load_module_strict=False)`.

    Raises:
        TargetError: at `save_state`, for trained parameters of such a model that are in no adapter.
        CheckpointError: at `load_state`, for a folder without the adapters' files, and what `restore` raises.
        LoraLiteError: where another process raised.
    """
    together = accelerator.num_processes > 1

    def save(models: list[nn.Module], weights: list[Any], folder: str | os.PathLike[str]) -> None:
        project = accelerator.project_configuration
        writes = accelerator.is_local_main_process if project.save_on_each_node else accelerator.is_main_process
        adapted = _with_adapters(models)
        for i in adapted:
            check_saved(models[i])
            save_all(models[i], folder, writes, together, _ending(i))
        weights[:] = [state for i, state in enumerate(weights) if i not in adapted]

    def load(models: list[nn.Module], folder: str | os.PathLike[str]) -> None:
        adapted = _with_adapters(models)  # no model is there that DeepSpeed or FSDP has loaded by itself
        for i in adapted:
            restore_all(models[i], folder, together, _ending(i))
        models[:] = [model for i, model in enumerate(models) if i not in adapted]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _with_adapters(models: list[nn.Module]) -> list[int]:
    return [i for i, model in enumerate(models) if adapters(model)]


def _ending(i: int) -> str:
    return f"_{i}" if i else ""
