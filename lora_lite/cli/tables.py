"""Reports as tables that fit the terminal, and stay whole where the output is piped."""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..base.stacks import starred
from .compare import Difference
from .report import LayerReport, Report, TensorReport, grouped

GAP = 2
"""Spaces between columns."""
UNLIMITED = 10_000
"""Columns of an output that is no terminal and that COLUMNS says nothing of."""


def console() -> Console:
    """The standard output, as wide as the terminal or COLUMNS; a pipe has no width, so that nothing is cut there."""
    piped = not sys.stdout.isatty() and not os.environ.get("COLUMNS")
    return Console(highlight=False, soft_wrap=False, width=UNLIMITED if piped else None)


def shortened(text: str, width: int) -> str:
    """At most `width` characters: the middle makes way, and most of the end stays, which tells paths apart."""
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def show_report(out: Console, report: Report) -> None:
    """An adapter, or tensors that come without a config."""
    _title(out, str(report.path), f": {report.format}, {size(report.bytes)}")
    lines = {
        "variant": report.variant,
        "config": ", ".join(f"{field}={_value(value)}" for field, value in report.config.items()) or "the defaults",
        "scale": None if report.scale is None else f"{report.scale:g}",
        "base": " ".join(str(report.base[key]) for key in ("class", "name_or_path", "dtype") if report.base.get(key)),
        "quantised": quantised(report.base["quantization"]) if "quantization" in report.base else "",
        "tensors": f"{report.tensors:,}, of {report.parameters:,} numbers in {', '.join(report.dtypes)}",
        "layers": f"{len(report.layers):,}",
        "norm": _norms(report.layers),
    }
    if report.variant is None:
        lines = {"tensors": lines["tensors"], "config": "none: to load them give one, lora_lite.load(..., cfg=...)"}
    _facts(out, {name: text for name, text in lines.items() if text})
    out.print()
    _layers(out, report.layers) if report.layers else _tensors(out, report.loose)


def _norms(layers: list[LayerReport]) -> str:
    unknown = sum(layer.norm is None for layer in layers)
    what = "of W' - W, Frobenius, at this scale"
    return what if not unknown else f"{what}: it depends on the base weight, so give --base FOLDER"


def _layers(out: Console, layers: list[LayerReport]) -> None:
    rows, known = [], any(layer.norm is not None for layer in layers)
    for pattern, members in grouped({layer.path: layer for layer in layers}).items():
        shape = " or ".join(sorted({f"{layer.d_in or '?'} -> {layer.d_out or '?'}" for layer in members}))
        norms = [(layer.norm, layer.block) for layer in members if layer.norm is not None]
        row = [pattern, shape, str(len(members))]
        if norms:
            largest, block = max(norms, key=lambda norm_block: norm_block[0])
            mean = sum(norm for norm, _ in norms) / len(norms)
            row += [f"{mean:.4g}", f"{largest:.4g}", "" if block is None else str(block)]
        rows.append(row + [""] * (3 + 3 * known - len(row)))
    head = ["layer", "in -> out", "n", *(("mean norm", "max norm", "at") if known else ())]
    table(out, head, rows, right=range(2, 6))


def _tensors(out: Console, tensors: list[TensorReport]) -> None:
    """A row for all that differ in numbers within the key."""
    kinds = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.path), " x ".join(map(str, tensor.shape)), tensor.dtype)
        for tensor in tensors
    )
    table(out, ["tensor", "shape", "dtype", "n"], [[*kind, str(n)] for kind, n in kinds.items()], right=(3,))


def show_difference(out: Console, difference: Difference) -> None:
    """Two adapters: what differs, or that nothing does."""
    layers = sum(group.layers for group in difference.groups)
    for sign, path, only in (("A", difference.a, difference.only_a), ("B", difference.b, difference.only_b)):
        _title(out, f"{sign}  {path}", f", {layers + len(only)} layers")
    out.print()
    if difference.equal:
        out.print("equal")
        return
    _differing(out, difference.config | {f"base {key}": values for key, values in difference.base.items()})
    for sign, only in (("A", difference.only_a), ("B", difference.only_b)):
        if only:
            out.print()
            out.print(f"only in {sign}: {len(only)} layers")
            table(out, ["layer", "n"], [[path, str(n)] for path, n in Counter(map(starred, only)).items()], right=(1,))
    if not difference.groups:
        return
    out.print()
    head = ["layer", "n", "tensors", "delta", "cosine"]
    rows = [
        [group.path, str(group.layers), *map(_figure, (group.tensors, group.delta)), _figure(group.cosine, ".6f")]
        for group in difference.groups
    ]
    table(out, head, rows, right=range(1, 5))
    out.print(Text("tensors: |A - B| / |A|; delta: the same of W' - W, cosine: its own"))
    if any(None in (group.tensors, group.delta) for group in difference.groups):
        out.print(Text("-: tensors of other shapes, a delta that depends on the base weight"))


def _differing(out: Console, fields: Mapping[str, tuple[Any, Any]]) -> None:
    grid = _plain_table()
    for title in ("differs", "A", "B"):
        grid.add_column(title, overflow="fold")
    for name, values in fields.items():
        grid.add_row(*map(Text, (name, *map(quantised if name == "base quantization" else _value, values))))
    if fields:
        out.print(grid)


# ---- pieces -------------------------------------------------------------------------------------


def table(out: Console, head: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> None:
    """A table whose first column, of paths, is shortened to what the others leave of the width."""
    taken = sum(max(len(row[i]) for row in [head, *rows]) + GAP for i in range(1, len(head)))
    room = max(out.width - taken, 12)
    grid = _plain_table()
    for i, title in enumerate(head):
        grid.add_column(title, no_wrap=True, justify="right" if i in tuple(right) else "left")
    for path, *cells in rows:
        grid.add_row(*map(Text, (shortened(path, room), *cells)))
    out.print(grid)


def _plain_table() -> Table:
    return Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")


def _title(out: Console, path: str, rest: str) -> None:
    out.print(Text(shortened(path, max(out.width - len(rest), 20)), style="bold") + rest)


def _facts(out: Console, facts: Mapping[str, str]) -> None:
    """Name and text, one below the other; a long text goes on in the next line, whole."""
    grid = Table.grid(padding=(0, GAP, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in facts.items():
        grid.add_row(Text(name.ljust(9)), Text(text))
    out.print(grid)


def size(n: int) -> str:
    """Bytes for a person: "4.9 MB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            return f"{n / factor:.1f} {unit}"
    return f"{n} bytes"


def quantised(quantization: Mapping[str, Any] | None) -> str:
    """A record of quantisation in a line."""
    if quantization is None:
        return "no"
    parts = [
        f"{quantization['quant_type']}, {quantization['method']}",
        "double quantisation" if quantization["double_quant"] else "",
        f"blocks of {quantization['blocksize']}" if quantization["blocksize"] else "",
        f"computing in {quantization['compute_dtype']}" if quantization["compute_dtype"] else "",
        f"{len(quantization['modules'])} modules",
    ]
    return ", ".join(part for part in parts if part)


def _value(value: Any) -> str:
    if isinstance(value, dict) and len(value) > 2:
        return f"{len(value)} entries"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figure(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)
