"""Adapters of other programs' files attached as adapters of this library."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.attach import installed
from ...core.config import BaseConfig
from ...core.names import check_shapes
from ...core.resolve import attachable, make_sites
from ...core.state import Method, number_sites
from ...core.variant import ParamSpec, lookup
from ...errors import CheckpointError, ConfigError
from ..peft.folder import CONFIG as PEFT_SETTINGS
from ..peft.folder import DIFFUSERS_SETTINGS
from ..peft.folder import PICKLE as PEFT_PICKLE
from ..peft.folder import WEIGHTS as PEFT_WEIGHTS
from ..peft.load import load_peft
from ..safetensors import Header, check_numbers, read_any
from .format import Format, Piece, Pieces
from .table import FORMATS

Loader = Callable[[nn.Module, Path, str], Adapter]
"""(model, path, name) -> the adapter that is attached."""


def _check_unsaid(path: Path, cfg: BaseConfig | None) -> None:
    if cfg is not None:
        raise ConfigError(f"{path} says how its adapter was made\n  leave cfg= out: it is for raw tensors")


def by_path(path: Path, cfg: BaseConfig | None = None) -> Loader | None:
    """The loader of a file or folder whose first bytes, or names, are another program's; None for any other, and for a
    folder of PEFT's beside a config, which is then of raw tensors. ConfigError for a config beside any other format."""
    if (known := _by_path(path)) is not None:
        _check_unsaid(path, cfg)
        return partial(load_pieces, known)
    if cfg is not None:
        return None
    if (path / PEFT_SETTINGS).is_file() and any((path / name).is_file() for name in (PEFT_WEIGHTS, PEFT_PICKLE)):
        return load_peft  # of a pickle, it says what to do
    if any(path.glob(f"*/{PEFT_SETTINGS}")) and not any(path.glob("*.safetensors")):
        return load_peft  # which names the adapters in it
    return None


def by_header(header: Header, cfg: BaseConfig | None = None) -> Loader | None:
    """The loader of a safetensors file whose keys or metadata are another program's; None for any other. ConfigError
    for a config beside it."""
    known = _by_header(header)
    if known is not None or DIFFUSERS_SETTINGS in header.metadata:
        _check_unsaid(header.path, cfg)
    if DIFFUSERS_SETTINGS in header.metadata:
        return load_peft
    return None if known is None else partial(load_pieces, known)


def loader_of(path: Path) -> Loader | None:
    """The loader of another program's adapter; None for a file of ours, and for what can't be read or told."""
    if (loader := by_path(path)) is None:
        with suppress(CheckpointError):  # whoever asked reads it next, and says so
            header, *others = read_any(path)
            loader = None if others else by_header(header)
    return loader


def check_ours(path: Path) -> None:
    """CheckpointError for a file that only `load` reads, on a model: neither ours nor a folder of PEFT's."""
    if (loader := loader_of(path)) is None or (loader is load_peft and path.is_dir()):
        return
    convert = f"lora-lite convert {shlex.quote(str(path))} adapter.safetensors --base BASE"
    raise CheckpointError(f"{path} is another program's adapter\n  make a file of ours of it: {convert}")


def _by_path(path: Path) -> Format | None:
    return next((known for known in FORMATS.values() if known.is_path(path)), None)


def _by_header(header: Header) -> Format | None:
    return next((known for known in FORMATS.values() if known.is_header(header)), None)


def load_pieces(known: Format, model: nn.Module, path: Path, name: str) -> Adapter:
    """Attach the adapter of a file of this format.

    Raises:
        CheckpointError: for a file that isn't one, whole, and on this model's layers.

    It raises what attach raises, too; the model is then as it was.
    """
    root = attachable(model)
    pieces = known.read(root, path)
    if not pieces:
        raise CheckpointError(f"{path} has no tensors of a layer: there is no adapter in it")
    methods = [_method(of_variant) for of_variant in _by_variant(pieces)]
    number_sites(methods)
    tensors: dict[str, Tensor] = {}
    wanted: dict[str, ParamSpec] = {}
    for site in (site for method in methods for site in method.sites):
        values = pieces[site.path].tensors
        check_numbers(dict(values), f"{path}: {site.path}", "save the adapter again")
        tensors |= {site.key(tensor): value.to(site.cfg.dtype).contiguous() for tensor, value in values.items()}
        wanted |= {site.key(tensor): spec for tensor, spec in site.specs.items() if tensor in values or spec.trainable}
    check_shapes(tensors, wanted, str(path))
    with installed(root, methods, name, _zeros(methods) | tensors, owned=True) as adapter:
        for method in methods:
            _fill(adapter, method, tensors)
        logger.info(f"loaded {adapter} from {path}, a {known.says}")
    return adapter


def _zeros(methods: list[Method]) -> dict[str, Tensor]:
    places = ((site, name, spec) for method in methods for site in method.sites for name, spec in site.specs.items())
    return {site.key(name): torch.zeros(spec.shape, dtype=site.cfg.dtype) for site, name, spec in places}


@torch.no_grad()
def _fill(adapter: Adapter, method: Method, tensors: dict[str, Tensor]) -> None:
    """Compute what no file holds as it is the base's, such as DoRA's norms; then the file's values are put back."""
    sites = [site for site in method.sites if not all(site.key(name) in tensors for name in site.specs)]
    # A copy: the adapter has taken the tensors themselves, which `init` writes into.
    values = {key: tensors[key].clone() for site in sites for name in site.specs if (key := site.key(name)) in tensors}
    views = adapter.views(method) if sites else {}
    for site in sites:
        lookup(method.cfg.variant).init(views[site.path], site.cfg)
    if values:
        adapter.load_state_dict(adapter.state_dict() | values)


def _by_variant(pieces: Pieces) -> list[list[Piece]]:
    variants = dict.fromkeys(piece.cfg.variant for piece in pieces.values())
    return [[piece for piece in pieces.values() if piece.cfg.variant == variant] for variant in variants]


def _method(pieces: list[Piece]) -> Method:
    """A method with the config that most of its layers have, and what differs by layer."""
    counts = Counter(str(_settings(piece.cfg)) for piece in pieces)
    usual = next(piece.cfg for piece in pieces if counts[str(_settings(piece.cfg))] == max(counts.values()))
    settings = _settings(usual)
    differing = {p.target.path: {k: v for k, v in _settings(p.cfg).items() if v != settings[k]} for p in pieces}
    overrides = {path: values for path, values in differing.items() if values}
    layers = {piece.target: piece.layer for piece in pieces}
    shared: dict[str, Any] = {
        "target_names": (_exactly(target.path for target in layers),),
        "kinds": tuple(dict.fromkeys(layer.kind.category for layer in layers.values())),
        "dtype": reduce(torch.promote_types, (piece.cfg.dtype for piece in pieces)),
        "per_layer": {_exactly(paths): values for values, paths in _alike(overrides)},
    }
    cfg = replace(usual, **shared)
    return Method(cfg, make_sites(layers, cfg, overrides))


def _alike(overrides: dict[str, dict[str, Any]]) -> list[tuple[dict[str, Any], list[str]]]:
    """Each set of fields that differ, with its layers."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for path, values in overrides.items():
        groups.setdefault(str(values), (values, []))[1].append(path)
    return list(groups.values())


def _settings(cfg: BaseConfig) -> dict[str, Any]:
    """The fields that may differ by layer, with their values."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in cfg.SAME_AT_ALL_LAYERS}


def _exactly(paths: Iterable[str]) -> str:
    return f"^({'|'.join(map(re.escape, paths))})$"
