"""The commands of `lora-lite`. They print; the figures are computed in the other files of this room."""

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from loguru import logger
from rich import progress as bars
from rich.console import Console
from typer.core import TyperCommand

from ..core.variant import config_for
from ..errors import ConfigError
from ..merging.on_disk import merge_checkpoint
from ..merging.residual import quantize_residual
from .combine import combine as combine_adapters
from .compare import compare
from .convert import NAMES
from .convert import convert as convert_adapter
from .engines import Engine, verdict
from .plot import plot_norms
from .reason import reason
from .report import inspect as inspect_adapter
from .tables import show_difference, show_errors, show_report, show_verdict
from .verify import tokens, verify_merge

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Command(TyperCommand):
    """A command that ends with the reason on stderr and exit code 2 where something is wrong; --debug shows all."""

    def invoke(self, ctx: Any) -> Any:
        debug = ctx.find_root().params["debug"]
        try:
            with _messages(debug):
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if debug:
                traceback.print_exc()
            else:
                typer.echo(f"lora-lite: {reason(error)}", err=True)
            raise typer.Exit(2) from error


@contextmanager
def _messages(debug: bool) -> Iterator[None]:
    """The library's log lines on stderr: warnings, with debug all; other libraries' warnings with debug alone."""
    sink = logger.add(sys.stderr, format="{level.name}: {message}", level="DEBUG" if debug else "WARNING")
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            if not debug:
                logging.disable(logging.WARNING)
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logger.remove(sink)


def _bar(label: str, *figures: bars.ProgressColumn) -> bars.Progress:
    """A bar on stderr, if that is a terminal, which goes when the work is done."""
    stderr = Console(stderr=True)
    columns = bars.TextColumn(label), bars.BarColumn(), *figures, bars.TimeRemainingColumn()
    return bars.Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show log lines, and a traceback where it fails.")] = False,
) -> None:
    """Look at LoRA-like adapters on disk, merge them into a checkpoint, convert them to and from other programs'
    formats; quantise a base with the start of one."""


@app.command(cls=Command)
def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter file, a PEFT folder, or a file or folder of tensors.")],
    base: Annotated[Path | None, typer.Option(help="Folder of the original weights: DoRA, IA3, ... need them.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the norm of the delta by layer.")] = None,
    engine: Annotated[Engine | None, typer.Option("--for", help="Ask what this engine would refuse of it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every layer by itself.")] = False,
) -> None:
    """Show an adapter: method, config, base, size of its deltas.

    With --for: what a server refuses of it, and the command that helps; the exit code is 0 if it takes the adapter,
    1 if not.
    """
    if engine is not None:
        if base is not None or plot is not None:
            raise ConfigError("--for looks at the adapter alone\n  leave --base and --plot out, or ask for them apart")
        answer = verdict(path, engine)
        if as_json:
            print(json.dumps(answer.to_json(), indent=2))
        else:
            show_verdict(answer)
        raise typer.Exit(0 if answer.is_taken else 1)
    with _bar("layers", bars.MofNCompleteColumn()) as bar:
        report = inspect_adapter(path, base, bar.track)
    if plot is not None:
        plot_norms(report, plot)
    if as_json:
        print(json.dumps(asdict(report), indent=2, default=str))  # str: a path
    else:
        show_report(report)


