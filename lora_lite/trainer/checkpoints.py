"""transformers' Trainer with adapters: the mixin, which goes before any trainer that is one of its kind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from ..base.layer import find_layers
from ..core.adapter import adapters
from ..core.ran import grouped
from ..core.variant import config_for
from ..errors import CheckpointError, TargetError, brief
from ..io.checkpoint import restore, save
from ..measure.audit import watched_step
from .construction import adapters_kept, construction

__all__ = ["AdapterCheckpoints", "AdapterTrainer"]


class AdapterCheckpoints:
    """Mixin for a Trainer of a model with adapters: `checkpoint-N/<name>.safetensors` for each, and no base.

    Optimizer, schedule and random states are the Trainer's own; DeepSpeed's own checkpoint beside them holds the base.

    ref_model   (of TRL's trainers that have a reference) None: the model with its adapters as they are now, `snapshot`;
                `reference(model)`: the base; or a model of your own, where the trainer takes one. No second model is
                loaded.

    Raises:
        ConfigError: for settings that the adapter would not survive, or that say two things of it.
        TargetError: for a model without an adapter, a peft_config, generation by vLLM; for trained parameters in no
            adapter, which no checkpoint would hold; after the first backward, before the optimizer's step (DeepSpeed
            takes that within the backward), for adapters that take no part in it.
        QuantizedWeightError: before the first step, where the base gives wrong gradients or none.
    """

    _is_audited = False

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TargetError(f"{type(self).__name__} is given {_not_a_model(model)}")
        kinds = type(self).__mro__
        call = construction((kinds[0], *kinds[kinds.index(AdapterCheckpoints) + 1 :]), model, args, kwargs)
        if not adapters(model):
            raise TargetError(f"{type(model).__name__} has no adapter to train\n  lora_lite.attach one first")
        _check_saved(model)
        call.add_reference(model)
        with _trainable(model), adapters_kept(model), call.without_loading():
            super().__init__(*call.args, **call.kwargs)
        call.finish(self)
        cast(Any, self).add_callback(_Schedules(model))

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

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, and in training the adapters' penalties."""
        trainer: Any = super()
        result = trainer.compute_loss(model, *args, **kwargs)
        penalties = [p for adapter in adapters(cast(Any, self).model).values() if (p := adapter.penalty()) is not None]
        if not (penalties and model.training):
            return result
        penalty = torch.stack(penalties).sum() / self._parts_of_a_step(kwargs.get("num_items_in_batch"))
        return (result[0] + penalty, *result[1:]) if isinstance(result, tuple) else result + penalty

    def _parts_of_a_step(self, num_items_in_batch: Any) -> int:
        """By what a penalty is divided, as it is added to each batch of a step: 1 where the trainer does it itself."""
        trainer: Any = self
        is_scaled = trainer.loss_is_scaled_for_ga  # by the number of tokens in all batches of a step
        if is_scaled is None:
            is_scaled = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = is_scaled or trainer.compute_loss_func is not None
        return int(trainer.current_gradient_accumulation_steps) if is_scaled else 1

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write every adapter, the processing class and the arguments to a folder."""
        trainer: Any = self
        _check_saved(trainer.model)
        folder = Path(output_dir or trainer.args.output_dir)
        for name, adapter in adapters(trainer.model).items():
            if trainer.args.should_save or adapter.is_sharded:
                save(trainer.model, folder / f"{name}.safetensors", name, resume=True)
        if trainer.args.should_save:
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
            torch.save(trainer.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _restore_all(model or cast(Any, self).model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        _restore_all(cast(Any, self).model, cast(Any, self).state.best_model_checkpoint)


class _Schedules(TrainerCallback):
    """The schedules of the adapters that are trained take a step with the optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for adapter in adapters(self._model).values():
            if adapter.in_training:
                adapter.step()


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """transformers.Trainer for a model with adapters."""


def _not_a_model(model: Any) -> str:
    wanted = "a model with an adapter on it"
    if model is None:
        cure = "load the model and lora_lite.attach first; for a search, one for each trial"
        return f"{wanted}, not a model_init\n  {cure}"
    load = f"lora_lite.load_base({model!r})" if isinstance(model, str) else "load the model"
    return f"{wanted}, not {brief(repr(model))}\n  {load} and lora_lite.attach first, and give it that model"


def _check_saved(model: nn.Module) -> None:
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


def _fulls(model: nn.Module, lost: list[str]) -> Iterator[str]:
    """For each of these parameters that an adapter can train, the config that does."""
    layers = find_layers(dict(model.named_modules()))
    for path in (path for name in lost for path in (name, name.rpartition(".")[0]) if path in layers):
        kind = layers[path].kind.category
        kinds = "" if kind in config_for("full").kinds else f", kinds={kind!r}"
        yield f"ll.FullConfig(target_names={path.rpartition('.')[2]!r}{kinds})"


def _restore_all(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    files = {name: Path(folder) / f"{name}.safetensors" for name in adapters(model)}
    if missing := [str(file) for file in files.values() if not file.is_file()]:  # before the first one is copied
        raise CheckpointError(f"{folder} is no checkpoint of these adapters\n  missing: {', '.join(missing)}")
    for name, file in files.items():
        restore(model, file, name)


@contextmanager
def _trainable(model: Any) -> Iterator[None]:
    """Trainer refuses a quantised model unless this flag of transformers says that an adapter is on it.

    The flag is set for the check alone: with it, save_pretrained and gradient checkpointing look for PEFT's config.
    """
    flag = "_hf_peft_config_loaded"
    before = {flag: model.__dict__[flag]} if flag in model.__dict__ else {}
    setattr(model, flag, True)
    try:
        yield
    finally:
        delattr(model, flag)
        model.__dict__.update(before)
