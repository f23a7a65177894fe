"""Reports as tables that fit the terminal, and stay whole where the output is piped."""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ..base.stacks import place, starred
from ..merging.residual import LayerErrors
from .compare import Difference
from .engines import ALL, Verdict
from .report import LayerReport, Report, grouped

GAP = 2  # spaces between columns
LONGEST = 200  # characters of a value of a config
UNLIMITED = 10_000  # columns of an output that is no terminal and that COLUMNS says nothing of


def show_report(report: Report) -> None:
    """Print an adapter, or tensors that come without a config."""
    out = _console()
    _title(out, str(report.path), f": {report.format}, {decimal(report.bytes)}")
    norm, base = "of W' - W, Frobenius, at this scale", report.base
    if any(layer.norm is None for layer in report.layers):
        norm += ": it depends on the base weight, so give --base FOLDER"
    lines = {
        "variant": report.variant,
        "config": ", ".join(f"{field}={_value(value)}" for field, value in report.config.items()) or "the defaults",
        "scale": None if report.scale is None else f"{report.scale:g}",
        "base": " ".join(str(base[key]) for key in ("class", "name_or_path", "dtype") if base.get(key)),
        "quantised": _quantised(base["quantization"]) if "quantization" in base else "",
        "tensors": f"{report.tensors:,}, of {report.parameters:,} numbers in {', '.join(report.dtypes)}",
        "layers": f"{len(report.layers):,}",
        "norm": norm,
    }
    if report.variant is None:
        lines = {"tensors": lines["tensors"], "config": "none: to load them give one, lora_lite.load(..., cfg=...)"}
    _grid(out, ("", ""), [(name, text) for name, text in lines.items() if text])
    out.print()
    if report.layers:
        _layers(out, report.layers)
        return
    # Numbers within a key are blocks and experts, so one row is for all that differ in them.
    keys = [re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor["path"]) for tensor in report.loose]
    shapes = [" x ".join(map(str, tensor["shape"])) for tensor in report.loose]
    kinds = Counter(zip(keys, shapes, (tensor["dtype"] for tensor in report.loose), strict=True))
    _table(out, ["tensor", "shape", "dtype", "n"], [[*kind, str(n)] for kind, n in kinds.items()], right=(3,))


def _layers(out: Console, layers: list[LayerReport]) -> None:
    rows = []
    for pattern, members in grouped({layer.path: layer for layer in layers}).items():
        shape = " or ".join(sorted({f"{layer.d_in or '?'} -> {layer.d_out or '?'}" for layer in members}))
        norms = [(layer.norm, place(layer.path)[1]) for layer in members if layer.norm is not None]
        figures = ["", "", ""]
        if norms:
            largest, block = max(norms, key=lambda norm_block: norm_block[0])
            figures = [f"{fmean(norm for norm, _ in norms):.4g}", f"{largest:.4g}", "" if block is None else str(block)]
        rows.append([pattern, shape, str(len(members)), *figures])
    columns = 6 if any(layer.norm is not None for layer in layers) else 3
    head = ["layer", "in -> out", "n", "mean norm", "max norm", "at"][:columns]
    _table(out, head, [row[:columns] for row in rows], right=range(2, columns))


def show_difference(a: Path, b: Path, difference: Difference) -> None:
    """Print how two adapters differ, or that they are equal."""
    out, layers = _console(), sum(group.layers for group in difference.groups)
    sides = (("A", a, difference.only_a), ("B", b, difference.only_b))
    for sign, path, only in sides:
        _title(out, f"{sign}  {path}", f", {layers + len(only)} layers")
    out.print()
    if difference.equal:
        out.print("equal")
        return
    # A config of another program's file names each layer, in texts of any length.
    rows = [(name, *(shortened(_value(v), LONGEST) for v in values)) for name, values in difference.config.items()]
    for name, values in difference.base.items():
        rows.append((f"base {name}", *map(_quantised if name == "quantization" else _value, values)))
    if rows:
        _grid(out, ("differs", "A", "B"), rows)
    for sign, _, only in sides:
        if only:
            out.print(f"\nonly in {sign}: {len(only)} layers")
            _table(out, ["layer", "n"], [[path, str(n)] for path, n in Counter(map(starred, only)).items()], right=(1,))
    if not difference.groups:
        return
    out.print()
    head = ["layer", "n", "tensors", "delta", "cosine"]
    rows = [
        (group.path, str(group.layers), *map(_figure, (group.tensors, group.delta)), _figure(group.cosine, ".6f"))
        for group in difference.groups
    ]
    _table(out, head, rows, right=range(1, 5))
    out.print("tensors: |A - B| / |A|; delta: the same of W' - W, cosine: its own")
    if any(None in (group.tensors, group.delta) for group in difference.groups):
        out.print("-: tensors of other shapes, a delta that depends on the base weight")


