"""transformers' Trainer with adapters: checkpoints hold adapters, not the base, and a quantised base may train.

    from lora_lite.trainer import AdapterTrainer
    trainer = AdapterTrainer(model, args, train_dataset=...)
    trainer.train()  # train(resume_from_checkpoint=True) goes on from the last checkpoint

`class MyTrainer(AdapterCheckpoints, SFTTrainer)` does the same for a trainer of your own. For DPO and the like,
`reference(model)` is the model with its adapter off, to be passed as `ref_model=`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from .adapter import adapters
from .audit import watched_step
from .calls import grouped
from .checkpoint import restore, save
from .errors import CheckpointError, TargetError, brief
from .reference import Reference, reference

__all__ = ["AdapterCheckpoints", "AdapterTrainer", "Reference", "reference"]


class AdapterCheckpoints:
    """Mixin for a Trainer of a model with adapters: `checkpoint-N/<name>.safetensors` for each, and no base.

    Optimizer, schedule and random states are the Trainer's own; DeepSpeed's own checkpoint beside them holds the base.
    Raises TargetError for a model without an adapter, for parameters that would be trained and are in no adapter, since
    no checkpoint would hold them, and after the first backward, before the optimizer's step (DeepSpeed takes that
    within the backward), for adapters that take no part in it. Raises QuantizedWeightError before the first step where
    the base gives wrong gradients or none.
    """

    _is_audited = False

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, nn.Module):
            given = "a model_init" if model is None else brief(repr(model))
            raise TargetError(
                f"{type(self).__name__} is given a model with an adapter on it, not {given}\n"
                f"  load the model and lora_lite.attach first; for a search, make one for each trial"
            )
        if not adapters(model):
            raise TargetError(f"{type(model).__name__} has no adapter to train\n  lora_lite.attach one first")
        _check_saved(model)
        with _trainable(model):
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; the first one is watched."""
        step: Any = super()
        if self._is_audited:
            return step.training_step(model, *args, **kwargs)
        _check_saved(model)
        with watched_step(model):
            loss = step.training_step(model, *args, **kwargs)
        self._is_audited = True
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write every adapter, the processing class and the arguments to a folder."""
        trainer: Any = self
        _check_saved(trainer.model)
        folder = Path(output_dir or trainer.args.output_dir)
        for name, adapter in adapters(trainer.model).items():
            if trainer.args.should_save or adapter.is_sharded:
                save(trainer.model, _file(folder, name), name)
        if trainer.args.should_save:
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
            torch.save(trainer.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trainer: Any = self
        _restore_all(model or trainer.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        trainer: Any = self
        _restore_all(trainer.model, trainer.state.best_model_checkpoint)


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """transformers.Trainer for a model with adapters."""


def _check_saved(model: nn.Module) -> None:
    """TargetError for a parameter that is trained, and in no adapter: no checkpoint would hold it."""
    inside = {id(parameter) for adapter in adapters(model).values() for parameter in adapter.parameters()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if lost:
        raise TargetError(
            f"{len(lost)} parameters would be trained and are in no adapter, so no checkpoint would hold them: "
            f"{grouped(lost)}\n"
            f"  freeze them (requires_grad_(False)), or put an adapter on their layer (target_names), or train them "
            f"with a Trainer without AdapterCheckpoints, which saves the whole model"
        )


def _restore_all(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    files = {name: _file(folder, name) for name in adapters(model)}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder} is no checkpoint of these adapters\n  missing: {', '.join(missing)}")
    for name, file in files.items():
        restore(model, file, name)


def _file(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder) / f"{name}.safetensors"


@contextmanager
def _trainable(model: Any) -> Iterator[None]:
    """Trainer refuses a quantised model unless this flag of transformers says that an adapter is on it.

    The flag is set for the check alone: with it, save_pretrained and gradient checkpointing look for PEFT's config.
    """
    flag = "_hf_peft_config_loaded"
    before = model.__dict__.get(flag)
    setattr(model, flag, True)
    try:
        yield
    finally:
        if before is None:
            delattr(model, flag)
        else:
            setattr(model, flag, before)
