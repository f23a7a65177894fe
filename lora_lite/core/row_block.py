"""The block in which rows have adapters or scales of their own: what is put on the model for it, and taken off again.

The model's calls say how many rows there are. A module that multiplies by an adapted weight shows no rows of its
products, so its forward runs once for each group of rows.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..errors import ConfigError, TargetError
from .hooks import weight_hooks
from .names import IN_EXPERT
from .rows import Batch, Parts
from .state import Session, Site, session_at

Uses = list[tuple[Site, Callable[..., None], Callable[..., None]]]
"""The adapters at weights that a module reads: of each the site, and what puts its weight there and takes it off."""


@contextmanager
def block_of_rows(root: nn.Module, session: Session, size: int, tokens: Tensor | None = None) -> Iterator[Batch]:
    """The `Batch` of this many rows; within another block, that block's."""
    if is_compiling():
        raise ConfigError("rows with adapters of their own: enter the block outside of what torch.compile takes")
    if (outer := session.batch) is not None:
        if tokens is not None or outer.tokens is not None or outer.size != size:
            inside = f"{outer.size} rows" if outer.tokens is None else "labelled tokens"
            raise ConfigError(f"{size} rows with adapters or scales of their own, inside of a block of {inside}")
        yield outer
        return
    sites = [site for state in session.adapters.values() if not state.unloaded for site in state.sites]
    if routed := [site.path for site in sites if IN_EXPERT.search(site.path)]:
        raise TargetError(
            f"{routed[0]}: an expert sees the tokens that are routed to it, in which rows can't be told apart\n"
            f"  leave it out with exclude_names, or run the adapters one after the other"
        )
    batch = session.batch = Batch(size, tokens)
    with ExitStack() as undo:
        undo.callback(setattr, session, "batch", None)
        enter = root.register_forward_pre_hook(partial(_enter, batch), with_kwargs=True, prepend=True)
        leave = root.register_forward_hook(partial(_leave, batch), always_call=True)
        undo.callback(enter.remove)
        undo.callback(leave.remove)
        generate: Any = getattr(root, "generate", None)
        if callable(generate):
            _replace(root, "generate", partial(_generate, batch, root, _plain(generate)), undo)
        readers: dict[nn.Module, Uses] = {}
        for site in sites:
            for reader, put, take in weight_hooks(site) if site.through_weight else ():
                readers.setdefault(reader, []).append((site, put, take))
        for reader, uses in readers.items():
            _replace(reader, "forward", partial(_by_group, batch, reader, _plain(reader.forward), uses), undo)
            batch.readers.add(id(reader))
        undo.callback(batch.readers.clear)
        undo.callback(batch.products.clear)  # a pending backward may remember the batch
        yield batch


def _plain(function: Any) -> Any:
    """The function itself, where a copy of the model still has the one of the block that it was made in."""
    if isinstance(function, partial) and function.func in (_by_group, _generate):
        return function.args[2]
    return function


def _replace(module: nn.Module, name: str, function: Any, undo: ExitStack) -> None:
    before = vars(module).get(name)
    if isinstance(before, partial) and before.func in (_by_group, _generate):  # in a copy that was made within a block
        before = None
    module.__dict__[name] = function
    undo.callback(module.__dict__.pop if before is None else module.__dict__.__setitem__, name, before)


