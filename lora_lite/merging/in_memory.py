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

    @property
    def path(self) -> str:
        return self.sites[0].path


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
               inputs reach them (an image, another expert). Where nothing has run yet, as after a load, one forward of
               the model's own `dummy_inputs` finds weights that it reads without calling their layer; a warning says
               where that isn't known

    Raises QuantizedWeightError on a quantised layer without that choice, of another library, or that rounds its
    activations; VariantError for a method that isn't affine; TargetError for layers that never ran, for a weight that
    another module shares (a tied head), for adapters that stay and don't commute with those that go in, an unknown
    name, sharded or merged adapters; BaseModelError where the result holds a NaN or an infinity. The model is then as
    it was.
    """
    if quantized not in CHOICES:
        raise ConfigError(f"quantized={quantized!r}: wanted one of {CHOICES}")
    check_choice(never_ran)
    root, session = session_of(model)
    check_unmerged(session, "merge")
    with full_precision(root):
        _merge(root, session, name, quantized, keep, never_ran)


def _merge(
    root: nn.Module, session: Session, name: str | None, quantized: str | None, keep: bool, never_ran: str
) -> None:
    chosen = list(adapters(root).values()) if name is None else [get_adapter(root, name)]
    if not chosen:
        raise TargetError(f"no adapter on this {type(root).__name__}\n  attach or load one first")
    layers = _layers(root, chosen, quantized)
    check_called(root, {layer.path: layer.base.module for layer in layers}, never_ran)
    errors: dict[str, tuple[float, float]] = {}
    if not keep:
        for layer in layers:
            _changes(root, layer, quantized, errors)  # every error comes now, before the first change
    done: list[Swap] = []
    try:
        for layer in layers:
            for swap, value in _changes(root, layer, quantized, errors):
                swap.put(value)
                if keep:
                    done.append(swap)
            if not keep:  # so that whatever stops this, each layer has the adapter once: in its weight or on it
                for site in layer.sites:
                    uninstall(site.module, site.state.name)
    except BaseException:
        _undo(done)
        raise
    if keep:
        session.merged = done
        for adapter in chosen:
            session.adapters[adapter.name].merged = True
    else:
        for adapter in chosen:
            detach(root, adapter.name)
    names = ", ".join(adapter.name for adapter in chosen)
    logger.info(f"merged {names} into {len(layers)} layers of {type(root).__name__}{'' if keep else ', for good'}")
    if errors:
        path = max(errors, key=lambda path: errors[path])
        of_weight, of_change = (sum(values) / len(errors) for values in zip(*errors.values(), strict=True))
        logger.info(
            f"quantised {len(errors)} layers again, which adds an error of {of_weight:.1%} of the weight on average "
            f"({errors[path][0]:.1%} in {path}), {of_change:.2g} times what the adapters change"
        )


def unmerge(model: nn.Module) -> None:
    """The original tensors in their places again, bit for bit, and the adapters at work.

    Raises TargetError if nothing is merged.
    """
    root, session = session_of(model)
    if not session.merged:
        raise TargetError(
            f"nothing is merged into this {type(root).__name__}\n"
            f"  after merge(..., keep=False) the original weights are gone: load the base again"
        )
    _undo(session.merged)
    session.merged = []
    for state in session.adapters.values():
        state.merged = False
    logger.info(f"unmerged {', '.join(session.adapters)}")


def _undo(swaps: list[Swap]) -> None:
    for swap in reversed(swaps):
        swap.undo()


def _layers(root: nn.Module, chosen: Sequence[Adapter], quantized: str | None) -> list[_Layer]:
    """Every layer that one of these adapters is on. Raises what can be told without computing anything."""
    names = {adapter.name for adapter in chosen}
    holders = Counter(id(p) for module in root.modules() for p in module.parameters(recurse=False))
    modules = dict.fromkeys(site.module for adapter in chosen for site in adapter.sites())
    out = []
    for module in modules:
        sites = in_order(list(sites_of(module).values()))
        base = layer_of(module, sites[0].path)
        assert base is not None
        layer = _Layer(
            base, [s for s in sites if s.state.name in names], [s for s in sites if s.state.name not in names]
        )
        weight = base.stored
        _check_holder(layer)
        if sharding.is_sharded(weight) or weight.is_meta:
            raise TargetError(
                f"{layer.path}: its weight is {'sharded' if sharding.is_sharded(weight) else 'offloaded'}\n"
                f"  save the adapter, and merge on a whole model or with lora_lite.merge_checkpoint"
            )
        if holders[id(weight)] > 1:
            raise TargetError(
                f"{layer.path}: another module shares its weight, as an embedding does with a tied head\n"
                f"  it would change as well: untie them, or leave the layer out with exclude_names"
            )
        if not base.storage.is_known:
            raise QuantizedWeightError(
                f"{layer.path}: the weight is {base.describe()}, whose numbers can't be read or replaced here\n"
                f"  keep the adapter attached, or use lora_lite.merge_checkpoint on the 16-bit checkpoint"
            )
        check_affine(base)
        if not base.storage.is_dense and quantized is None:
            raise QuantizedWeightError(
                f"{layer.path}: the weight is {base.describe()}, which can't hold the sum\n"
                f'  use quantized="dequantize" (a dense layer), "requantize" (quantised again, with its error), or '
                f"lora_lite.merge_checkpoint on the 16-bit checkpoint"
            )
        out.append(layer)
    return out


def _check_holder(layer: _Layer) -> None:
    """TargetError where a new weight would be lost, or others' hooks with the layer that is replaced."""
    module, weight = layer.base.module, layer.base.stored
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if not any(weight is each for each in held):
        raise TargetError(
            f"{layer.path}: its weight is computed from others at each forward (a parametrisation, weight_norm)\n"
            f"  fold those in first, with torch.nn.utils.parametrize.remove_parametrizations or the like"
        )
    own = {handle.id for site in sites_of(module).values() for handle in site.handles}
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if not layer.base.storage.is_dense and ("forward" in vars(module) or any(set(each) - own for each in hooks)):
        raise TargetError(
            f"{layer.path}: something else has hooks on this {type(module).__name__}\n"
            f"  another layer will stand in its place: take them off first, and put them on again afterwards"
        )


