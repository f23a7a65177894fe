"""The reference of preference training: the model itself, with its adapters off or as they were."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..base.still import still
from ..core.adapter import adapters, get_adapter
from ..core.scaled import scaled
from ..core.state import session_of
from ..errors import CheckpointError, TargetError

__all__ = ["Reference", "reference", "snapshot"]


def reference(model: nn.Module, name: str | None = None) -> nn.Module:
    """The model without one adapter, or all, as an object to pass as `ref_model=`; it follows the model's weights.

    Each call runs the model in eval mode, without gradients, at scale 0. It has the model's attributes (`config`,
    `device`, `generate`) and no parameters or modules: what a trainer does to its reference (`.eval()`, `.to()`, other
    dropouts) doesn't touch the model that is trained. TRL's `sync_ref_model` has no weights to write into here.

    Raises:
        TargetError: for a model without an adapter, or an unknown name.
    """
    root = _with_adapters(model)
    if name is not None:
        get_adapter(root, name)
    return Reference(root, {name: 0.0}, {})


def snapshot(model: nn.Module) -> nn.Module:
    """The model with its adapters as they are now, as an object to pass as `ref_model=`: the scale of each, 0 for those
    that come later, and a copy of each that is to be trained. It is a `reference` otherwise. Of fresh adapters it is
    the base, bit for bit, where the method starts at the identity.

    AdapterCheckpoints takes it where no `ref_model` is given: preference training is held to the policy that it starts
    from (Rafailov et al. 2023, arXiv:2305.18290, section 4), which may be the result of another training.

    Raises:
        TargetError: for a model without an adapter, or one that fully_shard or ZeRO-3 has sharded.
    """
    root = _with_adapters(model)
    # Not `in_training`: an adapter that is off now may be switched on for a step.
    trained = [a for a in adapters(root).values() if any(parameter.requires_grad for parameter in a.parameters())]
    for adapter in trained:
        if adapter.is_sharded:
            problem = f"adapter {adapter.name!r} is sharded, so no copy of it can take its place in a forward"
            raise TargetError(f"{problem}\n  {NOT_SHARDED}")
    # A copy requires a gradient where its tensor does, though none is taken: torch.matmul goes another way without.
    placed = {path: tensor for adapter in trained for path, tensor in _placed(root, adapter.name).items()}
    tensors = {path: t.detach().clone().requires_grad_(t.requires_grad) for path, t in placed.items()}
    states = session_of(root)[1].adapters.values()
    scales: dict[str | None, float] = {None: 0.0}  # of names that come later
    scales |= {state.name: 0.0 if state.unloaded else state.scale for state in states}
    return Reference(root, scales, tensors)


PARTS = "get_base_model", "get_decoder", "get_encoder", "get_input_embeddings", "get_output_embeddings"  # that give it
NOT_SHARDED = "pass ref_model=lora_lite.trainer.reference(model), the base, which a fresh adapter's start is"


class Reference(nn.Module):
    """A model whose adapters have other scales and tensors in every call: what `reference` and `snapshot` give."""

    def __init__(self, model: nn.Module, scales: Mapping[str | None, float], tensors: Mapping[str, Tensor]) -> None:
        """
        scales      by adapter; None: of all others
        tensors     (of the adapters' shapes) by path in the model, in the place of those there
        """
        super().__init__()
        # No submodule and no parameter: what is done to all of them doesn't reach the model.
        self.__dict__.update(_model=model, _scales=dict(scales), _tensors=dict(tensors))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its adapters as they are in the reference."""
        return self._run("__call__", *args, **kwargs)  # not `forward`: trainers replace it, here and in the model alike

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the adapters as they are in the reference."""
        return self._run("generate", *args, **kwargs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write its scales, and its copies by their paths in the model; `restore` reads them."""
        tensors = {path: tensor.detach().cpu() for path, tensor in self._tensors.items()}
        torch.save({"scales": self._scales, "tensors": tensors}, path)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take the scales and copies of such a file.

        Raises:
            CheckpointError: unless it is of the same adapters.
        """
        stored = torch.load(path, map_location="cpu", weights_only=True)
        tensors, shapes = stored["tensors"], {key: tensor.shape for key, tensor in self._tensors.items()}
        if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
            problem = f"{path} is the reference of other adapters than this model has in training"
            raise CheckpointError(f"{problem}\n  attach those that the training began with")
        like = self._tensors.items()
        self._tensors.update({key: tensors[key].to(t).requires_grad_(t.requires_grad) for key, t in like})
        self._scales.update(stored["scales"])

    def is_in(self, path: str | os.PathLike[str]) -> bool:
        """Does `restore` of this file leave it as it is?"""
        stored = torch.load(path, map_location="cpu", weights_only=True)
        tensors = stored["tensors"]
        same = stored["scales"] == self._scales and tensors.keys() == self._tensors.keys()
        return same and all(torch.equal(tensors[key], tensor.cpu()) for key, tensor in self._tensors.items())

    @property
    def size(self) -> int:
        """The number of elements that it keeps a copy of."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Everything that its outputs depend on: TRL remembers log-probabilities by a hash of it."""
        state = self._model.state_dict(*args, **kwargs)
        scales = {name: self._scale(name, adapter.scale) for name, adapter in adapters(self._model).items()}
        off = {path for name, scale in scales.items() if scale == 0 for path in _placed(self._model, name)}
        on = {f"scale of {name}": torch.tensor(scale) for name, scale in scales.items() if scale != 0}
        copies = {path: tensor.detach() for path, tensor in self._tensors.items()}
        return {path: tensor for path, tensor in (state | copies).items() if path not in off} | on

    def _scale(self, name: str, scale: float) -> float:
        return self._scales.get(name, self._scales.get(None, scale))

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        with self._as_it_was() as model:
            if not self._tensors:
                return getattr(model, method)(*args, **kwargs)
            current = dict(_tensors_of(model))  # a trainer may have moved them since
            for path, tensor in self._tensors.items():
                self._tensors[path] = tensor.detach().to(current[path].device).requires_grad_(tensor.requires_grad)
            tensors = {f"model.{path}": tensor for path, tensor in self._tensors.items()}
            return functional_call(_Call(model, method), tensors, args, kwargs)

    @contextmanager
    def _as_it_was(self) -> Iterator[Any]:
        with ExitStack() as stack:
            stack.enter_context(still(self._model))
            states = session_of(self._model)[1].adapters
            for name in dict.fromkeys((*states, *filter(None, self._scales))):
                scale = self._scales.get(name, self._scales.get(None))
                is_gone = name not in states or states[name].unloaded
                if scale is not None and not (is_gone and scale == 0):  # one that was on and is gone is an error
                    stack.enter_context(scaled(self._model, scale, name))
            yield self._model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        value = getattr(self.__dict__["_model"], name)
        if isinstance(value, nn.Module) or name in PARTS:
            problem = (
                f"{name!r} of a {type(self).__name__} would be that of the model, with its adapters as they are now"
            )
            raise TargetError(f"{problem}\n  call the reference itself, or pass ref_model=, a second model")
        return value


class _Call(nn.Module):
    """A method of a model as a forward, which functional_call can run with other tensors."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self._method = model, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self._method)(*args, **kwargs)


def _with_adapters(model: nn.Module) -> nn.Module:
    root = session_of(model)[0]
    if not adapters(root):
        raise TargetError(f"{type(root).__name__} has no adapter to switch off\n  lora_lite.attach one first")
    return root


def _placed(root: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters and buffers of one adapter, by their path in the model."""
    mine = {id(tensor) for _, tensor in get_adapter(root, name).named_tensors()}
    return {path: tensor for path, tensor in _tensors_of(root) if id(tensor) in mine}


def _tensors_of(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(root.named_parameters(), root.named_buffers())
