"""The reference of preference training: the model itself with its adapter off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..base.still import still
from ..core.adapter import adapters, get_adapter
from ..core.scaled import scaled
from ..core.state import session_of
from ..errors import TargetError

__all__ = ["Reference", "reference"]


def reference(model: nn.Module, name: str | None = None) -> nn.Module:
    """The model without one adapter, or all, as an object to pass as `ref_model=`; it follows the model's weights.

    Each call runs the model in eval mode, without gradients, at scale 0. It has the model's attributes (`config`,
    `device`, `generate`) and no parameters or modules: what a trainer does to its reference (`.eval()`, `.to()`, other
    dropouts) doesn't touch the model that is trained. TRL's `sync_ref_model` has no weights to write into here.

    To start from a trained adapter as it is, use TRL's `precompute_ref_log_probs=True` without a reference.

    Raises:
        TargetError: for a model without an adapter, or an unknown name.
    """
    root = session_of(model)[0]
    if name is not None:
        get_adapter(root, name)
    if not adapters(root):
        raise TargetError(f"{type(root).__name__} has no adapter to switch off\n  lora_lite.attach one first")
    return Reference(root, name)


class Reference(nn.Module):
    """A model whose adapter is off in every call: the result of `reference`."""

    def __init__(self, model: nn.Module, name: str | None) -> None:
        super().__init__()
        self.__dict__.update(_model=model, _name=name)  # no submodule: what is done to all modules doesn't reach it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the adapter off."""
        with self._off() as model:  # not `forward`: trainers replace it by their own, here and in the model alike
            return model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the adapter off."""
        with self._off() as model:
            return model.generate(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state dict: TRL remembers log-probabilities by a hash of it."""
        return self._model.state_dict(*args, **kwargs)

    @contextmanager
    def _off(self) -> Iterator[Any]:
        with still(self._model), scaled(self._model, 0.0, self._name):
            yield self._model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self.__dict__["_model"], name)
