"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) by TRL: towards plain words, or both ways.

    python examples/dpo.py             # on SmolLM2-135M; nothing is downloaded
    python examples/dpo.py --poles     # one adapter, trained at c = +1 for plain words and at c = -1 for long ones

The model draws some answers to each question. Of these, the one with the largest share of short words is chosen, and
the one with the smallest is rejected: a rule that a program checks. The reference is the model with its adapter off.

With --poles each step is the sum of two losses: at c = +1 that of the pairs, at c = -1 that of the pairs the other way
round. Nothing asks for that at the other end of the scale otherwise; the table shows both ends in either case.

These few minutes train one pole alone, as far as new questions show it: with the defaults the loss of both falls from
1.386 to 0.964, and the held-out share of plain words goes from 0.569 to 0.816 at c = +1, and to 0.564 at c = -1, where
the answers do change (KL 0.141). More --steps on more pairs are needed to see whether the other pole follows.
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
from jsonl import DataError
from loguru import logger
from preferences import Progress, drawn_pairs, questions, quiet, scores, settings, show
from smollm2 import smollm2_folder
from torch import Tensor
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

import lora_lite as ll
from lora_lite.trainer import AdapterCheckpoints, reference

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Trainer(AdapterCheckpoints, DPOTrainer):
    """DPO of the adapter at c = 1."""


class TrainerAtBothPoles(Trainer):
    """DPO at both poles in one step: two forwards and one backward. c = 0 stays the base, which is the reference."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        with ll.scaled(model, 1.0):
            towards = super().compute_loss(model, inputs, *args, **kwargs)
        with ll.scaled(model, -1.0):
            return towards + super().compute_loss(model, reversed_pairs(inputs), *args, **kwargs)


def reversed_pairs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was chosen (the first half of the rows) is rejected, and the other way round."""
    return {key: value.roll(len(value) // 2, 0) for key, value in inputs.items()}


@app.command()
def main(
    poles: Annotated[bool, typer.Option(help="Train at c = +1 and at c = -1 at once.")] = False,
    model: Base = None,
    r: Rank = 8,
    lr: LearningRate = 3e-4,
    beta: Annotated[float, typer.Option(help="How much it costs to leave the reference.")] = 0.1,
    dtype: BaseDtype = "auto",
    steps: Steps = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in a step.")] = 4,
    prompts: Annotated[int | None, typer.Option(min=1, help="Questions to draw answers to. Default: all.")] = None,
    held_out: Annotated[int | None, typer.Option(min=1, help="Held-out questions. Default: all.")] = None,
    answers: Annotated[int, typer.Option(min=2, help="Answers that are drawn to each question.")] = 4,
    tokens: MostTokens = 32,
    seed: Annotated[int, typer.Option(help="Of the answers, the adapter and the order of the pairs.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Default: runs/dpo, or runs/dpo-poles.")] = None,
) -> None:
    """Draw pairs, train an adapter on them, show what it does at each end of its scale, and save it."""
    set_up(seed)
    quiet()
    out = out or Path("runs", "dpo-poles" if poles else "dpo")
    with plain_errors():
        taught, asked = (part[:most] for part, most in zip(questions(), (prompts, held_out), strict=True))
        source = model or str(smollm2_folder())
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        base = load(source, None, dtype)
        pairs = drawn_pairs(base, tokenizer, taught, answers, tokens)
        if not pairs:
            raise DataError(f"all answers to {len(taught)} questions are equally plain\n  draw more --answers")
        logger.info(f"{len(pairs)} pairs from {len(taught)} questions")
        ll.attach(base, ll.LoRAConfig(r=r))
        options = settings(out, steps, lr, seed) | {"per_device_train_batch_size": batch_size, "beta": beta}
        trainer: Any = (TrainerAtBothPoles if poles else Trainer)(
            base,
            ref_model=reference(base),
            args=DPOConfig(**options),
            train_dataset=Dataset.from_list(cast(Any, pairs)),
            processing_class=tokenizer,
            callbacks=[Progress()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        logger.info(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        ll.save(base, out / "adapter.safetensors")
        rows = scores(base, tokenizer, asked, (1.0, -1.0), tokens)
        if poles:
            logger.info(
                "with the defaults, expect c = +1 to move on held-out questions, and c = -1 to stay at the base's"
            )
        show(f"DPO at {'both poles' if poles else 'c = +1'}", asked[0], rows)
        inputs = ll.prompt_batches(tokenizer, asked)[0]
        check_reload(load(source, None, dtype), out / "adapter.safetensors", inputs, logits_of(base, inputs))


if __name__ == "__main__":
    app()
