"""Numbers that a seed gives and nothing trains: matrices of which each layer takes a corner, and tables of indices."""

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..base.stacks import Place
from ..core.targets import Target
from ..core.variant import ParamSpec, seeded
from ..errors import ConfigError


def projection_specs(
    targets: Sequence[Target], rows: int, r: int, seed: int, save_projection: bool
) -> dict[str, ParamSpec]:
    """A (rows, max i) and B (max o, r), with the bounds and the generator of PEFT's VeRA: one seed gives the same."""
    a, b = (rows, max(t.d_in for t in targets)), (max(t.d_out for t in targets), r)

    def second(tensor: Tensor, generator: torch.Generator) -> None:
        _uniform(tensor.new_empty(a), generator)  # B is what the generator gives after A
        _uniform(tensor, generator)

    saved: Any = "always" if save_projection else "never"
    return {
        "A": ParamSpec(a, seeded(_uniform, seed), trainable=False, keep_dtype=True, saved=saved),
        "B": ParamSpec(b, seeded(second, seed), trainable=False, keep_dtype=True, saved=saved),
    }


def _uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """Kaiming's bound √3 (√2 / √n), n columns."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(tensor.shape[1]))
    tensor.uniform_(-bound, bound, generator=generator)


def draw_bases(seed: int, rarity: float | None, after: tuple[int, ...] | None = None) -> Callable[[Tensor], None]:
    """An `init` of one of RandLoRA's bases, of variance 1 over all, by PEFT's draws.

    rarity      None: uniform. Else of -1, 0 and 1, the two others once in twice as many
    after       (r, 1, Q) of the first base, where the second is wanted: its draws come before
    """

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        if after is not None:
            _basis(after, rarity, generator)
        tensor.copy_(_basis(tuple(tensor.shape), rarity, generator))

    return seeded(fill, seed)


def _basis(shape: tuple[int, ...], rarity: float | None, generator: torch.Generator) -> Tensor:
    if rarity is not None:
        u = torch.rand(shape, generator=generator)
        basis = (u > 1 - 1 / (2 * rarity)).float() - (u < 1 / (2 * rarity)).float()
    else:
        # A slice of the second axis at a time, in bfloat16: that is the order and the dtype of PEFT's numbers.
        slices = [torch.empty(shape[0], 1, shape[2], dtype=torch.bfloat16) for _ in range(shape[1])]
        basis = torch.cat([torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator) for t in slices], 1)
    return basis / basis.double().std().to(basis.dtype)  # in float64, so that no machine rounds it another way


def scaled_slices(
    s: float, scales: Float[Tensor, "r N"], gamma: Float[Tensor, "N q"], a: Float[Tensor, "r 1 q"], like: Tensor
) -> Float[Tensor, "m q"]:
    """s Â (r N, q) of RandLoRA, of A in the dtype of `like`: drawn again or cast with a model, it is the same there."""
    return (s * scales[..., None] * a.to(like.dtype) * gamma).flatten(0, 1)


def ordered_factors(d_in: int, narrow: Float[Tensor, "m q"], wide: Float[Tensor, "p n r"]) -> tuple[Tensor, Tensor]:
    """A and B of the product of B̂ (p, r n) and Â, which is transposed where its rows aren't as long as x."""
    pair = narrow, wide.flatten(1)
    return pair if narrow.shape[1] == d_in else (pair[1].mT, pair[0].mT)


def balanced_indices(n: int, length: int, seed: int) -> Int[Tensor, "n"]:
    """n indices below `length` in a random order, each as often as any other, or once more."""
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randperm(length, generator=generator)[: n % length]
    return torch.cat([torch.arange(length).repeat(n // length), extra])[torch.randperm(n, generator=generator)]


def add_shared(specs: dict[str, ParamSpec], more: dict[str, ParamSpec], path: str, what: str, cure: str = "") -> None:
    """One more layer's shared tensors. Raises ConfigError where an earlier layer has one of another size."""
    if any(specs.setdefault(name, spec).shape != spec.shape for name, spec in more.items()):
        problem = f"{path}: other layers of its name have another size, and would share {what}"
        raise ConfigError(f"{problem}\n  leave one of them out with exclude_names{cure}")


@lru_cache(maxsize=4096)  # asked at each call of a layer
def names_in_stack(path: str, place: Place, stride: int) -> tuple[str, str]:
    """The names of tensors that layers of one name in a stack of blocks share: `stride` of them in a row, and all."""
    (stack, block), run, every = place, path, path
    if stack is not None and block is not None:
        name = path.removeprefix(f"{stack}{block}")
        run, every = f"{stack}{block // stride}{name}", f"{stack}{name}"
    run, every = (re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_") for text in (run, every))
    return run, every
