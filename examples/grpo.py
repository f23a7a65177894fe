"""Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) by TRL: towards plain words.

    python examples/grpo.py            # on SmolLM2-135M; nothing is downloaded

The reward of an answer is the share of its words that are short, which a program counts. In each step the model draws
a group of answers to each of some questions, and learns from how each compares with its group; beta is the price of the
divergence from the reference, which is the model with its adapter off.
"""

from pathlib import Path
from typing import Annotated, Any, cast

import transformers
import typer
from common import (
    Base,
    BaseDtype,
    LearningRate,
    MostTokens,
    Rank,
    Steps,
    check_reload,
    load,
    logits_of,
    plain_errors,
    set_up,
)
from datasets import Dataset
from loguru import logger
from preferences import Progress, questions, quiet, reward, scores, settings, show, user
from smollm2 import smollm2_folder
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import lora_lite as ll
from lora_lite.trainer import AdapterCheckpoints, reference

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Trainer(AdapterCheckpoints, GRPOTrainer):
    pass


@app.command()
def main(
    model: Base = None,
    r: Rank = 8,
    lr: LearningRate = 1e-3,
    beta: Annotated[float, typer.Option(help="The price of a nat of divergence from the reference.")] = 0.04,
    dtype: BaseDtype = "auto",
    steps: Steps = 20,
    groups: Annotated[int, typer.Option(min=1, help="Questions in a step.")] = 2,
    answers: Annotated[int, typer.Option(min=2, help="Answers to each of them.")] = 6,
    held_out: Annotated[int | None, typer.Option(min=1, help="Held-out questions. Default: all.")] = None,
    tokens: MostTokens = 24,
    seed: Annotated[int, typer.Option(help="Of the answers, the adapter and the order of the questions.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("runs", "grpo"),
) -> None:
    """Train an adapter by a reward, show what it does on held-out questions, and save it."""
    set_up(seed)
    quiet()
    with plain_errors():
        taught, asked = questions()
        asked = asked[:held_out]
        source = model or str(smollm2_folder())
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        base = load(source, None, dtype)
        ll.attach(base, ll.LoRAConfig(r=r))
        options = settings(out, steps, lr, seed) | {"beta": beta, "temperature": 1.0}
        options |= {"per_device_train_batch_size": groups * answers, "num_generations": answers}
        trainer: Any = Trainer(
            base,
            reward,
            ref_model=reference(base),
            args=GRPOConfig(**options, max_completion_length=tokens),
            train_dataset=Dataset.from_list(cast(Any, [{"prompt": user(text)} for text in taught])),
            processing_class=tokenizer,
            callbacks=[Progress()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "reward" in entry]
        first, last = history[: len(history) // 3 or 1], history[-(len(history) // 3 or 1) :]
        logger.info(f"reward of drawn answers, first and last third: {mean(first):.3f} -> {mean(last):.3f}")
        ll.save(base, out / "adapter.safetensors")
        show("GRPO", asked[0], scores(base, tokenizer, asked, (1.0,), tokens))
        inputs = ll.prompt_batches(tokenizer, asked)[0]
        check_reload(load(source, None, dtype), out / "adapter.safetensors", inputs, logits_of(base, inputs))


def mean(entries: list[dict[str, float]]) -> float:
    return sum(entry["reward"] for entry in entries) / len(entries)


if __name__ == "__main__":
    app()
