"""An audit tells if adapters would train, and if a merge of them would be what they are.

print(ll.audit(model, batch))
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..base.still import still
from ..core.scaled import disabled
from ..core.state import session_of
from ..measure.audit import Audit, Batch, numbers_in, outputs, parts_taken, unchanged
from .in_memory import merged as merged_weights


def audit(model: nn.Module, batch: Batch, merged: bool = False) -> Audit:
    """Run one forward and backward on a batch, and see that every adapter takes part in it.

    The batch goes in as `model(**batch)`, a tensor as `model(batch)`. What is differentiated is the output's `loss`,
    or, without one, the mean square of each floating-point output. The model runs in the mode that it is in: call
    `model.train()` first to see what training does. Gradients, statistics of normalisations and random states are
    afterwards as they were. Of a model inside DistributedDataParallel or torch.compile the inner one runs.

    merged      also run the batch in eval mode with the adapters in the weights, and without them: `Audit.merged` is
                the greatest difference of an output from the attached model's, divided by the greatest difference that
                the adapters make. It takes the memory of the adapted weights once more; quantised layers are dense then

    Raises:
        TargetError: naming them, for layers that were never called, so that their adapters have no effect (the model
            reads the weight without calling the layer, or doesn't use it, or nothing in this batch reaches that part of
            it), and for adapter parameters without a gradient. Also where there is nothing to audit: no adapter, a
            merged one, or all at scale 0.
        QuantizedWeightError: as attach, where training would get wrong gradients or none; and what the model raises.
        With merged=True also what `merge` raises.
    """
    taken = parts_taken(model, batch)
    return replace(taken, merged=difference(session_of(model)[0], batch)) if merged else taken


def difference(root: nn.Module, batch: Batch) -> float:
    """`Audit.merged` of the module that adapters were attached to."""

    def run() -> list[Tensor]:
        with unchanged(root), still(root):
            return [tensor.double() for tensor in numbers_in(outputs(root, batch))]

    with merged_weights(root):
        in_weights = run()
    attached = run()
    with disabled(root):
        base = run()
    error, change = _apart(in_weights, attached), _apart(base, attached)
    return error / change if change else math.inf if error else 0.0


def _apart(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The greatest difference; infinite where only one is a finite number, or both are infinite and differ."""
    differences = [(a - b).abs()[a != b] for a, b in zip(outputs, others, strict=True)]
    return max((float(d.nan_to_num(math.inf).max()) for d in differences if d.numel()), default=0.0)
