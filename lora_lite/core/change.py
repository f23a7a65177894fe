"""The change that adapters make in a layer's weight, where their method gives it itself (`low_rank`).

Then W' - W is a product of two factors, or a matrix. Any other change is read off the base by core/effective.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TargetError, VariantError
from ..ops.svd import LOW_RANK, Svd, product_norm, product_svd, top_svd
from .adapt import adapt_input, adapt_output
from .effective import random_rows
from .layer import Layer
from .state import Site
from .variant import LowRank, Variant, lookup

SAME = 1e-9
"""The part of a change up to which two ways to it differ by float64's rounding."""


class Change(NamedTuple):
    """W' - W = B A (o, i), and b' - b (o,), in float64. Where A is None, B is W' - W itself; of a norm, a vector."""

    a: Float[Tensor, "r i"] | None
    b: Float[Tensor, "o *r"]
    shift: Float[Tensor, "o"] | None = None  # None where the bias stays

    @property
    def delta(self) -> Float[Tensor, "o *i"]:
        return self.b if self.a is None else self.b @ self.a

    def svd(self) -> Svd:
        """All singular triplets that it can have, of a matrix."""
        return top_svd(self.b, min(self.b.shape)) if self.a is None else product_svd(self.b, self.a)

    def norm(self) -> float:
        """‖W' - W‖, Frobenius; 0 where factors cancel, but for rounding."""
        if self.a is None:
            return float(self.b.norm())
        norm = product_norm(self.b, self.a)
        return norm if norm > LOW_RANK * float(self.b.norm() * self.a.norm()) else 0.0

    def distance(self, a: Float[Tensor, "k i"], b: Float[Tensor, "o k"]) -> float:
        """‖W' - W - B A‖, Frobenius, of factors of any dtype."""
        if self.a is None:
            return float((self.b - b.double() @ a.double()).norm())
        return product_norm(torch.cat([self.b, -b.double()], dim=1), torch.cat([self.a, a.double()]))

    def times(self, weight: float) -> "Change":
        return Change(self.a, weight * self.b, None if self.shift is None else weight * self.shift)


def total(changes: Sequence[Change]) -> Change:
    """The sum, whose factors lie beside each other: exact, of any ranks."""
    shifts = [change.shift for change in changes if change.shift is not None]
    shift = torch.stack(shifts).sum(0) if shifts else None
    factors = [change.a for change in changes if change.a is not None]
    if len(factors) == len(changes):
        return Change(torch.cat(factors), torch.cat([change.b for change in changes], dim=1), shift)
    delta = changes[0].delta.clone()
    for change in changes[1:]:
        delta += change.delta
    return Change(None, delta, shift)


@torch.no_grad()
def added_change(sites: Sequence[Site], expert: int | None = None) -> Change | None:
    """The change by these adapters at a layer, at their scales; None where a method doesn't give its own.

    expert      of a layer that fuses several, the one whose matrix is meant

    Raises:
        TargetError: for an adapter that no weight holds.
        VariantError: for a method whose `low_rank` isn't what its forward does.
    """
    changes = [_added(site, expert) for site in sites]
    known = [change for change in changes if change is not None]
    return total(known) if len(known) == len(sites) else None


def check_has_weight(sites: Sequence[Site]) -> None:
    """TargetError for an adapter that no weight holds."""
    for site in sites:
        if problem := site.no_weight:
            raise TargetError(f"{site.path}: {problem}")


def _added(site: Site, expert: int | None) -> Change | None:
    check_has_weight([site])
    variant = lookup(site.cfg.variant)
    if variant.low_rank is Variant.low_rank or site.target.is_diagonal:
        return None
    # In eval mode: dropout is no part of what was learned. With the layer's bias, which a constant may depend on.
    view = Layer(site.module, site, torch.float64, None, expert if site.stacked else None, {"training": False})
    factors = variant.low_rank(view)
    if factors is None or (form := LowRank(*factors)).gain is not None:
        return None
    form = form._replace(b=form.b.double(), s=torch.as_tensor(form.s, dtype=torch.float64, device=form.b.device))
    shift = None if form.shift is None else form.shift.double().flatten()  # (o,)
    if form.is_dense and form.a is not None:
        change = Change(form.a.double(), form.b * form.s, shift)
    else:
        change = Change(None, form.delta(site.target.d_in, torch.float64), shift)
    _check(view, change)
    return change


def _check(view: Layer, change: Change) -> None:
    """VariantError unless this is what the method's forward adds, whatever y is: it may be anyone's."""
    x, y = random_rows((3, view.in_features), (3, view.out_features), device=change.b.device)
    added = x @ change.b.mT if change.a is None else x @ change.a.mT @ change.b.mT  # (3, o)
    added = added if change.shift is None else added + change.shift
    outputs = [(adapt_output(view, x, start), start + added) for start in (y, added)]
    # A method may multiply s into a factor, which rounds in the dtype that the factor is stored in.
    same = SAME + 8 * torch.finfo(view.cfg.dtype).eps
    # Factors may cancel, as those of a start that is taken out again: then their own size tells what rounding is.
    rounding = 1e-12 * x.norm() * change.b.norm() * (1 if change.a is None else change.a.norm())
    alike = all((got - wanted).abs().max() <= same * wanted.abs().max() + rounding for got, wanted in outputs)
    if not (alike and torch.equal(adapt_input(view, x), x)):
        problem = f"low_rank of {view.cfg.variant!r} gave another change than its forward makes"
        raise VariantError(f"{view.path}: {problem}\n  wanted y + B (s A x), at layer.scale, for any y")
