"""Pairs of processes in which DeepSpeed trains an adapter, one for a job: python deepspeed_worker.py FOLDER JOB..."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import conftest  # noqa: F401  puts the folders of the tests on the path
import deepspeed
import deepspeed.ops
import pytest
import torch
import torch.distributed as dist
from models import config, perturb, tiny_llama
from processes import in_two, two_on_cpu

import lora_lite as ll

FOLDER, JOBS = Path(sys.argv[1]), sys.argv[2:]
BATCH = torch.arange(48).reshape(4, 12)


def settings(stage: int, offload: bool = False) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        zero |= {"offload_param": {"device": "cpu"}} if stage == 3 else {}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def built(variant: str, stage: int, late: bool) -> tuple[Any, ll.Adapter]:
    """A model with an adapter: partitioned before the attach, or left to `initialize`."""
    model = tiny_llama()
    if stage == 3 and not late:
        deepspeed.zero.Init(module=model, config_dict_or_path=settings(3))
        assert model.lm_head.weight.shape == (0,)
    torch.manual_seed(5)
    return model, ll.attach(model, config(variant))


def engine_of(model: Any, adapter: ll.Adapter, stage: int, offload: bool, cpu_adam: bool = False) -> Any:
    kind: Any = deepspeed.ops.adam.DeepSpeedCPUAdam if cpu_adam else torch.optim.AdamW
    optimizer = kind(list(adapter.parameters()), lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage, offload))[0]


def train(engine: Any, steps: int) -> list[float]:
    batch, losses = BATCH.chunk(2)[dist.get_rank()], []
    engine.train()
    for _ in range(steps):
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def plain(stage: int) -> None:
    """deepspeed.initialize: train, save, resume to the same bits; consolidate to one file, and load that."""
    cases = [("lora", False, False), ("dora", True, False), ("lora", True, True)]
    for variant, late, offload in cases:
        folder = FOLDER / f"{variant}-{late}-{offload}"
        model, adapter = built(variant, stage, late)
        assert adapter.is_sharded == (stage == 3 and not late)
        engine = engine_of(model, adapter, stage, offload)
        first = train(engine, 2)
        engine.save_checkpoint(folder / "ds", exclude_frozen_parameters=late)
        last = train(engine, 2)
        assert last[-1] < first[0]
        ll.save(model, folder / "end.safetensors")

        again, adapter = built(variant, stage, late)
        perturb(adapter) if stage == 2 else None
        engine = engine_of(again, adapter, stage, offload)
        engine.load_checkpoint(folder / "ds", load_module_strict=not late)
        ll.save(again, folder / "two.safetensors")
        assert train(engine, 2) == last
        ll.save(again, folder / "resumed.safetensors")
        same_file(folder / "end.safetensors", folder / "resumed.safetensors")

        consolidated(variant, folder)
        if stage == 3:
            refused(model)
    if stage == 3:
        kept_whole()


def refused(model: Any) -> None:
    with pytest.raises(ll.TargetError, match=r"sharded by ZeRO-3\n  lora_lite\.save .*merge_checkpoint"):
        ll.merge(model)
    with pytest.raises(ll.TargetError, match="sharded by ZeRO-3, which keeps a hold"):
        ll.detach(model)


def kept_whole() -> None:
    """At DeepSpeed's own threshold each of these small parameters is whole in every process, and managed as well."""
    model = tiny_llama()
    adapter = ll.attach(model, config("norm", target_names=r"layernorm$|model\.norm$"))
    cfg = settings(3)
    del cfg["zero_optimization"]["stage3_param_persistence_threshold"]
    optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=1e-2)
    train(deepspeed.initialize(model=model, optimizer=optimizer, config=cfg)[0], 2)
    assert model.model.norm.weight.shape == (64,)
    refused(model)
    ll.save(model, FOLDER / "whole.safetensors")
    alone = tiny_llama()
    ll.load(alone, FOLDER / "whole.safetensors")
    values = ll.adapters(alone)["default"].state_dict()
    assert all(torch.equal(tensor, values[key]) for key, tensor in adapter.state_dict().items())


def cpu_adam() -> None:
    """DeepSpeed's own Adam, which a compiler has made before: offloaded states are its purpose."""
    for stage in (2, 3):
        model, adapter = built("lora", stage, late=True)
        engine = engine_of(model, adapter, stage, offload=True, cpu_adam=True)
        losses = train(engine, 4)
        assert losses[-1] < losses[0]
        ll.save(model, FOLDER / f"{stage}.safetensors")
        alone = tiny_llama()
        ll.load(alone, FOLDER / f"{stage}.safetensors")
        engine.eval()
        with torch.no_grad():
            torch.testing.assert_close(alone(input_ids=BATCH).logits, engine(input_ids=BATCH).logits)


