"""Lightning: a callback with which a Trainer's checkpoints hold the adapters of a module, and no base.

    from lora_lite.trainer.lightning import AdapterCallback, save_adapters
    trainer = Trainer(callbacks=[AdapterCallback(), ModelCheckpoint(...)])   # ll.attach(module.model, ...) comes first
    trainer.fit(module, data)                 # fit(..., ckpt_path="last.ckpt") goes on from a checkpoint
    save_adapters("last.ckpt", "folder")      # its adapters, each as a file for ll.load

It audits the first step, adds the adapters' penalties to the loss, and lets their schedules take a step after the
optimizer's. With manual optimization it does the first alone: add `adapter.penalty()` and call `adapter.step()` there.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ..core.adapter import adapters
from ..core.state import session_of
from ..errors import CheckpointError, TargetError
from ..io.checkpoint import file_metadata
from ..io.safetensors import write_tensors
from ..measure.audit import watched_step
from .files import check_saved, restore_all, step_all

__all__ = ["AdapterCallback", "save_adapters"]

KEY = "lora_lite"  # of a checkpoint: {adapter: {"metadata": of its file, "keys": {in its file: in the state_dict}}}


class AdapterCallback(Callback):
    """Checkpoints of the module's adapters: everything else of the model that they are attached to is left out, and
    left as it is by `fit(ckpt_path=...)`. Other parts of the module are in it as ever.

    Raises:
        TargetError: for a module without an adapter, or with one that is sharded; for trained parameters of its model
            that are in no adapter; for a ModelCheckpoint(save_weights_only=True), which asks no callback; and as
            AdapterTrainer for adapters that take no part in the first step.
        CheckpointError: where a checkpoint lacks a tensor of an adapter, or is of other settings or none.
    """

    def __init__(self) -> None:
        self._watching = ExitStack()  # the first step, between its start and its backward
        self._has_begun = False
        self._steps = 0  # of the optimizers, as far as schedules have followed them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module, and let it load a checkpoint without the base."""
        model = _model(pl_module)
        check_saved(model)
        if weights_only := [c for c in trainer.checkpoint_callbacks if getattr(c, "save_weights_only", False)]:
            problem = f"{type(weights_only[0]).__name__}(save_weights_only=True) asks no callback, and writes the base"
            raise TargetError(f"{problem}\n  leave it out: a checkpoint has the adapters and the optimizer's state")
        self._loading = pl_module.register_load_state_dict_post_hook(_leave_base)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._loading.remove()
        self._watching.close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the base out, and put in what an adapter's file says of it."""
        model = _model(pl_module)
        check_saved(model)
        if sharded := [name for name, adapter in adapters(model).items() if adapter.is_sharded]:
            problem = f"adapter {sharded[0]!r} is sharded by {type(trainer.strategy).__name__}"
            raise TargetError(f"{problem}\n  train by DDP, or without AdapterCallback and lora_lite.save after it")
        keys = _keys(pl_module)
        checkpoint[KEY] = {
            name: {
                "metadata": file_metadata(adapter.methods, adapter.scale, adapter.base, steps=adapter.steps),
                "keys": keys[name],
            }
            for name, adapter in adapters(model).items()
        }
        base = _base_keys(pl_module)
        checkpoint["state_dict"] = {key: t for key, t in checkpoint["state_dict"].items() if key not in base}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the adapters' scales and schedules, and see that all else of them is as it was: Lightning has loaded
        their tensors before."""
        with TemporaryDirectory() as folder:
            _write(checkpoint, "the checkpoint", folder)
            restore_all(pl_module, folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step from which schedules follow."""
        self._steps = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the first step."""
        if not self._has_begun:
            self._has_begun = True
            self._watching.enter_context(watched_step(pl_module))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the penalties, to each batch of a step its part."""
        if not pl_module.automatic_optimization:
            return
        penalties = [p for adapter in adapters(pl_module).values() if (p := adapter.penalty()) is not None]
        for penalty in penalties:  # in place: the loss that is differentiated is this tensor, whatever a hook returns
            loss.add_(penalty * _scale_of(trainer) / trainer.accumulate_grad_batches)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first step has shown which adapters take part."""
        self._watching.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A step that failed shows nothing."""
        self._watching.__exit__(type(exception), exception, exception.__traceback__)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Schedules take a step where the optimizer did, while its gradients are there."""
        if pl_module.automatic_optimization and trainer.global_step > self._steps:
            step_all(pl_module)
        self._steps = trainer.global_step


def save_adapters(checkpoint: str | os.PathLike[str], folder: str | os.PathLike[str]) -> list[Path]:
    """Write each adapter of a checkpoint that AdapterCallback made to `<name>.safetensors`, as `lora_lite.save` does.

    The checkpoint is opened by torch.load(weights_only=True), which runs no code of it.

    Raises:
        CheckpointError: for a checkpoint without adapters of AdapterCallback.
    """
    return _write(torch.load(checkpoint, map_location="cpu", weights_only=True), str(checkpoint), folder)


def _write(content: dict[str, Any], source: str, folder: str | os.PathLike[str]) -> list[Path]:
    """The adapters of a checkpoint as files of a folder. CheckpointError if it has none."""
    if KEY not in content:
        problem = f"{source} has no adapter of AdapterCallback"
        raise CheckpointError(f"{problem}\n  load it without the callback, into the module with its adapter attached")
    paths = []
    for name, entry in content[KEY].items():
        tensors = {key: content["state_dict"][in_state].contiguous() for key, in_state in entry["keys"].items()}
        paths.append(Path(folder) / f"{name}.safetensors")
        write_tensors(paths[-1], tensors, entry["metadata"])
    return paths


def _model(module: nn.Module) -> nn.Module:
    """The part of a module that adapters were attached to. TargetError where there is none."""
    if not adapters(module):
        raise TargetError(f"{type(module).__name__} has no adapter to train\n  lora_lite.attach one first")
    return session_of(module)[0]


def _keys(module: nn.Module) -> dict[str, dict[str, str]]:
    """For each adapter the keys of its saved tensors in the module's state_dict, by their keys in a file."""
    parameters = module.named_parameters(remove_duplicate=False)
    names = {id(t): key for key, t in (*parameters, *module.named_buffers(remove_duplicate=False))}
    return {
        name: {key: names[id(tensor)] for key, tensor in adapter.named_tensors() if key in specs}
        for name, adapter in adapters(module).items()
        for specs in [adapter.specs()]
    }


def _base_keys(module: nn.Module) -> set[str]:
    """The keys of a module's state_dict that are of the model with adapters, and of no adapter's saved tensor."""
    model, every = _model(module), dict(module.named_modules(remove_duplicate=False))
    places = [name for name, part in every.items() if part is model]
    ours = {key for keys in _keys(module).values() for key in keys.values()}
    of_model = {f"{place}.{key}" if place else key for place in places for key in model.state_dict()}
    return of_model - ours


def _leave_base(module: nn.Module, incompatible: Any) -> None:
    """After a load of the module: what a checkpoint of AdapterCallback lacks isn't missing."""
    base = _base_keys(module)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in base]


def _scale_of(trainer: Trainer) -> float:
    """The factor of the loss under mixed precision in float16, which is in it before this callback sees it."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
