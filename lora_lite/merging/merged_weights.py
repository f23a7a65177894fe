"""The merged weight and bias of one layer, computed, and where they go: nothing is changed here.

A merged weight is what the adapters' hooks make of the unit vectors (core/effective.py), of a norm its two vectors, of
experts one matrix after the other.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..base.kinds import bare_parameters
from ..base.layer import BaseLayer, layer_of
from ..base.probe import norm_offset
from ..core.adapter import adapters
from ..core.effective import Affine, in_order, random_rows
from ..core.state import Site, sites_at
from ..core.swap import Swap, Unparametrized
from ..dtypes import STORAGE_DTYPES, dtype_name, fits
from ..errors import BaseModelError, TargetError

Changes = list[tuple[Swap, Tensor | nn.Module]]


@dataclass
class MergedLayer:
    """A layer, with the adapters that go into its weight and those that stay on it."""

    base: BaseLayer
    sites: list[Site]
    stay: list[Site]
    quantized: str | None  # the choice for a quantised layer, as `merge` was told
    shares_bias: bool  # does another module hold its bias?
    error: tuple[float, float] | None = None  # of quantising again, over the norms of the weight and of its change


def changes(root: nn.Module, layer: MergedLayer) -> Changes:
    """The merged weight and bias of one layer, computed, and where they go; nothing is changed yet."""
    base, module, bias = layer.base, layer.base.module, layer.base.bias
    if not base.storage.is_dense and base.packed is None:
        return _replacements(root, layer)
    new = torch.empty_like(base.stored) if base.packed is None else _unpacked(layer)
    numbers = base.weight if base.packed is None else base.dense_weight
    if not base.kind.has_matrix:
        new_bias = _fold_norm(layer, new)  # (d,)
    elif base.experts:
        out = base.oriented(new)  # (experts, d_out, d_in)
        new_bias = None if base.by_weight else _bias_of_experts(layer, new.dtype)  # (experts, d_out)
        for i in range(base.experts):  # each matrix (d_out, d_in)
            if _fold(layer, numbers(i), out[i], None, i) is not None and base.by_weight:
                raise TargetError(
                    f"{base.path}: an adapter adds a constant, and an expert's matrix has no place for it"
                )
    else:
        new_bias = _fold(layer, numbers(), base.oriented(new), bias)  # (d_out,)
    swap = Swap(module, base.kind.weight, base.stored.data)
    parts: Changes = [(swap, new) if base.packed is None else _parameter_for(layer, new)]
    if new_bias is not None and bias is not None:
        if layer.shares_bias and not torch.equal(new_bias, bias):
            problem = "an adapter changes its bias, which another module holds as well"
            raise TargetError(f"{base.path}: {problem}\n  untie them, or keep the adapter attached")
        parts.append((Swap(module, base.kind.bias, bias.data), new_bias))
    elif new_bias is not None and not base.shows_bias:
        raise TargetError(
            f"{base.path}: an adapter adds a constant, and the model multiplies by this weight without a bias\n"
            f"  keep the adapter attached"
        )
    elif new_bias is not None:  # a method that adds a constant, on a layer that had no bias
        parts.append((Swap(module, base.kind.bias, None), nn.Parameter(new_bias, requires_grad=False)))
    return parts


def _fold_norm(layer: MergedLayer, out: Tensor) -> Tensor | None:
    """Write w' (d,) of a norm y = (w + c) ⊙ n(x) + b to `out`, and return b' (d,), None if there is none."""
    base, offset = layer.base, norm_offset(layer.base)
    gain, has_bias = base.stored.double() + offset, base.kind.bias in base.module._parameters  # (d,)
    new, new_bias = fold_norm(layer.sites, gain, base.bias, has_bias)  # (d,), (d,)
    if layer.stay:
        _check_commute(layer, gain.diag(), base.bias, None)
    check_fits(base.path, out.copy_(new - offset))
    bias_dtype = (out if base.bias is None else base.bias).dtype
    return None if new_bias is None else check_fits(base.path, new_bias.to(bias_dtype))


def fold_norm(
    sites: Sequence[Site], gain: Float[Tensor, "d"], bias: Float[Tensor, "d"] | None, has_bias: bool
) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"] | None]:
    """(g', b') in float64 of a norm y = g ⊙ n(x) + b with these adapters. Raises TargetError if it can't hold them."""
    affine, new_bias = Affine(sites, torch.float64, gain.device), None
    new, problem = affine.gain(gain), "an adapter changes the norm's input, or mixes its channels"
    if new is not None:
        new_bias = affine.bias(bias, lambda: gain)  # no input is changed, so the weight isn't read
        problem = "" if new_bias is None or has_bias else "an adapter adds a constant, and this norm has no bias"
    if new is None or problem:
        raise TargetError(f"{sites[0].path}: {problem}\n  keep the adapter attached")
    return new, new_bias


def _unpacked(layer: MergedLayer) -> Tensor:
    """Room for the numbers of a bare parameter in 4 bits: in float32 where they are quantised again."""
    shape, again = bare_parameters(layer.base.module)[layer.base.kind.weight], layer.quantized == "requantize"
    dtype = torch.float32 if again else layer.base.storage.compute_dtype(layer.base)
    return torch.empty(shape.shape, dtype=dtype, device=layer.base.stored.device)


def _parameter_for(layer: MergedLayer, new: Tensor) -> tuple[Swap, Tensor | nn.Module]:
    """The change of a bare parameter in 4 bits: a dense one in its place, or another parametrisation."""
    base, module = layer.base, layer.base.module
    if layer.quantized == "dequantize":
        return Unparametrized(module, base.kind.weight, None), new
    replacement = base.storage.requantized(base, new, None)
    error = (replacement() - new).norm()
    layer.error = float(error / new.norm()), float(error / (new - base.packed()).norm())
    return Swap(module.parametrizations, base.kind.weight, base.packed), replacement


