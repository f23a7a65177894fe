"""Merging in memory: adapters folded into the weights of their layers, and the exact original weights again.

No variant has code for it: a merged weight is what the adapter's hooks make of the unit vectors (core/effective.py).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn

from ..base import sharding
from ..base.affine import check_affine
from ..base.kinds import bare_parameters
from ..base.layer import BaseLayer, layer_of
from ..base.probe import norm_offset
from ..base.still import full_precision
from ..base.storage import Storage
from ..core.adapter import Adapter, adapters, get_adapter
from ..core.attach import detach, uninstall
from ..core.effective import Affine, in_order, random_rows
from ..core.state import Session, Site, Swap, Unparametrized, check_unmerged, session_of, sites_at, sites_of
from ..dtypes import STORAGE_DTYPES, dtype_name, fits
from ..errors import BaseModelError, ConfigError, QuantizedWeightError, TargetError
from ..measure.calls import check_called, check_choice

CHOICES = (None, "dequantize", "requantize")
Changes = list[tuple[Swap, Tensor | nn.Module]]


@dataclass
class _Layer:
    """A layer, with the adapters that go into its weight and those that stay on it."""

    base: BaseLayer
    sites: list[Site]
    stay: list[Site]
    quantized: str | None  # the choice for a quantised layer, as `merge` was told
    shares_bias: bool  # does another module hold its bias?
    error: tuple[float, float] | None = None  # of quantising again, over the norms of the weight and of its change


def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    quantized: str | None = None,
    keep: bool = True,
    never_ran: str = "raise",
) -> None:
    """Fold one adapter, or all, at their scales, into the weights of their layers; a bias where a method needs one.

    keep       True: the original tensors stay in memory too, and `unmerge` puts them back; until then the adapters are
               idle, and calls that would change them raise. False: for good, one layer at a time, and the adapters come
               off. It computes twice, first to see that all is well
    quantized  a quantised layer becomes an nn.Linear in the model's dtype ("dequantize"), or, of bitsandbytes, is
               quantised as it was ("requantize"), and the error that this adds is logged. None: raise
    never_ran  layers that no forward has called since attach, although one has called others, "raise", or "merge" where
               other inputs reach them (an image, another expert): the model may read their weights itself, so that the
               adapter had no effect. Where nothing has run yet, one forward of the model's `dummy_inputs` tells; if
               that can't, a warning says so

    Raises:
        QuantizedWeightError: on a quantised layer without that choice, or that rounds its input.
        VariantError: for a method that isn't affine.
        TargetError: for layers that never ran, a weight that another module shares (a tied head), adapters that stay
            and don't commute with those that go in, an unknown name, sharded or merged adapters.
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
        check_called(root, {layer.base.path: layer.base for layer in layers}, never_ran)
        if keep:
            _merge_reversibly(root, session, chosen, layers)
        else:
            _merge_for_good(root, chosen, layers)
    names = ", ".join(adapter.name for adapter in chosen)
    logger.info(f"merged {names} into {len(layers)} layers of {type(root).__name__}{'' if keep else ', for good'}")
    if errors := {layer.base.path: layer.error for layer in layers if layer.error is not None}:
        path = max(errors, key=lambda path: errors[path])
        of_weight, of_change = (sum(values) / len(errors) for values in zip(*errors.values(), strict=True))
        error = f"{of_weight:.1%} of the weight on average ({errors[path][0]:.1%} in {path})"
        added = f"{error}, {of_change:.2g} times what the adapters change"
        logger.info(f"quantised {len(errors)} layers again, which adds an error of {added}")


def _merge_reversibly(root: nn.Module, session: Session, chosen: Sequence[Adapter], layers: Sequence[_Layer]) -> None:
    """Every layer gets its merged weight, and the session what `unmerge` puts back; or none does, after an error."""
    with ExitStack() as undo:  # an interrupt, too, must not leave some layers with the adapter twice
        swaps = []
        for layer in layers:
            for swap, value in _changes(root, layer):
                swap.put(value)
                undo.callback(swap.undo)
                swaps.append(swap)
        undo.pop_all()
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
            uninstall(site.module, site.slot)
    for adapter in chosen:
        detach(root, adapter.name)


