"""Kinds of layer: where a module keeps the matrix W (d_out, d_in) that it multiplies its input by, and how it lies."""

import sys
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .sharding import shape_of


class Size(NamedTuple):
    """The size of a layer's matrices."""

    d_in: int
    d_out: int
    experts: int = 0  # how many matrices it fuses; 0 for a layer of one


class Kind:
    """A kind of layer. It has no state: each question is about the module that is given. A new one goes into KINDS."""

    weight, bias = "weight", "bias"  # the names of its parameters on the module

    def size(self, module: Any) -> Size | None:
        """The size of a module of this kind; None for any other."""
        raise NotImplementedError

    def lies_transposed(self, module: Any) -> bool:
        """True if each matrix is stored as (d_in, d_out)."""
        return False

    def stored(self, module: Any) -> Tensor:
        """The tensor that holds the weight: codes where it is quantised, all matrices of fused experts."""
        tensor: Tensor = getattr(module, self.weight)
        return tensor

    def oriented(self, module: Any, stored: Tensor) -> Float[Tensor, "*e o i"]:
        """A tensor that lies as the module's weight does, as matrices (d_out, d_in)."""
        return stored.mT if self.lies_transposed(module) else stored

    def computes_its_product(self, module: Any) -> bool:
        """Is its forward known to be x Wᵀ + b, by its class?"""
        return False

    def replace(self, module: nn.Module, matrices: Tensor) -> None:
        """Until `restore`, the module computes with these matrices: of a kind that has no layer to hook."""
        raise NotImplementedError

    def restore(self, module: nn.Module) -> None:
        """The module computes with its own weight, as every other kind always does."""

    def bias_of(self, module: Any) -> Tensor | None:
        """The bias (d_out,), or (experts, d_out); None for a module without one."""
        bias = getattr(module, self.bias, None)
        return bias if isinstance(bias, Tensor) else None


class Linear(Kind):
    """nn.Linear, and whatever has its attributes: layers of quantisers, of tensor parallelism, of other libraries."""

    def size(self, module: Any) -> Size | None:
        if not isinstance(getattr(module, "weight", None), Tensor):
            return None
        d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
        # By attributes and not by the shape, which codes of 4 bits don't have: two lie in a byte.
        return Size(d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None

    def computes_its_product(self, module: Any) -> bool:
        return type(module).forward is nn.Linear.forward and not is_bypassed(module)


class Conv1D(Kind):
    """transformers' Conv1D (GPT-2), a linear layer whose weight is (d_in, d_out)."""

    def size(self, module: Any) -> Size | None:
        if not is_instance(module, "transformers.pytorch_utils", "Conv1D") or not isinstance(module.weight, Tensor):
            return None
        d_in, d_out = shape_of(module.weight)  # the whole shape, where ZeRO-3 has left an empty tensor
        return Size(d_in, d_out)

    def lies_transposed(self, module: Any) -> bool:
        return True

    def computes_its_product(self, module: Any) -> bool:
        return True


class FusedExperts(Kind):
    """The down-projections of a mixture-of-experts block as one bare parameter (experts, ...), with no layer to hook.

    A method that is linear in the block's output and reads no weight goes on that output, a weighted sum of what the
    experts write. Any other goes on each expert's matrix, which is replaced for the time of a forward.
    """

    weight, bias = "down_proj", "down_proj_bias"

    def size(self, module: Any) -> Size | None:
        transposed = self._orientation(module)
        if transposed is None:
            return None
        n, a, b = self.stored(module).shape  # (experts, d_out, d_in), or (experts, d_in, d_out) if transposed
        return Size(a, b, n) if transposed else Size(b, a, n)

    def lies_transposed(self, module: Any) -> bool:
        return bool(self._orientation(module))

    def replace(self, module: nn.Module, matrices: Float[Tensor, "e o i"]) -> None:
        """Until `restore`, the block computes with these matrices."""
        # The parameter is untouched: Python finds an instance's attribute before nn.Module.__getattr__ is asked for it.
        module.__dict__[self.weight] = self.oriented(module, matrices)

    def restore(self, module: nn.Module) -> None:
        """The block computes with its parameter again."""
        module.__dict__.pop(self.weight, None)

    def _orientation(self, module: Any) -> bool | None:
        """Does it keep each matrix as (d_in, d_out), as GPT-OSS and Llama 4 do? None for a module of another kind.

        The shape of a fused gate and up projection says which; without a gate, transformers' `is_transposed`.
        """
        # Not getattr, which is slow where there is no such attribute: in nearly every module of a model.
        matrices = vars(module).get(self.weight, module._parameters.get(self.weight))
        if not isinstance(matrices, Tensor) or matrices.ndim != 3:
            return None
        up = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
        if not isinstance(up, Tensor) or up.ndim != 3:
            return None
        n, a, b = matrices.shape
        # Told apart even where a = b: the axis that is twice as long is the one that holds gate and up.
        by_shape: dict[tuple[int, ...], bool] = {(n, 2 * b, a): False, (n, b, 2 * a): True}
        declared: Any = getattr(module, "is_transposed", None)
        return by_shape.get(tuple(up.shape), declared)


LINEAR, EXPERTS = Linear(), FusedExperts()
KINDS: list[Kind] = [EXPERTS, Conv1D(), LINEAR]  # the first that knows a module's size is its kind


def size_of(module: nn.Module) -> Size | None:
    """The size of anything that is a layer of some kind, else None."""
    return next((size for kind in KINDS if (size := kind.size(module)) is not None), None)


def is_bypassed(module: nn.Module) -> bool:
    """True for the out-projection of nn.MultiheadAttention, whose weight is read without calling the layer."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def is_instance(value: Any, module: str, name: str) -> bool:
    """isinstance of a class in a package that may be missing: while nothing has imported it, nothing is of it."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)