def _changes(
    root: nn.Module, layer: _Layer, quantized: str | None, errors: dict[str, tuple[float, float]]
) -> list[tuple[Swap, Tensor | nn.Module]]:
    """What to put where for one layer, computed; and what a second quantisation adds, by path."""
    base, path, bias = layer.base, layer.path, layer.base.bias
    module = base.module
    if base.experts:
        return _expert_changes(layer)
    if base.storage.is_dense:
        weight = base.weight()
        new, new_bias = _folded(layer, weight, bias, weight.dtype, None if bias is None else bias.dtype)
        stored = new.mT.contiguous() if base.transposed else new
        changes: list[tuple[Swap, Tensor | nn.Module]] = [(Swap(module, base.kind.weight, base.stored.data), stored)]
        if bias is not None and new_bias is not None:
            changes.append((Swap(module, base.kind.bias, bias.data), new_bias))
        elif new_bias is not None:
            changes.append((Swap(module, base.kind.bias, None), nn.Parameter(new_bias, requires_grad=False)))
        return changes
    weight, dtype = (
        base.dense_weight(),
        _activation_dtype(root),
    )  # the quantised layer casts its input, nn.Linear doesn't
    replacement: nn.Module
    if quantized == "dequantize":
        compute = base.storage.compute_dtype(base)
        weight = weight if compute is None else weight.to(compute).to(weight.dtype)  # the numbers that it multiplies by
        replacement = base.dense_module(*_folded(layer, weight, bias, dtype))
    else:
        new, new_bias = _folded(layer, weight, bias, torch.float32, dtype)
        replacement = base.storage.requantized(base, new, new_bias)
        again = layer_of(replacement, path)
        assert again is not None
        error = (again.dense_weight() - new).norm()
        errors[path] = float(error / new.norm()), float(error / (new - weight).norm())
    places = [(parent, name) for parent in root.modules() for name, child in parent.named_children() if child is module]
    if not places:
        raise TargetError(
            f"{path}: the model is this one quantised layer, so nothing can hold its replacement\n"
            f"  attach to an nn.Sequential with the layer in it"
        )
    return [(Swap(parent, name, module), replacement) for parent, name in places]


