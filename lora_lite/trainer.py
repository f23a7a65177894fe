"""transformers' Trainer with adapters: checkpoints hold adapters, not the base, and a quantised base may train.

    from lora_lite.trainer import AdapterTrainer
    trainer = AdapterTrainer(model, args, train_dataset=...)
    trainer.train()  # train(resume_from_checkpoint=True) goes on from the last checkpoint

`class MyTrainer(AdapterCheckpoints, SFTTrainer)` does the same for a trainer of your own.
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
from .checkpoint import restore, save
from .errors import CheckpointError, TargetError


class AdapterCheckpoints:
    """Mixin for a Trainer of a model with adapters: `checkpoint-N/<name>.safetensors` for each, and no base.

    Optimizer, schedule and random states are the Trainer's own. Raises TargetError for a model without an adapter.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TargetError(
                "an AdapterTrainer is given a model with an adapter on it, not a model_init\n"
                "  for a search, make one for each trial"
            )
        if not adapters(model):
            raise TargetError(f"{type(model).__name__} has no adapter to train\n  lora_lite.attach one first")
        with _trainable(model):
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write every adapter, the processing class and the arguments to a folder."""
        trainer: Any = self
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
