"""Daubechies' orthogonal wavelets: the scaling filter h (L,), from two digits and the conditions that define it.

    Σ_k h_k h_{k+2m} = δ_m      Σ_k (-1)^k k^p h_k = 0 for p < N      Σ_k h_k = √2
    of a coiflet also           Σ_k (k - N)^p h_k = 0 for 0 < p < N

db and sym have L = 2N, coif L = 3N. The conditions have few solutions, all apart; the digits below say which one is
meant, and Newton's iteration gives the rest (Daubechies 1992, Ten Lectures on Wavelets, tables 6.1, 6.3 and 8.1).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .low_rank import is_traced_or_transformed

DIGITS = {
    "db1": "71 71",
    "db2": "48 84 22 -13",
    "db3": "33 81 46 -14 -9 4",
    "db4": "23 71 63 -3 -19 3 3 -1",
    "db5": "16 60 72 14 -24 -3 8 -1 -1 0",
    "db6": "11 49 75 32 -23 -13 10 3 -3 0 0 0",
    "db7": "8 40 73 47 -14 -22 7 8 -4 -2 1 0 0 0",
    "db8": "5 31 68 59 -2 -28 0 13 -2 -4 1 1 0 0 0 0",
    "db9": "4 24 60 66 13 -29 -10 15 3 -7 0 2 0 0 0 0 0 0",
    "db10": "3 19 53 69 28 -25 -20 13 9 -7 -3 3 0 -1 0 0 0 0 0 0",
    "sym2": "48 84 22 -13",
    "sym3": "33 81 46 -14 -9 4",
    "sym4": "3 -1 -10 30 80 50 -3 -8",
    "sym5": "2 -2 -18 2 63 72 20 -4 3 3",
    "sym6": "-1 0 4 -2 -7 34 79 49 -5 -12 0 2",
    "sym7": "1 0 -11 -14 29 77 54 2 -5 7 3 -1 0 0",
    "sym8": "0 0 -1 0 5 -3 -5 36 78 48 -6 -14 1 3 0 0",
    "sym9": "0 0 -1 1 6 -2 -19 4 62 72 24 -5 0 3 -1 -1 0 0",
    "sym10": "0 0 0 0 -2 1 5 -3 -4 38 77 47 -7 -16 1 5 0 -1 0 0",
    "coif1": "-7 34 85 38 -7 -2",
    "coif2": "2 -4 -7 39 81 42 -8 -6 2 1 0 0",
    "coif3": "0 1 2 -7 -6 41 79 43 -7 -8 3 2 -1 0 0 0 0 0",
    "coif4": "0 0 -1 2 3 -8 -6 42 78 43 -7 -10 4 3 -2 -1 0 0 0 0 0 0 0 0",
    "coif5": "-2 4 22 -42 -101 234 282 -919 -521 4216 7743 4380 -620 -1056 412 326 -198 -91 68 24 -17 -6 3 1"
    " 0 0 0 0 0 0",
}
"""h in hundredths, of coif5 in ten-thousandths; the order is that of the reconstruction filter."""


@lru_cache
def scaling_filter(name: str) -> tuple[float, ...]:
    """h of the wavelet, in float64 to rounding; the high-pass filter is g_k = (-1)^k h_{L-1-k}."""
    h = torch.tensor([float(digits) for digits in DIGITS[name].split()], dtype=torch.float64, device="cpu")
    is_coiflet = name.startswith("coif")
    moments = len(h) // (3 if is_coiflet else 2)
    h *= 2**0.5 / h.sum()
    for _ in range(30):  # 20 are the most that one takes (sym10), 6 are common
        values, jacobian = _conditions(h, moments, is_coiflet)
        h = h - torch.linalg.lstsq(jacobian, values[:, None], rcond=1e-13, driver="gelsd").solution[:, 0]
    return tuple(h.tolist())


def _conditions(h: Tensor, moments: int, is_coiflet: bool) -> tuple[Tensor, Tensor]:
    """The conditions' values (m,), 0 for a wavelet, and their derivatives (m, L)."""
    length, k = len(h), torch.arange(len(h), dtype=h.dtype)
    shifted = [torch.cat([h[2 * m :], h.new_zeros(2 * m)]) for m in range(length // 2)]  # h_{k+2m}
    back = [torch.cat([h.new_zeros(2 * m), h[: length - 2 * m]]) for m in range(length // 2)]  # h_{k-2m}
    # Chebyshev polynomials in place of the powers: the same conditions, better conditioned
    t = ((2 * k - (length - 1)) / length).clamp(-1, 1).acos()
    linear = [(-1) ** k * (p * t).cos() for p in range(moments)] + [torch.ones_like(h)]
    if is_coiflet:
        linear += [((k - moments) / (length / 2)) ** p for p in range(1, moments)]
    wanted = h.new_tensor([2**0.5 if n == moments else 0.0 for n in range(len(linear))])
    orthogonal = torch.stack([h @ other for other in shifted])
    orthogonal[0] -= 1
    rows = torch.stack(linear)
    jacobian = torch.cat([torch.stack([a + b for a, b in zip(shifted, back, strict=True)]), rows])
    return torch.cat([orthogonal, rows @ h - wanted]), jacobian


class Atoms(NamedTuple):
    """The filter of each coefficient along the rows and where it lies, and those along the columns: (n, L) each."""

    f: Float[Tensor, "n l"]
    rows: Int[Tensor, "n l"]
    g: Float[Tensor, "n l"]
    columns: Int[Tensor, "n l"]


def atoms(o: int, i: int, h: Sequence[float], c: Float[Tensor, "n"], places: Int[Tensor, "n"]) -> Atoms:
    """The inverse transform of coefficients c at row-major places of (o, i), cut to (o, i), is Σ_k f_k ⊗ g_k.

    The transform's input has L - 2 more rows and columns, half of them on each side, and an even number. Its quarters
    are, as PyWavelets calls them, cA cH over cV cD.
    """
    length, k = len(h), torch.arange(len(h), device=c.device)
    low = torch.tensor(h, dtype=c.dtype, device=c.device)  # (L,)
    high = low.flip(0) * (1 - 2 * (k % 2))
    (rows, is_lower), (columns, is_right) = (
        _half(place, size, length) for place, size in ((places.long() // i, o), (places.long() % i, i))
    )
    f, rows = _inside(c[:, None] * torch.where(is_right[:, None], high, low), rows[:, None] + k, o)
    return Atoms(f, rows, *_inside(torch.where(is_lower[:, None], high, low), columns[:, None] + k, i))


def inverse(o: int, i: int, h: Sequence[float], c: Tensor, places: Tensor) -> Float[Tensor, "o i"]:
    """The inverse transform itself."""
    f, rows, g, columns = atoms(o, i, h, c, places)
    values, index = f[:, :, None] * g[:, None, :], rows[:, :, None] * i + columns[:, None, :]  # (n, L, L)
    add = Tensor.scatter_add if is_traced_or_transformed() else Tensor.scatter_add_  # in place, or vmap could not
    return add(c.new_zeros(o * i), 0, index.flatten(), values.flatten()).view(o, i)


def times_inverse(
    o: int, x: Float[Tensor, "m i"], h: Sequence[float], c: Tensor, places: Tensor
) -> Float[Tensor, "m o"]:
    """x times its transpose, by 2 L products for each row and coefficient."""
    f, rows, g, columns = atoms(o, x.shape[1], h, c, places)
    terms = torch.linalg.vecdot(x[:, columns], g)[..., None] * f  # (m, n, L)
    return x.new_zeros(len(x), o).scatter_add(1, rows.flatten().expand(len(x), -1), terms.flatten(1))


def _half(place: Int[Tensor, "n"], size: int, length: int) -> tuple[Int[Tensor, "n"], Tensor]:
    """Along one side: where the filter's first number comes to lie, and whether it is in the second half."""
    half = (size + length - 1) // 2
    place = place + (2 * half - size) // 2
    is_second = place >= half
    return 2 * torch.where(is_second, place - half, place) - (length - 2), is_second


def _inside(f: Tensor, place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The filter's numbers, zero where they lie outside, and their places."""
    return f * ((place >= 0) & (place < size)), place.clamp(0, size - 1)