def _activation_dtype(root: nn.Module) -> torch.dtype:
    """In which most of the plain parameters are, by their elements: embeddings, norms and heads, but no adapters."""
    adapted = {id(p) for adapter in adapters(root).values() for p in adapter.parameters()}
    sizes: Counter[torch.dtype] = Counter()
    for parameter in root.parameters():
        if parameter.is_floating_point() and id(parameter) not in adapted:
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _expert_changes(layer: _Layer) -> list[tuple[Swap, Tensor | nn.Module]]:
    """Fused experts: each matrix; and each bias, where an adapter acts on the whole block's output."""
    base, outer = layer.base, [site for site in layer.sites if not site.stacked]
    block, stored, biases = base.module, base.stored, base.bias
    zero = torch.zeros(base.d_out, base.d_in, device=stored.device)
    if outer and Affine(outer, _compute(stored), stored.device).bias(None, lambda: zero) is not None:
        names = " or ".join(site.state.name for site in outer)
        raise TargetError(
            f"{layer.path}: {names} adds a constant, and a bias of experts would be weighted as their outputs are\n"
            f"  keep the adapter"
        )
    new = torch.empty_like(stored)
    for i, matrix in enumerate(base.kind.oriented(block, stored)):
        base.kind.oriented(block, new)[i].copy_(_folded(layer, matrix, None, matrix.dtype, expert=i)[0])
    changes: list[tuple[Swap, Tensor | nn.Module]] = [(Swap(block, base.kind.weight, stored.data), new)]
    if biases is not None and outer:
        affine = Affine(outer, _compute(biases), biases.device)
        new_biases = torch.stack([x for bias in biases if (x := affine.bias(bias, lambda: zero)) is not None])
        _check_fits(layer, new_biases, biases.dtype)
        changes.append((Swap(block, base.kind.bias, biases.data), new_biases.to(biases.dtype)))
    return changes


@torch.no_grad()
def _folded(
    layer: _Layer,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
    expert: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """W' (d_out, d_in) and b', in these dtypes, of which the second is the first if it isn't given."""
    affine = Affine(layer.sites, _compute(weight), weight.device, expert)
    if layer.stay:
        _check_apart(layer, weight, bias, expert)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    new_bias = affine.bias(bias, lambda: weight)
    if new_bias is not None:
        _check_fits(layer, new_bias, bias_dtype or dtype)
        new_bias = new_bias.to(bias_dtype or dtype)
    affine.write(weight, out, lambda columns: _check_fits(layer, columns, dtype))
    return out, new_bias


def _check_fits(layer: _Layer, merged: Tensor, dtype: torch.dtype) -> None:
    if not fits(merged, dtype):
        raise BaseModelError(
            f"{layer.path}: merged numbers are NaN or infinite in {dtype_name(dtype)}\n"
            f"  check the adapter's and the base's values; nothing was changed"
        )


def _check_apart(layer: _Layer, weight: Tensor, bias: Tensor | None, expert: int | None) -> None:
    """TargetError unless those that go in and those that stay give the same in this order as in the one attached."""
    reads = [site for site in layer.stay if site.base_weight != "unused"]
    all_sites = in_order(list(sites_of(layer.base.module).values()))
    whole, inner, outer = (
        Affine(sites, torch.float64, weight.device, expert) for sites in (all_sites, layer.sites, layer.stay)
    )
    (x,) = random_rows((4, whole.d_in), device=weight.device)
    b = None if bias is None else bias.double()

    def plain(x: Tensor) -> Tensor:
        return x @ weight.double().mT + (0 if b is None else b)

    wanted = whole(x, plain)
    apart = outer(x, lambda x: inner(x, plain))
    if reads or (apart - wanted).abs().max() > 1e-9 * wanted.abs().max():
        going, staying = (", ".join(s.state.name for s in sites) for sites in (layer.sites, layer.stay))
        raise TargetError(
            f"{layer.path}: {staying} would act differently on a weight with {going} merged into it\n"
            f"  merge all adapters at once, or detach what stays"
        )


def _compute(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
