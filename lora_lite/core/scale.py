"""The scale of an adapter: what a call computes with, and what gradient checkpointing needs where it has been changed.

torch.utils.checkpoint runs a part of the forward again in the middle of the backward, when the `scaled` block that the
forward ran in may be over. autograd numbers its nodes in the order in which they are made, so the node that asks for
the second run tells which scale the first one saw; torch has no public name for either, and uses both itself. Each
thread has a count of its own, and nodes that a second run makes have late numbers: where those would matter it raises.
"""

from bisect import bisect_right
from threading import get_ident
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError

MOST_CHANGES = 10_000  # a search or an evaluation may change c for ever, with no backward that it would be kept for
_backward_node = torch._C._current_autograd_node  # the node that asks for a second run; None outside of a backward
_backward_number = torch._C._current_graph_task_id  # -1 outside of a backward


class Scale(NamedTuple):
    """The scale of one call. In a graph of torch.compile `value` is a tensor without dimensions: a number would be a
    part of the graph, or break it (torch 2.13, with checkpointing)."""

    value: Any
    is_zero: bool
    is_one: bool


class ScaleChanges:
    """The changes of one adapter's scale, by the number of the first node that was made under each.

    An adapter has none until its scale is changed for the first time.
    """

    def __init__(self, scale: float) -> None:
        self.numbers, self.scales = [0], [scale]
        self.thread = get_ident()  # the numbers are of its count
        self.threads = {self.thread}  # all that changed the scale, or ran a forward after a change
        self.in_doubt = False  # another thread has changed it since the last forward
        self.second_run: int | None = None  # nodes from this number on were made by a second run
        self.set_in = -1  # the backward within which the scale was set, by who runs a forward there; -1 for none

    def change(self, scale: float, set_in: int | None = None) -> None:
        """From the next node on the scale is this one."""
        number = torch.autograd._get_sequence_nr()  # of the next node that this thread makes
        if self.thread != get_ident():
            self._follow_this_thread(number, scale)
            self.in_doubt = True
        elif self.numbers[-1] == number:
            self.scales[-1] = scale  # nothing was made under the last one
        else:
            self.numbers.append(number)
            self.scales.append(scale)
            if len(self.numbers) > MOST_CHANGES:  # half at a time, so that a change rarely shifts the lists
                del self.numbers[: MOST_CHANGES // 2], self.scales[: MOST_CHANGES // 2]
        self.set_in = _backward_number() if set_in is None else set_in

    def of_this_call(self, scale: float) -> float:
        """The scale of a call: as it is set; in a second run, as it was in the first.

        Raises:
            ConfigError: where that isn't known.
        """
        node = _backward_node()
        if node is None:  # no backward is running, so this is a first run
            if self.thread != get_ident():
                number = torch.autograd._get_sequence_nr() if get_ident() in self.threads else 0
                self._follow_this_thread(number, scale)
            self.second_run, self.in_doubt = None, False
            return scale
        # Who sets the scale within a backward, and runs a forward there, means that one.
        return scale if self.set_in == _backward_number() else self._of_first_run(node._sequence_nr(), scale)

    def _of_first_run(self, number: int, scale: float) -> float:
        index = bisect_right(self.numbers, number) - 1  # the last change before the node; -1 if it is forgotten
        # An accelerator's backward has a thread of its own, which has never changed the scale.
        elsewhere = get_ident() != self.thread and get_ident() in self.threads
        if elsewhere or self.in_doubt or (index < 0 and len(self.threads) > 1):
            raise _not_known(
                "several threads change the scale or run forwards: at which one this part of a graph was made"
            )
        if index < 0:
            many = f"more than {MOST_CHANGES // 2} changes of the scale ago"
            raise _not_known(f"{many}: at which one this part of a graph was made")
        if self.second_run is not None and number >= self.second_run:
            raise _not_known("a checkpoint inside of a reentrant one is run again: at which scale it was made")
        if self.scales[index] != scale and self.second_run is None:  # nodes made from here on have late numbers
            self.second_run = torch.autograd._get_sequence_nr()
        return self.scales[index]

    def _follow_this_thread(self, number: int, scale: float) -> None:
        self.numbers, self.scales, self.thread = [number], [scale], get_ident()
        self.threads.add(self.thread)


def _not_known(what: str) -> ConfigError:
    return ConfigError(f"{what} isn't known\n  gradient checkpointing: call backward earlier, inside of `scaled`")
