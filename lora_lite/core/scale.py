"""The scale of an adapter: what a call computes with, and what gradient checkpointing needs where it has been changed.

torch.utils.checkpoint runs a part of the forward again in the middle of the backward, when the `scaled` block that the
forward ran in may be over. autograd numbers its nodes in the order in which they are made, so the node that asks for
the second run tells which scale the first one saw, and likewise which mask (core/positions.py); torch has no public
name for either, and uses both itself. Each thread has a count of its own, and nodes that a second run makes have late
numbers: where those would matter it raises.
"""

from bisect import bisect_right
from math import inf
from threading import get_ident
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from ..errors import ConfigError

Value = TypeVar("Value")
MOST_CHANGES = 10_000  # a search or an evaluation may change c for ever, with no backward that it would be kept for


class Scale(NamedTuple):
    """The scale of one call. In a graph of torch.compile `value` is a tensor without dimensions: a number would be a
    part of the graph, or break it (torch 2.13, with checkpointing)."""

    value: Any
    is_zero: bool
    is_one: bool
    rows: Any = None  # the `Rows` (core/rows.py) where each row has a scale of its own; then `value` is None


class Changes(Generic[Value]):
    """The changes of a value that forwards go by, as one adapter's scale, by the number of the first node that was made
    under each.

    what, cure   the value's name, and what to do where it isn't known, for messages
    most         changes to remember; None for MOST_CHANGES
    """

    def __init__(
        self, value: Value, what: str = "scale", cure: str = ", inside of `scaled`", most: int | None = None
    ) -> None:
        self.what, self.cure, self.most = what, cure, most
        self.threads: set[int] = set()  # all that changed the value, or ran a forward after a change
        self.set_in = -1  # the backward within which the value was set, by who runs a forward there; -1 for none
        self.unknown_from = inf  # nodes from this number on may be of a second run, or of another thread
        self._follow_this_thread(0, value)

    def change(self, value: Value, set_in: int | None = None) -> None:
        """From the next node on the value is this one."""
        number = torch.autograd._get_sequence_nr()  # of the next node that this thread makes
        if self.thread != get_ident():
            self._follow_this_thread(number, value)
            self.unknown_from = 0  # until a forward of this thread, all that is pending is another's
        elif self.numbers[-1] == number:
            self.values[-1] = value  # nothing was made under the last one
        else:
            self.numbers.append(number)
            self.values.append(value)
            most = self.most or MOST_CHANGES
            if len(self.numbers) > most:  # half at a time, so that a change rarely shifts the lists
                del self.numbers[: most // 2], self.values[: most // 2]
        self.set_in = torch._C._current_graph_task_id() if set_in is None else set_in  # -1 outside of a backward

    def of_this_call(self, value: Value) -> Value:
        """The value in a call: as it is set; in a second run, as it was in the first. ConfigError if it isn't known."""
        node = torch._C._current_autograd_node()  # the one that asks for a second run
        if node is None:  # no backward is running, so this is a first run
            if self.thread != get_ident():
                self._follow_this_thread(torch.autograd._get_sequence_nr() if get_ident() in self.threads else 0, value)
            self.unknown_from = inf
            return value
        if self.set_in == torch._C._current_graph_task_id():  # set within this backward, for a forward there
            return value
        number = node._sequence_nr()
        index = bisect_right(self.numbers, number) - 1  # the last change before the node; -1 if it is forgotten
        # An accelerator's backward has a thread of its own, which has never changed the scale.
        elsewhere = get_ident() != self.thread and get_ident() in self.threads
        if elsewhere or (index < 0 and len(self.threads) > 1):
            reason = f"several threads change the {self.what} or run forwards"
        elif index < 0:
            reason = f"more than {(self.most or MOST_CHANGES) // 2} changes of the {self.what} ago"
        elif number >= self.unknown_from:
            reason = "a checkpoint inside of a reentrant one, or in several threads, is run again"
        else:
            if self.values[index] != value and self.unknown_from == inf:  # nodes made from here on have late numbers
                self.unknown_from = torch.autograd._get_sequence_nr()
            return self.values[index]
        raise ConfigError(
            f"{reason}: at which {self.what} this part of a graph was made isn't known\n"
            f"  gradient checkpointing: call backward earlier{self.cure}"
        )

    def _follow_this_thread(self, number: int, value: Value) -> None:
        self.numbers, self.values, self.thread = [number], [value], get_ident()  # each thread counts by itself
        self.threads.add(self.thread)
