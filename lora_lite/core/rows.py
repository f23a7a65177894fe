"""A scale for each row of a batch: how a batch is parted, and the call of a model within which it is.

A `Batch` is the block in which rows have scales of their own. In it every adapter's `Scale` has `Rows`: the scale of
each row, or of each label where tokens are labelled. A method runs on the rows of one scale at a time, as it would on a
batch of these alone.
"""

from collections.abc import Callable, Mapping, Sequence
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..errors import ConfigError, TargetError
from .scale import Scale


class Batch:
    """A block in which each of `size` rows has its own scales; with `tokens` (b, t), each token those of its label."""

    def __init__(self, size: int, tokens: Int[Tensor, "b t"] | None = None) -> None:
        self.size, self.tokens = size, tokens
        self.calls: dict[int, tuple[int, set[int]]] = {}  # by thread: the rows of the running call, their lengths
        self.is_called = False  # for graphs, which know no threads: is a call of the whole model running?
        self.generating: set[int] = set()  # threads in `generate`, which may repeat the rows
        self.readers: set[int] = set()  # modules whose forward runs once for each group of rows
        self.groups: dict[tuple[int, int], Mapping[int, float]] = {}  # by thread and such a module: scales
        self.version = 0  # of the scales of its rows
        self.products: dict[int, Any] = {}  # by layer, what core/mixed.py remembers

    def __getstate__(self) -> dict[str, Any]:
        """A copy is that of a block that is over."""
        return vars(Batch(self.size, self.tokens))

    @property
    def is_generating(self) -> bool:
        """Is this a call within `generate`? A graph knows no threads."""
        return bool(self.generating) if is_compiling() else get_ident() in self.generating

    def share(self, path: str, shape: Sequence[int]) -> int:
        """How many places of a tensor with these leading axes belong to each row, one after the other.

        Raises:
            TargetError: where rows can't be told apart in it.
        """
        count, size = torch.Size(shape).numel(), self.size if self.tokens is None else self.tokens.numel()
        is_flat = tuple(shape) in ((count,), (1, count))  # a mixture of experts gives its layers all tokens in one row
        if not is_compiling() and torch._C._current_autograd_node() is not None:  # checked in the first run
            is_known = count % size == 0
        elif self.tokens is not None:
            is_known = count == size and (is_flat or tuple(shape[:2]) == tuple(self.tokens.shape))
        elif is_compiling():  # whose rows are as many as the block has, or a multiple: `check` is in the graph
            is_known = bool(shape) and (shape[0] == size or (self.is_generating and shape[0] % size == 0))
            is_known = is_known or (is_flat and self.is_called and count % size == 0)
        elif (call := self.calls.get(get_ident())) is None:  # a part of the model is called, such as an encoder
            is_known = bool(shape) and (shape[0] == size or (self.is_generating and shape[0] % size == 0))
        else:
            n, lengths = call
            is_known = bool(shape) and (shape[0] == n or (is_flat and count in {n * t for t in lengths}))
        if not is_known:
            what = f"{size} rows" if self.tokens is None else f"{' x '.join(map(str, self.tokens.shape))} tokens"
            raise TargetError(
                f"{path}: wanted hidden states of {what}, got {tuple(shape)}, in which they can't be told apart\n"
                f"  leave this layer out with exclude_names, or run the adapters one after the other"
            )
        return count // size

    def is_split(self, path: str, reader: nn.Module) -> bool:
        """Does this call of a module that reads an adapted weight see the rows of one group? If not, it will be parted.

        Raises:
            TargetError: in a graph of torch.compile.
            ConfigError: where it will not.
        """
        if is_compiling():
            raise TargetError(f"{path}: rows with adapters of their own have no graph at a weight that a module reads")
        if (get_ident(), id(reader)) in self.groups:
            return True
        if id(reader) in self.readers:
            return False
        raise ConfigError(
            f"{path}: the block in which each row had its own adapter is over\n"
            f"  gradient checkpointing: call backward inside of it"
        )

    def running_group(self) -> Mapping[int, float]:
        """The scales of the rows that a module which reads an adapted weight runs on in this thread; none elsewhere."""
        thread = get_ident()
        return next((scales for (running, _), scales in self.groups.items() if running == thread), {})

    def check(self, n: int, shape: Sequence[int]) -> None:
        """ConfigError unless a call with n rows, or with these tokens, is of this batch."""
        if self.tokens is not None:
            if tuple(shape) != tuple(self.tokens.shape):
                wanted, got = (" x ".join(map(str, sizes)) for sizes in (self.tokens.shape, shape))
                raise ConfigError(f"tokens= has {wanted} labels, and the model was called with {got} tokens")
        elif n != self.size and not (self.is_generating and n % self.size == 0):
            raise ConfigError(
                f"{self.size} rows have an adapter or a scale, and the model was called with {n}\n"
                f"  give one for each row of the batch"
            )


