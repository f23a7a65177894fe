"""Prompts for the French/English contrast, and neutral ones to measure what else changes."""

from typing import Any

import torch

import lora_lite as ll

NOUNS = """
bread rivers cats trains music winter coffee mountains books gardens
bridges horses rain cheese clocks ships apples castles stars shoes
dogs tea forests cars painting summer lakes bicycles milk windows
birds chairs islands sugar snow roads lamps flowers wolves paper
"""
FITTED, HELD_OUT = NOUNS.split()[:20], NOUNS.split()[20:]
FRENCH = "Le La Les Un Une L En Je Ce C Il Elle Des Bien Oui"
ENGLISH = "The A An It I In There This Sure Here They As Yes You Well"
NEUTRAL = """What is the capital of Japan?
How do I boil an egg?
Name three colours.
What is two plus two?
Why is the sky blue?
Write a haiku about the sea.
How many days are in a year?
What does a dentist do?
Explain gravity in one sentence.
Give me a recipe for soup.
What is a prime number?
Who wrote Hamlet?
How far away is the moon?
What is the boiling point of water?
Suggest a name for a cat.
How do plants make food?
What is a noun?
List the days of the week.
How does a bicycle stay upright?
What is the largest ocean?
Why do leaves fall in autumn?
Describe a sunset in one sentence.
What does a thermometer measure?
How many legs does a spider have?
What is the opposite of hot?
Tell me a short joke.
How do I tie a knot?
What is the speed of light?
Name a fruit that is yellow.
What is democracy?
How do I clean a window?
What is ten times ten?
Why do we sleep?
Who painted the Mona Lisa?
What is a triangle?
How do birds fly?
Give me a tip for saving money.
What causes tides?
What is the currency of Japan?
How do I write a letter?""".splitlines()


def chats(language: str, nouns: list[str]) -> list[Any]:
    """The two sides: the same questions, with a system prompt that asks for one language."""
    system = {"role": "system", "content": f"Always answer in {language}."}
    return [[system, {"role": "user", "content": f"Tell me about {noun}."}] for noun in nouns]


def first_tokens(tokenizer: Any, words: str) -> list[int]:
    return sorted({tokenizer(word, add_special_tokens=False).input_ids[0] for word in words.split()})


def gap(model: Any, tokenizer: Any, language: str, nouns: list[str] = HELD_OUT) -> float:
    """Mean logit gap of French over English first words on held-out nouns."""
    batches = ll.prompt_batches(tokenizer, chats(language, nouns), 20)
    sides = first_tokens(tokenizer, FRENCH), first_tokens(tokenizer, ENGLISH)
    return ll.logit_gap(model, batches, *sides).mean().item()


def sides(tokenizer: Any, nouns: list[str] = FITTED) -> dict[str, Any]:
    """The calibration data."""
    return {
        side: ll.prompt_batches(tokenizer, chats(language, nouns), 20)
        for side, language in (("positive", "French"), ("negative", "English"))
    }


def random_direction(width: int, seed: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))
