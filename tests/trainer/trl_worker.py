"""One of two processes in which TRL's trainers run, with torchrun's variables: ddp, zero2 or zero3, then a folder."""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import conftest  # noqa: F401  puts the folders of the tests on the path
import pytest
from datasets import load_from_disk
from models import config, perturb, tiny_llama
from processes import in_two, two_on_cpu
from trl_tiny import KINDS, logged, trainer_of, trl_arguments

import lora_lite as ll
from lora_lite.trainer import Reference, reference

JOB, FOLDER = sys.argv[1], Path(sys.argv[2])
NAMES = ("loss", "kl", "rewards/margins")


def settings() -> dict[str, Any]:
    if JOB == "ddp":
        return {}
    zero = {
        "zero_optimization": {"stage": int(JOB[-1]), "stage3_param_persistence_threshold": 0},
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


def main() -> None:
    """Two steps of each trainer, on a trained adapter: the reference is the base, and as the adapter was."""
    figures = {}
    for kind in ("dpo", "kto", "grpo"):
        model = trained()
        trainer = trainer_of(kind, model, FOLDER / JOB, {"ref_model": reference(model)}, **settings())
        trainer.train()
        assert isinstance(trainer.ref_model, Reference)
        figures[kind] = {name: logged(trainer, name) for name in NAMES}
    precomputed: Any = {"precompute_ref_log_probs": True, **settings()}
    model = trained()
    if JOB == "zero3":
        trl_arguments(KINDS["dpo"].config, FOLDER, **settings())  # from here on transformers says that it is ZeRO-3
        with pytest.raises(
            ll.TargetError, match=r"ZeRO-3 shards the adapters.*\n  pass ref_model=.*reference\(model\)"
        ):
            trainer_of("dpo", model, FOLDER / JOB, **settings())
        with pytest.raises(
            ll.ConfigError, match=r"makes a second ZeRO-3 engine of the model.*\n  don't precompute, and"
        ):
            trainer_of("dpo", model, FOLDER / JOB, **precomputed)
    else:
        trainer = trainer_of("dpo", trained(), FOLDER / JOB, **settings())
        trainer.train()
        assert logged(trainer, "rewards/margins")[0] == 0
        if JOB == "zero2":
            with pytest.raises(ll.ConfigError, match="under DeepSpeed, precompute_ref_log_probs=True runs the model"):
                trainer_of("dpo", model, FOLDER / JOB, {"ref_model": reference(model)}, **precomputed)
        data = load_from_disk(FOLDER / "pairs")  # the log-probabilities go beside it, where both processes find them
        trainer = trainer_of("dpo", model, FOLDER / JOB, {"train_dataset": data}, **precomputed)
        trainer.train()
        figures["start"] = {name: logged(trainer, name) for name in NAMES}
    if trainer.args.process_index == 0:
        (FOLDER / f"{JOB}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    if JOB != "ddp":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # both processes would compile it
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        two_on_cpu()
    in_two(main)
