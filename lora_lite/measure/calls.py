"""Which adapted layers a forward calls, and which weights it reads without calling their layer.

A hook runs only where its layer is called. Where a model multiplies by `layer.weight` itself (Mamba's dt_proj, a fused
loss), an adapter has no effect and no gradient, while a merge would change the weight that the model reads.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..base.still import still
from ..core.ran import grouped, has_run, trained, uncalled
from ..core.state import sites_of
from ..errors import ConfigError, TargetError, brief

NEVER_RAN = ("raise", "merge")


@dataclass
class Calls:
    """The adapted layers that took part in a forward, by path."""

    called: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    """Layers whose parent was called."""
    read: set[str] = field(default_factory=set)
    """Layers whose weight went into an operation, inside of a call of the layer or outside."""
    gradients: set[str] = field(default_factory=set)
    """Parameters of adapters that got a gradient, be it exactly 0."""


@contextmanager
def reading(layers: Mapping[str, nn.Module], calls: Calls) -> Iterator[None]:
    """Within the block, `calls.read` gets the layers whose weights an operation of torch is given.

    No gradient is needed, so it serves for the codes of quantised weights too. Compiled parts run uncompiled: in a
    graph neither this nor a hook could note anything.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and asking would import it, for a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_Reads(layers, calls))
        yield


class _Reads(TorchDispatchMode):
    """It sees what reaches the dispatcher, so that `.shape`, `.dtype` or `x.to(weight)` are no reads."""

    supports_higher_order_operators = True

    def __init__(self, layers: Mapping[str, nn.Module], calls: Calls) -> None:
        super().__init__()
        weights = {path: next(iter(sites_of(layer).values())).base.stored for path, layer in layers.items()}
        self._paths = {id(weight): (path, weight) for path, weight in weights.items()}  # held, or an id may be reused
        self._read = calls.read

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(function).removeprefix("aten.").partition(".")[0]
        if not (name.startswith("new_") or name.endswith("_like")):  # these take dtype, device and shape alone
            self._read.update(self._paths[id(t)][0] for t in tree_leaves((args, kwargs)) if id(t) in self._paths)
        return function(*args, **(kwargs or {}))


@contextmanager
def watching(root: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[Calls]:
    """Within the block, notes which of these layers of the model are called, whose parents, and which parameters of
    adapters get a gradient."""
    calls, modules = Calls(), dict(root.named_modules())
    paths = {id(module): path for path, module in modules.items()}  # a wrapper may have come in since attach
    flags = [(site, site.ran) for layer in layers.values() for site in sites_of(layer).values()]
    with ExitStack() as stack:
        for path, layer in layers.items():
            caller = modules[_caller(modules, paths[id(layer)])]
            stack.callback(caller.register_forward_pre_hook(partial(_note, calls.reached, path)).remove)
        for site, _ in flags:
            site.ran = False
        fresh = {key: p for key, p in trained(layers).items() if p.grad is None}
        for key, parameter in trained(layers).items():  # DeepSpeed empties .grad, FSDP2 exchanges what a hook is on
            stack.callback(parameter.register_hook(partial(_note, calls.gradients, key)).remove)
        try:
            yield calls
        finally:
            calls.gradients.update(key for key, p in fresh.items() if p.grad is not None)
            calls.called.update(path for path, layer in layers.items() if has_run(layer))
            for site, ran in flags:
                site.ran = ran or site.ran


def _note(noted: set[str], name: str, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        noted.add(name)


def _caller(modules: Mapping[str, nn.Module], path: str) -> str:
    """The path of the nearest module around this one that has a forward: a ModuleList has none, and is never called."""
    while path:
        path = path.rpartition(".")[0]
        if type(modules[path]).forward is not nn.Module.forward:
            break
    return path


def check_called(root: nn.Module, layers: Mapping[str, nn.Module], never_ran: str) -> None:
    """Check that forwards call these layers.

    Where a layer has not run yet, one forward of the model's own dummy inputs is looked at. Without any, a warning says
    that it isn't known. `never_ran="merge"` takes the caller's word for it that other inputs reach all layers.

    Raises:
        TargetError: for layers that no forward has called since attach, although one has called others, or whose
            weights the model reads without calling them.
    """
    silent = {path: layer for path, layer in layers.items() if not has_run(layer)}
    if never_ran == "merge" or not silent:
        return
    known = uncalled(root)
    calls, reason = _dummy_forward(root, silent)
    never = silent.keys() - calls.called
    if unaffected := never & (known | calls.read):
        raise TargetError(refusal(unaffected, len(layers)))
    if never:
        logger.warning(
            f"merge: {len(never)} of {len(layers)} layers have not been called since attach: {grouped(never)}\n"
            f"  {reason}, so it isn't known whether the model calls them or reads their weights by itself\n"
            f"  lora_lite.audit(model, batch) before the merge tells"
        )


def check_choice(never_ran: str) -> None:
    """ConfigError for anything but "raise" and "merge"."""
    if never_ran not in NEVER_RAN:
        raise ConfigError(f"never_ran={never_ran!r}: wanted one of {NEVER_RAN}")


def refusal(paths: Iterable[str], of: int) -> str:
    """The message for layers that a merge must not touch."""
    paths = set(paths)
    return (
        f"{len(paths)} of {of} adapted layers were never called, so their adapters had no effect: {grouped(paths)}\n"
        f"  the model reads their weights itself, or no input has reached them; merged, the adapters would have one\n"
        f"  leave them out with exclude_names (lora_lite.audit(model, batch) tells which are reached), or merge with "
        f'never_ran="merge" (--never-ran merge) if other inputs reach them, such as an image or another expert'
    )


def _dummy_forward(root: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[Calls, str]:
    """The calls of one forward of the model's own dummy inputs, and why it doesn't reach all of these, of which none
    has run yet. The model is as it was afterwards."""
    if not isinstance(inputs := getattr(root, "dummy_inputs", None), Mapping):
        return Calls(), f"this {type(root).__name__} has no dummy_inputs to run"
    try:
        device = next(p.device for p in root.parameters() if not p.is_meta)
        on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        with still(root), watching(root, layers) as calls, reading(layers, calls):
            root(**on_device)
    except Exception as error:  # of someone else's forward, on inputs that may not suit it: said in the warning
        return Calls(), f"its dummy_inputs don't run ({type(error).__name__}: {brief(error)})"
    finally:
        for layer in layers.values():
            for site in sites_of(layer).values():
                site.ran = False
    return calls, "its dummy_inputs don't reach them"
