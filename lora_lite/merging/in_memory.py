"""Merging in memory: adapters folded into the weights of their layers, and the exact original weights again.

No variant has code for it: a merged weight is what the adapter's hooks make of the unit vectors (core/effective.py).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from loguru import logger
from torch import nn

from ..base.affine import check_affine
from ..base.layer import BaseLayer
from ..base.still import full_precision
from ..base.storage import Storage
from ..core.adapter import Adapter, adapters, get_adapter
from ..core.attach import detach, uninstall
from ..core.effective import in_order
from ..core.scaled import check_in_use
from ..core.state import Session, Site, check_unmerged, session_of, sites_at, sites_of
from ..errors import ConfigError, QuantizedWeightError, TargetError
from ..measure.calls import check_called, check_choice
from .dequantized import record_dense
from .merged_weights import MergedLayer, changes

CHOICES = (None, "dequantize", "requantize")
ELSEWHERE = "lora_lite.save the adapter, then merge in one process on a whole model, or with merge_checkpoint"


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
    check_in_use(session.adapters.values())
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


def _merge_reversibly(
    root: nn.Module, session: Session, chosen: Sequence[Adapter], layers: Sequence[MergedLayer]
) -> None:
    """Every layer gets its merged weight, and the session what `unmerge` puts back; or none does, after an error."""
    with ExitStack() as undo:  # an interrupt, too, must not leave some layers with the adapter twice
        swaps = []
        for layer in layers:
            for swap, value in changes(root, layer):
                swap.put(value)
                undo.callback(swap.undo)
                swaps.append(swap)
        undo.pop_all()
    session.merged = swaps  # only now: an error before has undone all
    for adapter in chosen:
        session.adapters[adapter.name].merged = True


def _merge_for_good(root: nn.Module, chosen: Sequence[Adapter], layers: Sequence[MergedLayer]) -> None:
    """Every layer has its merged weight alone, and the adapters are gone; the old weights are never all in memory."""
    for layer in layers:
        changes(root, layer)  # computed and dropped: every error comes now, before the first change
    for layer in layers:
        for swap, value in changes(root, layer):
            swap.put(value)
        # At once, so that whatever stops this, each layer has the adapter once: in its weight or on it.
        for site in layer.sites:
            uninstall(site.module, site.slot)
    for adapter in chosen:
        detach(root, adapter.name)
    record_dense(root)


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
    """Within the block all adapters are in the weights, as by `merge(quantized="dequantize")`, with all that it raises:
    a forward costs what the base's does. After it the weights are the original ones, bit for bit. Nothing is logged."""
    root, session = session_of(model)
    check_unmerged(session, "merge")
    check_in_use(session.adapters.values())
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


def _layers(root: nn.Module, chosen: Sequence[Adapter], quantized: str | None) -> list[MergedLayer]:
    """Every layer that one of these adapters is on. Raises what can be told without computing anything."""
    for adapter in chosen:
        if by := adapter.sharded_by:
            raise TargetError(f"adapter {adapter.name!r} is sharded by {by}\n  {ELSEWHERE}")
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
        layers.append(MergedLayer(base, goes, [site for site in sites if site not in goes], quantized, shares_bias))
        _check_layer(layers[-1], is_shared=holders[id(base.stored)] > 1 + _together(base, sites))
    return layers


def _together(base: BaseLayer, sites: Sequence[Site]) -> int:
    """How many other modules hold the weight for which every adapter there acts. Raises TargetError if that changed."""
    for holder, name, _ in (tie for site in sites for tie in site.base.ties):
        if holder._parameters.get(name) is not base.stored:
            problem = f"its adapter is also at {type(holder).__name__}, which holds another weight by now"
            raise TargetError(f"{base.path}: {problem}\n  tie them again, or save, detach and load the adapter")
    return min(len(site.base.ties) for site in sites)


def _check_layer(layer: MergedLayer, is_shared: bool) -> None:
    """Raises TargetError or QuantizedWeightError unless this layer's weight can be replaced by a merged one."""
    base, path, module, weight = layer.base, layer.base.path, layer.base.module, layer.base.stored
    holder = module if base.packed is None else base.packed
    if problem := next(
        filter(None, [*(s.no_weight for s in layer.sites), *(s.base.kind.no_weight for s in layer.stay)]), ""
    ):
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
    elif weight.is_meta:
        problem, cure = "its weight is offloaded", ELSEWHERE
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