@app.command(cls=Command)
def diff(
    a: Annotated[Path, typer.Argument(help="An adapter file or PEFT folder.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Show how two adapters differ.

    The exit code is 0 if they are equal, 1 if not.
    """
    with _bar("layers", bars.MofNCompleteColumn()) as bar:
        difference = compare(a, b, bar.track)
    show_difference(a, b, difference)
    raise typer.Exit(0 if difference.equal else 1)


BASE_WEIGHTS = "Add the delta to the weights as they are, or as the quantised base had them in training."
NEVER_RAN = "Layers that no forward had called when the adapter was saved: refuse, or merge (other inputs reach them)."


@app.command(cls=Command)
def merge(
    base: Annotated[Path, typer.Argument(help="Folder of the base checkpoint.")],
    adapter: Annotated[Path, typer.Argument(help="An adapter file or PEFT folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    base_weights: Annotated[Literal["original", "as_trained"], typer.Option(help=BASE_WEIGHTS)] = "original",
    untie: Annotated[bool, typer.Option("--untie", help="Write a head that is tied to the embedding apart.")] = False,
    any_base: Annotated[bool, typer.Option("--any-base", help="On another base, warn where DoRA would fail.")] = False,
    never_ran: Annotated[Literal["raise", "merge"], typer.Option(help=NEVER_RAN)] = "raise",
    verify: Annotated[Path | None, typer.Option(help="Text on which to compare the merged model.")] = None,
) -> None:
    """Fold an adapter into a checkpoint on disk.

    Tensor by tensor, so it needs little memory; run again, it goes on where it was interrupted.
    """
    text = None if verify is None else verify.read_text(encoding="utf-8")
    if text is not None:
        tokens(base, text)  # what can't be verified should be known before the work
    with _bar("merging", bars.DownloadColumn(), bars.TransferSpeedColumn()) as bar:
        task = bar.add_task("", total=None)
        report = merge_checkpoint(
            base,
            adapter,
            out,
            base_weights,
            untie=untie,
            verify_base=not any_base,
            never_ran=never_ran,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(report)
    if text is not None:
        print(verify_merge(base, adapter, out, text, base_weights))


ENERGY = "Make a plain LoRA of the least rank by layer that holds this share of |W' - W|^2, such as 0.95."


@app.command(cls=Command)
def quantize(
    base: Annotated[Path, typer.Argument(help="Folder of a checkpoint in 16 bits.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    variant: Annotated[Literal["pissa", "loftq"], typer.Option(help="The adapter's start.")] = "pissa",
    r: Annotated[int, typer.Option("--r", help="Its rank.")] = 16,
    quantization: Annotated[Literal["nf4", "fp4", "int8"], typer.Option(help="By bitsandbytes.")] = "nf4",
    iterations: Annotated[int, typer.Option(help="Rounds of quantising and of the SVD of what that lacks.")] = 5,
    svd: Annotated[Literal["exact", "fast"], typer.Option(help="PiSSA's first.")] = "exact",
    target: Annotated[list[str] | None, typer.Option(help="Regex of layers with an adapter; may be repeated.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Module that stays in 16 bits; may be repeated.")] = None,
) -> None:
    """Quantise a checkpoint, and write beside it an adapter that starts at what quantising took (QPiSSA, LoftQ).

    Tensor by tensor, so it needs little memory.
    """
    config: Any = config_for(variant)
    cfg = config(r=r, target_names=target or (), **({"svd": svd} if variant == "pissa" else {}))
    with _bar("quantising", bars.DownloadColumn(), bars.TransferSpeedColumn()) as bar:
        task = bar.add_task("", total=None)
        result = quantize_residual(
            base,
            cfg,
            out,
            quantization,
            iterations=iterations,
            skip_modules=skip or (),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(result)
    show_errors(result.errors)


TO = f"Format to write: {', '.join(NAMES)}. By default PEFT's of a file of ours, and ours of any other."


@app.command(cls=Command)
def convert(
    source: Annotated[Path, typer.Argument(help="An adapter: a file of ours, a PEFT folder, another program's file.")],
    target: Annotated[Path, typer.Argument(help="File or folder to make, where there is none.")],
    base: Annotated[Path, typer.Option(help="Folder of the base checkpoint.")],
    to: Annotated[str | None, typer.Option(help=TO)] = None,
    rank: Annotated[int | None, typer.Option(help="Make a plain LoRA of this rank, of any method.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Refuse a LoRA with a larger relative error.")] = None,
    energy: Annotated[float | None, typer.Option(help=ENERGY)] = None,
    per_expert: Annotated[
        bool, typer.Option("--per-expert", help="To PEFT: name layers as the base's checkpoint does.")
    ] = False,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the format (docs/formats.md), as prefix=unet.")
    ] = None,
) -> None:
    """Turn an adapter from one program's format into another's.

    Opens the whole base on the CPU, as the adapter was trained on it: that takes its size in memory. What was written
    is read back, and compared with the adapter.
    """
    pairs = {key: value for key, _, value in (option.partition("=") for option in options or ())}
    if wrong := [option for option in options or () if "=" not in option]:
        raise ConfigError(f"--set {wrong[0]}: wanted an option and its value, as prefix=unet")
    print(convert_adapter(source, target, base, to, rank, max_error, energy, pairs, per_expert))


@app.command(cls=Command)
def play(
    model: Annotated[str, typer.Argument(help="Folder of a model, or the name of one in the hub's cache.")],
    adapters: Annotated[list[Path] | None, typer.Argument(help="Adapters: files or folders of any format.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0 is any free one.")] = 8421,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
    dtype: Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16, ...")] = "auto",
    quantization: Annotated[Literal["nf4", "fp4", "int8"] | None, typer.Option(help="By bitsandbytes.")] = None,
) -> None:
    """Open a page in the browser in which a model and its adapters answer side by side.

    The page works without a network, and only on this machine. It can make steering vectors and ablations of two lists
    of sentences, measure what they cost, and save them. Ctrl-C ends it.
    """
    from ..play.command import run

    run(model, adapters or [], port=port, open_browser=open_browser, dtype=dtype, quantization=quantization)


HOW = "exact: ranks add up. svd: the best of a rank or energy. ties, dare, magnitude: sums of a density of each delta."


@app.command(cls=Command)
def combine(
    parts: Annotated[
        list[str], typer.Argument(help="Each an adapter file or PEFT folder with its weight: a=1.0 b=-0.5.")
    ],
    out: Annotated[Path, typer.Option(help="File to make, where there is none.")],
    how: Annotated[Literal["exact", "svd", "ties", "dare", "magnitude"], typer.Option(help=HOW)] = "exact",
    rank: Annotated[int | None, typer.Option(help="Of the lora that the sum becomes.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or the share of |W' - W|^2 that its ranks hold, as 0.95.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="The part of each delta that ties, dare, magnitude keep.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare.")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base: PEFT folders, DoRA, IA3, ... need it.")] = None,
) -> None:
    """Make one adapter file of several: the weighted sum of what they change in the weights.

    Files of methods that add to any weight, such as lora, need no base.
    """
    print(combine_adapters(parts, out, base, how=how, rank=rank, energy=energy, density=density, seed=seed))
