"""Training by other libraries, with adapters: their checkpoints hold adapters, not the base.

    from lora_lite.trainer import AdapterTrainer
    trainer = AdapterTrainer(model, args, train_dataset=...)
    trainer.train()  # train(resume_from_checkpoint=True) goes on from the last checkpoint

`class MyTrainer(AdapterCheckpoints, SFTTrainer)` does the same for a trainer of your own, on quantised bases too. For
preference training, `DPOTrainer(model, ref_model=reference(model), ...)` takes the model itself with its adapter off.
Without it TRL loads a second model by its name: beside a quantised model that is another one (first loss 0.73, where
ln 2 = 0.69 is right).

`lora_lite.trainer.accelerate` and `lora_lite.trainer.lightning` are of these libraries, and don't need transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .preference import Reference, reference

if TYPE_CHECKING:
    from .checkpoints import AdapterCheckpoints, AdapterTrainer

__all__ = ["AdapterCheckpoints", "AdapterTrainer", "Reference", "reference"]


def __getattr__(name: str) -> Any:
    if name in ("AdapterCheckpoints", "AdapterTrainer"):  # on first use: it imports transformers
        return getattr(import_module(".checkpoints", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
