"""The hooks: functions of this module bound to an adapter's name.

They read everything from the module that they fire on, so deepcopy, pickle, torch.compile, FSDP2's parameter swapping
and functional_call need nothing of their own here.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, compiler, nn
from torch.compiler import is_dynamo_compiling

from ..base.kinds import BLOCK, packed_in
from ..base.matrices import normalized
from ..errors import TargetError
from ..ops.recompute import recomputed
from . import weight_products  # noqa: F401  the import registers its answers
from .adapt import adapt_input, adapt_output, blended
from .adapted_weight import AdaptedWeight, Use, dense, put, take_back
from .layer import NOTHING, Layer
from .mixed import is_mixed, mixed
from .names import SITES, TIES
from .scale import Scale
from .state import Site, sites_of
from .variant import REGISTRY, lookup

_LOCK = RLock()  # for the moments in which a weight is put in a parameter's place, or taken back: threads share modules


def register_hooks(site: Site) -> None:
    """Register a site's hooks anew; those of an adapter that is first come before all others."""
    name, variant, handles = site.slot, lookup(site.cfg.variant), site.handles
    site.as_they_are = tuple((name, site.attribute(name)) for name, spec in site.specs.items() if spec.keep_dtype)
    while handles:
        handles.pop().remove()
    if site.state.unloaded:
        return
    called = site.base.reader or site.module
    before = partial(called.register_forward_pre_hook, prepend=site.is_first)
    after = partial(called.register_forward_hook, prepend=site.is_first)
    if site.through_weight:
        for reader, put_it, take_it in weight_hooks(site):
            is_its_own = reader is called
            handles.append(reader.register_forward_pre_hook(put_it, prepend=is_its_own and site.is_first))
            # An Exception in the forward must not leave another weight.
            handles.append(
                reader.register_forward_hook(take_it, prepend=is_its_own and site.is_first, always_call=True)
            )
        for holder, _, _ in site.base.ties:
            holder.__dict__.setdefault(TIES, {})[name] = site.module
        return
    if site.base.kind is BLOCK:
        handles.append(after(partial(_stream_hook, name)))
        return
    if site.parts is not None:
        handles.append(after(partial(_sharded_hook, name), with_kwargs=True))
        return
    if variant.forward_input is not None:
        handles.append(before(partial(_input_hook, name), with_kwargs=True))  # x may come by keyword
    if site.target.is_diagonal and variant.reads_input:
        handles.append(after(partial(_norm_hook, name), with_kwargs=True))
    elif variant.forward is not None:
        handles.append(after(partial(_output_hook, name), with_kwargs=True))


def weight_hooks(site: Site) -> Iterator[tuple[nn.Module, Callable[..., None], Callable[..., None]]]:
    """Each module that multiplies by the site's weight, with what runs before its forward and after it."""
    name, base = site.slot, site.base
    done = partial(_weight_done, base.kind.weight, base.within)
    yield base.reader or site.module, partial(_weight_hook, name, base.within), done
    for holder, weight, called in base.ties:
        within = next(path for path, module in called.named_modules() if module is holder)
        yield called, partial(_tied_hook, name, weight, within), partial(_weight_done, weight, within)


def _called(module: nn.Module, slot: str) -> tuple[Site, Scale | None]:
    """The site of a layer that is being called, and the scale of this call; None where the adapter does nothing."""
    site: Site = module.__dict__[SITES][slot]  # of this module: a copy has sites of its own
    state = site.state
    if is_dynamo_compiling() or compiler._is_compiling_flag:  # is_compiling(), without its second call
        scale = state.traced
    else:
        site.ran = True  # a graph can't note it: a mutation inside of a compiled checkpoint breaks the graph
        scale = state.plain if state.changes is None else state.scale_of_call()
        if scale.rows is not None and scale.rows.batch.groups:  # one row's scale, in a module that runs group by group
            group = scale.rows.batch.running_group()
            if id(scale.rows) in group and not site.through_weight:
                return site, None if state.merged else scale.rows.of_group(group)
    return site, None if state.merged or scale.is_zero else scale


