"""Adapters of MLX: a folder that `mlx_lm.load(base, adapter_path=folder)` reads (mlx-lm 0.32, mlx_lm/tuner).

    adapters.safetensors    <path>.lora_a (i, r), <path>.lora_b (r, o), transposed; DoRA's <path>.m (o,)
    adapter_config.json     fine_tune_type: "lora", "dora" or "full"; num_layers; lora_parameters: rank, scale, dropout,
                            keys: paths within a block, for the last num_layers blocks, or paths within the model

    y = W x + b + scale (x lora_a) lora_b       scale = alpha / r

One rank and one scale serve all layers, so here ranks are filled up with zeros, and the scale goes into lora_b where
layers differ. A square layer's factors have shapes that fit either way round: the names alone tell.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...base.stacks import find_stacks
from ...core.names import file_key
from ...core.targets import Target
from ...core.validate import is_number
from ...errors import CheckpointError, brief
from ..keys import layers_of
from ..peft.folder import CONFIG
from ..peft.folder import MLX_WEIGHTS as WEIGHTS
from ..peft.folder import WEIGHTS as PEFT_WEIGHTS
from ..peft.kinds import is_plain_linear
from ..peft.lora import magnitude
from ..safetensors import Header, read_header, read_json
from .format import Contents, Format, Piece, Pieces, config, read_matrix
from .gguf_names import text_config

_OURS = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_m"}
_NAMES = {"lora": {"lora_A", "lora_B"}, "dora": {"lora_A", "lora_B", "lora_m"}}  # by fine_tune_type
_AS_LORA = "give rank= or energy= to write what they change as a plain LoRA"
_CURE = "leave it out, or merge the adapter: mlx_lm.convert takes the merged folder"


def is_path(path: Path) -> bool:
    """True for a folder with MLX's two files and not PEFT's."""
    return all((path / name).is_file() for name in (WEIGHTS, CONFIG)) and not (path / PEFT_WEIGHTS).exists()


# ---- read -------------------------------------------------------------------------------------------


def read(root: nn.Module, path: Path) -> Pieces:
    """The pieces of a folder. The layers are those that have tensors, whatever num_layers and keys say."""
    header, settings = read_header(path / WEIGHTS), read_json(path / CONFIG)
    kind, parameters = settings.get("fine_tune_type", "lora"), settings.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise CheckpointError(
            f"{path / CONFIG}: fine_tune_type={brief(repr(kind))}: wanted 'lora' or 'dora'\n"
            f"  a full fine-tuning has whole weights, and is no adapter"
        )
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not (is_number(scale) and scale):
        problem = f"lora_parameters.scale={brief(repr(scale))}: wanted a number other than 0"
        raise CheckpointError(f"{path / CONFIG}: {problem}")
    by_layer: dict[str, dict[str, str]] = defaultdict(dict)  # path in the file -> our tensor -> key
    for key in header.entries:
        layer, _, name = key.rpartition(".")
        if not layer or name not in _OURS:
            raise CheckpointError(
                f"{header.path}: {brief(key)} is no LoRA's tensor\n"
                f"  nothing is left out in silence: wanted lora_a and lora_b of each layer, and m of DoRA"
            )
        by_layer[layer][_OURS[name]] = key
    targets, layers = layers_of(root, header.path, by_layer)
    return {
        target.path: _piece(header, kind, scale, by_layer[layer], target, layers[target])
        for layer, target in targets.items()
    }


def _piece(header: Header, kind: str, scale: float, keys: Mapping[str, str], target: Target, layer: BaseLayer) -> Piece:
    where, wanted = f"{header.path}: {target.path}", _NAMES[kind]
    if keys.keys() != wanted:
        raise CheckpointError(f"{where} has {', '.join(sorted(keys))}\n  wanted {', '.join(sorted(wanted))}")
    if not is_plain_linear(layer):
        raise CheckpointError(
            f"{where}: MLX's LoRA of a layer of the kind {layer.kind.category!r} isn't read here\n  {_CURE}"
        )
    a, b = (read_matrix(header, keys[name]).mT.contiguous() for name in ("lora_A", "lora_B"))  # (r, i), (o, r)
    values = {"lora_A": a, "lora_B": b if scale > 0 else -b}
    if "lora_m" in wanted:
        # Of 16 bits m is exact in float32, and so are then the norms that it is compared with, as in MLX.
        values["lora_m"] = header.read([keys["lora_m"]])[keys["lora_m"]].float()
    dtype = reduce(torch.promote_types, (value.dtype for value in values.values()))
    return Piece(target, layer, config(where, kind, r=len(a), alpha=abs(scale) * len(a), dtype=dtype), values)


# ---- write ------------------------------------------------------------------------------------------


def write(root: nn.Module, pieces: Pieces, path: Path) -> Contents:
    """The contents of a folder that MLX reads."""
    kinds = {piece.cfg.variant for piece in pieces.values()}
    if len(kinds) > 1:
        raise CheckpointError(f"MLX's folder holds one method, and here are {', '.join(sorted(kinds))}\n  {_AS_LORA}")
    others = [p for p, piece in pieces.items() if not is_plain_linear(piece.layer)]
    if others:
        kind = pieces[others[0]].layer.kind.category
        raise CheckpointError(f"{others[0]}: MLX's LoRA of a layer of the kind {kind!r} isn't written here\n  {_CURE}")
    is_composite = text_config(root) is not getattr(root, "config", None)  # a vision tower beside the language model
    for p, piece in pieces.items():
        if any(isinstance(m, nn.Embedding) and m.weight is piece.layer.module.weight for m in root.modules()):
            raise CheckpointError(f"{p} is tied to the embedding, and mlx-lm has no such layer then\n  {_CURE}")
        if is_composite and not {"language_model", "lm_head"} & set(p.split(".")):
            raise CheckpointError(f"{p} is outside of the language model, which is all that mlx-lm loads\n  {_CURE}")
    configs: dict[str, Any] = {p: piece.cfg for p, piece in pieces.items()}
    rank = max(cfg.r for cfg in configs.values())
    (scale, _), *_ = Counter(cfg.scaling for cfg in configs.values()).most_common(1)
    tensors: dict[str, Tensor] = {}
    for p, piece in pieces.items():
        a, b, empty = piece.tensors["lora_A"], piece.tensors["lora_B"], rank - configs[p].r
        b = b if configs[p].scaling == scale else b * (configs[p].scaling / scale)
        tensors[file_key(p, "lora_a")] = F.pad(a, (0, 0, 0, empty)).mT  # (i, r)
        tensors[file_key(p, "lora_b")] = F.pad(b, (0, empty)).mT  # (r, o)
        if "lora_m" in piece.tensors:
            tensors[file_key(p, "m")] = magnitude(piece.layer, configs[p].scaling, piece.tensors)
    keys, blocks = _keys(root, pieces)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    settings = {"fine_tune_type": kinds.pop(), "num_layers": blocks, "lora_parameters": parameters}
    whole = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
    described = (json.dumps(settings, indent=2) + "\n").encode()
    return {path / WEIGHTS: to_bytes(whole, metadata={"format": "mlx"}), path / CONFIG: described}


def _keys(root: nn.Module, pieces: Pieces) -> tuple[list[str], int]:
    """The list of `keys`, and num_layers: names within a block if the last blocks all have the same ones, as mlx_lm
    writes them, and every other reader knows; else paths within the model, which mlx_lm.load takes as well."""
    within: dict[int, set[str]] = defaultdict(set)  # block -> names of layers in it
    for p, piece in pieces.items():
        if piece.target.stack is not None:
            within[piece.target.block or 0].add(p.removeprefix(f"{piece.target.stack}{piece.target.block}."))
    depths = find_stacks(dict(root.named_modules())).depths
    stacks = {piece.target.stack for piece in pieces.values()}
    depth = max((depths.get(stack or "", 0) for stack in stacks), default=0)
    are_last = sorted(within) == list(range(depth - len(within), depth))
    if len(stacks) == 1 and None not in stacks and are_last and len(set(map(frozenset, within.values()))) == 1:
        return sorted(within[depth - 1]), len(within)
    return list(pieces), depth


FORMAT = Format("mlx", "MLX adapter folder", ("lora", "dora"), read, write, is_path=is_path)
