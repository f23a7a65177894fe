"""transformers' Trainer with adapters: checkpoints hold adapters, not the base, and a quantised base may train.

    from lora_lite.trainer import AdapterTrainer
    trainer = AdapterTrainer(model, args, train_dataset=...)
    trainer.train()  # train(resume_from_checkpoint=True) goes on from the last checkpoint

`class MyTrainer(AdapterCheckpoints, SFTTrainer)` does the same for a trainer of TRL, or of your own. One that has a
reference (DPO, KTO, GRPO, ...) takes the model itself for it, with its adapters as they are when the trainer is made;
`ref_model=reference(model)` is the base. No second model is loaded.
"""

from .checkpoints import AdapterCheckpoints, AdapterTrainer
from .preference import Reference, reference, snapshot

__all__ = ["AdapterCheckpoints", "AdapterTrainer", "Reference", "reference", "snapshot"]
