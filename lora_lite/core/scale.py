"""A number that changes, and which it was when autograd made a node: what gradient checkpointing needs of the scale.

torch.utils.checkpoint runs a part of the forward again in the middle of the backward, when the `scaled` block that the
forward ran in may be over. autograd numbers its nodes in the order in which they are made, so the node that asks for
the second run tells what the first one saw; torch has no public name for either, and uses both itself. Each thread has
a count of its own, and nodes that a second run makes have late numbers: where those would matter it raises.
"""

from bisect import bisect_right
from threading import get_ident

import torch

from ..errors import ConfigError

MOST_CHANGES = 10_000
backward_node = torch._C._current_autograd_node
"""The node for which a backward runs a forward again, with a `_sequence_nr()`; None outside of every backward."""


class Timeline:
    """Values by the number of the first node that was made under each, in the thread that last had to do with it."""

    def __init__(self) -> None:
        self.since: list[int] = []
        """Empty while the value has never changed."""
        self._values: list[float] = []
        self._thread = 0
        """Whose count the numbers are of."""
        self._threads: set[int] = set()
        """All that had to do with it."""
        self._is_between = False
        """Another thread has changed the value since the last forward that a graph may be pending of."""
        self._again: int | None = None
        """Nodes from this one on were made by a second run, until there is a first one again."""

    def change(self, before: float, after: float) -> None:
        """From the next node on."""
        now = torch.autograd._get_sequence_nr()
        if not self.since:
            self._start(0, before)
        elif self._thread != get_ident():
            self._start(now, after)
            self._is_between = True
        if self.since[-1] == now:
            self._values[-1] = after  # nothing was made under the last one
            return
        self.since.append(now)
        self._values.append(after)
        if len(self.since) > MOST_CHANGES:
            del self.since[: MOST_CHANGES // 2], self._values[: MOST_CHANGES // 2]

    def first_run(self, value: float) -> None:
        """A forward outside of every backward reads the value, which has changed before."""
        if self._thread != get_ident():
            self._start(torch.autograd._get_sequence_nr() if get_ident() in self._threads else 0, value)
        self._again, self._is_between = None, False

    def _start(self, since: int, value: float) -> None:
        self.since, self._values, self._thread = [since], [value], get_ident()
        self._threads.add(self._thread)

    def at(self, node: int, now: float) -> float:
        """The value under which a node was made; `now` if it never changed. Raises ConfigError where it isn't known."""
        if not self.since:
            return now
        index = bisect_right(self.since, node) - 1
        why = ""
        here = get_ident()  # of a CPU; an accelerator's backward has a thread of its own
        elsewhere = here != self._thread and here in self._threads
        if elsewhere or self._is_between or (index < 0 and len(self._threads) > 1):
            why = "several threads change the scale or run forwards: at which one this part of a graph was made"
        elif index < 0:
            why = f"more than {MOST_CHANGES // 2} changes of the scale ago: at which one this part of a graph was made"
        elif self._again is not None and node >= self._again:
            why = "a checkpoint inside of a reentrant one is run again: at which scale it was made"
        if why:
            raise ConfigError(f"{why} isn't known\n  gradient checkpointing: call backward earlier, inside of `scaled`")
        if self._values[index] != now and self._again is None:
            self._again = torch.autograd._get_sequence_nr()
        return self._values[index]
