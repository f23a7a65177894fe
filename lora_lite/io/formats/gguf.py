"""LoRA in a GGUF file, as llama.cpp and Ollama read it (src/llama-adapter.cpp; convert_lora_to_gguf.py writes it).

    general.architecture    the model's, as gguf_names.py has it; llama.cpp wants it equal to its base's
    general.type            "adapter"; adapter.type "lora"
    adapter.lora.alpha      f32, one for all layers; 0 or none: a scaling of 1
    blk.0.attn_q.weight.lora_a (r, i), .lora_b (o, r)       of an embedding token_embd: (V, r), (d, r)

    y = W x + b + alpha / r lora_b lora_a x         r of each layer

Rows of lora_b are in the order of llama.cpp's own W: for rotary positions a Llama's q and k are in another one than
transformers'. Layers whose scaling isn't alpha / r have the rest in lora_b.
"""

from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...core.targets import Target
from ...core.validate import is_number
from ...dtypes import STORAGE_DTYPES
from ...errors import CheckpointError, ConfigError, brief
from ..gguf import Gguf, is_gguf, read_gguf, write_gguf
from ..keys import layers_of
from ..peft.kinds import is_embedding, is_plain_linear
from .format import Contents, Format, Piece, Pieces, config
from .gguf_names import Named, named_layers

ARCHITECTURE, TYPE, ALPHA = "general.architecture", "general.type", "adapter.lora.alpha"
ADAPTER = {TYPE: "adapter", "adapter.type": "lora"}
CONTROL_VECTOR = "controlvector"  # general.architecture of the other kind of file
INVOCATION = "adapter.alora.invocation_tokens"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
MODELFILE = "Modelfile"
_SIDES = {"lora_a": "lora_A", "lora_b": "lora_B"}
_CURE = "leave it out, or merge the adapter (merge_checkpoint) and convert the merged folder"


def is_path(path: Path) -> bool:
    """True for every GGUF file but a control vector: what else it is, a message says."""
    return is_gguf(path) and not is_control_vector(path)


def is_control_vector(path: Path) -> bool:
    """True for a whole control vector. Raises nothing."""
    try:
        return is_gguf(path) and read_gguf(path).fields.get(ARCHITECTURE) == CONTROL_VECTOR
    except CheckpointError:
        return False


# ---- read -------------------------------------------------------------------------------------------


def read(root: nn.Module, path: Path) -> Pieces:
    """The pieces of a file."""
    file = read_gguf(path)
    kinds = {key: file.fields.get(key) for key in ADAPTER}
    if kinds != ADAPTER:
        kind = brief(", ".join(f"{key}={value!r}" for key, value in kinds.items()))
        raise CheckpointError(f"{path}: {kind}\n  wanted a LoRA, {', '.join(f'{k}={v!r}' for k, v in ADAPTER.items())}")
    if INVOCATION in file.fields:
        raise CheckpointError(f"{path}: {INVOCATION}: an adapter that begins to act at some tokens isn't read here")
    names, architecture = named_layers(root), file.fields.get(ARCHITECTURE)
    if architecture != names.architecture.name:
        problem = f"an adapter of another model: {ARCHITECTURE}={brief(repr(architecture))}"
        raise CheckpointError(f"{path} is {problem}\n  this {type(root).__name__} is {names.architecture.name!r}")
    alpha: Any = file.fields.get(ALPHA, 0.0)
    if not is_number(alpha):
        raise CheckpointError(f"{path}: {ALPHA}={brief(repr(alpha))}: wanted a number")
    by_layer: dict[str, dict[str, str]] = defaultdict(dict)  # llama.cpp's name -> our tensor -> key
    for key in file.header.entries:
        name, _, side = key.rpartition(".")
        if side not in _SIDES:
            raise CheckpointError(
                f"{path}: {brief(key)} is no LoRA's tensor\n"
                f"  nothing is left out in silence: wanted lora_a and lora_b; of a norm, llama.cpp drops it"
            )
        by_layer[name][_SIDES[side]] = key
    unknown = sorted(by_layer.keys() - names.by_name.keys())
    if unknown:
        problem = f"{len(unknown)} of its {len(by_layer)} layers are not in this {type(root).__name__}"
        raise CheckpointError(f"{path}: {problem}, such as {brief(unknown[0])}")
    targets, layers = layers_of(root, path, [names.by_name[name] for name in by_layer])
    pieces = {}
    for name, keys in by_layer.items():
        target = targets[names.by_name[name]]
        pieces[target.path] = _piece(file, names, name, float(alpha), keys, target, layers[target])
    return pieces


