"""A change that a merge makes on a module, and how it is undone."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(eq=False)
class Swap:
    """One thing that a merge has changed on a module: the storage of a parameter, or a whole attribute."""

    holder: nn.Module
    name: str
    before: Any  # a tensor or a module; None where there was nothing

    def put(self, value: Tensor | nn.Module | None) -> None:
        """Set it on the device, in the dtype and the mode that the model has got meanwhile."""
        now = getattr(self.holder, self.name)
        if isinstance(value, nn.Module) and isinstance(now, nn.Module):
            value.train(now.training)  # train() or eval() since the merge has not reached what was put aside
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            now.data = value.to(now.device, now.dtype)  # the parameter stays the object that others know
        else:
            setattr(self.holder, self.name, value)

    def undo(self) -> None:
        self.put(self.before)


class Unparametrized(Swap):
    """A parameter that a parametrisation gave, as one of the module's own: the value that it is put with."""

    def put(self, value: Any) -> None:
        module: Any = self.holder
        cls, lists = type(module), module.parametrizations
        self.before = cls, dict(lists.items()), lists
        del lists[self.name]
        # torch's remove_parametrizations takes the property off the class itself, which deep copies share.
        members = {name: member for name, member in vars(cls).items() if name != self.name}
        module.__class__ = type(cls.__name__, cls.__bases__, members) if lists else cls.__bases__[0]
        if not lists:
            del module.parametrizations
        module.register_parameter(self.name, nn.Parameter(value, requires_grad=False))

    def undo(self) -> None:
        module: Any = self.holder
        del module._parameters[self.name]
        module.__class__, known, module.parametrizations = self.before
        module.parametrizations._modules.clear()
        module.parametrizations.update(known)