def _bias_of_experts(layer: MergedLayer, dtype: torch.dtype) -> Tensor | None:
    """The new biases where an adapter acts on the whole block's output; None where none does, or without a bias."""
    base, outer = layer.base, [site for site in layer.sites if not site.stacked]
    if not outer:
        return None
    # The map of an output alone: no weight comes before it.
    zero = torch.zeros(base.d_out, base.d_in, dtype=dtype, device=base.stored.device)
    dtype = dtype if base.bias is None else base.bias.dtype
    affine = Affine(outer, torch.promote_types(dtype, torch.float32), zero.device)
    if affine.bias(None, lambda: zero) is not None:
        problem = f"{' or '.join(site.state.name for site in outer)} adds a constant"
        reason = "a bias of experts would be weighted as their outputs are"
        raise TargetError(f"{base.path}: {problem}, and {reason}\n  keep the adapter")
    if base.bias is None:
        return None
    new = torch.stack([row for bias in base.bias if (row := affine.bias(bias, lambda: zero)) is not None])
    return check_fits(base.path, new.to(dtype))


def _replacements(root: nn.Module, layer: MergedLayer) -> Changes:
    """Another layer in the place of a quantised one, wherever the model has it: dense, or quantised again."""
    base, module, weight = layer.base, layer.base.module, layer.base.dense_weight()
    parents = [(parent, name) for parent in root.modules() for name, m in parent.named_children() if m is module]
    if not parents:
        problem = "the model is this one quantised layer, so nothing can hold its replacement"
        raise TargetError(f"{base.path}: {problem}\n  attach to an nn.Sequential with the layer in it")
    dtype = _activation_dtype(root)  # the quantised layer casts its input, nn.Linear doesn't
    replacement: nn.Module
    if layer.quantized == "dequantize":
        compute = base.storage.compute_dtype(base)
        weight = weight if compute is None else weight.to(compute).to(weight.dtype)  # the numbers that it multiplies by
        new = weight.new_empty(weight.shape, dtype=dtype)
        replacement = base.dense_module(new, _fold(layer, weight, new, base.bias, bias_dtype=dtype))
    else:
        new = weight.new_empty(weight.shape, dtype=torch.float32)
        replacement = base.storage.requantized(base, new, _fold(layer, weight, new, base.bias, bias_dtype=dtype))
        again = layer_of(replacement, base.path)
        assert again is not None
        error = (again.dense_weight() - new).norm()
        layer.error = float(error / new.norm()), float(error / (new - weight).norm())
    return [(Swap(parent, name, module), replacement) for parent, name in parents]


def _activation_dtype(root: nn.Module) -> torch.dtype:
    """The dtype of most of the plain parameters, by their elements: embeddings, norms and heads, but no adapters."""
    adapted = {id(p) for adapter in adapters(root).values() for p in adapter.parameters()}
    sizes: Counter[torch.dtype] = Counter()
    for parameter in root.parameters():
        if parameter.dtype in STORAGE_DTYPES and id(parameter) not in adapted:  # float8 holds codes
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


@torch.no_grad()
def _fold(
    layer: MergedLayer,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None,
    expert: int | None = None,
    bias_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Write W' (d_out, d_in) to `out`, cast once to its dtype, and return b' (d_out,), None if there is none."""
    affine = Affine(layer.sites, torch.promote_types(weight.dtype, torch.float32), weight.device, expert)
    if layer.stay:
        _check_commute(layer, weight, bias, expert)
    new_bias = affine.bias(bias, lambda: weight)
    if new_bias is not None:
        new_bias = new_bias.to(bias_dtype or (weight if bias is None else bias).dtype)
        check_fits(layer.base.path, new_bias)
    check_fits(layer.base.path, affine.write(weight, out))
    return new_bias


def check_fits(path: str, merged: Tensor) -> Tensor:
    """The tensor itself. Raises BaseModelError where it holds a NaN or an infinity, as where its dtype is too small."""
    if not fits(merged):
        problem = f"{path}: merged numbers are NaN or infinite in {dtype_name(merged.dtype)}"
        raise BaseModelError(f"{problem}\n  check the adapter's and the base's values; nothing was changed")
    return merged


def _check_commute(layer: MergedLayer, weight: Tensor, bias: Tensor | None, expert: int | None) -> None:
    """TargetError unless those that go in and those that stay give the same in this order as in the one attached."""
    reads = any(site.base_weight != "unused" for site in layer.stay)
    parts = in_order(sites_at(layer.base)), layer.sites, layer.stay
    whole, inner, outer = (Affine(sites, torch.float64, weight.device, expert) for sites in parts)
    (x,) = random_rows((4, whole.d_in), device=weight.device)  # (4, d_in)

    def plain(x: Tensor) -> Tensor:
        return x @ weight.double().mT + (0 if bias is None else bias.double())

    wanted = whole(x, plain)  # (4, d_out)
    merged = outer(x, lambda x: inner(x, plain))
    # What reads the weight would find another one there. Between float64 outputs, 1e-9 is above any rounding.
    if reads or (merged - wanted).abs().max() > 1e-9 * wanted.abs().max():
        going, staying = (
            ", ".join(dict.fromkeys(site.state.name for site in sites)) for sites in (layer.sites, layer.stay)
        )
        problem = f"{layer.base.path}: {staying} would act differently on a weight with {going} merged into it"
        raise TargetError(f"{problem}\n  merge all adapters at once, or detach what stays")