def _piece(
    file: Gguf, names: Named, name: str, alpha: float, keys: dict[str, str], target: Target, layer: BaseLayer
) -> Piece:
    where = f"{file.header.path}: {name}"
    if keys.keys() != set(_SIDES.values()):
        raise CheckpointError(f"{where} has {', '.join(sorted(keys))} alone\n  wanted lora_a and lora_b")
    check_layer(where, name, layer)
    values = {side: file.matrix_or_vector(key) for side, key in keys.items()}
    a, b = values["lora_A"].mT.contiguous() if name == EMBEDDING else values["lora_A"], values["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or {a.dtype, b.dtype} - set(STORAGE_DTYPES):
        shapes = ", ".join(f"{tuple(value.shape)} of {value.dtype}" for value in values.values())
        raise CheckpointError(f"{where} has {shapes}\n  wanted two matrices of floating numbers")
    if (rows := names.rows(name, target.d_out)) is not None and len(b) == len(rows):
        b = b[rows.argsort()]
    dtype, r = torch.promote_types(a.dtype, b.dtype), len(a)
    cfg = config(where, "lora", r=r, alpha=abs(alpha) or float(r), dtype=dtype)
    return Piece(target, layer, cfg, {"lora_A": a, "lora_B": -b if alpha < 0 else b})


def check_layer(where: str, name: str, layer: BaseLayer) -> None:
    """CheckpointError for a layer on which llama.cpp has no LoRA."""
    if not (is_embedding(layer) if name == EMBEDDING else is_plain_linear(layer)):
        raise CheckpointError(
            f"{where}: llama.cpp's LoRA of a layer of the kind {layer.kind.category!r} isn't known here\n  {_CURE}"
        )


# ---- write ------------------------------------------------------------------------------------------


def write(root: nn.Module, pieces: Pieces, path: Path, modelfile: Any = None) -> Contents:
    """The contents of a file that llama.cpp reads; `modelfile` names Ollama's base, and a Modelfile goes beside it."""
    _check_place(path, modelfile)
    names = named_layers(root)
    by_path = {p: name for name, p in names.by_name.items()}
    for p, piece in pieces.items():
        if p not in by_path:
            raise CheckpointError(f"{p} has no name in llama.cpp's {names.architecture.name!r}\n  {_CURE}")
        check_layer(p, by_path[p], piece.layer)
        if by_path[p] in (EMBEDDING, HEAD) and _is_tied(root, names):
            raise CheckpointError(f"{p} is tied to another layer, which llama.cpp would change too\n  {_CURE}")
    configs: dict[str, Any] = {p: piece.cfg for p, piece in pieces.items()}
    (alpha, count), *_ = Counter(cfg.scaling * cfg.r for cfg in configs.values()).most_common(1)
    if count < len(configs):
        logger.info(f"{path}: one alpha {alpha:g} for all; {len(configs) - count} layers have the rest in lora_b")
    tensors: dict[str, Tensor] = {}
    for p, piece in pieces.items():
        a, b, name = piece.tensors["lora_A"], piece.tensors["lora_B"], by_path[p]
        b = b if configs[p].scaling * configs[p].r == alpha else b * (configs[p].scaling * configs[p].r / alpha)
        if (rows := names.rows(name, len(b))) is not None:
            b = b[rows]
        for side, value in (("lora_a", a.mT if name == EMBEDDING else a), ("lora_b", b)):
            # GGML multiplies by no float64: the proof tells what the rounding is.
            tensors[f"{name}.{side}"] = value.float() if value.dtype == torch.float64 else value
    fields: dict[str, str | int | float] = {ARCHITECTURE: names.architecture.name, **ADAPTER, ALPHA: float(alpha)}
    file = BytesIO()
    write_gguf(file, fields, tensors)
    beside = {} if modelfile is None else {path.parent / MODELFILE: _modelfile(path, modelfile).encode()}
    return {path: file.getvalue(), **beside}


def _check_place(path: Path, modelfile: Any) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; GGUF is one file, such as {path / 'adapter.gguf'}")
    if modelfile is None:
        return
    other = path.parent / MODELFILE
    if other.exists() and other.read_bytes() != _modelfile(path, modelfile).encode():
        raise CheckpointError(f"{other} exists, and says something else\n  name a folder without one")


def _check_modelfile(modelfile: Any) -> None:
    if modelfile is None:
        return
    is_line = isinstance(modelfile, str) and not set(modelfile) & set("\r\n")
    if not is_line or not modelfile or modelfile != modelfile.strip():
        raise ConfigError(f"modelfile={modelfile!r}: wanted the name of Ollama's base model, such as 'llama3.2:1b'")


def _modelfile(path: Path, base: str) -> str:
    return f"FROM {base}\nADAPTER ./{path.name}\n"


def _is_tied(root: nn.Module, names: Named) -> bool:
    """Are embedding and head one tensor? Then GGUF has it once, as token_embd."""
    ends = [root.get_submodule(names.by_name[name]) for name in (EMBEDDING, HEAD) if name in names.by_name]
    weights = [getattr(module, "weight", None) for module in ends]
    says_so = names.architecture.always_ties or getattr(names.config, "tie_word_embeddings", False)
    return bool(says_so) or (len(weights) == 2 and weights[0] is weights[1])


FORMAT = Format("gguf", "GGUF LoRA", ("lora",), read, write, is_path=is_path, options={"modelfile": _check_modelfile})
