"""Instruction data: pairs of a prompt and its completion, from Python's own standard library or from a JSONL file."""

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonl import DataError, keys_of, lines_of, record_of, text_of

INSTRUCTION = "In one line, what does this Python function do?"
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages", "lib-dynload", "__pycache__"}
DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
LONGEST_SIGNATURE = 80
SHORTEST_SUMMARY = 12

KEYS = (("prompt", "completion"), ("question", "answer"))
"""The keys that a line of a JSONL file may have; the second pair is GSM8K's."""


@dataclass(frozen=True)
class Pair:
    """group: pairs of one group are never split between training and held-out."""

    prompt: str
    completion: str
    group: str


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): a tenth of the groups is held out, chosen by a hash of the name, so always the same ones.

    Raises DataError if there is only one group.
    """
    groups = sorted({pair.group for pair in pairs}, key=lambda group: zlib.crc32(group.encode()))
    if len(groups) < 2:
        raise DataError(f"{len(pairs)} pairs of one prompt: wanted two prompts at least, one to train on, one held out")
    held_out = set(groups[: max(1, len(groups) // 10)])
    return [p for p in pairs if p.group not in held_out], [p for p in pairs if p.group in held_out]


# ---- the standard library -----------------------------------------------------------------------


def stdlib_pairs() -> list[Pair]:
    """Signature -> summary line for every documented public function of the standard library, by module.

    The source is parsed, never imported.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    public = [path for path in paths if SKIPPED_FOLDERS.isdisjoint(path.parts)]
    return [pair for path in public for pair in module_pairs((root / path).read_bytes(), path)]


def module_pairs(source: bytes, path: Path) -> Iterator[Pair]:
    """The pairs of one file; `path` is relative to the library, and its first part is the group."""
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    for qualified, function in functions(ast.parse(source), name):
        signature, summary = f"{qualified}({ast.unparse(function.args)})", summary_line(function)
        if summary and len(signature) <= LONGEST_SIGNATURE:
            yield Pair(f"{INSTRUCTION}\n\n{signature}", summary, name.partition(".")[0])


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, Any]]:
    """(qualified name, definition) of each public function of a module and each public method of its classes."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, DEFINITIONS) or (child.name.startswith("_") and not child.name.endswith("__")):
            continue
        if isinstance(child, ast.ClassDef):
            yield from functions(child, f"{name}.{child.name}")
        else:
            yield f"{name}.{child.name}", child


def summary_line(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """The first line of the docstring, if it is a sentence: not cut off by a line break, and not an example."""
    first, _, rest = (ast.get_docstring(function) or "").strip().partition("\n")
    whole = first.endswith(".") or not rest.partition("\n")[0].strip()
    return first.rstrip() if whole and len(first) >= SHORTEST_SUMMARY and first[0].isalpha() else None


# ---- JSONL --------------------------------------------------------------------------------------


def read_jsonl(path: Path) -> list[Pair]:
    """One JSON object a line, with `prompt` and `completion`, or with GSM8K's `question` and `answer`.

    Raises DataError.
    """
    return [line_pair(line, where) for where, line in lines_of(path, f"a JSON object a line, of {_wanted()}")]


def line_pair(line: str, where: str) -> Pair:
    record = record_of(line, where, _wanted())
    for prompt, completion in KEYS:
        if prompt in record and completion in record:
            text = text_of(record, prompt, where)
            return Pair(text, text_of(record, completion, where), group=text)
    raise DataError(f"{where}: missing keys, wanted {_wanted()}\n  found: {keys_of(record)}")


def _wanted() -> str:
    return " or ".join(f"{prompt!r} and {completion!r}" for prompt, completion in KEYS)
