"""The scale of an adapter: what a call computes with, and what gradient checkpointing needs where it has been changed.

torch.utils.checkpoint runs a part of the forward again in the middle of the backward, when the `scaled` block that the
forward ran in may be over. autograd numbers its nodes in the order in which they are made, so the node that asks for
the second run tells which scale the first one saw; torch has no public name for either, and uses both itself. Each
thread has a count of its own, and nodes that a second run makes have late numbers: where those would matter it raises.
"""

from bisect import bisect_right
from math import inf
from threading import get_ident
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError

MOST_CHANGES = 10_000  # a search or an evaluation may change c for ever, with no backward that it would be kept for


class Scale(NamedTuple):
    """The scale of one call. In a graph of torch.compile `value` is a tensor without dimensions: a number would be a
    part of the graph, or break it (torch 2.13, with checkpointing)."""

    value: Any
    is_zero: bool
    is_one: bool


class ScaleChanges:
    """The changes of one adapter's scale, by the number of the first node that was made under each."""

    def __init__(self, scale: float) -> None:
        self.threads: set[int] = set()  # all that changed the scale, or ran a forward after a change
        self.set_in = -1  # the backward within which the scale was set, by who runs a forward there; -1 for none
        self.unknown_from = inf  # nodes from this number on may be of a second run, or of another thread
        self._follow_this_thread(0, scale)

    def change(self, scale: float, set_in: int | None = None) -> None:
        """From the next node on the scale is this one."""
        number = torch.autograd._get_sequence_nr()  # of the next node that this thread makes
        if self.thread != get_ident():
            self._follow_this_thread(number, scale)
            self.unknown_from = 0  # until a forward of this thread, all that is pending is another's
        elif self.numbers[-1] == number:
            self.scales[-1] = scale  # nothing was made under the last one
        else:
            self.numbers.append(number)
            self.scales.append(scale)
            if len(self.numbers) > MOST_CHANGES:  # half at a time, so that a change rarely shifts the lists
                del self.numbers[: MOST_CHANGES // 2], self.scales[: MOST_CHANGES // 2]
        self.set_in = torch._C._current_graph_task_id() if set_in is None else set_in  # -1 outside of a backward

    def of_this_call(self, scale: float) -> float:
        """The scale of a call: as it is set; in a second run, as it was in the first. ConfigError if it isn't known."""
        node = torch._C._current_autograd_node()  # the one that asks for a second run
        if node is None:  # no backward is running, so this is a first run
            if self.thread != get_ident():
                self._follow_this_thread(torch.autograd._get_sequence_nr() if get_ident() in self.threads else 0, scale)
            self.unknown_from = inf
            return scale
        if self.set_in == torch._C._current_graph_task_id():  # set within this backward, for a forward there
            return scale
        number = node._sequence_nr()
        index = bisect_right(self.numbers, number) - 1  # the last change before the node; -1 if it is forgotten
        # An accelerator's backward has a thread of its own, which has never changed the scale.
        elsewhere = get_ident() != self.thread and get_ident() in self.threads
        if elsewhere or (index < 0 and len(self.threads) > 1):
            reason = "several threads change the scale or run forwards"
        elif index < 0:
            reason = f"more than {MOST_CHANGES // 2} changes of the scale ago"
        elif number >= self.unknown_from:
            reason = "a checkpoint inside of a reentrant one, or in several threads, is run again"
        else:
            if self.scales[index] != scale and self.unknown_from == inf:  # nodes made from here on have late numbers
                self.unknown_from = torch.autograd._get_sequence_nr()
            return self.scales[index]
        raise ConfigError(
            f"{reason}: at which scale this part of a graph was made isn't known\n"
            f"  gradient checkpointing: call backward earlier, inside of `scaled`"
        )

    def _follow_this_thread(self, number: int, scale: float) -> None:
        self.numbers, self.scales, self.thread = [number], [scale], get_ident()  # each thread counts by itself
        self.threads.add(self.thread)