def show_verdict(verdict: Verdict) -> None:
    """Print what an engine makes of an adapter, and the commands that help."""
    out = _console()
    _title(out, str(verdict.path), f": {verdict.engine} {'takes' if verdict.is_taken else 'refuses'} it")
    for reason in verdict.reasons:
        n = len(reason.layers)
        where = "" if reason.layers == ALL else f": {reason.layers[0]}" + f" and {n - 1} more" * (n > 1)
        _grid(out, ("", ""), [("  -", reason.says + where)])
    for note in verdict.notes:
        _grid(out, ("", ""), [("  -", note)])
    if verdict.reasons:
        out.print("this helps:" if verdict.commands else "nothing here helps: no server's format holds it")
    for i, command in enumerate(verdict.commands):
        _grid(out, ("", ""), [("  or" if i else "  ", command)])  # whole, so that it can be copied
    if len(verdict.commands) > 1:
        out.print("the first is exact; the second prints how far it is off")


def show_errors(errors: Mapping[str, LayerErrors]) -> None:
    """Print the errors of a quantised base with its adapter, a row for all layers that differ in the block alone."""
    out, rows = _console(), []
    for pattern, members in grouped(errors).items():
        plain, residual = (fmean(getattr(member, name) for member in members) for name in ("plain", "residual"))
        figures = [f"{plain:.2%}", f"{residual:.2%}", f"{1 - residual / plain:.0%}" if plain else "-"]
        rows.append([pattern, str(len(members)), *figures])
    out.print()
    _table(out, ["layer", "n", "quantised", "with adapter", "less"], rows, right=range(1, 5))
    out.print("the mean of |W - W'| / |W|, Frobenius")


# ---- pieces -------------------------------------------------------------------------------------


def _console() -> Console:
    piped = not sys.stdout.isatty() and not os.environ.get("COLUMNS")  # nothing is cut in a pipe, which has no width
    return Console(highlight=False, width=UNLIMITED if piped else None)


def shortened(text: str, width: int) -> str:
    """At most `width` characters: the middle makes way, and most of the end stays, which tells paths apart."""
    head = (width - 3) // 3
    return text if len(text) <= width else f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def _title(out: Console, path: str, rest: str) -> None:
    out.print(Text(shortened(path, max(out.width - len(rest), 20)), style="bold") + rest)


def _grid(out: Console, head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> None:
    """Rows of texts under their titles; a long text goes on in the next line, whole."""
    grid = Table(*head, box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold", show_header=any(head))
    for i in right:
        grid.columns[i].justify = "right"
    for row in rows:
        grid.add_row(*(Text(cell, overflow="fold") for cell in row))  # Text: a path may look like rich's markup
    out.print(grid)


def _table(out: Console, head: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> None:
    """A grid whose first column, of paths, is shortened to what the others leave of the width."""
    taken = sum(max(len(row[i]) for row in [head, *rows]) + GAP for i in range(1, len(head)))
    room = max(out.width - taken, 12)
    _grid(out, head, [(shortened(path, room), *cells) for path, *cells in rows], right)


def _quantised(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "no"
    forms = {
        "double_quant": "double quantisation",
        "blocksize": "blocks of {blocksize}",
        "compute_dtype": "computing in {compute_dtype}",
    }
    said = [form.format(**record) for name, form in forms.items() if record[name]]
    return ", ".join([record["quant_type"], record["method"], *said, f"{len(record['modules'])} modules"])


def _value(value: Any) -> str:
    if isinstance(value, dict) and len(value) > 2:
        return f"{len(value)} entries"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figure(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)