def _output_hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
    site, scale = _called(module, name)
    if scale is None:
        return None  # torch hands on the layer's own output: the base, bit for bit
    if scale.rows is not None and not is_dynamo_compiling() and is_mixed(module, scale.rows, y):
        return None
    x = args[0] if args else next(iter(kwargs.values()))  # (*b, d_in)
    if not isinstance(y, Tensor):
        raise TargetError(
            f"{site.path}: wanted a tensor from this layer, got {type(y).__name__}\n  leave it out with exclude_names"
        )
    if x.dtype != y.dtype:  # x is never cast up: the layer's output says in which dtype it computes
        x = x.to(y.dtype)
    if scale.rows is None:  # here, and not in `_new_output`: of one token, a call is 1 % of the time
        variant: Any = REGISTRY.get(site.cfg.variant) or lookup(site.cfg.variant)  # .get: a call less
        new = variant.forward(Layer(module, site, y.dtype, scale), x, y)
        new = new if variant.handles_scale or scale.is_one else blended(scale.value, new, y)
    else:
        new = _new_output(module, site, scale, x, y)
    return new if site.positions is None else site.positions.choose(site.path, new, y)


def _new_output(
    module: nn.Module, site: Site, scale: Scale, x: Tensor, y: Tensor, instead: Mapping[str, Any] = NOTHING
) -> Tensor:
    """The output as the adapter makes it; where rows have scales of their own, on the rows of each scale."""
    if scale.rows is None:
        return adapt_output(Layer(module, site, y.dtype, scale, instead=instead), x, y)
    new: Tensor | None = mixed(module, site, scale.rows, x, y)
    if new is not None:
        return new

    def method(c: Scale, y: Tensor, x: Tensor) -> Tensor:
        return adapt_output(Layer(module, site, y.dtype, c, instead=instead), x, y)

    out: Tensor = scale.rows.run(site.path, method, y, x)
    return out


def _norm_hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Any:
    """A norm is a linear map of the normalised input, with the matrix diag(w)."""
    site, scale = _called(module, name)
    if scale is None:
        return None
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]  # x (*b, d), perhaps a gate

    def normalised(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        again = [next(given) if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
        named = dict(zip(kwargs, again[len(args) :], strict=True))
        return normalized(module, tensors[0], again[: len(args)], named).to(y.dtype)  # (*b, d)

    # Of some rows alone, it isn't made again in the backward.
    instead = NOTHING if scale.rows else {"normalised": (normalised, tensors)}
    new = _new_output(module, site, scale, recomputed(normalised, *tensors), y, instead)
    return new if site.positions is None else site.positions.choose(site.path, new, y)


def _input_hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    site, scale = _called(module, name)
    if scale is None:
        return None
    x = args[0] if args else next(iter(kwargs.values()))  # (*b, d_in)
    if scale.rows is None:
        new = adapt_input(Layer(module, site, x.dtype, scale), x)
    else:
        new = scale.rows.run(site.path, lambda c, x: adapt_input(Layer(module, site, x.dtype, c), x), x)
    new = new if site.positions is None else site.positions.choose(site.path, new, x)
    return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): new})


def _sharded_hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
    """A layer of which each process computes a part."""
    site, scale = _called(module, name)
    if scale is None:
        return None
    x = args[0] if args else next(iter(kwargs.values()))  # (*b, d_in), or this process's part
    new = site.parts.output(module, site, scale, x, y)
    return new if site.positions is None else site.positions.choose(site.path, new, y)


