"""A page for each method, made from its file: equation on the left, code on the right, then fields, abilities, results.

Nothing in it is written by hand: the head and the equation are the file's docstring, abilities are the row of
docs/methods.md (`make table`), results are rows of docs/arena.md (`make arena`).
"""

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import lora_lite as ll
from lora_lite.core.variant import needs_data

DOCS = Path(__file__).parents[1]
FOLDER = "methods"
COLUMNS = {
    "trained": "trained numbers",
    "base": "base",
    "layers": "layers",
    "fresh": "a fresh adapter is",
}
COLUMNS |= {"merges": "merges into the weights", "PEFT folder": "PEFT folder"}
DIFFERENCE = r"(?:\s+([+-][\d.]+)\s+([+-][\d.]+ [+-][\d.]+)\s+(\S.*))?"
APART = ["difference from LoRA", "95 % interval", ""]
TABLES = {  # of the arena: the line above the rows, what a row is, and what its parts are
    "At about equal parameters": (
        rf"(?:(\d+)\s+)?([\d.]+(?: [kMG])?)\s+([\d.]+e[-+]\d+\*?)\s+([\d.]+){DIFFERENCE}",
        ["rank", "trained", "learning rate", "loss", *APART],
    ),
    "At an equal divergence": (
        rf"([\d.]+)\s+([\d.]+)\s+([\d.]+){DIFFERENCE}",
        ["KL at scale 1", "scale", "loss", *APART],
    ),
    "Costs": (
        r"([\d.]+)\s+([\d.]+ [\d.]+)\s+([\d.]+ \w?B)(?:\s+([\d.]+))?\s+([\d.]+ \w?B)(?:\s+([\d.]+))?\s+([\d.]+ \w?B)",
        [
            "step / LoRA's",
            "quartiles",
            "kept for the backward",
            "/ PEFT's",
            "peak",
            "/ PEFT's",
            "file",
        ],
    ),
}
INDEX = """# One page each

Equation on the left, code on the right. Each method is checked against its paper's formula on explicit matrices and,
where PEFT has it, against PEFT on the same parameters: outputs, gradients, steps of training.

*Base*: `any` reads no weight, so it goes on layers that any library has quantised; others read the weight, dequantised
where that is allowed. *Trained*: numbers in SmolLM2-135M by the config's defaults (`make table`).
[What each can do](../methods.md) has the rest.

"""


def rows() -> dict[str, dict[str, str]]:
    """Each method's row of docs/methods.md, by the names of its columns."""
    lines = [
        line
        for line in (DOCS / "methods.md").read_text().splitlines()
        if line.startswith("|")
    ]
    names, _, *cells = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines
    )
    return {row[0].strip("`"): dict(zip(names, row, strict=True)) for row in cells}


def code(file: Path) -> str:
    """A file below its docstring, its imports and its `__all__`."""
    text = file.read_text()
    last = [
        node.end_lineno or 0
        for node in ast.parse(text).body
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    ]
    return "\n".join(text.splitlines()[max(last) :]).strip()


LABEL = re.compile(r"(Identity|Base|Departs|Checked) +(.*)")


def split(document: str) -> tuple[str, dict[str, str]]:
    """A method's docstring: its equation as it stands, and what it says under each label as prose."""
    equation: list[str] = []
    labels: dict[str, str] = {}
    label = ""
    for line in document.partition("\n\n")[2].splitlines():
        if match := LABEL.match(line):
            label = match[1]
            labels[label] = match[2]
        elif label:
            labels[label] += f" {line.strip()}"
        else:
            equation.append(line)
    return textwrap.dedent("\n".join(equation)).strip(), labels


def prose(text: str) -> str:
    """Words of a docstring as Markdown: nothing in them is markup but `code`."""
    return "`".join(
        part if n % 2 else re.sub(r"([\\*_<>\[\]|$#~^])", r"\\\1", part)
        for n, part in enumerate(text.split("`"))
    )


