"""From words to tokens and back: chats through the model's template, and text as it grows by a token."""

from typing import Any

from ..errors import ConfigError
from ..measure.prompts import prompt_batches

MOST_TOKENS = 512
"""The longest prompt, with its system prompt: the rows of a forward are in memory together."""


def chat_ids(tokenizer: Any, prompt: str, system: str | None = None) -> list[int]:
    """A user's words through the chat template, up to where the answer starts.

    Raises:
        ConfigError: for too long a prompt, or a system prompt that the template doesn't know.
    """
    if system is None:
        chat: Any = prompt
    elif tokenizer.chat_template is None:
        raise ConfigError("this model has no chat template, so there is no place for a system prompt\n  leave it empty")
    else:
        chat = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    ids: list[int] = prompt_batches(tokenizer, [chat], thinking=False)[0]["input_ids"][0].tolist()
    if not 0 < len(ids) <= MOST_TOKENS:
        raise ConfigError(f"the prompt has {len(ids)} tokens: wanted 1 to {MOST_TOKENS}\n  write a shorter one")
    return ids


def word_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text by itself, which the model is to have said."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


class Spelling:
    """The text of tokens that come one after the other."""

    def __init__(self, tokenizer: Any, special: bool = False) -> None:
        self.tokenizer, self.special = tokenizer, special
        self.ids: list[int] = []
        self.text = ""

    def add(self, token: int) -> str:
        """The text that the token adds; nothing in the middle of a character, which comes with its last token."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=not self.special, clean_up_tokenization_spaces=False)
        if text.endswith("�"):
            return ""
        new, self.text = text[len(self.text) :], text
        return str(new)


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token of a prompt, special ones by their names."""
    spelling = Spelling(tokenizer, special=True)
    return [spelling.add(token) for token in ids]