class Parts:
    """The rows of a batch, or its tokens, in groups: those with equal keys. There is a key for each row, or label."""

    def __init__(self, batch: Batch, keys: Sequence[Any]) -> None:
        self.batch, self.keys = batch, tuple(keys)
        self.size = len(keys) if batch.tokens is None else batch.tokens.numel()  # how many rows it parts, or tokens
        self.groups: dict[Any, list[int]] = {}
        for i, key in enumerate(self.keys):
            self.groups.setdefault(key, []).append(i)
        self._orders: dict[torch.device, tuple[list[int], Tensor | None, Tensor | None]] = {}

    def order(self, device: torch.device) -> tuple[list[int], Tensor | None, Tensor | None]:
        """The size of each group, the rows (or tokens) group by group, and the way back; None where they lie so."""
        if device not in self._orders:
            tokens = self.batch.tokens
            if tokens is None:
                parts = [torch.tensor(rows) for rows in self.groups.values()]
            else:
                labels = tokens.flatten().cpu()
                parts = [torch.isin(labels, torch.tensor(rows)).nonzero().flatten() for rows in self.groups.values()]
            order = torch.cat(parts)
            is_sorted = bool((order.diff() > 0).all())
            there, back = (None, None) if is_sorted else (order.to(device), order.argsort().to(device))
            self._orders[device] = list(map(len, parts)), there, back
        return self._orders[device]

    def part(self, tensor: Tensor) -> Sequence[Tensor]:
        """The rows (size, ...) of each group."""
        sizes, there, _ = self.order(tensor.device)
        return (tensor if there is None else tensor[there]).split(sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """All rows (size, ...) in their order."""
        whole = torch.cat(list(parts))
        back = self.order(whole.device)[2]
        return whole if back is None else whole[back]


class Rows(Parts):
    """The scales of one adapter in a batch: of each row, or of each label."""

    def __init__(self, batch: Batch, scales: Sequence[float], whole: float | None) -> None:
        """`whole` is the scale of all rows that are on, where they have none of their own."""
        super().__init__(batch, scales)
        # For graphs of torch.compile: inputs, which may change.
        with torch.inference_mode(False):
            self.scales = torch.tensor(self.keys, dtype=torch.float64, device="cpu")  # (b,)
            self.whole = None if whole is None else torch.tensor(whole, dtype=torch.float64, device="cpu")  # ()

    @property
    def is_zero(self) -> bool:
        return self.groups.keys() <= {0.0}

    def of_group(self, group: Mapping[int, float]) -> Scale | None:
        """The scale of a group's rows; None for 0."""
        c = group[id(self)]
        return Scale(c, False, c == 1) if c else None

    def run(self, path: str, method: Callable[..., Tensor], old: Float[Tensor, "*b d"], *others: Tensor) -> Tensor:
        """method(scale, old, *others) on the rows of each scale, and `old` bit for bit where that is 0.

        others      of the leading axes of `old`
        """
        lead = old.shape[:-1]
        for other in others:
            if other.shape[:-1] != lead:
                got = f"inputs of {tuple(other.shape)} and outputs of {tuple(old.shape)}"
                raise TargetError(f"{path}: wanted a row of inputs for each of outputs, got {got}")
        share, size = self.batch.share(path, lead), self.size
        # As they are where an axis is that of the rows: what a method sees has the shape that it has without others.
        tensors = [t if lead[:1] == (size,) else t.reshape(size, share, t.shape[-1]) for t in (old, *others)]
        new = self._traced(method, tensors) if is_compiling() else self._by_group(method, tensors)
        return new.reshape(*lead, new.shape[-1])

    def _by_group(self, method: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        if len(self.groups) == 1:
            c = next(iter(self.groups))
            return method(Scale(c, False, c == 1), *tensors) if c else tensors[0]
        parts = zip(*map(self.part, tensors), strict=True)
        return self.join(
            [
                method(Scale(c, False, c == 1), *part) if c and len(part[0]) else part[0]  # a label that no token has
                for c, part in zip(self.groups, parts, strict=True)
            ]
        )

    def _traced(self, method: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        """In a graph: one for every assignment. Where adapters are on or off, each runs on all rows, and else row by
        row, with the scale as an input."""
        old, batch = tensors[0], self.batch
        scales = self.scales if batch.tokens is None else self.scales[batch.tokens.flatten().to(self.scales.device)]
        if self.whole is not None:
            new = method(Scale(self.whole, False, False), *tensors)
            where = (scales != 0).to(old.device).view(-1, *[1] * (old.ndim - 1))
            return torch.where(where, new, old)
        if batch.tokens is not None:
            raise ConfigError("tokens= with scales of their own has no graph\n  use it outside of torch.compile")
        rows = range(len(old))
        return torch.cat([method(Scale(scales[i], False, False), *(t[i : i + 1] for t in tensors)) for i in rows])