def accelerated(stage: int, offload: bool) -> None:
    """Through Accelerate: save_state has the adapter's file beside DeepSpeed's own, and goes on to the same bits."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    from lora_lite.trainer.accelerate import keep_adapters

    folder = FOLDER / f"accelerate-{offload}"

    def prepared(late: bool) -> tuple[Any, Any, Any]:
        AcceleratorState._reset_state()  # a process has one, with one plugin
        plugin = DeepSpeedPlugin(hf_ds_config=settings(stage, offload) | {"gradient_accumulation_steps": 1})
        accelerator = Accelerator(deepspeed_plugin=plugin)
        keep_adapters(accelerator)
        model, adapter = built("dora", stage, late)
        optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=1e-2)
        return accelerator, *accelerator.prepare(model, optimizer)

    def steps(accelerator: Any, model: Any, optimizer: Any) -> list[float]:
        batch, losses = BATCH.chunk(2)[accelerator.process_index], []
        for _ in range(2):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    whole = prepared(late=True)
    assert type(whole[1]).__name__ == "DeepSpeedEngine"
    assert whole[0].num_processes == whole[1].world_size == 2
    steps(*whole)
    whole[0].save_state(str(folder), exclude_frozen_parameters=True)
    last = steps(*whole)
    ll.save(whole[1], folder / "end.safetensors")
    again = prepared(late=False)
    again[0].load_state(str(folder), load_module_strict=False)
    assert steps(*again) == last
    ll.save(again[1], folder / "resumed.safetensors")
    same_file(folder / "end.safetensors", folder / "resumed.safetensors")
    alone = tiny_llama()
    ll.load(alone, folder / "default.safetensors", verify_base=False)


def trained(stage: int, offload: bool) -> None:
    """Through transformers' Trainer: 2 and 2 steps are 4."""
    from test_ecosystem import Tokens, arguments

    from lora_lite.trainer import AdapterTrainer

    def trainer(run: str, steps: int) -> Any:
        more = {"gradient_accumulation_steps": "auto", "train_micro_batch_size_per_gpu": "auto"}
        args = arguments(
            FOLDER / run,
            max_steps=steps,
            save_steps=2,
            lr_scheduler_type="constant",
            deepspeed=settings(stage, offload) | more,
            use_cpu=False,
        )
        return AdapterTrainer(built("lora", stage, late=True)[0], args, train_dataset=Tokens())

    def losses(of: Any) -> list[float]:
        return [entry["loss"] for entry in of.state.log_history if "loss" in entry]

    whole = trainer("whole", 4)
    whole.train()
    assert type(whole.model_wrapped).__name__ == "DeepSpeedEngine"
    assert whole.args.world_size == whole.model_wrapped.world_size == 2
    trainer("part", 2).train()
    again = trainer("part", 4)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)
    for run in ("whole", "part"):
        assert (FOLDER / run / "checkpoint-4" / "default.safetensors").is_file()
    same_file(*(FOLDER / run / "checkpoint-4" / "default.safetensors" for run in ("whole", "part")))

    # As load_best_model_at_end does; an evaluation would count one process, on a machine without an accelerator.
    adapter, half = ll.adapters(whole.model)["default"], FOLDER / "whole" / "checkpoint-2"
    whole.state.best_model_checkpoint, adapter.scale = str(half), 0.5
    whole._load_best_model()
    assert (adapter.scale, adapter.steps) == (1.0, 2)
    ll.save(whole.model, FOLDER / "best.safetensors")
    same_file(FOLDER / "best.safetensors", half / "default.safetensors")


def consolidated(variant: str, folder: Path) -> None:
    """What zero_to_fp32.py makes of the checkpoint loads as the adapter that was saved beside it."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    if dist.get_rank() == 0:
        convert_zero_checkpoint_to_fp32_state_dict(str(folder / "ds"), str(folder / "fp32"), safe_serialization=True)
        raw, saved = tiny_llama(), tiny_llama()
        ll.load(raw, folder / "fp32", cfg=config(variant), verify_base=False)
        ll.load(saved, folder / "two.safetensors", verify_base=False)
        with torch.no_grad():
            apart = (raw(input_ids=BATCH).logits - saved(input_ids=BATCH).logits).abs().max().item()
        print(f"{variant}: max |logits of zero_to_fp32 - logits of ll.save| = {apart}")
        assert apart == 0
    dist.barrier()


def same_file(one: Path, other: Path) -> None:
    from safetensors.torch import load_file

    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # both processes would compile it
    jobs: dict[str, Any] = {
        "plain": plain,
        "cpu-adam": lambda _: cpu_adam(),
        "accelerate": lambda stage: (accelerated(stage, False), accelerated(stage, True)),
        "trainer": lambda stage: trained(stage, offload=True),
    }

    def job(name: str, stage: str) -> None:
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        two_on_cpu()
        jobs[name](int(stage or 0))

    for wanted in JOBS:
        name, _, stage = wanted.partition(" ")
        if in_two(partial(job, name, stage)) != [0, 0]:
            break
