"""Graphs of torch.compile, and the adapters that they can't know of."""

from importlib import import_module
from typing import Any

_OPTION = "skip_nnmodule_hook_guards"


def guard_hooks() -> None:
    """From now on a graph holds only for modules that have hooks where those it was made of had some.

    By default (torch 2.13) none has that guard: the graph of a base would serve an adapted model of the same class. The
    option's default is set, which is of all threads; to set the option itself is seen by one thread alone. The import
    takes a second, once; transformers' models and PyTorch's optimizers have done it already.
    """
    config: Any = import_module("torch._dynamo.config")
    if (option := config._config.get(_OPTION)) is not None:  # without the option there is nothing to be skipped
        option.default = False


def forget_graphs() -> None:
    """Every graph is made again: those from before the guard don't have it."""
    guard_hooks()
    import_module("torch._dynamo").reset_code_caches()
