"""Tensors that an adapter has once, whatever the number of its layers: VeRA's A and B, a bank of vectors."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .names import file_key

PLACE = "lora_shared"  # their child module of the model that attach was given; in a file, the start of their keys


class Shared(nn.Module):
    """The shared tensors of one adapter. It is a child of the model, so whatever moves, copies or shards that sees each
    tensor once; the layers' views read it."""

    def __init__(self, specs: Mapping[str, Any], number: int = 1) -> None:
        super().__init__()
        self.specs = dict(specs)  # the `ParamSpec` of each, by its name without `lora_`
        # Of several methods in one adapter that have such tensors, each has a child of its own.
        self.number, self.place = number, PLACE if number == 1 else f"{PLACE}_{number}"

    def forward(self, x: Any) -> Any:
        """The input itself: an nn.Sequential runs all of its children, and so this one last."""
        return x

    def hold(self, name: str, value: Tensor) -> None:
        register: Any = self.register_parameter if isinstance(value, nn.Parameter) else self.register_buffer
        register(name, value)

    def key(self, name: str) -> str:
        """The key of one of them in a file, whatever the adapter's name."""
        return file_key(self.place, name)

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self, name)
        return tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.tensor(name)) for name in self.specs)

    def __getstate__(self) -> dict[str, Any]:
        specs = {name: replace(spec, init="zeros") for name, spec in self.specs.items()}  # functions may not pickle
        return self.__dict__ | {"specs": specs}