def unmerge(model: nn.Module) -> None:
    """Put the original tensors back in their places, bit for bit; the adapters are at work again.

    Raises:
        TargetError: if nothing is merged.
    """
    root, session = session_of(model)
    if not session.merged:
        cure = "after merge(..., keep=False) the original weights are gone: load the base again"
        raise TargetError(f"nothing is merged into this {type(root).__name__}\n  {cure}")
    _undo(session)
    logger.info(f"unmerged {', '.join(session.adapters)}")


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within the block all adapters are in the weights, as by `merge(quantized="dequantize")`, with all that it raises.
    Nothing is logged."""
    root, session = session_of(model)
    check_unmerged(session, "merge")
    chosen = list(adapters(root).values())
    with full_precision(root):
        _merge_reversibly(root, session, chosen, _layers(root, chosen, quantized="dequantize"))
    try:
        yield
    finally:
        _undo(session)


def _undo(session: Session) -> None:
    for swap in reversed(session.merged):
        swap.undo()
    session.merged = []
    for state in session.adapters.values():
        state.merged = False


# ---- what may be merged -------------------------------------------------------------------------


def _layers(root: nn.Module, chosen: Sequence[Adapter], quantized: str | None) -> list[_Layer]:
    """Every layer that one of these adapters is on. Raises what can be told without computing anything."""
    names = {adapter.name for adapter in chosen}
    holders = Counter(id(p) for module in root.modules() for p in module.parameters(recurse=False))
    layers = []
    # A module may hold several weights, and a weight several adapters.
    weights = {(id(site.module), site.prefix): site.base for adapter in chosen for site in adapter.sites()}
    for known in weights.values():
        sites = in_order(sites_at(known))
        base = known.as_it_is_now()  # it may have been quantised since attach
        goes = [site for site in sites if site.state.name in names]
        shares_bias = base.bias is not None and holders[id(base.bias)] > 1
        layers.append(_Layer(base, goes, [site for site in sites if site not in goes], quantized, shares_bias))
        _check_layer(layers[-1], is_shared=holders[id(base.stored)] > 1 + _together(base, sites))
    return layers


def _together(base: BaseLayer, sites: Sequence[Site]) -> int:
    """How many other modules hold the weight for which every adapter there acts. Raises TargetError if that changed."""
    for holder, name, _ in (tie for site in sites for tie in site.base.ties):
        if holder._parameters.get(name) is not base.stored:
            problem = f"its adapter is also at {type(holder).__name__}, which holds another weight by now"
            raise TargetError(f"{base.path}: {problem}\n  tie them again, or save, detach and load the adapter")
    return min(len(site.base.ties) for site in sites)


def _check_layer(layer: _Layer, is_shared: bool) -> None:
    """Raises TargetError or QuantizedWeightError unless this layer's weight can be replaced by a merged one."""
    base, path, module, weight = layer.base, layer.base.path, layer.base.module, layer.base.stored
    holder = module if base.packed is None else base.packed
    if problem := next(filter(None, (site.base.kind.no_weight for site in (*layer.sites, *layer.stay))), ""):
        raise TargetError(f"{path}: {problem}")
    ours = {handle.id for site in sites_of(module).values() for handle in site.handles}
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    is_hooked = "forward" in vars(module) or any(ids.keys() - ours for ids in hooks)
    problem = cure = ""
    # A new weight would be lost where the weight is made at each forward.
    if not any(weight is tensor for tensor in (*holder.parameters(recurse=False), *holder.buffers(recurse=False))):
        problem = "its weight is computed from others at each forward (a parametrisation, weight_norm)"
        cure = "fold those in first, with torch.nn.utils.parametrize.remove_parametrizations or the like"
    elif is_hooked and not base.storage.is_dense and holder is module:
        problem = f"something else has hooks on this {type(module).__name__}, and another layer will stand in its place"
        cure = "take them off first, and put them on again afterwards"
    elif sharding.is_sharded(weight) or weight.is_meta:
        problem = f"its weight is {'sharded' if sharding.is_sharded(weight) else 'offloaded'}"
        cure = "save the adapter, and merge on a whole model or with lora_lite.merge_checkpoint"
    elif is_shared:
        problem = "another module shares its weight, as an embedding does with a tied head: it would change as well"
        cure = 'adapt it with tied_weights="together", untie them, or leave the layer out with exclude_names'
    if problem:
        raise TargetError(f"{path}: {problem}\n  {cure}")
    problem = f"{path}: the weight is {base.describe()}"
    if not base.storage.is_known:
        cure = "keep the adapter attached, or use lora_lite.merge_checkpoint on the 16-bit checkpoint"
        raise QuantizedWeightError(f"{problem}, whose numbers can't be read or replaced here\n  {cure}")
    check_affine(base)
    if not base.storage.is_dense and layer.quantized is None:
        again = type(base.storage).requantized is not Storage.requantized
        cure = 'use quantized="dequantize" (a dense layer), '
        cure += '"requantize" (quantised again, with its error), ' * again
        cure += "or lora_lite.merge_checkpoint on the 16-bit checkpoint"
        raise QuantizedWeightError(f"{problem}, which can't hold the sum\n  {cure}")


