"""A number that changes, and which it was when autograd made a node: what gradient checkpointing needs of the scale.

torch.utils.checkpoint runs a part of the forward again in the middle of the backward, when the `scaled` block that the
forward ran in may be over. autograd numbers its nodes in the order in which they are made, so the node that asks for
the second run tells what the first one saw; torch has no public name for either, and uses both itself.
"""

from bisect import bisect_right

import torch

from .errors import ConfigError

MOST_CHANGES = 10_000


class Timeline:
    """Values by the number of the first node that was made under each; those before the first change are `since` 0."""

    def __init__(self) -> None:
        self._since: list[int] = []
        self._values: list[float] = []

    def change(self, before: float, after: float) -> None:
        """From the next node on."""
        if not self._since:
            self._since, self._values = [0], [before]
        now = torch.autograd._get_sequence_nr()
        if self._since[-1] == now:
            self._values[-1] = after  # nothing was made under the last one
            return
        self._since.append(now)
        self._values.append(after)
        if len(self._since) > MOST_CHANGES:
            del self._since[: MOST_CHANGES // 2], self._values[: MOST_CHANGES // 2]

    def at(self, node: int, now: float) -> float:
        """The value under which a node was made; `now` if it never changed. Raises ConfigError if that is forgotten."""
        if not self._since:
            return now
        index = bisect_right(self._since, node) - 1
        if index < 0:
            raise ConfigError(
                f"the scale changed more than {MOST_CHANGES // 2} times since a forward that is run again now\n"
                f"  gradient checkpointing: call backward earlier"
            )
        return self._values[index]


def second_run_of() -> int | None:
    """The number of the node for which a backward runs a forward again; None outside of every backward."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()
