"""How good is the learning rate that `ll.suggest` gives? A sweep around it, on SmolLM2-135M-Instruct and GSM8K.

    nice python benchmarks/suggest.py --steps 30 --half-decades 2      # six minutes of one core

Each rate trains a fresh LoRA of the suggested rank on the same batches; the loss is of held-out answers. Prints a line
a rate, and by how much the best one is better than the suggestion.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import lora_lite as ll

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from smollm2 import smollm2_folder

DATA = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"


def tokens(tokenizer: Any, file: Path, rows: int, size: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Batches of questions with their answers, whose loss is of the answers."""
    batches = []
    lines = [json.loads(line) for line in file.read_text().splitlines()[:rows]]
    for i in range(0, rows, size):
        ids, labels = [], []
        for row in lines[i : i + size]:
            question = tokenizer(row["question"] + "\n").input_ids
            answer = [*tokenizer(row["answer"]).input_ids, tokenizer.eos_token_id]
            padding = [tokenizer.eos_token_id] * length
            ids.append((question + answer + padding)[:length])
            labels.append(([-100] * len(question) + answer + [-100] * length)[:length])
        batches.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return batches


@torch.no_grad()
def held_out(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def main(
    steps: Annotated[int, typer.Option(help="Steps of AdamW for each rate.")] = 30,
    half_decades: Annotated[int, typer.Option(help="On each side of the suggestion.")] = 2,
    size: Annotated[int, typer.Option(help="Rows of a batch.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 96,
    data: Annotated[Path, typer.Option(help="A folder with train.jsonl and test.jsonl.")] = DATA,
) -> None:
    import transformers

    folder = str(smollm2_folder())
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), ll.load_base(folder)
    train = tokens(tokenizer, data / "train.jsonl", size * steps, size, length)
    test = tokens(tokenizer, data / "test.jsonl", 24, 4, length)
    suggestion = ll.suggest(model, tokens=size * steps * length, steps=steps)
    print(suggestion, f"\nbase: {held_out(model, test):.4f}", flush=True)
    losses = {}
    for half in range(-half_decades, half_decades + 1):
        lr = suggestion.lr * 10 ** (half / 2)
        torch.manual_seed(0)
        adapter = ll.attach(model, ll.LoRAConfig(r=suggestion.rank, alpha=suggestion.alpha))
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0)
        model.train()
        for batch in train:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        model.eval()
        losses[lr] = held_out(model, test)
        ll.detach(model)
        print(f"lr {lr:.2e}  held-out loss {losses[lr]:.4f}", flush=True)
    best = min(losses, key=lambda lr: losses[lr])
    print(f"best {best:.2e}; the suggestion is {losses[suggestion.lr] / losses[best] - 1:.1%} above it")


if __name__ == "__main__":
    typer.run(main)
