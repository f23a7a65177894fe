"""TRL's trainers in two processes, by DDP, ZeRO-2 and ZeRO-3 in turn: python trl_worker.py FOLDER."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import conftest  # noqa: F401  puts the folders of the tests on the path
import deepspeed.ops
import pytest
from datasets import load_from_disk
from models import config, perturb, tiny_llama
from processes import in_two, two_on_cpu
from trl_tiny import KINDS, logged, trainer_of, trl_arguments

import lora_lite as ll
from lora_lite.trainer import Reference, reference

FOLDER = Path(sys.argv[1])
NAMES = ("loss", "kl", "rewards/margins")


def settings(name: str) -> dict[str, Any]:
    if name == "ddp":
        return {}
    zero = {
        "zero_optimization": {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return {"deepspeed": zero, "use_cpu": False}


def trained() -> Any:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora")))
    return model


def main(job: str) -> None:
    """Two steps of each trainer, on a trained adapter: the reference is the base, and as the adapter was."""
    figures, options = {}, settings(job)
    for kind in ("dpo", "kto", "grpo"):
        model = trained()
        trainer = trainer_of(kind, model, FOLDER / job, {"ref_model": reference(model)}, **options)
        trainer.train()
        assert isinstance(trainer.ref_model, Reference)
        figures[kind] = {name: logged(trainer, name) for name in NAMES}
    precomputed: Any = {"precompute_ref_log_probs": True, **options}
    model = trained()
    if job == "zero3":
        trl_arguments(KINDS["dpo"].config, FOLDER, **options)  # from here on transformers says that it is ZeRO-3
        with pytest.raises(
            ll.TargetError, match=r"ZeRO-3 shards the adapters.*\n  pass ref_model=.*reference\(model\)"
        ):
            trainer_of("dpo", model, FOLDER / job, **options)
        with pytest.raises(
            ll.ConfigError, match=r"makes a second ZeRO-3 engine of the model.*\n  don't precompute, and"
        ):
            trainer_of("dpo", model, FOLDER / job, **precomputed)
    else:
        trainer = trainer_of("dpo", trained(), FOLDER / job, **options)
        trainer.train()
        assert logged(trainer, "rewards/margins")[0] == 0
        if job == "zero2":
            with pytest.raises(ll.ConfigError, match="under DeepSpeed, precompute_ref_log_probs=True runs the model"):
                trainer_of("dpo", model, FOLDER / job, {"ref_model": reference(model)}, **precomputed)
        data = load_from_disk(
            FOLDER / f"pairs-{job}"
        )  # the log-probabilities go beside it, where both processes find them
        trainer = trainer_of("dpo", model, FOLDER / job, {"train_dataset": data}, **precomputed)
        trainer.train()
        figures["start"] = {name: logged(trainer, name) for name in NAMES}
    if trainer.args.process_index == 0:
        (FOLDER / f"{job}.json").write_text(json.dumps(figures))


def job(name: str) -> None:
    if name != "ddp":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        two_on_cpu()
    main(name)


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # both processes would compile it
    for name in ("ddp", "zero2", "zero3"):
        if in_two(partial(job, name)) != [0, 0]:
            break
