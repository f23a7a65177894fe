"""A steering vector in a GGUF file: llama.cpp's --control-vector, repeng's export_gguf, EasySteer's files.

    general.architecture        "controlvector"
    controlvector.model_hint    the model's model_type, which llama.cpp doesn't look at
    controlvector.layer_count   how many directions there are
    direction.3                 F32 (d,), added to the residual stream at the output of block 3, counted from 0

llama.cpp starts at block 1: a vector at block 0 has no place. It adds the vector at all tokens, times the number of
--control-vector-scaled; so what is written is c v. On a model the file is a steer with kinds="block".
"""

import re
from io import BytesIO
from pathlib import Path

from torch import Tensor, nn

from ...base.stacks import find_stacks
from ...core.targets import block_layers
from ...errors import CheckpointError, brief
from ..gguf import read_gguf, write_gguf
from ..keys import layers_of
from .format import Contents, Format, Piece, Pieces, config
from .gguf import ARCHITECTURE, CONTROL_VECTOR, is_control_vector
from .gguf_names import architecture_of, named_layers, text_config

HINT, COUNT = "controlvector.model_hint", "controlvector.layer_count"
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})", re.ASCII)
_ON_BLOCKS = "fit it with SteerConfig(kinds='block'), which adds the vector at a block's output itself"


def place(root: nn.Module, piece: Piece) -> str:
    """The path of the block at whose output the file adds the vector.

    Raises:
        CheckpointError: for a layer whose output the block doesn't add as it is, and last.
    """
    target = piece.target
    if target.is_block:
        return target.path
    architecture, name = architecture_of(root), f"blk.{target.block}.ffn_down.weight"
    if target.experts or named_layers(root).by_name.get(name) != target.path:
        raise CheckpointError(f"{target.path}: a vector added there is no vector at its block's output\n  {_ON_BLOCKS}")
    if not architecture.is_plain:
        problem = f"{architecture.name!r} has a norm or a factor between it and its block's output"
        raise CheckpointError(f"{target.path}: {problem}\n  {_ON_BLOCKS}")
    return f"{target.stack}{target.block}"


# ---- read -------------------------------------------------------------------------------------------


def read(root: nn.Module, path: Path) -> Pieces:
    """The pieces of a file, on the blocks of a model that has one stack of them."""
    file = read_gguf(path)
    kinds = {getattr(text_config(root), "model_type", None)}
    hint = file.fields.get(HINT)
    blocks = _blocks(root, path)
    by_path: dict[str, str] = {}
    for key in file.header.entries:
        match = _DIRECTION.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{path}: {brief(key)} is no direction\n  wanted direction.1, direction.2, ...")
        block = int(match[1])
        if block not in blocks:
            raise CheckpointError(
                f"{path}: {key}: block {block} is not in this {type(root).__name__}, which has {len(blocks)}\n"
                f"  its {HINT} is {brief(repr(hint))}, and this model's type {kinds.pop()!r}"
            )
        if block == 0:
            problem = "llama.cpp refuses a vector at block 0, and so does this reader"
            raise CheckpointError(f"{path}: {key}: {problem}\n  write the file again without {key}")
        by_path[blocks[block]] = key
    targets, layers = layers_of(root, path, by_path, ("block",))
    pieces = {}
    for p, target in targets.items():
        vector, where = file.matrix_or_vector(by_path[p]), f"{path}: {by_path[p]}"
        if vector.shape != (target.d_out,):
            problem = f"{tuple(vector.shape)}, where this {type(root).__name__} has the width {target.d_out}"
            raise CheckpointError(f"{where} has the shape {problem}: a vector of another model")
        cfg = config(where, "steer", kinds="block", dtype=vector.dtype)
        values = {"lora_own": vector, "lora_v": vector.clone(), "lora_norm": vector.new_zeros(())}
        pieces[target.path] = Piece(target, layers[target], cfg, values)
    return pieces


def _blocks(root: nn.Module, path: Path) -> dict[int, str]:
    """The paths of the blocks by their numbers. Raises CheckpointError unless they are of one stack."""
    modules = dict(root.named_modules())
    stacks = find_stacks(modules)
    places = {stacks.place(p): p for p in block_layers(root, modules, stacks)}
    names = sorted({stack for stack, _ in places if stack})
    if len(names) != 1:
        problem = f"{len(names)} stacks of blocks ({', '.join(names) or 'none'})"
        raise CheckpointError(f"{path}: this {type(root).__name__} has {problem}\n  a control vector is of one stack")
    return {block: p for (_, block), p in places.items() if block is not None}


# ---- write ------------------------------------------------------------------------------------------


def write(root: nn.Module, pieces: Pieces, path: Path) -> Contents:
    """The contents of a file that llama.cpp reads by --control-vector."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; GGUF is one file, such as {path / 'vector.gguf'}")
    architecture_of(root)  # llama.cpp adds vectors in the models that are known here, and in others without a word none
    tensors: dict[str, Tensor] = {}
    for p, piece in pieces.items():
        if getattr(piece.cfg, "start", None):
            problem = f"start={piece.cfg.start}: llama.cpp adds a vector at all tokens"  # type: ignore[attr-defined]
            raise CheckpointError(f"{p}: {problem}\n  keep it as our file (lora_lite.save)")
        if (block := piece.target.block) == 0:
            raise CheckpointError(f"{p}: llama.cpp has no place for a vector at block 0\n  leave it out (layers=)")
        key = f"direction.{block}"
        place(root, piece)  # which refuses a layer whose output isn't its block's
        if key in tensors:
            raise CheckpointError(f"{p}: a second vector at block {block}\n  steer at one place of each block")
        tensors[key] = (piece.scale * piece.tensors["lora_v"].double()).float()
    fields = {ARCHITECTURE: CONTROL_VECTOR, HINT: text_config(root).model_type, COUNT: len(tensors)}
    file = BytesIO()
    write_gguf(file, fields, tensors)
    return {path: file.getvalue()}


FORMAT = Format(
    *("gguf-control-vector", "GGUF control vector", ("steer",), read, write),
    is_path=is_control_vector,
    place=place,
)
