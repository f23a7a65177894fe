"""The constructor of a trainer of TRL: what it can't do with adapters of this library, and the reference it gets.

TRL asks one question of a model, `isinstance(model, PeftModel)`. Where the answer is no, it loads a second model as the
reference, sends weights without the adapter to vLLM, and casts what is trained on a quantised base to bfloat16.
"""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..core.adapter import Adapter, adapters
from ..core.config import BaseConfig
from ..core.variant import Variant, lookup
from ..errors import CheckpointError, ConfigError, TargetError, brief
from .preference import NOT_SHARDED, Reference, snapshot

REFERENCE = "reference.pt"  # in a checkpoint: the reference that the training began with
LIBRARIES = "trl", "transformers"
SWITCHES = {"adalora": "total_step", "adamss": "use_asa", "oft": "coft"}  # without which their schedule does nothing
TEMPLATES = (".jinja", ".j2")


@dataclass
class Construction:
    """A call of a trainer's constructor, with the reference that the trainer is to have.

    args, kwargs    as they go to the constructor
    """

    trainer: str
    signature: Signature
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    settings: Any  # the trainer's `args`
    reference: Any = None  # the user's, until `add_reference`
    beta: float | None = None  # of a trainer that takes no reference, and loads one unless this is 0
    between: Sequence[str] = ()  # the classes between the mixin and TRL that have a constructor of their own

    def add_reference(self, model: nn.Module) -> None:
        """Take the model as it is now for the reference that a trainer would load, unless the user has given one."""
        takes_one = "ref_model" in self.signature.parameters
        is_theirs = self.reference is not None and not isinstance(self.reference, Reference)
        is_precomputed = getattr(self.settings, "precompute_ref_log_probs", False) and _uses_deepspeed(self.settings)
        if is_precomputed and not is_theirs:
            self._check_precomputed()
            return  # TRL runs the model as it is, in an engine
        # Documented by GRPOConfig and RLOOConfig: at beta = 0 no reference is loaded. What others call beta is none of
        # that; a config that can `sync_ref_model` has a reference.
        if not takes_one and getattr(self.settings, "sync_ref_model", None) is not None:
            self.beta = self.settings.beta or None
        if self.beta and self.between:
            logger.warning(
                f"{self.trainer}: while TRL's constructor runs, args.beta is 0, so that it loads no reference; that is "
                f"what {', '.join(self.between)}.__init__ reads of it\n  read self.beta in a later method, or in the "
                f"constructor of a class above AdapterCheckpoints"
            )
        if self.reference is None and (takes_one or self.beta):
            self.reference = self._snapshot(model)
        if self.reference is None:
            return
        if not takes_one and not (self.beta and isinstance(self.reference, Reference)):
            raise TargetError(
                f"{self.trainer} takes no ref_model of {brief(type(self.reference).__name__)}\n"
                f"  where its beta isn't 0 it takes lora_lite.trainer.reference(model) or snapshot(model)"
            )
        if isinstance(self.reference, Reference):
            self._check_reference()
        if takes_one:
            is_ours = isinstance(self.reference, Reference) and _uses_deepspeed(self.settings)
            self._give("ref_model", _Prepared(model) if is_ours else self.reference)

    def _check_precomputed(self) -> None:
        if is_deepspeed_zero3_enabled():  # the hooks of both engines would stay on one model, and their steps differ
            problem = f"{self.trainer}: precompute_ref_log_probs=True makes a second ZeRO-3 engine of the model"
            raise ConfigError(f"{problem}, and the first step fails\n  don't precompute, and {NOT_SHARDED}")
        if self.reference is not None:
            problem = f"{self.trainer}: under DeepSpeed, precompute_ref_log_probs=True runs the model as it is"
            raise ConfigError(f"{problem}\n  leave ref_model out, or don't precompute")

    def _snapshot(self, model: nn.Module) -> nn.Module:
        if is_deepspeed_zero3_enabled():
            problem = f"{self.trainer}: ZeRO-3 shards the adapters, so they can't be kept as they are for its reference"
            raise TargetError(f"{problem}\n  {NOT_SHARDED}")
        copied: Any = snapshot(model)
        logger.info(
            f"{self.trainer}: the reference is this model with its adapters as they are now ({copied.size:,} "
            f"numbers are copied), which for fresh ones is the base\n"
            f"  for the base whatever they are, pass ref_model=lora_lite.trainer.reference(model)"
        )
        return copied

    def _check_reference(self) -> None:
        if getattr(self.settings, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP") == "true":
            problem = f"{self.trainer}: under FSDP the model's shards can't serve as its reference too"
            raise TargetError(f"{problem}\n  pass ref_model=, a second model, or use DDP or DeepSpeed")
        if getattr(self.settings, "sync_ref_model", False):
            problem = f"{self.trainer}: sync_ref_model=True needs a reference with weights of its own"
            raise ConfigError(f"{problem}, and its reference is the model itself\n  pass ref_model=, or leave it out")

    def _give(self, name: str, value: Any) -> None:
        bound = self.signature.bind_partial(None, *self.args, **self.kwargs)
        bound.arguments[name] = value
        self.args, self.kwargs = bound.args[1:], bound.kwargs

    @contextmanager
    def without_loading(self) -> Iterator[None]:
        """Within the block, which is the constructor, TRL loads no reference."""
        if self.beta is not None:
            self.settings.beta = 0.0
        try:
            yield
        finally:
            if self.beta is not None:
                self.settings.beta = self.beta

    def finish(self, trainer: Any) -> None:
        """Give the reference to a trainer that took none, and refuse one that TRL has loaded all the same, and what the
        settings that it has chosen by itself don't reach."""
        _check_adapters(self.trainer, trainer.model, trainer.args)
        if self.beta is not None:
            trainer.beta = self.beta
        if isinstance(self.reference, Reference):
            trainer.ref_model = self.reference
        loaded = getattr(trainer, "ref_model", None)
        if self.reference is None and isinstance(loaded, nn.Module) and not adapters(loaded):  # else it is a copy
            problem = f"{self.trainer} has loaded a second {type(loaded).__name__} as its reference"
            cure = "give it args=, and let its constructor name the arguments that TRL's has"
            raise TargetError(f"{problem}, which beside a quantised base is another model\n  {cure}")


def construction(kinds: Sequence[type], model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Construction:
    """The call of the constructor of kinds[0], whose bases are the others, with these arguments after the model.

    Raises:
        ConfigError, TargetError: for settings that would leave the adapter out, or that it would not survive.
    """
    name, signature = kinds[0].__name__, _signature(kinds[1:])
    _check_peft_config(name, kwargs.get("peft_config"))
    reference = None if "ref_model" in signature.parameters else kwargs.pop("ref_model", None)
    arguments = signature.bind_partial(None, model, *args, **kwargs).arguments  # None for `self`
    settings = arguments.get("args")
    _check_peft_config(name, arguments.get("peft_config"))
    _check_generation(name, settings)
    _check_teacher(name, settings)
    _check_template(name, settings)
    _check_adapters(name, model, settings)
    reference = arguments.get("ref_model", reference)
    theirs = takewhile(lambda kind: kind.__module__.partition(".")[0] not in LIBRARIES, kinds[1:])
    between = [kind.__name__ for kind in theirs if "__init__" in vars(kind)]
    return Construction(name, signature, (model, *args), kwargs, settings, reference, between=between)


class _Prepared(nn.Module):
    """The place of a reference while TRL makes an engine of it, for which DeepSpeed wants parameters. The engine of the
    model itself is what gathers its weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config, self.parameter = model.config, nn.Parameter(torch.zeros(1), requires_grad=False)


def _uses_deepspeed(settings: Any) -> bool:
    return getattr(settings, "deepspeed_plugin", None) is not None


def _signature(kinds: Sequence[type]) -> Signature:
    """The signature of the first of these constructors that names its arguments: others hand them on."""
    signatures = (inspect.signature(kind.__init__) for kind in kinds if "__init__" in vars(kind))  # type: ignore[misc]
    handed_on = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return next(s for s in signatures if not all(p.kind in handed_on for p in list(s.parameters.values())[1:]))


def _check_peft_config(trainer: str, config: Any) -> None:
    if config is not None:
        ours = "cfg" if isinstance(config, BaseConfig) else "lora_lite.LoRAConfig(...)"
        problem = f"{trainer} takes no peft_config ({type(config).__name__}): the model comes with its adapter on"
        raise TargetError(f"{problem}\n  lora_lite.attach(model, {ours}) first, and leave peft_config out")


def _check_generation(trainer: str, settings: Any) -> None:
    """TargetError where vLLM would generate: TRL sends it the merged weights of PEFT's models alone."""
    always = getattr(settings, "vllm_server_base_url", None) is not None  # of a config that leaves no choice
    if getattr(settings, "use_vllm", always):
        problem = f"{trainer}: vLLM would generate without the adapter, since TRL merges those of PEFT alone"
        cure = "use_vllm=False generates with the model and its adapter"
        cure = cure if hasattr(settings, "use_vllm") else f"use a trainer that can generate without vLLM: {cure}"
        raise TargetError(f"{problem}\n  {cure}")


def _check_teacher(trainer: str, settings: Any) -> None:
    """TargetError for a teacher that is the model as it was: where it isn't PEFT's, TRL loads another one."""
    kind = getattr(settings, "teacher_model_kind", "live")
    if kind != "live":
        problem = f"{trainer}: teacher_model_kind={kind!r} loads a second model, beside a quantised base another one"
        raise TargetError(f"{problem}\n  use 'live', the model with its adapter")


def _check_template(trainer: str, settings: Any) -> None:
    """ConfigError for a chat template of another tokenizer, whose tokens TRL would add to the embeddings."""
    path = getattr(settings, "chat_template_path", None)
    if path is not None and not str(path).endswith(TEMPLATES):
        problem = f"{trainer}: chat_template_path={str(path)!r} may add tokens, whose rows no checkpoint would hold"
        cure = "trl.clone_chat_template and model.save_pretrained before lora_lite.attach, or give a .jinja file"
        raise ConfigError(f"{problem}\n  {cure}")


def _check_adapters(trainer: str, model: nn.Module, settings: Any) -> None:
    _check_dropout(model, settings)
    if not _uses_deepspeed(settings):
        return
    for adapter in adapters(model).values():
        if is_deepspeed_zero3_enabled() and adapter.in_training and _has_penalty(adapter):
            problem = f"{trainer}: adapter {adapter.name!r} ({adapter.variant}) adds a penalty to the loss, of whole"
            raise TargetError(f"{problem} tensors, and ZeRO-3 parts them\n  train it by DDP or ZeRO-2")
        for cfg in adapter.configs if adapter.in_training else ():
            is_off = cfg.variant in SWITCHES and not getattr(cfg, SWITCHES[cfg.variant])
            if lookup(cfg.variant).on_step is not Variant.on_step and not is_off:
                problem = (
                    f"{trainer}: adapter {adapter.name!r} ({cfg.variant}) has a schedule, which writes into tensors"
                )
                raise TargetError(f"{problem} that DeepSpeed keeps copies of, and reads gradients\n  train it by DDP")


def _has_penalty(adapter: Adapter) -> bool:
    return any(lookup(cfg.variant).penalty is not Variant.penalty for cfg in adapter.configs)


def _check_dropout(model: nn.Module, settings: Any) -> None:
    """ConfigError for dropout that TRL is asked to switch off (by default, in DPO), and can't: it is no module."""
    for adapter in adapters(model).values() if getattr(settings, "disable_dropout", False) else ():
        dropout = max(getattr(cfg, "dropout", 0.0) for cfg in adapter.configs)
        if dropout and adapter.in_training:
            problem = f"adapter {adapter.name!r} has dropout={dropout:g}, which disable_dropout=True doesn't reach"
            raise ConfigError(f"{problem}\n  attach it with dropout=0, or train with disable_dropout=False")


def check_no_penalty(trainer: str, model: nn.Module) -> None:
    """TargetError for an adapter with a penalty, where a step has not called the `compute_loss` that adds it."""
    for adapter in adapters(model).values():
        if adapter.in_training and _has_penalty(adapter):
            problem = f"{trainer}'s training_step doesn't call compute_loss, so adapter {adapter.name!r} is without its"
            raise TargetError(
                f"{problem} penalty ({adapter.variant})\n  use a method without one, or a trainer that calls "
                f"AdapterCheckpoints.compute_loss in each step"
            )


def resume_reference(trainer: Any, ref_model: Reference, file: Path) -> None:
    """Go on from the reference that a training began with: the adapters may be others where it goes on.

    Raises:
        CheckpointError: where log-probabilities were computed by another one before; and what `restore` raises.
    """
    if not file.is_file():
        problem = f"{file} is missing: the reference is the model with its adapters as they were attached here"
        logger.warning(f"{problem}\n  a training that began with others took those")
    elif not getattr(trainer.args, "precompute_ref_log_probs", False):
        ref_model.restore(file)
    elif not ref_model.is_in(file):
        problem = f"{file}: the training began with another reference than log-probabilities were computed by here"
        raise CheckpointError(f"{problem}\n  attach the adapters that it began with, before the trainer is made")


@contextmanager
def adapters_kept(model: nn.Module) -> Iterator[None]:
    """Within the block, a constructor, adapters keep their numbers: on a quantised base TRL rounds to bfloat16 all that
    is trained, and in what an adapter is trained its config's `dtype` says."""
    before = [(p, p.data) for adapter in adapters(model).values() for p in adapter.parameters()]
    try:
        yield
    finally:
        for parameter, data in before:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
