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

from ..base.layer import called_around
from ..base.still import still
from ..core.ran import Layers, grouped, has_run, trained, uncalled
from ..core.state import Site, sites_at
from ..errors import ConfigError, TargetError, brief


@dataclass
class Calls:
    """The adapted layers that took part in a forward, by path."""

    called: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)  # layers whose parent was called
    read: set[str] = field(
        default_factory=set
    )  # whose weight went into an operation, in a call of the layer or outside
    gradients: set[str] = field(default_factory=set)  # parameters of adapters that got a gradient, be it exactly 0
    by_weight: list[Site] = field(default_factory=list)  # whose flag says that something has multiplied by the weight

    def forget_calls(self) -> None:
        """Begin again: what ran so far was not what is asked about. Gradients stay, which come at the end."""
        for noted in (self.called, self.reached, self.read):
            noted.clear()
        for site in self.by_weight:
            site.ran = False


@contextmanager
def watching(root: nn.Module, layers: Layers, reads: bool = True) -> Iterator[Calls]:
    """Within the block, notes which of these layers of the model are called, whose parents, and which parameters of
    adapters get a gradient; with `reads`, also whose weights an operation of torch is given.

    With `reads`, compiled parts run uncompiled: in a graph neither these nor a hook could be noted.
    """
    calls, modules, parameters = Calls(), dict(root.named_modules()), trained(layers)
    flags: list[tuple[Site, bool]] = []
    paths = {id(module): path for path, module in modules.items()}  # a wrapper may have come in since attach
    fresh = [key for key, parameter in parameters.items() if parameter.grad is None]
    with ExitStack() as stack:
        for path, layer in layers.items():
            caller = layer.reader or modules[called_around(modules, paths[id(layer.module)].rpartition(".")[0])]
            stack.enter_context(caller.register_forward_pre_hook(partial(_note, calls.reached, path)))
            if layer.by_weight:  # its sites note that something has multiplied by the weight
                flags += [(site, site.ran) for site in sites_at(layer)]
            else:
                stack.enter_context(layer.module.register_forward_pre_hook(partial(_note, calls.called, path)))
        calls.by_weight = [site for site, _ in flags]
        for site, _ in flags:
            site.ran = False
        for key, parameter in parameters.items():  # DeepSpeed empties .grad, FSDP2 exchanges what a hook is on
            stack.enter_context(parameter.register_hook(partial(_note, calls.gradients, key)))
        if reads and "torch._dynamo" in sys.modules:  # else nothing is compiled, and asking takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if reads:
            stack.enter_context(_Reads(layers, calls.read))
        yield calls
        calls.called.update(site.path for site, _ in flags if site.ran)
        for site, ran in flags:
            site.ran = site.ran or ran
        calls.gradients.update(key for key in fresh if parameters[key].grad is not None)


class _Reads(TorchDispatchMode):
    """It sees what reaches the dispatcher, so that `.shape`, `.dtype` or `x.to(weight)` are no reads.

    No gradient is needed, so it serves for the codes of quantised weights too.
    """

    supports_higher_order_operators = True

    def __init__(self, layers: Layers, read: set[str]) -> None:
        super().__init__()
        weights = {path: layer.stored for path, layer in layers.items()}
        self._paths = {id(weight): (path, weight) for path, weight in weights.items()}  # held, or an id may be reused
        self._read = read

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(function).removeprefix("aten.").partition(".")[0]
        if not (name.startswith("new_") or name.endswith("_like")):  # these take dtype, device and shape alone
            self._read.update(self._paths[id(t)][0] for t in tree_leaves((args, kwargs)) if id(t) in self._paths)
        return function(*args, **(kwargs or {}))


def _note(noted: set[str], name: str, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        noted.add(name)


def check_called(root: nn.Module, layers: Layers, never_ran: str) -> None:
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
    if never_ran not in ("raise", "merge"):
        raise ConfigError(f"never_ran={never_ran!r}: wanted one of ('raise', 'merge')")


def refusal(paths: Iterable[str], of: int) -> str:
    """The message for layers that a merge must not touch."""
    paths = set(paths)
    return (
        f"{len(paths)} of {of} adapted layers were never called, so their adapters had no effect: {grouped(paths)}\n"
        f"  the model reads their weights itself, or no input has reached them; merged, the adapters would have one\n"
        f"  leave them out with exclude_names (lora_lite.audit(model, batch) tells which are reached), or merge with "
        f'never_ran="merge" (--never-ran merge) if other inputs reach them, such as an image or another expert'
    )


def _dummy_forward(root: nn.Module, layers: Layers) -> tuple[Calls, str]:
    """The calls of one forward of the model's own dummy inputs, and why it doesn't reach all of these, of which none
    has run yet. The model is as it was afterwards."""
    if not isinstance(inputs := getattr(root, "dummy_inputs", None), Mapping):
        return Calls(), f"this {type(root).__name__} has no dummy_inputs to run"
    try:
        device = next(p.device for p in root.parameters() if not p.is_meta)
        on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        with still(root), watching(root, layers) as calls:
            root(**on_device)
    except Exception as error:  # of someone else's forward, on inputs that may not suit it: said in the warning
        return Calls(), f"its dummy_inputs don't run ({type(error).__name__}: {brief(error)})"
    finally:
        for layer in layers.values():
            for site in sites_at(layer):
                site.ran = False
    return calls, "its dummy_inputs don't reach them"
