"""Fused experts: the down-projections of a mixture-of-experts block as one bare parameter, with no layer to hook.

Two ways lead to them. What is linear in the block's output and needs no weight goes on that output: it is a weighted
sum of what the experts write. All else goes on each expert's matrix, which is replaced for the time of a forward.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

NAME, BIAS = "down_proj", "down_proj_bias"


def down(block: nn.Module) -> Float[Tensor, "e o i"] | None:
    """The experts' down-projections, one matrix (d_out, d_in) each, or None for a module that is no such block."""
    transposed = lies_transposed(block)
    if transposed is None:
        return None
    matrices: Tensor = getattr(block, NAME)
    return matrices.mT if transposed else matrices


def stored(block: nn.Module) -> Tensor:
    """The parameter that holds them, as it lies in memory."""
    parameter: Tensor = getattr(block, NAME)
    return parameter


def oriented(block: nn.Module, matrices: Tensor) -> Float[Tensor, "e o i"]:
    """A tensor that lies as the block's parameter does, with each matrix as (d_out, d_in)."""
    return matrices.mT if lies_transposed(block) else matrices


def bias(block: nn.Module) -> Float[Tensor, "e o"] | None:
    """What each expert adds after its down-projection, or None."""
    found = getattr(block, BIAS, None)
    return found if isinstance(found, Tensor) else None


def count(block: nn.Module) -> int:
    """How many experts it fuses; 0 for a module that is no such block."""
    matrices = down(block)
    return 0 if matrices is None else matrices.shape[0]


def shadow(block: nn.Module, matrices: Float[Tensor, "e o i"]) -> None:
    """Until `unshadow`, the block computes with these. The parameter is untouched: Python finds an attribute of the
    instance before it asks nn.Module for a parameter."""
    block.__dict__[NAME] = matrices.mT if lies_transposed(block) else matrices


def unshadow(block: nn.Module) -> None:
    """The parameter again."""
    block.__dict__.pop(NAME, None)


def lies_transposed(block: nn.Module) -> bool | None:
    """Does it keep each matrix as (d_in, d_out), as GPT-OSS and Llama 4 do? None for a module that is no such block.

    The shape of a fused gate and up projection says which; without a gate, transformers' `is_transposed`.
    """
    matrices = vars(block).get(NAME, block._parameters.get(NAME))  # getattr is slow where there is none: nearly always
    if not isinstance(matrices, Tensor) or matrices.ndim != 3:
        return None
    up = getattr(block, "gate_up_proj", getattr(block, "up_proj", None))
    if not isinstance(up, Tensor) or up.ndim != 3:
        return None
    n, a, b = matrices.shape
    by_shape: dict[tuple[int, ...], bool] = {(n, 2 * b, a): False, (n, b, 2 * a): True}
    declared: Any = getattr(block, "is_transposed", None)
    return by_shape.get(tuple(up.shape), declared)
