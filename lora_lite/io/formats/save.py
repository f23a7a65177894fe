"""`save_as`: adapters in the format of another program, and the proof that the file is the adapter."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from loguru import logger
from torch import nn

from ...core.adapter import get_adapter
from ...core.change import Change, added_change, total
from ...core.effective import delta_weight
from ...core.resolve import make_stand_in
from ...core.state import Site, check_unmerged, session_of
from ...core.variant import config_for, weight_use
from ...errors import CheckpointError, ConfigError, brief
from ..checkpoint import save
from ..factors import PLAIN, Factors, Layers, adapted_layers, check_cut, low_rank
from ..peft.save import save_peft
from ..safetensors import check_numbers, replacing, sync_folder
from .format import Contents, Format, Piece, Pieces
from .table import FORMATS

OURS, PEFT = "lora-lite", "peft"


def check_wishes(
    format: str,
    options: Mapping[str, Any],
    rank: int | None = None,
    energy: float | int | None = None,
    max_error: float | int | None = None,
) -> Format | None:
    """The format of that name, None for ours and PEFT's, before a model is looked at. ConfigError for an unknown one,
    for an option that it hasn't, or not with this value, and for a cut to a LoRA that it can't hold."""
    if format not in (OURS, PEFT, *FORMATS):
        raise ConfigError(f"format={format!r}: wanted one of {', '.join((OURS, PEFT, *FORMATS))}")
    check_cut(rank, energy, max_error)
    known, is_cut = FORMATS.get(format), rank is not None or energy is not None
    allowed = set(known.options) if known is not None else {"per_expert"} if format == PEFT else set()
    if unknown := sorted(options.keys() - allowed):
        raise ConfigError(f"format={format!r} has no option {unknown[0]!r}: wanted one of {sorted(allowed) or 'none'}")
    for option, check in known.options.items() if known is not None else ():
        if option in options:
            check(options[option])
    if is_cut and format == OURS:
        raise ConfigError("a file of ours holds every method as it is\n  leave rank and energy out")
    if is_cut and known is not None and "lora" not in known.variants:
        raise ConfigError(f"format={format!r}: rank and energy make a LoRA, and it holds none\n  leave them out")
    return known


def save_as(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str,
    name: str = "default",
    rank: int | None = None,
    energy: float | int | None = None,
    max_error: float | int | None = None,
    **options: Any,
) -> float:
    """Write an adapter in the format of another program; the file is read back, and compared with the adapter, before
    it takes its place.

    format      "lora-lite", "peft" (as save_peft), or one of docs/formats.md, which has the `options` of each
    rank, energy, max_error     as of save_peft: methods of any kind as a plain LoRA, which includes the scale

    Files of "lora-lite" and "peft" have the adapter's tensors bit for bit and aren't read back: without a rank 0 is
    returned for them, and with one what it cuts off.

    Returns the greatest relative difference ‖ΔW of the file - ΔW‖ / ‖ΔW‖ of a layer, which is logged: 0 where the
    numbers are the same; the rounding, where the format has 16 bits; what a rank cuts off.

    Raises:
        CheckpointError: for what the format can't say, naming it and the conversion that helps; for a file that isn't
            the adapter; for a folder with other things in it. Nothing is written.
        ConfigError: for an unknown format or option.
        TargetError: for an unknown name.
    """
    known, is_cut = check_wishes(format, options, rank, energy, max_error), rank is not None or energy is not None
    if known is None and format == PEFT:
        return save_peft(model, path, name, rank, max_error, energy, **options) or 0.0
    if known is None:
        save(model, path, name)
        return 0.0
    root, session = session_of(model)
    check_unmerged(session, "export")
    adapter = get_adapter(model, name)
    layers, path = adapted_layers(model, [adapter]), Path(path)
    if adapter.scale == 0:
        raise CheckpointError(f"{name!r} is at scale 0, which does nothing\n  set its scale first")
    if is_cut:
        factors, _ = low_rank(layers, rank, energy, max_error)
        pieces = {p: _plain(sites[0], factors[p], sites[0].cfg.dtype) for p, sites in layers.items()}
    else:
        pieces = {p: _native(known, sites, adapter.scale) for p, sites in layers.items()}
    for p, piece in pieces.items():
        check_numbers(dict(piece.tensors), f"{name} in memory: {p}", "nothing was written")
    contents = known.write(root, pieces, path, **options)
    _check_goal(known, path, contents)
    with _proving(path, contents) as written:
        proof = known.read(root, written)
        for p, piece in proof.items():
            check_numbers(dict(piece.tensors), f"{path}: {p}", "they are too large for the dtype of the file")
        worst = difference({known.place(root, pieces[p]): sites for p, sites in layers.items()}, proof, path)
        if not math.isfinite(worst):
            raise CheckpointError(f"{path}: ΔW of the file differs from the adapter's by {worst}")
    logger.info(f"saved {adapter} to {path}, a {known.says}: ΔW differs by {worst:.1e} at most in a layer")
    return worst


def _check_goal(known: Format, path: Path, contents: Contents) -> None:
    """CheckpointError where the files would come among others, of which a reader may take the wrong ones."""
    if folder := next((goal for goal in contents if goal.is_dir()), None):
        raise CheckpointError(f"{folder} is a folder, and a file is to be written there\n  name another place")
    if path in contents:
        return
    if path.is_file():
        raise CheckpointError(f"{path} is a file; what is written is a folder ({known.says})\n  name a new folder")
    names = {goal.name for goal in contents}
    if path.is_dir() and (others := sorted(set(os.listdir(path)) - names)):
        problem = f"has {brief(', '.join(others))}, which is no part of a {known.says}"
        raise CheckpointError(f"{path} {problem}\n  name a new folder: what reads this one could take another adapter")


@contextmanager
def _proving(path: Path, contents: Contents) -> Iterator[Path]:
    """Where the files lie while they are read back, beside their places; they take them if the block raises nothing."""
    beside = next(parent for parent in path.absolute().parents if parent.is_dir())  # a rename is atomic in one system
    with TemporaryDirectory(prefix=f".{path.name}.", dir=beside) as folder:
        files = {goal: Path(folder) / goal.relative_to(path.parent) for goal in contents}
        for goal, file in files.items():
            with replacing(file) as handle:
                handle.write(contents[goal])
        try:
            yield Path(folder) / path.name
        except CheckpointError as error:
            raise CheckpointError(f"{error}\n  nothing was written".replace(folder, str(path.parent))) from error
        for goal in files:
            goal.parent.mkdir(parents=True, exist_ok=True)
        if path not in contents and len(files) > 1:
            goal.unlink(missing_ok=True)  # the last: an old one never lies beside the new weights
        for goal, file in files.items():
            os.replace(file, goal)
            sync_folder(goal.parent)


def _plain(site: Site, pair: Factors, dtype: torch.dtype) -> Piece:
    make: Any = config_for("lora")
    cfg = make(r=pair.rank, alpha=pair.alpha, dtype=dtype)
    return Piece(site.target, site.base, cfg, {"lora_A": pair.a, "lora_B": pair.b})


def _native(known: Format, sites: Sequence[Site], scale: float) -> Piece:
    """An adapter's method at a layer as it is. Raises CheckpointError for what the format hasn't."""
    site, cfg = sites[0], sites[0].cfg
    variant = "lora" if cfg.variant in PLAIN else cfg.variant

    def refused(problem: str, cure: str) -> CheckpointError:
        return CheckpointError(f"{site.path or 'the model itself'}: a {known.says} can't hold {problem}\n  {cure}")

    as_lora = "give rank= or energy= to write what it changes as a plain LoRA"
    as_lora = as_lora if "lora" in known.variants else "keep it as our file (lora_lite.save)"
    if len(sites) > 1:
        raise refused(f"{len(sites)} methods at one layer", as_lora)
    if variant not in known.variants:
        raise refused(f"{variant!r}, only {', '.join(known.variants)}", as_lora)
    if site.positions is not None:
        raise refused("an adapter that acts at some positions of a sequence", "keep it as our file (lora_lite.save)")
    tensors = {name: tensor.detach() for name, tensor in site.tensors()}
    if variant != "lora":
        if scale != 1 and variant != "steer":
            raise refused(f"the scale {scale:g} of {variant!r}", f"set it to 1, or {as_lora}")
        return Piece(site.target, site.base, cfg, tensors, scale)
    if further := sorted(tensors.keys() - {"lora_A", "lora_B"}):
        raise refused(f"{further[0]}, which adds a constant", "keep it as our file (lora_lite.save), or merge it")
    a, b = tensors["lora_A"], tensors["lora_B"]
    one: Any = cfg
    # alpha / r holds rsLoRA's scaling and the adapter's own, so that the tensors stay what they are.
    return _plain(site, Factors(a, b if scale > 0 else -b, one.scaling * one.r * abs(scale)), cfg.dtype)


# ---- the proof --------------------------------------------------------------------------------------


@torch.no_grad()
def difference(layers: Layers, pieces: Pieces, path: Path) -> float:
    """The greatest relative difference of a layer between its adapters' change and that of the pieces.

    Raises:
        CheckpointError: where a layer is in one of them alone: something would have been dropped.
    """
    if layers.keys() != pieces.keys():
        lost = sorted(layers.keys() ^ pieces.keys())
        raise CheckpointError(f"{path}: {len(lost)} layers are in the adapter or in the file alone, such as {lost[0]}")
    return max(_difference(sites, pieces[p]) for p, sites in layers.items())


def _difference(sites: Sequence[Site], piece: Piece) -> float:
    site = sites[0]
    if piece.cfg.variant == "steer":  # no weight holds it; a file may have it at another place, where c v is the same
        before = site.state.scale * site.tensor("lora_v").double()
        return float((piece.scale * piece.tensors["lora_v"].double() - before).norm()) / (float(before.norm()) or 1.0)
    device = next(tensor.device for _, tensor in site.tensors())
    tensors = {name: tensor.to(device) for name, tensor in piece.tensors.items()}
    stand_in = make_stand_in(site.target, piece.cfg, _module(site, weight_use(piece.cfg)), tensors, piece.scale)
    experts = range(site.base.experts) if site.stacked else [None]
    changes = [(_change(sites, expert), _change([stand_in], expert)) for expert in experts]
    rest, size = (math.hypot(*norms) for norms in zip(*(_norms(*pair) for pair in changes), strict=True))
    return rest / size if size else rest


def _change(sites: Sequence[Site], expert: int | None) -> Change:
    return added_change(sites, expert) or Change(None, *delta_weight(sites, expert))


def _norms(live: Change, read: Change) -> tuple[float, float]:
    """‖read - live‖ and ‖live‖ of weights and shifts."""
    shift, other = (c.shift if c.shift is not None else torch.zeros(()) for c in (live, read))
    rest = total([live, read.times(-1.0)]).norm()
    return math.hypot(rest, float((shift - other).norm())), math.hypot(live.norm(), float(shift.norm()))


def _module(site: Site, use: str) -> nn.Module:
    """A module of the layer's shape, for a file's tensors. It has the layer's weight for a method that reads it (DoRA),
    and none for any other."""
    stack = (site.base.experts,) if site.stacked else ()
    module = nn.Linear(site.target.d_in, site.target.d_out, bias=False, device="meta")
    if use == "unused":
        weight = torch.empty(*stack, site.target.d_out, site.target.d_in, dtype=torch.int8, device="meta")
    else:
        weight = site.base.as_it_is_now().dense_weight()  # (o, i)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module
