"""TRL's trainers on tiny models: each with the mixin, its arguments and some data, by a short name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl.import_utils import suppress_experimental_warning

from lora_lite.trainer import AdapterCheckpoints

with suppress_experimental_warning():  # TRL's own way, and each import would warn
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

WORDS = ("the", "cat", "dog", "sat", "ran", "on", "mat", "road", "good", "bad")
STORIES = [" ".join(WORDS[(i * k + j) % len(WORDS)] for j in range(8)) for i in range(4) for k in (1, 3)]
PAIRS = [
    {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran on the road"},
    {"prompt": "the dog", "chosen": " ran on", "rejected": " sat bad bad mat"},
]


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    special = ("[PAD]", "[UNK]", "[EOS]")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate((*special, *WORDS))}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=32
    )


def trl_arguments(kind: Any, folder: Path, **overrides: Any) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    return kind(**(options | overrides))


def longest(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


@dataclass(frozen=True)
class Kind:
    """One of TRL's trainers: what it is given beside the model and its arguments."""

    trainer: Any
    config: Any
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    rewards: bool = False


PROMPTS = [{"prompt": pair["prompt"]} for pair in PAIRS]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
ONLINE = {"num_generations": 2, "max_completion_length": 4, "temperature": 1.0}
SHORT = {"max_length": 16}
KINDS = {
    "sft": Kind(trl.SFTTrainer, trl.SFTConfig, [{"text": story} for story in STORIES], SHORT),
    "reward": Kind(trl.RewardTrainer, trl.RewardConfig, PAIRS, SHORT),
    "dpo": Kind(trl.DPOTrainer, trl.DPOConfig, PAIRS, SHORT),
    "kto": Kind(trl.KTOTrainer, trl.KTOConfig, LABELLED, SHORT),
    "grpo": Kind(trl.GRPOTrainer, trl.GRPOConfig, PROMPTS, ONLINE | {"beta": 0.1}, rewards=True),
    "rloo": Kind(trl.RLOOTrainer, trl.RLOOConfig, PROMPTS, ONLINE | {"beta": 0.1}, rewards=True),
    "cpo": Kind(CPOTrainer, CPOConfig, PAIRS, SHORT),
    "orpo": Kind(ORPOTrainer, ORPOConfig, PAIRS, SHORT),
    "online_dpo": Kind(OnlineDPOTrainer, OnlineDPOConfig, PROMPTS, SHORT | {"max_new_tokens": 4}, rewards=True),
}
REFERRING = ("dpo", "kto", "grpo", "rloo", "online_dpo")
"""Those that have a reference."""


def trainer_of(kind: str, model: Any, folder: Path, more: dict[str, Any] | None = None, **settings: Any) -> Any:
    """The trainer with the mixin, which takes `more` beside its usual arguments. settings: of its config."""
    chosen = KINDS[kind]
    args = trl_arguments(chosen.config, folder, **(chosen.settings | settings))
    options = {"args": args, "train_dataset": Dataset.from_list(chosen.rows * 2), "processing_class": tokenizer()}
    options |= {"reward_funcs": longest} if chosen.rewards else {}
    return mixed(chosen.trainer)(model, **(options | (more or {})))


def mixed(trainer: type) -> Callable[..., Any]:
    return type(f"Our{trainer.__name__}", (AdapterCheckpoints, trainer), {})


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