def shown(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        value = repr(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        value = repr(field.default_factory())
    else:
        return "asked for"
    return f"`{value}`" if len(value) < 60 else "see the code"


def fields(config: type[Any]) -> list[str]:
    """A table of the fields that a method's config adds to BaseConfig's."""
    common = {field.name for field in dataclasses.fields(ll.BaseConfig)}
    members = [field for field in dataclasses.fields(config) if field.name not in common]
    if not members:
        return ["No field of its own."]
    table = [f"| `{field.name}` | {shown(field)} |" for field in members]
    return ["| field | default |", "|---|---|", *table]


def arena_rows(text: str) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """The arena's tables: for each the cells of each method, by what they are."""
    tables: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for title, (row, columns) in TABLES.items():
        block = re.search(rf"^{title}.*\n.*\n((?:.+\n)+)", text, re.M)
        for line in block[1].splitlines() if block is not None else ():
            name, _, rest = line.partition(" ")
            cells = re.fullmatch(row, rest.strip())
            if cells is None:
                raise ExtensionError(f"docs/arena.md: under {title!r} a row is {line!r}")
            tables.setdefault(title, {})[name] = [
                (column, cell)
                for column, cell in zip(columns, cells.groups(), strict=True)
                if cell is not None
            ]
    return tables


def arena(name: str) -> list[str]:
    """What the arena's last run says of a method, as tables."""
    parts: list[str] = []
    for title, rows_of in arena_rows((DOCS / "arena.md").read_text()).items():
        if name in rows_of:
            columns, cells = zip(*rows_of[name], strict=True)
            rule = "|---" * len(cells)
            parts += [
                f"{title}:",
                "",
                f"| {' | '.join(columns)} |",
                f"{rule}|",
                f"| {' | '.join(cells)} |",
                "",
            ]
    if not parts:
        return ["The last run of [the arena](../arena.md) (`make arena`) left it out."]
    about = (
        "losses in nats a token; bytes above the base's; a star says that the best learning rate "
        "was at the end of those that were tried."
    )
    return [
        f"Of the last run of [the arena](../arena.md) (`make arena`): {about}",
        "",
        *parts,
    ]


def page(name: str, row: dict[str, str]) -> str:
    variant = ll.REGISTRY[name]
    config = ll.config_for(name)
    module = sys.modules[variant.__module__]
    title, _, sentence = row["method"].partition(": ")
    link = re.fullmatch(r"\[(.+)\]\((.+)\)", title)
    document = inspect.getdoc(module) or ""
    peft = re.search(r"PEFT(?:'s)? (\w+Config(?:\([^)]*\)*)?)", document)
    file = Path(inspect.getfile(module))
    equation, labels = split(document)
    said = "\n\n".join(f"**{label}** {prose(text)}" for label, text in labels.items())
    left = f":::{{container}} equation\n```text\n{equation}\n```\n\n{said}\n:::"
    pair = f"::::{{container}} pair\n{left}\n\n```python\n{code(file)}\n```\n::::"
    abilities = [
        f"| {' | '.join(COLUMNS.values())} |",
        "|---" * len(COLUMNS) + "|",
        f"| {' | '.join(row[column] for column in COLUMNS)} |\n",
    ]
    return "\n".join(
        [
            "---\nhide-toc: true\n---\n",
            f"# {link[1] if link is not None else title}",
            f"\n`{name}`: {sentence}.",
            f"\nPaper: <{link[2]}>" if link is not None else "",
            f"\nIn PEFT: `{peft[1]}`" if peft is not None else "",
            f"\nFile: `{file.relative_to(DOCS.parent)}`",
            f"\n```python\n{line}\n```\n" if (line := attach_line(name)) else "",
            pair,
            "\n## Fields\n",
            *fields(config),
            "\nAnd those of every config: {py:class}`lora_lite.BaseConfig`.",
            "\n## What it can do\n",
            *abilities,
            "Found by running it on small layers: `make table` ([how to read it](../methods.md)).",
            "\n## Results\n",
            *arena(name),
            "\n## Classes\n",
            f"```{{eval-rst}}\n.. autoclass:: lora_lite.{config.__name__}\n   :no-index-entry:\n```"
            if own(config, module)
            else "",
            f"```{{eval-rst}}\n.. autoclass:: lora_lite.{variant.__name__}\n```"
            if variant.__name__ in ll.__all__
            else "",
            "",
        ]
    )


def attach_line(name: str) -> str:
    """The call that attaches a method by its defaults; "" for one that wants more than that."""
    config = ll.config_for(name)
    try:
        cfg: Any = config()
    except (TypeError, ll.ConfigError):
        return ""
    if cfg.variant != name or name in (
        "history",
        "tokens",
    ):  # made by `freeze_into`; of no tokens by default
        return ""
    data = ", calibration_data=data" if needs_data(cfg) else ""
    return f"ll.attach(model, ll.{config.__name__}(){data})"


def own(config: type[Any], module: Any) -> bool:
    return config.__module__ == module.__name__ and config.__name__ in ll.__all__


def write(app: Sphinx) -> None:
    """Write the pages that changed, and take away those of methods that are no more."""
    folder = DOCS / FOLDER
    folder.mkdir(exist_ok=True)
    table = rows()
    if missing := sorted(ll.REGISTRY.keys() - table.keys()):
        raise ExtensionError(f"no row in docs/methods.md for {missing}: run `make table`")
    pages = {f"{name}.md": page(name, table[name]) for name in sorted(ll.REGISTRY)}
    unlinked = {
        name: re.sub(r"\[(.+?)\]\(.+?\)", r"\1", table[name]["method"])
        for name in sorted(ll.REGISTRY)
    }
    lines = [
        f"| [`{name}`](./{name}.md) | {what} | {table[name]['base']} | {table[name]['trained']} |"
        for name, what in unlinked.items()
    ]
    text = INDEX + "| method | what it is | base | trained |\n|---|---|---|---|\n"
    tree = "\n".join(f"{name} <{name}>" for name in sorted(ll.REGISTRY))
    pages["index.md"] = (
        f"{text}{chr(10).join(lines)}\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"
    )
    for file in folder.glob("*.md"):
        if file.name not in pages:
            file.unlink()
    for file_name, content in pages.items():
        file = folder / file_name
        if not file.is_file() or file.read_text() != content:
            file.write_text(content)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
