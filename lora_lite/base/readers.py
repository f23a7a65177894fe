"""Weights that a module reads of the modules inside of it, found in its code.

`self.dt_proj.weight @ x` (Mamba), `F.multi_head_attention_forward(..., self.out_proj.weight)` (torch, WavLM),
`self.mlp.w1.view(...)` (DBRX): a hook on the layer's call would never run, or not for this product. Bytecode says so
without running anything. A layer that is called as well, in another branch (Bloom), keeps its hook. One that isn't
found (a weight that is read by way of a list, or by another function) is told by `lora_lite.audit`.
"""

import dis
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from .stacks import Modules

# What asks for a tensor's dtype or shape, not for its numbers: T5 reads `self.wo.weight.dtype`.
_QUESTIONS = {"dtype", "device", "shape", "ndim", "requires_grad", "size", "dim", "numel", "is_cuda", "data_ptr"}


def readers(modules: Modules) -> dict[str, str]:
    """Path of what the code of a module names, `layers.0.mlp.w1`, `attn.out_proj.weight` -> path of that module.

    Where several do, it is the outermost, within whose call the others are. What is loaded for itself, as a layer is to
    be called, is named `layers.0.mlp.fc()`.
    """
    inner_first: list[tuple[str, Any]] = [*modules.items()][::-1]
    named = ((path, chain) for path, module in inner_first for chain in _read_by(module.__class__))
    return {f"{path}.{chain}" if path else chain: path for path, chain in named}


@cache
def _read_by(cls: Any) -> frozenset[str]:
    """Attributes of children, `attn.out_proj.weight`, that the code of a class loads."""
    # torch's other modules read no child's weight, but for a fused path that they leave to modules without hooks.
    if cls.__module__.startswith("torch.nn.modules.") and cls is not nn.MultiheadAttention:
        return frozenset()
    # From `forward` on, through the methods that it names: code beside it (init, tying, fusing) reads weights as well.
    chains: set[str] = set()
    names, seen = ["forward"], {"forward"}
    while names:
        name = names.pop()
        # Of all classes that define it: one calls the other by `super()`.
        members = (vars(base)[name] for base in cls.__mro__ if name in vars(base) and base is not nn.Module)
        for code in (code for member in members for code in _codes(member)):
            chains.update(_reads(code))
            fresh = {name for name in code.co_names if name not in seen and hasattr(cls, name)}
            names += fresh
            seen |= fresh
    return frozenset(chains)


def _codes(function: Any) -> Iterator[types.CodeType]:
    """The code of a function or property, of what it wraps, and of functions inside of it."""
    while hasattr(function, "__wrapped__"):  # transformers decorates its forwards
        function = function.__wrapped__
    function = getattr(function, "fget", None) or getattr(function, "__func__", function)
    stack = [getattr(function, "__code__", None)]
    while stack:
        code = stack.pop()
        if isinstance(code, types.CodeType):
            stack += code.co_consts
            yield code


def _reads(code: types.CodeType) -> Iterator[str]:
    """`a.b`, `a.b.weight` and `a.b.weight()` for `self.a.b.weight`: what is loaded one of the other, and the last."""
    chain: list[str] | None = None
    last, first = None, code.co_varnames[0] if code.co_argcount else "self"  # a function inside of one has the other's
    for step in dis.get_instructions(code):
        before, last = last, step.argval
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain is not None:
            chain.append(step.argval)
        elif step.opname not in ("CACHE", "EXTENDED_ARG", "NOP", "PRECALL"):
            chain = chain or []
            asked = next((i for i, name in enumerate(chain) if name in _QUESTIONS), len(chain) + 1)
            yield from (".".join(chain[:n]) for n in range(2, len(chain) + 1) if n != asked)
            if chain:
                yield f"{'.'.join(chain)}()"
            # From 3.13 on, one step may load two names, or store one and load another.
            starts = "LOAD_FAST" in step.opname or step.opname == "LOAD_DEREF"
            loaded = step.argval[-1] if starts and isinstance(step.argval, tuple) else step.argval
            chain = [] if starts and loaded == first and before != "isinstance" else None