# ---- merged weights -----------------------------------------------------------------------------


def _changes(root: nn.Module, layer: _Layer) -> Changes:
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
    changes: Changes = [(swap, new) if base.packed is None else _parameter_for(layer, new)]
    if new_bias is not None and bias is not None:
        if layer.shares_bias and not torch.equal(new_bias, bias):
            problem = "an adapter changes its bias, which another module holds as well"
            raise TargetError(f"{base.path}: {problem}\n  untie them, or keep the adapter attached")
        changes.append((Swap(module, base.kind.bias, bias.data), new_bias))
    elif new_bias is not None and not base.shows_bias:
        raise TargetError(
            f"{base.path}: an adapter adds a constant, and the model multiplies by this weight without a bias\n"
            f"  keep the adapter attached"
        )
    elif new_bias is not None:  # a method that adds a constant, on a layer that had no bias
        changes.append((Swap(module, base.kind.bias, None), nn.Parameter(new_bias, requires_grad=False)))
    return changes


def _fold_norm(layer: _Layer, out: Tensor) -> Tensor | None:
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


def _unpacked(layer: _Layer) -> Tensor:
    """Room for the numbers of a bare parameter in 4 bits: in float32 where they are quantised again."""
    shape, again = bare_parameters(layer.base.module)[layer.base.kind.weight], layer.quantized == "requantize"
    dtype = torch.float32 if again else layer.base.storage.compute_dtype(layer.base)
    return torch.empty(shape.shape, dtype=dtype, device=layer.base.stored.device)


def _parameter_for(layer: _Layer, new: Tensor) -> tuple[Swap, Tensor | nn.Module]:
    """The change of a bare parameter in 4 bits: a dense one in its place, or another parametrisation."""
    base, module = layer.base, layer.base.module
    if layer.quantized == "dequantize":
        return Unparametrized(module, base.kind.weight, None), new
    replacement = base.storage.requantized(base, new, None)
    error = (replacement() - new).norm()
    layer.error = float(error / new.norm()), float(error / (new - base.packed()).norm())
    return Swap(module.parametrizations, base.kind.weight, base.packed), replacement


def _bias_of_experts(layer: _Layer, dtype: torch.dtype) -> Tensor | None:
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


def _replacements(root: nn.Module, layer: _Layer) -> Changes:
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
    layer: _Layer,
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


def _check_commute(layer: _Layer, weight: Tensor, bias: Tensor | None, expert: int | None) -> None:
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
        going, staying = (", ".join(site.state.name for site in sites) for sites in (layer.sites, layer.stay))
        problem = f"{layer.base.path}: {staying} would act differently on a weight with {going} merged into it"
        raise TargetError(f"{problem}\n  merge all adapters at once, or detach what stays")
