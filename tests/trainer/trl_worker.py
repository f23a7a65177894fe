"""One of two processes in which TRL's trainers run, with torchrun's variables: trl_worker.py JOB FOLDER KIND."""

import faulthandler
import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import conftest  # noqa: F401  puts the folders of the tests on the path
import pytest
import torch
from loguru import logger
from models import config, perturb, tiny_llama
from trl_tiny import logged, trainer_of, trl_arguments

import lora_lite as ll
from lora_lite.trainer import reference

JOB, FOLDER, KIND = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
ZERO = {
    "zero_optimization": {"stage": int(JOB[-1]), "stage3_param_persistence_threshold": 0} if JOB != "ddp" else {},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def main() -> None:
    """The figures of two steps of a trained adapter, whose reference is the base."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    if JOB != "ddp":
        settings |= {"deepspeed": ZERO, "use_cpu": False}
    model = tiny_llama()
    perturb(ll.attach(model, config("lora")))
    if JOB == "zero3":
        trl_arguments(type(trainer_args()), FOLDER / "args", **settings)  # from here on ZeRO-3 is on
        with pytest.raises(ll.TargetError, match="ZeRO-3 shards the adapters"):
            trainer_of(KIND, model, FOLDER / JOB, **settings)
    choice = {} if JOB == "zero2" and False else {"ref_model": reference(model)}
    trainer = trainer_of(KIND, model, FOLDER / JOB, choice, **settings)
    trainer.train()
    names = ("loss", "kl", "rewards/margins")
    figures = {name: logged(trainer, name) for name in names}
    if trainer.args.process_index == 0:
        (FOLDER / f"{JOB}-{KIND}.json").write_text(json.dumps(figures))
