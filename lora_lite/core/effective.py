"""A layer and its adapters as one affine map x -> W' x + b': what their hooks make of the unit vectors.

For fixed parameters every method here is affine in x, so merging needs no code in a variant: column j of W' is what
comes out for the unit vector e_j, less what comes out for 0. The layer's own product is read off its weight, a block of
columns at a time, wherever an adapter leaves its input alone or scales its channels.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..base.probe import norm_offset
from ..base.still import full_precision
from ..errors import TargetError, VariantError
from .adapt import adapt_input, adapt_output, check_groups
from .layer import Layer
from .state import Site
from .variant import LowRank, Variant, lookup

COLUMNS = 128  # unit vectors that go through the hooks at a time
ROWS = 512  # of a weight are cast at a time for a product: never a copy of it whole


class Affine:
    """One layer, or one of the experts that it fuses, with adapters in the order attached; in eval mode, no gradients.
    Made of adapters that aren't affine, it raises VariantError."""

    def __init__(
        self, sites: Sequence[Site], dtype: torch.dtype, device: torch.device, expert: int | None = None
    ) -> None:
        def views(dtype: torch.dtype, **shown: Tensor | None) -> list[Layer]:
            instead = {"training": False, **shown}
            return [Layer(s.module, s, dtype, None, expert if s.stacked else None, instead) for s in sites]

        self.dtype, self.device = dtype, device
        self.d_in, self.d_out = sites[0].target.d_in, sites[0].target.d_out
        self._views, self._no_bias = views(dtype), views(dtype, bias=None)
        exact = views(torch.float64, bias=None)  # rounding would look like a bend
        _check_affine(exact, self.d_in, self.d_out, device)
        if sites[0].base.kind.category == "conv":
            for view, site in zip(exact, sites, strict=True):
                check_groups(view, site.module, torch.empty(0, dtype=torch.float64, device=device))

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n i"], product: Callable[[Tensor], Tensor]) -> Float[Tensor, "n o"]:
        """W' x + b' itself, with the layer's own x -> W x + b given."""
        x = _inputs(self._views, x)  # (n, i)
        return _outputs(self._views, x, product(x))  # (n, o)

    def columns(self, weight: Float[Tensor, "o i"]) -> Iterator[tuple[int, int, Float[Tensor, "o n"]]]:
        """(start, stop, W'[:, start:stop]) for all of W'; only these columns of W are read if `is_columnwise`."""
        with torch.no_grad():
            x0, y0 = self._at_zero(self._no_bias, lambda: weight)  # (1, i), (1, o)
            offset = _outputs(self._no_bias, x0, y0)  # (1, o), what the adapters make of 0
        for start, stop in self._blocks():
            yield start, stop, self._columns(weight, start, stop, x0, y0, offset)

    def write(self, weight: Float[Tensor, "o i"], out: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """Put W' into `out`, cast to its dtype, a block of columns at a time."""
        for start, stop, columns in self.columns(weight):
            out[:, start:stop] = columns
        return out

    def _at_zero(self, views: Sequence[Layer], weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The adapters' input for x = 0, and W times that; W is read only if a method moves its input."""
        x = _inputs(views, torch.zeros(1, self.d_in, dtype=self.dtype, device=self.device))  # (1, i)
        return x, _product(x, weight()) if x.any() else x.new_zeros(1, self.d_out)  # (1, o)

    @torch.no_grad()
    def _columns(
        self, weight: Float[Tensor, "o i"], start: int, stop: int, x0: Tensor, y0: Tensor, offset: Tensor
    ) -> Float[Tensor, "o n"]:
        e = self._unit(start, stop)  # (n, i), row k is e_(start + k)
        x = _inputs(self._no_bias, e)  # (n, i)
        # Scaled channels scale columns of W; only an input that was mixed needs a real product.
        factors = None if x is e else _channel_scale(x - x0, start)  # (n,)
        if x is e or factors is not None:
            y = weight[:, start:stop].to(self.dtype).mT  # (n, o): W e_j is column j
            y = y if factors is None else y * factors[:, None]
        else:
            y = _product(x - x0, weight)  # (n, o)
        # Zeros are not added: a sum with them would still round in the dtype of the other side.
        y = _outputs(self._no_bias, x, y + y0 if y0.any() else y, slice(start, stop) if x is e else None)
        return (y - offset if offset.any() else y).mT

    @torch.no_grad()
    def bias(self, bias: Float[Tensor, "o"] | None, weight: Callable[[], Tensor]) -> Float[Tensor, "o"] | None:
        """b', what comes out for x = 0; None if that is nothing and the layer has no bias. Seldom asks for W."""
        x, y = self._at_zero(self._views, weight)
        new = _outputs(self._views, x, y if bias is None else y + bias.to(self.dtype))[0]  # (o,)
        return None if bias is None and not new.any() else new

    @torch.no_grad()
    def gain(self, gain: Float[Tensor, "d"]) -> Float[Tensor, "d"] | None:
        """g' of a norm y = g ⊙ n(x) + b; None where an adapter changes the norm's input, or mixes its channels."""
        (r,) = random_rows((1, self.d_in), device=self.device)
        r = r.to(self.dtype)
        n = torch.cat([0 * r, 0 * r + 1, r])  # (3, d)
        zero, one, mixed = _outputs(self._no_bias, n, gain * n)  # (d,) each
        new = one - zero
        is_diagonal = (mixed - zero - new * r).abs().max() <= 1e-9 * mixed.abs().max()
        return new if is_diagonal and _inputs(self._views, r) is r else None

    @torch.no_grad()
    def prepare(self) -> None:
        """Let the adapters compute what they remember of the weight."""
        x = self._unit(0, 1).zero_()
        _outputs(self._no_bias, _inputs(self._no_bias, x), x.new_zeros(1, self.d_out), slice(0, 1))

    @torch.no_grad()
    def is_columnwise(self) -> bool:
        """Does each column of W' depend on the same column of W alone: is every input at most scaled by channel?"""
        if all(lookup(view.cfg.variant).forward_input is None for view in self._no_bias):
            return True  # known without a call: the input reaches the layer as it is
        x0 = _inputs(self._no_bias, self._unit(0, 1).zero_())
        moved = ((start, _inputs(self._no_bias, self._unit(start, stop)) - x0) for start, stop in self._blocks())
        return not x0.any() and all(_channel_scale(x, start) is not None for start, x in moved)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.d_in, COLUMNS):
            yield start, min(start + COLUMNS, self.d_in)

    def _unit(self, start: int, stop: int) -> Float[Tensor, "n i"]:
        x = torch.zeros(stop - start, self.d_in, dtype=self.dtype, device=self.device)
        x[:, start:stop].fill_diagonal_(1)
        return x


def _inputs(layers: Sequence[Layer], x: Float[Tensor, "n i"]) -> Float[Tensor, "n i"]:
    for layer in layers:
        x = adapt_input(layer, x)
    return x


def _outputs(
    layers: Sequence[Layer], x: Float[Tensor, "n i"], y: Float[Tensor, "n o"], columns: slice | None = None
) -> Float[Tensor, "n o"]:
    """`columns`: x are the unit vectors of these channels."""
    for layer in layers:
        picked = None if columns is None else _picked(layer, columns)
        y = adapt_output(layer, x, y) if picked is None else y + picked
    return y


def _picked(layer: Layer, columns: slice) -> Float[Tensor, "n o"] | None:
    """The change by a method whose A is no matrix, for these unit vectors; None for any other method.

    A product with them would take V² d operations for an embedding of V tokens.
    """
    variant = lookup(layer.cfg.variant)
    factors = None if variant.low_rank is Variant.low_rank else variant.low_rank(layer)
    form = None if factors is None else LowRank(*factors)
    if form is None or form.is_dense:
        return None
    if form.a is None:
        rows = (form.b[:, columns] * form.s).mT  # (n, o)
    else:
        chosen = (form.a >= columns.start) & (form.a < columns.stop)  # (r,)
        rows = form.b.new_zeros(columns.stop - columns.start, len(form.b))
        rows.index_add_(0, form.a[chosen] - columns.start, (form.b[:, chosen] * form.s).mT)
    return rows if form.shift is None else rows + form.shift


def _channel_scale(x: Float[Tensor, "n i"], start: int) -> Float[Tensor, "n"] | None:
    """By how much each unit vector was scaled, if that is all that happened to it."""
    diagonal = x[:, start : start + len(x)].diagonal()  # (n,), what has stayed at each vector's own channel
    return diagonal if x.count_nonzero() == diagonal.count_nonzero() else None


def _product(x: Float[Tensor, "n i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "n o"]:
    return torch.cat([x @ rows.to(x.dtype).mT for rows in weight.split(ROWS)], dim=-1)  # each (n, ROWS)


@torch.no_grad()
def _check_affine(layers: Sequence[Layer], d_in: int, d_out: int, device: torch.device) -> None:
    """f(u + v) - f(u) - f(v) + f(0) = 0, of inputs and of outputs, in float64 and for vectors of two sizes."""
    pairs = random_rows((2, d_in), (2, d_out), device=device)
    # v is 30 times u: a bend that only large or only small inputs show would else pass.
    x, y = (torch.stack([0 * u, u, 30 * v, u + 30 * v]) for u, v in pairs)  # (4, i), (4, o)
    for layer in layers:
        # One vector at a time: rows of one batch may share what bends the map between batches.
        new_x = torch.cat([adapt_input(layer, row) for row in x.split(1)])  # (4, i)
        new_y = torch.cat([adapt_output(layer, *rows) for rows in zip(x.split(1), y.split(1), strict=True)])  # (4, o)
        for before, after in ((x, new_x), (y, new_y)):
            bent = (after[3] - after[2] - after[1] + after[0]).abs().max()
            if after.isfinite().all() and bent > 1e-7 * (after - before).abs().max() + 1e-12 * after.abs().max():
                raise VariantError(
                    f"{layer.path}: {layer.cfg.variant!r} is not affine in x, so no weight stands for it\n"
                    f"  found f(u + v) - f(u) - f(v) + f(0) = {float(bent):.1e}; wanted 0\n"
                    f"  keep the adapter attached: a merge can't be exact"
                )


@torch.no_grad()
def delta_weight(
    sites: Sequence[Site], expert: int | None = None
) -> tuple[Float[Tensor, "o *i"], Float[Tensor, "o"] | None]:
    """(W' - W, b' - b) in float64, of a layer, or of an expert that it fuses, with these adapters at their scales; None
    for a bias that stays.

    W is what the layer computes with, dequantised if it is quantised; of a norm, the vector that it multiplies by.

    expert      of a layer that fuses several, the one whose matrix is meant

    Raises:
        TargetError: for an adapter that no weight holds.
    """
    for site in sites:
        if problem := site.no_weight:
            raise TargetError(f"{site.path}: {problem}")
    layer = sites[0].base.as_it_is_now()
    with full_precision(layer.module):
        bias = None if expert is not None else layer.bias
        if sites[0].target.is_diagonal:
            weight = layer.stored.detach().double() + norm_offset(layer)  # (d,)
            affine = Affine(sites, torch.float64, weight.device)
            gain = affine.gain(weight)
            if gain is None:
                raise TargetError(f"{layer.path}: no vector is this change of a norm\n  keep the adapter attached")
            delta = gain - weight  # (d,)
        else:
            weight = layer.dense_weight(expert).double()  # (o, i)
            affine = Affine(sites, torch.float64, weight.device, expert)
            delta = affine.write(weight, torch.empty_like(weight)).sub_(weight)
        new = affine.bias(bias, lambda: weight)
    moved = new if new is None or bias is None else new - bias.double()  # (o,)
    return delta, moved if moved is not None and moved.any() else None


def in_order(sites: Sequence[Site]) -> list[Site]:
    """Sites of one layer as a forward meets them: those on experts' matrices come first."""
    return sorted(sites, key=lambda site: not site.stacked)


def random_rows(*shapes: tuple[int, ...], device: torch.device | str = "cpu") -> list[Tensor]:
    """The same normal numbers at every call, in float64: to compare what adapters make of them."""
    generator = torch.Generator().manual_seed(0)  # of its own: a user's random state stays as it is
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]
