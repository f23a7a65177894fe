"""transformers' Trainer with adapters: checkpoints hold adapters, not the base, and a quantised base may train.

    from lora_lite.trainer import AdapterTrainer
    trainer = AdapterTrainer(model, args, train_dataset=...)
    trainer.train()  # train(resume_from_checkpoint=True) goes on from the last checkpoint

`class MyTrainer(AdapterCheckpoints, SFTTrainer)` does the same for a trainer of your own. For preference training,
`DPOTrainer(model, ref_model=reference(model), ...)` takes the model itself with its adapter off. Without it TRL loads a
second model by its name: beside a quantised model that is another one (first loss 0.73, where ln 2 = 0.69 is right).
"""

from .checkpoints import AdapterCheckpoints, AdapterTrainer
from .preference import Reference, reference

__all__ = ["AdapterCheckpoints", "AdapterTrainer", "Reference", "reference"]
