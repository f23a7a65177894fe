"""Merging in memory: adapters folded into the weights of their layers, and the exact original weights again.

No variant has code for it: a merged weight is what the adapter's hooks make of the unit vectors (core/effective.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from loguru import logger
from torch import Tensor, nn

from ..base import sharding
from ..base.exact import full_precision
from ..base.layer import BaseLayer, layer_of
from ..base.probe import check_affine
from ..core.adapter import Adapter, adapters, get_adapter
from ..core.attach import detach, uninstall
from ..core.effective import Affine, in_order, random_rows
from ..core.state import Session, Site, Swap, check_unmerged, session_of, sites_of
from ..dtypes import dtype_name, fits
from ..errors import BaseModelError, ConfigError, QuantizedWeightError, TargetError
from ..measure.calls import check_called, check_choice

CHOICES = (None, "dequantize", "requantize")


@dataclass
class _Layer:
    """A layer, with the adapters that go into its weight and those that stay on it."""

    base: BaseLayer
    sites: list[Site]
    stay: list[Site]
    quantized: str | None
    """The choice for a quantised layer, as `merge` was told."""
    error: tuple[float, float] | None = None
    """The norm of what a second quantisation adds, over the weight's norm and over that of the adapters' change."""


def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    quantized: str | None = None,
    keep: bool = True,
    never_ran: str = "raise",
) -> None:
    """Fold one adapter, or all, at their scales, into the weights of their layers; a bias where a method needs one.

    keep       True: the original tensors stay in memory beside the merged ones, and `unmerge` puts them back; meanwhile
               the adapters are idle, and calls that would change them raise. False: for good, one layer at a time; the
               adapters come off and a plain model is left. It computes twice, first to see that all is well
    quantized  what to do with a layer of bitsandbytes. None: raise. "dequantize": it becomes an nn.Linear in the
               model's dtype, with the sum of the numbers that it computes with. "requantize": the merged weight is
               quantised as the old one was; the error that this adds is logged
    never_ran  what to do with layers that no forward has called since attach, although one has called others: the
               model may read their weights itself, so that the adapter had no effect. "raise", or "merge" where other
               inputs reach them (an image, another expert). Where nothing has run, as after a load, one forward of the
               model's `dummy_inputs` finds weights that it reads itself; a warning says where that isn't known

    Raises:
        QuantizedWeightError: on a quantised layer without that choice, of another library, or that rounds its input.
        VariantError: for a method that isn't affine.
        TargetError: for layers that never ran, for a weight that another module shares (a tied head), for adapters that
            stay and don't commute with those that go in, an unknown name, sharded or merged adapters.
        BaseModelError: where the result holds a NaN or an infinity. After any of these the model is as it was.
    """
    if quantized not in CHOICES:
        raise ConfigError(f"quantized={quantized!r}: wanted one of {CHOICES}")
    check_choice(never_ran)
    root, session = session_of(model)
    check_unmerged(session, "merge")
    with full_precision(root):
        chosen = list(adapters(root).values()) if name is None else [get_adapter(root, name)]
        if not chosen:
            raise TargetError(f"no adapter on this {type(root).__name__}\n  attach or load one first")
        layers = _layers(root, chosen, quantized)
        check_called(root, {layer.base.path: layer.base.module for layer in layers}, never_ran)
        if keep:
            _merge_reversibly(root, session, chosen, layers)
        else:
            _merge_for_good(root, chosen, layers)
    names = ", ".join(adapter.name for adapter in chosen)
    logger.info(f"merged {names} into {len(layers)} layers of {type(root).__name__}{'' if keep else ', for good'}")
    errors = {layer.base.path: layer.error for layer in layers if layer.error is not None}
    if errors:
        path = max(errors, key=lambda path: errors[path])
        of_weight, of_change = (sum(values) / len(errors) for values in zip(*errors.values(), strict=True))
        logger.info(
            f"quantised {len(errors)} layers again, which adds an error of {of_weight:.1%} of the weight on average "
            f"({errors[path][0]:.1%} in {path}), {of_change:.2g} times what the adapters change"
        )


def _merge_reversibly(root: nn.Module, session: Session, chosen: Sequence[Adapter], layers: Sequence[_Layer]) -> None:
    """Every layer has its merged weight, and the session what `unmerge` puts back; or none has, after an error."""
    swaps: list[Swap] = []
    try:
        for layer in layers:
            for swap, value in _changes(root, layer):
                swap.put(value)
                swaps.append(swap)
    except BaseException:  # an interrupt, too, must not leave some layers with the adapter twice
        for swap in reversed(swaps):
            swap.undo()
        raise
    session.merged = swaps  # only now: an error before has undone all
    for adapter in chosen:
        session.adapters[adapter.name].merged = True


def _merge_for_good(root: nn.Module, chosen: Sequence[Adapter], layers: Sequence[_Layer]) -> None:
    """Every layer has its merged weight alone, and the adapters are gone; the old weights are never all in memory."""
    for layer in layers:
        _changes(root, layer)  # computed and dropped: every error comes now, before the first change
    for layer in layers:
        for swap, value in _changes(root, layer):
            swap.put(value)
        # At once, so that whatever stops this, each layer has the adapter once: in its weight or on it.
        for site in layer.sites:
            uninstall(site.module, site.state.name)
    for adapter in chosen:
        detach(root, adapter.name)


def unmerge(model: nn.Module) -> None:
    """Put the original tensors back in their places, bit for bit; the adapters are at work again.

    Raises:
        TargetError: if nothing is merged.
    """
    root, session = session_of(model)
    if not session.merged:
        raise TargetError(
            f"nothing is merged into this {type(root).__name__}\n"
            f"  after merge(..., keep=False) the original weights are gone: load the base again"
        )
    for swap in reversed(session.merged):
        swap.undo()
    session.merged = []
    for state in session.adapters.values():
        state.merged = False
    logger.info(f"unmerged {', '.join(session.adapters)}")


# ---- what may be merged -------------------------------------------------------------------------


def _layers(root: nn.Module, chosen: Sequence[Adapter], quantized: str | None) -> list[_Layer]:
    """Every layer that one of these adapters is on. Raises what can be told without computing anything."""
    names = {adapter.name for adapter in chosen}
    holders = Counter(id(p) for module in root.modules() for p in module.parameters(recurse=False))
    layers = []
    for module in dict.fromkeys(site.module for adapter in chosen for site in adapter.sites()):
        sites = in_order(list(sites_of(module).values()))
        base = layer_of(module, sites[0].path)  # asked again: the weight may have been quantised since attach
        assert base is not None
        goes = [site for site in sites if site.state.name in names]
        layers.append(_Layer(base, goes, [site for site in sites if site not in goes], quantized))
        _check_layer(layers[-1], is_shared=holders[id(base.stored)] > 1)
    return layers


def _check_layer(layer: _Layer, is_shared: bool) -> None:
    """Raises TargetError or QuantizedWeightError unless this layer's weight can be replaced by a merged one."""
    base, path, module, weight = layer.base, layer.base.path, layer.base.module, layer.base.stored
    if not any(weight is tensor for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        raise TargetError(  # a new weight would be lost
            f"{path}: its weight is computed from others at each forward (a parametrisation, weight_norm)\n"
            f"  fold those in first, with torch.nn.utils.parametrize.remove_parametrizations or the like"
        )
    ours = {handle.id for site in sites_of(module).values() for handle in site.handles}
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if not base.storage.is_dense and ("forward" in vars(module) or any(ids.keys() - ours for ids in hooks)):
        raise TargetError(
            f"{path}: something else has hooks on this {type(module).__name__}\n"
            f"  another layer will stand in its place: take them off first, and put them on again afterwards"
        )
    if sharding.is_sharded(weight) or weight.is_meta:
        raise TargetError(
            f"{path}: its weight is {'sharded' if sharding.is_sharded(weight) else 'offloaded'}\n"
            f"  save the adapter, and merge on a whole model or with lora_lite.merge_checkpoint"
        )
    if is_shared:
        raise TargetError(
            f"{path}: another module shares its weight, as an embedding does with a tied head\n"
            f"  it would change as well: untie them, or leave the layer out with exclude_names"
        )
    if not base.storage.is_known:
        raise QuantizedWeightError(
            f"{path}: the weight is {base.describe()}, whose numbers can't be read or replaced here\n"
            f"  keep the adapter attached, or use lora_lite.merge_checkpoint on the 16-bit checkpoint"
        )
    check_affine(base)
    if not base.storage.is_dense and layer.quantized is None:
        raise QuantizedWeightError(
            f"{path}: the weight is {base.describe()}, which can't hold the sum\n"
            f'  use quantized="dequantize" (a dense layer), "requantize" (quantised again, with its error), or '
            f"lora_lite.merge_checkpoint on the 16-bit checkpoint"
        )


# ---- merged weights -----------------------------------------------------------------------------


def _changes(root: nn.Module, layer: _Layer) -> list[tuple[Swap, Tensor | nn.Module]]:
    """The merged weight and bias of one layer, computed, and where they go; nothing is changed yet."""
    if not layer.base.storage.is_dense:
        return _replacements(root, layer)
    base, module, bias = layer.base, layer.base.module, layer.base.bias
    new = torch.empty_like(base.stored)
    weight, out = base.weight(), base.kind.oriented(module, new)  # (d_out, d_in), or (experts, d_out, d_in)
    if base.experts:
        new_bias = _bias_of_experts(layer)  # (experts, d_out)
        for i in range(base.experts):
            _fold(layer, weight[i], out[i], None, weight.dtype, i)
    else:
        new_bias = _fold(layer, weight, out, bias, weight.dtype if bias is None else bias.dtype)  # (d_out,)
    changes: list[tuple[Swap, Tensor | nn.Module]] = [(Swap(module, base.kind.weight, base.stored.data), new)]
    if new_bias is not None and bias is not None:
        changes.append((Swap(module, base.kind.bias, bias.data), new_bias))
    elif new_bias is not None:  # a method that adds a constant, on a layer that had no bias
        changes.append((Swap(module, base.kind.bias, None), nn.Parameter(new_bias, requires_grad=False)))
    return changes


def _bias_of_experts(layer: _Layer) -> Tensor | None:
    """The new biases where an adapter acts on the whole block's output; None where none does, or without a bias."""
    base, outer = layer.base, [site for site in layer.sites if not site.stacked]
    if not outer:
        return None
    zero = base.stored.new_zeros(base.d_out, base.d_in)  # the map of an output alone: no weight comes before it
    if Affine(outer, torch.promote_types(zero.dtype, torch.float32), zero.device).bias(None, lambda: zero) is not None:
        names = " or ".join(site.state.name for site in outer)
        raise TargetError(
            f"{layer.base.path}: {names} adds a constant, and a bias of experts would be weighted as their outputs "
            f"are\n  keep the adapter"
        )
    if base.bias is None:
        return None
    affine = Affine(outer, torch.promote_types(base.bias.dtype, torch.float32), base.bias.device)
    new = torch.stack([row for bias in base.bias if (row := affine.bias(bias, lambda: zero)) is not None])
    _check_fits(layer, new, base.bias.dtype)
    return new.to(base.bias.dtype)


def _replacements(root: nn.Module, layer: _Layer) -> list[tuple[Swap, Tensor | nn.Module]]:
    """Another layer in the place of a quantised one, wherever the model has it: dense, or quantised again."""
    base, weight = layer.base, layer.base.dense_weight()
    dtype = _activation_dtype(root)  # the quantised layer casts its input, nn.Linear doesn't
    replacement: nn.Module
    if layer.quantized == "dequantize":
        compute = base.storage.compute_dtype(base)
        weight = weight if compute is None else weight.to(compute).to(weight.dtype)  # the numbers that it multiplies by
        new = weight.new_empty(weight.shape, dtype=dtype)
        replacement = base.dense_module(new, _fold(layer, weight, new, base.bias, dtype))
    else:
        new = weight.new_empty(weight.shape, dtype=torch.float32)
        replacement = base.storage.requantized(base, new, _fold(layer, weight, new, base.bias, dtype))
        again = layer_of(replacement, layer.base.path)
        assert again is not None
        error = (again.dense_weight() - new).norm()
        layer.error = float(error / new.norm()), float(error / (new - weight).norm())
    module = base.module
    parents = [
        (parent, name) for parent in root.modules() for name, child in parent.named_children() if child is module
    ]
    if not parents:
        raise TargetError(
            f"{layer.base.path}: the model is this one quantised layer, so nothing can hold its replacement\n"
            f"  attach to an nn.Sequential with the layer in it"
        )
    return [(Swap(parent, name, module), replacement) for parent, name in parents]


def _activation_dtype(root: nn.Module) -> torch.dtype:
    """The dtype of most of the plain parameters, by their elements: embeddings, norms and heads, but no adapters."""
    adapted = {id(p) for adapter in adapters(root).values() for p in adapter.parameters()}
    sizes: Counter[torch.dtype] = Counter()
    for parameter in root.parameters():
        if parameter.is_floating_point() and id(parameter) not in adapted:
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


@torch.no_grad()
def _fold(
    layer: _Layer, weight: Tensor, out: Tensor, bias: Tensor | None, bias_dtype: torch.dtype, expert: int | None = None
) -> Tensor | None:
    """Write W' (d_out, d_in) to `out`, cast once to its dtype, and return b' (d_out,), None if there is none."""
    affine = Affine(layer.sites, torch.promote_types(weight.dtype, torch.float32), weight.device, expert)
    if layer.stay:
        _check_commute(layer, weight, bias, expert)
    new_bias = affine.bias(bias, lambda: weight)
    if new_bias is not None:
        _check_fits(layer, new_bias, bias_dtype)
        new_bias = new_bias.to(bias_dtype)
    affine.write(weight, out, lambda columns: _check_fits(layer, columns, out.dtype))
    return new_bias


def _check_fits(layer: _Layer, merged: Tensor, dtype: torch.dtype) -> None:
    if not fits(merged, dtype):
        raise BaseModelError(
            f"{layer.base.path}: merged numbers are NaN or infinite in {dtype_name(dtype)}\n"
            f"  check the adapter's and the base's values; nothing was changed"
        )


def _check_commute(layer: _Layer, weight: Tensor, bias: Tensor | None, expert: int | None) -> None:
    """TargetError unless those that go in and those that stay give the same in this order as in the one attached."""
    reads = [site for site in layer.stay if site.base_weight != "unused"]
    parts = in_order(list(sites_of(layer.base.module).values())), layer.sites, layer.stay
    whole, inner, outer = (Affine(sites, torch.float64, weight.device, expert) for sites in parts)
    (x,) = random_rows((4, whole.d_in), device=weight.device)  # (4, d_in)

    def plain(x: Tensor) -> Tensor:
        return x @ weight.double().mT + (0 if bias is None else bias.double())

    wanted = whole(x, plain)  # (4, d_out)
    merged = outer(x, lambda x: inner(x, plain))
    # What reads the weight would find another one there. Between float64 outputs, 1e-9 is above any rounding.
    if reads or (merged - wanted).abs().max() > 1e-9 * wanted.abs().max():
        going, staying = (", ".join(s.state.name for s in sites) for sites in (layer.sites, layer.stay))
        raise TargetError(
            f"{layer.base.path}: {staying} would act differently on a weight with {going} merged into it\n"
            f"  merge all adapters at once, or detach what stays"
        )
