"""Prompt sets: files of prompts, and the words by which an answer's first token shows which side it is on.

The shipped pairs differ in their system prompt, letter case and tense also in how the question is put; they ask about
the same forty things in the same order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonl import DataError, keys_of, lines_of, record_of, text_of
from torch import Tensor

SHIPPED = Path(__file__).parent / "prompts"
WANTED = "'prompt', and 'system' if there is a system prompt"

FEWEST = 4
"""Prompts in a set: two to fit and two to hold out."""

WORDS = {
    "french": "Le,La,Les,L,Un,En,Je,Il,Des,Bon",
    "english": "The,A,An,It,I,In,There,This,Sure,Here,They,As,Yes,You,Well",
}
"""First words of answers to the shipped sets, as --positive-words and --negative-words take them."""

LIKELY, DISTINCT = 20, 3.0

Prompt = str | list[dict[str, str]]
"""As `ll.prompt_batches` takes them: what the user says, or a chat."""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: of .txt each line is one, of any other a JSON object with `prompt`, perhaps `system`.

    Raises DataError.
    """
    if path.suffix == ".txt":
        return [line.strip() for _, line in lines_of(path, "a prompt a line")]
    return [line_prompt(line, where) for where, line in lines_of(path, f"a JSON object a line, of {WANTED}")]


def line_prompt(line: str, where: str) -> Prompt:
    record = record_of(line, where, WANTED)
    if "prompt" not in record or not record.keys() <= {"prompt", "system"}:
        raise DataError(f"{where}: wanted {WANTED}\n  found: {keys_of(record)}")
    prompt = text_of(record, "prompt", where)
    if "system" not in record:
        return prompt
    return [{"role": "system", "content": text_of(record, "system", where)}, {"role": "user", "content": prompt}]


def question(prompt: Prompt) -> str:
    """The user's words, to show them."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def halves(path: Path) -> tuple[list[Prompt], list[Prompt]]:
    """(to fit on, held out): the first and the second half of a file. Raises DataError."""
    prompts = read_prompts(path)
    if len(prompts) < FEWEST:
        raise DataError(f"{path} has {len(prompts)} prompts: wanted {FEWEST} at least, half of them to be held out")
    middle = len(prompts) // 2
    return prompts[:middle], prompts[middle:]


# ---- token sets ---------------------------------------------------------------------------------


def shipped_words(path: Path) -> str | None:
    """The first words that go with a shipped set, where there are any."""
    return WORDS.get(path.stem) if path.resolve().parent == SHIPPED.resolve() else None


def token_sets(tokenizer: Any, positive: Sequence[str], negative: Sequence[str]) -> tuple[list[int], list[int]]:
    """The first tokens of two lists of words, without those in both. Raises DataError for a list without any."""
    ids = [{tokenizer(word, add_special_tokens=False).input_ids[0] for word in words} for words in (positive, negative)]
    common = ids[0] & ids[1]
    for words, first in zip((positive, negative), ids, strict=True):
        if not first - common:
            raise DataError(
                f"first words {', '.join(words) or '(none)'}: no first token that the other side hasn't as well\n"
                f"  give other --positive-words and --negative-words"
            )
    return sorted(ids[0] - common), sorted(ids[1] - common)


@torch.no_grad()
def own_token_sets(
    model: Any, positive: Sequence[dict[str, Tensor]], negative: Sequence[dict[str, Tensor]]
) -> tuple[list[int], list[int]]:
    """The LIKELY first tokens of each side, by the model's own probabilities, that are DISTINCT times as likely there
    as on the other. The batches are padded on the left. Raises DataError if a side has none.
    """
    model.eval()
    p, n = (_first_token_probabilities(model, batches) for batches in (positive, negative))
    sets = []
    for side, other in ((p, n), (n, p)):
        likely = side.topk(min(LIKELY, side.numel())).indices
        sets.append(sorted(likely[side[likely] > DISTINCT * other[likely]].tolist()))
    if not all(sets):
        raise DataError(
            "the model begins its answers to both sides alike, so first tokens don't tell them apart\n"
            "  give --positive-words and --negative-words, or sets that it answers differently"
        )
    return sets[0], sets[1]


def _first_token_probabilities(model: Any, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """The mean over the prompts (vocabulary,)."""
    rows = []
    for batch in batches:
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        rows.append(model(**inputs).logits[:, -1].float().softmax(-1))
    return torch.cat(rows).mean(0)  # (n, vocabulary) -> (vocabulary,)
