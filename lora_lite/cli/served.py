"""An adapter on disk as a server sees it: its layers, with the fields and names that engines take or refuse."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.variant import lookup
from ..io.keys import plain_key
from ..io.peft.folder import CONFIG, WEIGHTS, PeftFolder
from ..io.peft.patterns import alphas_of, ranks_of
from ..io.peft.settings import flag_of
from ..io.safetensors import Header, read_header, read_json
from .stored import StoredLayer, is_peft, read_adapter

_LORA = {"lora_A", "lora_B", "lora_m", "lora_bias"}  # our names of the tensors of PEFT's LoRA
PLAIN = ("lora", "eva", "loftq", "orthogonal")  # our variants that are written as a LoRA, as they are
_READ = ("lora", "dora", "pissa", "olora")  # PEFT's that load_peft takes
_AS_IT_IS = ("true", "gaussian", "eva", "orthogonal")  # values of init_lora_weights that leave the base alone


@dataclass(frozen=True)
class ServedLayer:
    """One adapted layer. What isn't a LoRA's is 0 or False for other methods."""

    path: str
    method: str  # our variant, or PEFT's name of what is none of ours; "whole" for new values of the base's tensors
    rank: int = 0
    alpha: float = 0.0
    rslora: bool = False
    has_bias: bool = False  # LoRA's own
    is_fused: bool = False  # the experts of a block in one tensor
    is_conv: bool = False
    is_norm: bool = False
    at_positions: bool = False  # acts at some tokens alone
    in_weight: bool = True  # could a weight hold it?
    is_start_lost: bool = False  # relative to a base that is in no file

    @property
    def name(self) -> str:
        """The last part of the path, by which servers know layers."""
        return self.path.rpartition(".")[2]

    @property
    def scaling(self) -> float:
        """The factor of B A; 0.0 of another method."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank) if self.rank else 0.0


@dataclass(frozen=True)
class Served:
    """An adapter file of ours, or a PEFT folder."""

    path: Path
    is_folder: bool
    layers: list[ServedLayer]
    scale: float = 1.0
    target_modules: Any = None  # of a folder: names, or a regex
    stated: ServedLayer | None = None  # of a folder of LoRAs: r and lora_alpha of its settings, without patterns

    @property
    def rank(self) -> int:
        """The greatest rank of a layer."""
        return max((layer.rank for layer in self.layers), default=0)


def read_served(path: Path) -> Served:
    """Read an adapter of either format. Of a PEFT folder headers and settings alone, since some can't be read without
    their model.

    Raises:
        CheckpointError: for what is damaged, or no adapter.
    """
    if not is_peft(path):
        stored = read_adapter(path)
        return Served(path, False, [_of_ours(layer) for layer in stored.layers.values()], stored.scale)
    header, settings = read_header(path / WEIGHTS), read_json(path / CONFIG)
    source = PeftFolder(header, str(path / CONFIG), settings, {}, {})
    layers, target_modules = _of_peft(source, header), settings.get("target_modules")
    if str(settings.get("peft_type")) != "LORA":
        return Served(path, True, layers, target_modules=target_modules)
    rank, alpha = (int(settings.get("r", 8)), float(settings.get("lora_alpha", 8)))  # PEFT's defaults
    stated = ServedLayer("", "lora", rank=rank, alpha=alpha, rslora=flag_of(source, "use_rslora"))
    return Served(path, True, layers, target_modules=target_modules, stated=stated)


def _of_ours(layer: StoredLayer) -> ServedLayer:
    cfg: Any = layer.cfg
    rank, rslora = getattr(cfg, "r", 0), getattr(cfg, "rslora", False)
    at_positions = lookup(cfg.variant).positions(cfg) is not None
    return ServedLayer(
        layer.target.path,
        cfg.variant,
        rank=rank,
        alpha=float(cfg.scaling * (math.sqrt(rank) if rslora else rank)) if cfg.variant in PLAIN else 0.0,
        rslora=rslora,
        has_bias="lora_bias" in layer.tensors,
        is_fused=layer.target.experts > 0,
        is_conv=set(cfg.kinds) == {"conv"},  # of several kinds no tensor tells which: ask of its folder
        is_norm=layer.target.is_diagonal,
        at_positions=at_positions,
        in_weight=not at_positions and "block" not in cfg.kinds and cfg.variant != "steer",
    )


def _of_peft(source: PeftFolder, header: Header) -> list[ServedLayer]:
    settings = source.settings
    kind = str(settings.get("peft_type"))
    names: dict[str, dict[str, tuple[int, ...]]] = {}  # path -> our name of a tensor -> its shape
    for key, entry in header.entries.items():
        path, _, name = plain_key(key).rpartition(".")
        if name in _LORA or not key.endswith("base_layer.weight"):  # a copy of the base's own says nothing
            names.setdefault(path, {})[name] = tuple(entry.shape)
    if kind != "LORA":
        return [ServedLayer(path, kind.lower()) for path in names]
    adapted = {path: shapes for path, shapes in names.items() if _LORA & shapes.keys()}
    alphas, ranks, method = alphas_of(source, adapted), ranks_of(source, adapted), _method(source)
    invocation = bool(settings.get("alora_invocation_tokens"))
    return [
        ServedLayer(
            path.removesuffix(".base_layer"),  # of the inner one of two tensors of a block
            method,
            rank=int(ranks[path]),
            alpha=alphas[path],
            rslora=flag_of(source, "use_rslora"),
            has_bias="lora_bias" in shapes,
            is_fused=_is_fused(path.removesuffix(".base_layer"), settings.get("target_parameters") or ()),
            is_conv=any(len(shape) > 2 for shape in shapes.values()),
            at_positions=invocation,
            in_weight=not invocation,
            is_start_lost=method not in _READ,
        )
        for path, shapes in adapted.items()
    ] + [ServedLayer(path, "whole") for path in names if path not in adapted]


def _method(source: PeftFolder) -> str:
    init = str(source.settings.get("init_lora_weights", True)).lower()
    if flag_of(source, "use_dora"):
        return "dora"
    return "lora" if init in (*_AS_IT_IS, "false", "none") else init


def _is_fused(path: str, parameters: Iterable[str]) -> bool:
    """Is it a module whose parameter PEFT names? That of a dense layer is its weight, and its keys are a layer's."""
    modules = [name.rpartition(".")[0] for name in parameters if not name.endswith(".weight")]
    return any(f".{path}".endswith(f".{module}") for module in modules)
