"""One of two processes in which transformers' Trainer runs, with torchrun's variables."""

import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  puts the folders of the tests on the path
import pytest
import torch
from models import IDS, config, tiny_llama
from processes import in_two, two_on_cpu
from safetensors.torch import load_file
from test_audit import SMALL
from test_ecosystem import Tokens, arguments
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

import lora_lite as ll
from lora_lite.trainer import AdapterTrainer

JOB, FOLDER = sys.argv[1], Path(sys.argv[2])
STAGE_3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def losses(trainer: AdapterTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ddp() -> None:
    """The first step is audited in each process, and what passes trains on."""
    model: Any = tiny_llama()
    ll.attach(model, config("lora"))
    trainer = AdapterTrainer(model, arguments(FOLDER / "llama"), train_dataset=Tokens())
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert len(losses(trainer)) == 6

    mamba = MambaForCausalLM(MambaConfig(**SMALL, state_size=8))
    with pytest.MonkeyPatch.context() as patch:  # as if the model's code didn't show what it reads
        patch.setattr("lora_lite.base.layer.readers", lambda modules: {})
        ll.attach(mamba, ll.LoRAConfig(r=4))
    trainer = AdapterTrainer(mamba, arguments(FOLDER / "mamba"), train_dataset=Tokens())
    with pytest.raises(ll.TargetError, match=r"reads the weight itself: .*mixer\.dt_proj \(2\)\n"):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- ZeRO-3 -------------------------------------------------------------------------------------


def zero_trainer(variant: str, run: str, steps: int, **overrides: Any) -> AdapterTrainer:
    """A trainer of a model that `from_pretrained` has partitioned, as it does once the arguments are there."""
    options = {"max_steps": steps, "save_steps": 2, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    args = arguments(FOLDER / run, **(options | {"deepspeed": STAGE_3, "use_cpu": False} | overrides))
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (0,)
    torch.manual_seed(5)
    ll.attach(model, config(variant))
    return AdapterTrainer(model, args, train_dataset=Tokens())


def zero() -> None:
    """Attach on a partitioned model, train, save and resume: the same losses, and files of whole tensors."""
    deepspeed.init_distributed(dist_backend="gloo")
    two_on_cpu()
    for variant in ("lora", "dora"):
        whole = zero_trainer(variant, f"{variant}-whole", 4)
        whole.train()
        assert whole.args.world_size == 2
        assert losses(whole)[-1] < losses(whole)[0]
        for call in (ll.merge, ll.detach):
            with pytest.raises(ll.TargetError, match="sharded"):
                call(whole.model)
        zero_trainer(variant, f"{variant}-part", 2).train()
        again = zero_trainer(variant, f"{variant}-part", 4)
        again.train(resume_from_checkpoint=True)
        assert losses(again) == losses(whole)

        ll.save(whole.model, FOLDER / f"{variant}.safetensors")
        alone = tiny_llama()
        ll.load(alone, FOLDER / f"{variant}.safetensors")
        same_outputs(alone, whole)
        ll.restore(alone, FOLDER / f"{variant}-whole" / "checkpoint-4" / "default.safetensors")
        same_outputs(alone, whole)
    takes_values_back()
    args = arguments(FOLDER / "gpt2", deepspeed=STAGE_3, use_cpu=False)
    transposed = AutoModelForCausalLM.from_pretrained(FOLDER / "gpt2-base")
    ll.attach(transposed, ll.LoRAConfig(r=2))  # Conv1D, whose features are those of its weight
    trainer = AdapterTrainer(transposed, args, train_dataset=Tokens())
    trainer.train()
    assert len(losses(trainer)) == 6


def takes_values_back() -> None:
    """A file is restored into partitioned parameters, until an optimizer has copies of them. A model may have been
    partitioned by the trainer alone."""
    model = tiny_llama()
    ll.attach(model, config("lora"))
    trainer = AdapterTrainer(
        model, arguments(FOLDER / "late", deepspeed=STAGE_3, use_cpu=False), train_dataset=Tokens()
    )
    trainer.train()
    assert model.model.layers[0].mlp.up_proj.lora_A.shape == (0,)
    file = FOLDER / "late" / "checkpoint-6" / "default.safetensors"
    with pytest.raises(ll.CheckpointError, match="ZeRO-3's optimizer has copies of its values"):
        ll.restore(model, file)
    alone = tiny_llama()
    ll.load(alone, file)
    same_outputs(alone, trainer)
    fresh = zero_trainer("lora", "restored", 2)
    ll.restore(fresh.model, FOLDER / "lora.safetensors")
    ll.save(fresh.model, FOLDER / "again.safetensors")
    before, after = (load_file(FOLDER / name) for name in ("lora.safetensors", "again.safetensors"))
    assert all(torch.equal(before[key], after[key]) for key in before)


@torch.no_grad()
def same_outputs(alone: Any, trainer: AdapterTrainer) -> None:
    engine: Any = trainer.model_wrapped
    engine.eval()
    torch.testing.assert_close(alone(input_ids=IDS).logits, engine(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    if JOB == "zero":
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # both processes would compile it
    in_two({"ddp": ddp, "zero": zero}[JOB])
