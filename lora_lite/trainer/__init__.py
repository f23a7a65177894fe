"""Training by other libraries, with adapters: their checkpoints hold adapters, not the base.

    from lora_lite.trainer import AdapterTrainer
    trainer = AdapterTrainer(model, args, train_dataset=...)
    trainer.train()  # train(resume_from_checkpoint=True) goes on from the last checkpoint

`class MyTrainer(AdapterCheckpoints, SFTTrainer)` does the same for a trainer of TRL, or of your own. One that has a
reference (DPO, KTO, GRPO, ...) takes the model itself for it, with its adapters as they are when the trainer is made;
`ref_model=reference(model)` is the base. No second model is loaded.

`lora_lite.trainer.accelerate` and `lora_lite.trainer.lightning` are of these libraries, and don't need transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .preference import Reference, reference, snapshot

if TYPE_CHECKING:
    from .checkpoints import AdapterCheckpoints, AdapterTrainer

__all__ = ["AdapterCheckpoints", "AdapterTrainer", "Reference", "reference", "snapshot"]


def __getattr__(name: str) -> Any:
    if name in ("AdapterCheckpoints", "AdapterTrainer"):  # on first use: it imports transformers
        return getattr(import_module(".checkpoints", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