def _enter(batch: Batch, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The model is called: with how many rows, and how long are they?"""
    if session_at(root).batch is not batch:  # a copy of the model that was made within the block
        for hooks in (root._forward_pre_hooks, root._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "func", None) in (_enter, _leave)]:
                del hooks[key]
        return
    rows, tensors = _rows(args, kwargs)
    n = len(rows)
    batch.check(n, rows.shape[:-1] if rows.is_floating_point() else rows.shape)
    batch.is_called = True
    if not is_compiling():
        batch.calls[get_ident()] = n, {t.shape[1] for t in tensors if t.ndim > 1 and len(t) == n}


def _leave(batch: Batch, root: nn.Module, args: tuple[Any, ...], y: Any) -> None:
    if not is_compiling():
        batch.calls.pop(get_ident(), None)
    batch.is_called = not is_compiling() and bool(batch.calls)


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The tensor that has the rows of a call: its tokens, embeddings, or the first; and all tensors."""
    named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values())
    inside = [value for each in named for value in (each.values() if isinstance(each, Mapping) else [each])]
    tensors = [value for value in inside if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        raise ConfigError("the model was called without a tensor, so there are no rows to give adapters to")
    return tensors[0], tensors


def _generate(batch: Batch, root: nn.Module, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate` repeats each row for its beams, so that a call within may have a multiple of them."""
    if session_at(root).batch is not batch:  # a copy of the model
        root.__dict__.pop("generate", None)
        return generate(*args, **kwargs)
    if batch.tokens is not None:
        raise ConfigError("tokens= labels the tokens of one call, and generate makes new ones\n  use rows without it")
    batch.check(len(_rows(args, kwargs)[0]), ())
    batch.generating.add(get_ident())
    try:
        return generate(*args, **kwargs)
    finally:
        batch.generating.discard(get_ident())


# ---- modules that read an adapted weight ----------------------------------------------------------


def _by_group(
    batch: Batch, reader: nn.Module, forward: Callable[..., Any], uses: Uses, *args: Any, **kwargs: Any
) -> Any:
    """A forward that runs once for each group of rows, with the weights that adapters make at that group's scales."""
    scales = {id(site.state): site.state.scale_of_call().rows for site, _, _ in uses if not site.state.merged}
    adapters = [rows for rows in scales.values() if rows is not None]
    if not adapters:
        if not batch.readers:  # a copy of the model that was made within the block
            reader.__dict__.pop("forward", None)
        return forward(*args, **kwargs)
    around = batch.running_group()  # of a module that this one is in
    if adapters and all(id(rows) in around for rows in adapters):
        return _run(batch, reader, forward, uses, around, args, kwargs)
    parts, path = Parts(batch, list(zip(*(rows.keys for rows in adapters), strict=True))), uses[0][0].path
    call = inspect.signature(forward).bind(*args, **kwargs)
    given = {name: _split(path, reader, name, value, parts) for name, value in call.arguments.items()}
    results = []
    for i, (key, n) in enumerate(zip(parts.groups, parts.order(_device(call.arguments))[0], strict=True)):
        if not n:  # a label that no token has
            continue
        call.arguments.update({name: values[i] for name, values in given.items()})
        group = {id(rows): c for rows, c in zip(adapters, key, strict=True)}
        results.append(_run(batch, reader, forward, uses, group, call.args, call.kwargs))
    return _join(path, reader, results, parts)


def _run(
    batch: Batch,
    reader: nn.Module,
    forward: Callable[..., Any],
    uses: Uses,
    group: Mapping[int, float],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """The forward on the rows of a group, with the weights that its adapters make."""
    running = (get_ident(), id(reader))
    batch.groups[running] = group
    try:
        for _, put, _ in uses:
            put(reader, args)
        return forward(*args, **kwargs)
    finally:
        for _, _, take in uses:
            take(reader, args, None)
        del batch.groups[running]


def _device(arguments: Mapping[str, Any]) -> torch.device:
    return next(value.device for value in arguments.values() if isinstance(value, Tensor))


def _axis(reader: nn.Module, name: str) -> int:
    """The axis of the rows in an argument, or in a result."""
    return int(isinstance(reader, nn.MultiheadAttention) and not reader.batch_first and name in _SEQUENCES)


_SEQUENCES = ("query", "key", "value", "output")  # of nn.MultiheadAttention: (tokens, rows, d), unless batch_first


def _split(path: str, reader: nn.Module, name: str, value: Any, parts: Parts) -> list[Any]:
    """An argument of each group's call. TargetError for one in which there may be rows that aren't seen."""
    is_row = isinstance(value, Tensor) and value.ndim == 1 and isinstance(reader, nn.Embedding)  # places, not rows
    if not isinstance(value, Tensor) or not value.ndim:
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, Tensor)):
            return [value] * len(parts.groups)
    elif is_row and parts.batch.tokens is None:
        pass
    elif name == "attn_mask" and isinstance(reader, nn.MultiheadAttention) and value.ndim == 2:
        return [value] * len(parts.groups)
    else:
        axis = _axis(reader, name)
        rows = value.movedim(axis, 0)  # (rows, ...), or (tokens of all rows, ...)
        if len(rows) % parts.size == 0:
            if name != "attn_mask":  # whose rows are those of the heads
                parts.batch.share(path, rows.shape[: max(1, rows.ndim - 1)])
            each = rows.unflatten(0, (parts.size, -1))
            return [part.flatten(0, 1).movedim(0, axis) for part in parts.part(each)]
    got = f"tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TargetError(
        f"{path}: its weight is read by a {type(reader).__name__}, whose argument {name!r} is a {got}, in which rows "
        f"can't be told apart\n  leave this layer out with exclude_names, or run the adapters one after the other"
    )


def _join(path: str, reader: nn.Module, results: Sequence[Any], parts: Parts, name: str = "output") -> Any:
    """The output for all rows, of those for each group."""
    first = results[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        if not first.ndim:
            raise TargetError(
                f"{path}: its weight is read by a {type(reader).__name__} that gives one number for all rows\n"
                f"  leave this layer out with exclude_names, or run the adapters one after the other"
            )
        axis, sizes = _axis(reader, name), [n for n in parts.order(first.device)[0] if n]
        each = [y.movedim(axis, 0).unflatten(0, (n, -1)) for y, n in zip(results, sizes, strict=True)]
        return parts.join(each).flatten(0, 1).movedim(0, axis)
    if type(first) is tuple:
        names = (name, *[""] * (len(first) - 1))  # after attention's output come its weights
        return tuple(_join(path, reader, y, parts, n) for y, n in zip(zip(*results, strict=True), names, strict=True))
    raise TargetError(
        f"{path}: its weight is read by a {type(reader).__name__} that gives a {type(first).__name__}, in which rows "
        f"can't be told apart\n  leave this layer out with exclude_names, or run the adapters one after the other"
    )
