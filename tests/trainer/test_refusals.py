"""What a trainer's constructor is given that adapters would not survive: an error that says what to write instead."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from models import config, tiny_llama
from trl.import_utils import suppress_experimental_warning
from trl_tiny import KINDS, mixed, tokenizer, trainer_of, trl_arguments

import lora_lite as ll
from lora_lite.trainer import reference
from lora_lite.trainer.construction import _check_adapters

with suppress_experimental_warning():
    from trl.experimental.async_grpo import AsyncGRPOConfig
    from trl.experimental.sdft import SDFTConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]


def adapted(**fields: Any) -> Any:
    model = tiny_llama()
    ll.attach(model, config("lora", **fields))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_the_trainer_is_to_attach(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    name = f"Our{KINDS[kind].trainer.__name__}"
    for cfg, cure in ((ll.LoRAConfig(r=4), "cfg"), (peft.LoraConfig(r=4), r"lora_lite\.LoRAConfig\(\.\.\.\)")):
        match = (
            rf"^{name} takes no peft_config \({type(cfg).__name__}\): .*\n  lora_lite\.attach\(model, {cure}\) first"
        )
        with pytest.raises(ll.TargetError, match=match):
            trainer_of(kind, adapted(), tmp_path, {"peft_config": cfg})
        with pytest.raises(ll.TargetError, match=match):  # which comes before it is missed
            trainer_of(kind, tiny_llama(), tmp_path, {"peft_config": cfg})


def test_such_a_config_by_place(tmp_path: Path) -> None:
    given = list(inspect.signature(trl.DPOTrainer.__init__).parameters)
    between = [None] * (given.index("peft_config") - given.index("ref_model"))
    with pytest.raises(ll.TargetError, match="OurDPOTrainer takes no peft_config"):
        mixed(trl.DPOTrainer)(adapted(), *between, ll.LoRAConfig())


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_the_name_of_a_model(kind: str, tmp_path: Path) -> None:
    match = (
        r"is given a model with an adapter on it, not 'org/name'\n  lora_lite\.load_base\('org/name'\) and lora_lite"
    )
    with pytest.raises(ll.TargetError, match=match):
        trainer_of(kind, "org/name", tmp_path)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "online_dpo"])
def test_generation_by_vllm(kind: str, tmp_path: Path) -> None:
    match = "vLLM would generate without the adapter, since TRL merges those of PEFT alone\n  use_vllm=False generates"
    with pytest.raises(ll.TargetError, match=match):
        trainer_of(kind, adapted(), tmp_path, use_vllm=True)


def test_a_trainer_that_generates_by_vllm_alone(tmp_path: Path) -> None:
    args = trl_arguments(AsyncGRPOConfig, tmp_path)
    with pytest.raises(ll.TargetError, match=r"vLLM would .*\n  use a trainer that can generate without vLLM"):
        trainer_of("grpo", adapted(), tmp_path, {"args": args})


def test_a_teacher_that_would_be_loaded(tmp_path: Path) -> None:
    args = trl_arguments(SDFTConfig, tmp_path, teacher_model_kind="base", num_generations=2)
    with pytest.raises(ll.TargetError, match=r"teacher_model_kind='base' loads a second model.*\n  use 'live'"):
        trainer_of("grpo", adapted(), tmp_path, {"args": args})


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_a_template_that_may_add_tokens(kind: str, tmp_path: Path) -> None:
    match = (
        r"chat_template_path='org/name' may add tokens.*\n  trl\.clone_chat_template and .* before lora_lite\.attach"
    )
    with pytest.raises(ll.ConfigError, match=match):
        trainer_of(kind, adapted(), tmp_path, chat_template_path="org/name")


def test_a_template_of_a_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    trainer = trainer_of("sft", adapted(), tmp_path, chat_template_path=str(tmp_path / "chat.jinja"))
    assert trainer.processing_class.chat_template == "{{ messages }}"


def test_dropout_that_is_to_be_switched_off(tmp_path: Path) -> None:
    match = r"'default' has dropout=0\.1, which disable_dropout=True doesn't reach\n  attach it with dropout=0, or"
    with pytest.raises(ll.ConfigError, match=match):
        trainer_of("dpo", adapted(dropout=0.1), tmp_path)
    trainer_of("dpo", adapted(dropout=0.1), tmp_path, disable_dropout=False)


def test_dropout_that_settings_left_out_switch_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    defaults = trl.DPOConfig.__init__
    on_this_machine: Any = {"use_cpu": True, "bf16": False}
    monkeypatch.setattr(trl.DPOConfig, "__init__", lambda self, *a, **kw: defaults(self, *a, **on_this_machine | kw))
    rows = Dataset.from_list(KINDS["dpo"].rows * 2)
    with pytest.raises(ll.ConfigError, match=r"dropout=0\.1, which disable_dropout=True doesn't reach"):
        mixed(trl.DPOTrainer)(adapted(dropout=0.1), train_dataset=rows, processing_class=tokenizer())


def under_deepspeed(folder: Path) -> Any:
    """Settings as TrainingArguments has them then; its engine is made after the checks."""
    args = trl_arguments(trl.SFTConfig, folder)
    args.deepspeed_plugin = object()
    return {"args": args}


def with_method(cfg: Any) -> Any:
    model = tiny_llama()
    ll.attach(model, cfg)
    return model


def test_penalties_and_schedules_under_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = (
        r"OurSFTTrainer: adapter 'default' \((adalora|adamss)\) has a schedule, .* DeepSpeed .*\n  train it by DDP"
    )
    for cfg in (ll.AdaLoRAConfig(total_step=9, tinit=1, tfinal=1), ll.AdaMSSConfig(use_asa=True)):
        with pytest.raises(ll.TargetError, match=schedule):
            trainer_of("sft", with_method(cfg), tmp_path, under_deepspeed(tmp_path))
    monkeypatch.setattr("lora_lite.trainer.construction.is_deepspeed_zero3_enabled", lambda: True)
    match = (
        r"OurSFTTrainer: adapter 'default' \(kasa\) adds a penalty .* ZeRO-3 parts them\n  train it by DDP or ZeRO-2"
    )
    with pytest.raises(ll.TargetError, match=match):
        trainer_of("sft", with_method(config("kasa")), tmp_path, under_deepspeed(tmp_path))


def test_a_schedule_that_is_off_is_none() -> None:
    for cfg in (ll.AdaLoRAConfig(), ll.AdaMSSConfig(), ll.OFTConfig(block_size=4)):
        _check_adapters("OurTrainer", with_method(cfg), under_deepspeed(Path())["args"])


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
def test_a_reference_that_is_to_be_synchronised(kind: str, tmp_path: Path) -> None:
    with pytest.raises(
        ll.ConfigError, match=r"sync_ref_model=True needs a reference with weights of its own.*\n  pass"
    ):
        trainer_of(kind, adapted(), tmp_path, sync_ref_model=True)


def test_a_reference_of_the_users_is_synchronised(tmp_path: Path) -> None:
    own = {"ref_model": tiny_llama(seed=7)}
    assert trainer_of("dpo", adapted(), tmp_path, own, sync_ref_model=True).ref_model is own["ref_model"]


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_fsdp(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` sets it
    match = "under FSDP the model's shards can't serve as its reference too\n  pass ref_model=, a second model, or use"
    with pytest.raises(ll.TargetError, match=match):
        trainer_of(kind, adapted(), tmp_path)


def test_zero_3_keeps_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lite.trainer.construction.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ll.TargetError, match=r"ZeRO-3 shards the adapters, .*\n  pass ref_model=.*reference\(model\)"):
        trainer_of("dpo", adapted(), tmp_path)


def test_a_reference_for_a_trainer_without_one(tmp_path: Path) -> None:
    for kind, settings in (("sft", {}), ("cpo", {}), ("grpo", {"beta": 0.0})):
        model = adapted()
        with pytest.raises(ll.TargetError, match=r"takes no ref_model of Reference\n  where its beta isn't 0 it takes"):
            trainer_of(kind, model, tmp_path, {"ref_model": reference(model)}, **settings)
    with pytest.raises(ll.TargetError, match="OurGRPOTrainer takes no ref_model of LlamaForCausalLM\n"):
        trainer_of("grpo", adapted(), tmp_path, {"ref_model": tiny_llama()})


class Hidden(trl.GRPOTrainer):
    """A constructor that doesn't say what it hands on."""

    def __init__(self, model: Any, rewards: Any, settings: Any, **options: Any) -> None:
        super().__init__(model, rewards, settings, **options)