def _stream_hook(name: str, block: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
    """The residual stream at a block's output: a tensor, or the first of a tuple or of a ModelOutput."""
    site, scale = _called(block, name)
    if scale is None:
        return None
    is_mapping = isinstance(y, Mapping)
    stream = y if isinstance(y, Tensor) else next(iter(y.values() if is_mapping else y), None)  # (*b, d_model)
    if not isinstance(stream, Tensor) or stream.shape[-1] != site.target.d_out:
        got = tuple(stream.shape) if isinstance(stream, Tensor) else type(y).__name__
        raise TargetError(
            f"{site.path}: wanted hidden states of width {site.target.d_out} from this block, got {got}\n"
            f"  target the layers that write to the stream, without kinds=('block',)"
        )
    # The block's attributes are its own affair: one that is called `bias` is no layer's bias.
    new = _new_output(block, site, scale, stream, stream, {"bias": None})
    new = new if site.positions is None else site.positions.choose(site.path, new, stream)
    if stream is y:
        return new
    if is_mapping:
        return type(y)(**{**y, next(iter(y)): new})
    return type(y)([new, *y[1:]]) if type(y) in (tuple, list) else y._replace(**{y._fields[0]: new})


def _weight_hook(slot: str, within: str, reader: nn.Module, args: tuple[Any, ...]) -> None:
    """A weight that the called module reads: for this call, one that knows its adapters stands in its place."""
    module = reader.get_submodule(within)
    weight = module.__dict__[SITES][slot].base.kind.weight
    _put_weight(slot, reader, module, module, weight)


def _tied_hook(slot: str, name: str, within: str, reader: nn.Module, args: tuple[Any, ...]) -> None:
    """A module multiplies by a weight that is another one's, whose adapter it shares."""
    holder = reader.get_submodule(within)
    _put_weight(slot, reader, holder.__dict__[TIES][slot], holder, name)


def _put_weight(slot: str, reader: nn.Module, module: nn.Module, holder: nn.Module, name: str) -> None:
    """The holder's weight of this name gets one more adapter, which is at the module."""
    site: Site = module.__dict__[SITES][slot]
    ran, scale, is_tied = site.ran, _called(module, slot)[1], holder is not module
    if scale is not None and scale.rows is not None:
        site.ran = ran
        if not scale.rows.batch.is_split(site.path, reader):
            return  # the forward that follows runs once for each group of rows
        scale = scale.rows.of_group(scale.rows.batch.running_group())
    at_weight = (s for s in sites_of(module).values() if s.through_weight and bool(s.base.ties) >= is_tied)
    is_first = site is next(other for other in at_weight if other.base.kind.weight == site.base.kind.weight)
    if is_dynamo_compiling():
        if is_first:
            take_back(holder, name)
        if scale is not None:  # a graph of torch.compile knows no such tensor, but its maths
            put(holder, name, dense(_adapted(holder, name, Use(module, site, scale))))
        return
    site.ran = ran  # the weight notes it, once something multiplies by it
    with _LOCK:
        weight, this = holder.__dict__.get(name), get_ident()
        # After the first adapter's hook the weight is this call's, too, whoever put it there and has left since.
        if isinstance(weight, AdaptedWeight) and (not is_first or weight.threads - {this}):
            if weight.serves(site, scale):
                weight.threads.add(this)
                return
        elif is_first:
            take_back(holder, name)  # an interrupt may have left one: hooks that clear up run after an Exception only
        if scale is not None:
            weight = _adapted(holder, name, Use(module, site, scale))
            weight.threads.add(this)
            put(holder, name, weight)


def _adapted(holder: nn.Module, name: str, use: Use) -> AdaptedWeight:
    """The weight in the holder's parameter's place, or the parameter, with one more adapter."""
    weight, target = holder.__dict__.get(name), use.site.target
    if isinstance(weight, AdaptedWeight):
        return weight.used_by(use)
    plain: Any = weight  # a replica of DataParallel has plain tensors in the places of parameters
    if weight is None:
        packed = packed_in(holder)
        plain = packed[name]() if name in packed else holder._parameters.get(name)
    is_stack = target.experts and use.site.base.kind.has_matrix  # one kernel has factors by group
    experts = torch.arange(target.experts, device=plain.device) if is_stack else None
    return AdaptedWeight.of(plain, [use], use.site.base.transposed, experts)


def _weight_done(name: str, within: str, reader: nn.Module, args: tuple[Any, ...], y: Any) -> None:
    module = reader.get_submodule(within)
    if is_dynamo_compiling():
        take_back(module, name)
        return
    with _LOCK:
        weight = module.__dict__.get(name)
        if isinstance(weight, AdaptedWeight):
            weight.threads.discard(get_ident())
            if weight.threads:
                return
        take_back(module, name)
