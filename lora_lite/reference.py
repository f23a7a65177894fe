"""The reference model of preference training: the model itself with its adapter off, so no second copy of the weights.

    from lora_lite.trainer import reference
    DPOTrainer(model, ref_model=reference(model), ...)

TRL knows PEFT's models alone as such that can be switched off. For any other it loads a second model by its name, as
that lies on the disk: beside a quantised model this is another one (first loss on a 4-bit base 0.73, where ln 2 = 0.69
is right).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from .adapter import adapters, get_adapter, scaled
from .errors import TargetError
from .session import session_of
from .still import still


def reference(model: nn.Module, name: str | None = None) -> nn.Module:
    """The model without one adapter, or all, as an object to pass as `ref_model=`; it follows the model's weights.

    Each call of it runs the model in eval mode, without gradients, at scale 0. It has the model's attributes (`config`,
    `device`, `generate`) and no parameters or modules of its own: what a trainer does to its reference (`.eval()`,
    `.to()`, `.requires_grad_()`, other dropouts) doesn't touch the model that is trained.

    The reference of an adapter that was trained before is the base, too. To start from the adapter as it is, use TRL's
    `precompute_ref_log_probs=True`, without a reference. TRL's `sync_ref_model` has no weights to write into here.

    Raises TargetError for a model without an adapter, or an unknown name.
    """
    root = session_of(model)[0]
    if name is not None:
        get_adapter(root, name)
    if not adapters(root):
        raise TargetError(f"{type(root).__name__} has no adapter to switch off\n  lora_lite.attach one first")
    return Reference(root, name)


class Reference(nn.Module):
    """What `reference` gives."""

    def __init__(self, model: nn.Module, name: str | None) -> None:
        super().__init__()
        self.__dict__.update(
            _model=model, _name=name
        )  # as no submodule: nothing that is done to all modules reaches it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives with the adapter off. `forward`, which trainers replace by their own, isn't used: the
        model that is trained has the same in its place."""
        with self._off() as model:
            return model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the model generates with the adapter off."""
        with self._off() as model:
            return model.generate(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's: TRL remembers log-probabilities by a hash of it."""
        return self._model.state_dict(*args, **kwargs)

    @contextmanager
    def _off(self) -> Iterator[Any]:
        with still(self._model), scaled(self._model, 0.0, self._name):
            yield self._model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(cast(Any, self.__dict__["_model"]), name)