class HandedOn(trl.GRPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def test_a_second_model_that_was_loaded_all_the_same(tiny: str, tmp_path: Path) -> None:
    model = ll.load_base(tiny)
    ll.attach(model, config("lora"))
    kind = KINDS["grpo"]
    settings = trl_arguments(kind.config, tmp_path, **kind.settings)
    data = {"train_dataset": Dataset.from_list(kind.rows * 2), "processing_class": tokenizer()}
    match = "OurHidden has loaded a second LlamaForCausalLM as its reference, .* another model\n  give it args="
    with pytest.raises(ll.TargetError, match=match):
        mixed(Hidden)(model, lambda completions, **_: [0.0] * len(completions), settings, **data)
    trainer = mixed(HandedOn)(model, lambda completions, **_: [0.0] * len(completions), settings, **data)
    assert type(trainer.ref_model).__name__ == "Reference"


def test_a_constructor_that_reads_a_beta_which_is_put_away(tmp_path: Path, log: list[str]) -> None:
    kind = KINDS["grpo"]
    data = {"train_dataset": Dataset.from_list(kind.rows * 2), "processing_class": tokenizer()}
    for beta in (0.0, 0.1):
        settings = trl_arguments(kind.config, tmp_path, **(kind.settings | {"beta": beta}))
        warned = [line for line in log if "HandedOn.__init__ reads" in line]
        assert not warned
        mixed(HandedOn)(adapted(), lambda completions, **_: [0.0] * len(completions), settings, **data)
    trainer_of("grpo", adapted(), tmp_path)
    warned = [line for line in log if "args.beta is 0" in line]
    assert len(warned) == 1
    assert warned[0].startswith("WARNING OurHandedOn: while TRL's constructor runs, args.beta is 0")
    assert warned[0].endswith(
        "read self.beta in a later method, or in the constructor of a class above AdapterCheckpoints"
    )
