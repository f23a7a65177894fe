"""The methods in kohya's and LyCORIS' files: the tensors of one layer as ours, and ours as theirs.

The equations are the same, and so are the factors' shapes, but for a convolution's LoRA, whose down is (r, i, *k) and
whose up (o, r, 1, 1). LoKr's sizes are stored from its tensors, as no file says how a side was split.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.config import BaseConfig
from ...core.targets import Target
from ...errors import CheckpointError, brief
from ...ops.kronecker import sides, split
from ..peft import lora
from ..safetensors import DTYPES, Header, check_numbers
from .format import Piece, config
from .kohya_names import Place

_LORA = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
_LOHA = {f"lora_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
_LOKR = {f"lora_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
_MID, _SCALE, _ALPHA = "lora_mid.weight", "dora_scale", "alpha"
_FACTORS = {*_LORA.values(), *_LOHA.values(), *_LOKR.values(), _MID}
ENDS = {*_FACTORS, _SCALE, _ALPHA}
MARKS = tuple(f".{end}" for end in sorted(_FACTORS))
_ROWS = ("lora_B", "lora_m", "lora_w1_a", "lora_w2_a")  # whose first axis is the layer's rows
MOST_AS_LORA = 256  # the rank of a LoKr whose split ours has no name for
Part = tuple[BaseConfig, dict[str, Tensor]]


def parts_of(header: Header, name: str, keys: Mapping[str, str], place: Place, targets: Sequence[Target]) -> list[Part]:
    """The config and the tensors of each layer that a name is of, in their order.

    Raises:
        CheckpointError: for factors without a partner, shapes that fit no layer, and what has no such method here.
    """
    where, ends = f"{header.path}: {name}", keys.keys() - {_ALPHA}
    if missing := _missing(ends):
        got = ", ".join(sorted(keys)) or "nothing"
        raise CheckpointError(f"{where} has {brief(got)}\n  {missing}: the tensors of a layer are whole, or not there")
    tensors = check_numbers(header.read(keys[end] for end in sorted(ends)), where, "save the adapter again")
    stored = {end: tensors[keys[end]] for end in ends}
    alpha = _alpha(header, keys[_ALPHA]) if _ALPHA in keys else 0.0
    make = _lora if "lora_up.weight" in ends else _loha if "hada_w1_a" in ends else _lokr
    rows = sum(target.d_out for target in targets)
    variant, fields, values, rank = make(where, stored, targets[0], rows)
    scale = (alpha or rank) / rank if rank else 1.0  # of LoKr with two whole matrices
    if scale < 0:
        first = "lora_B" if "lora_B" in values else "lora_w1_a" if "lora_w1_a" in values else "lora_w1"
        values[first] = -values[first]
    dtype = reduce(torch.promote_types, (value.dtype for value in values.values()))
    cfg = config(where, variant, alpha=abs(scale) * fields["r"], dtype=dtype, **fields)
    if place.is_swapped or len(targets) > 1:
        return [(cfg, part) for part in _split(where, variant, values, place, targets)]
    return [(cfg, values)]


def _missing(ends: set[str]) -> str:
    """Why these are no layer's tensors; "" where they are."""
    kinds = [kind for kind in ("lora_", "hada_", "lokr_") if any(end.startswith(kind) for end in ends)]
    if len(kinds) != 1:
        return "wanted the factors of one method"
    if kinds == ["lora_"]:
        return "" if {*_LORA.values()} <= ends else "wanted lora_down.weight and lora_up.weight"
    if _SCALE in ends:
        return "LoHa and LoKr with a dora_scale (LyCORIS' weight_decompose) aren't known here"
    if kinds == ["hada_"]:
        cores = ends & {"hada_t1", "hada_t2"}
        is_whole = {*_LOHA.values()} - {"hada_t1", "hada_t2"} <= ends and len(cores) != 1
        return "" if is_whole else "wanted hada_w1_a, hada_w1_b, hada_w2_a and hada_w2_b, and both cores or none"
    sides_whole = all(
        ends & {side, f"{side}_a", f"{side}_b"} in ({side}, {f"{side}_a", f"{side}_b"})
        for side in ("lokr_w1", "lokr_w2")
    )
    is_whole = sides_whole and not ("lokr_t2" in ends and "lokr_w2" in ends)
    return "" if is_whole else "wanted lokr_w1 or its two factors, and lokr_w2 or its two factors"


def _alpha(header: Header, key: str) -> float:
    """A number, 0 for the rank. Raises CheckpointError for anything else."""
    entry = header.entries[key]
    is_number = (
        math.prod(entry.shape) == 1 and len(entry.shape) < 2 and DTYPES.get(entry.dtype) not in (None, torch.bool)
    )
    value = float(header.read([key])[key]) if is_number else math.nan
    if not math.isfinite(value):
        raise CheckpointError(f"{header.path}: {key} is {entry.dtype} {tuple(entry.shape)}\n  wanted one finite number")
    return value


Ours = tuple[str, dict[str, Any], dict[str, Tensor], int]  # variant, fields, tensors, the rank that alpha is divided by


def _lora(where: str, stored: Mapping[str, Tensor], target: Target, rows: int) -> Ours:
    down, up, mid = stored["lora_down.weight"], stored["lora_up.weight"], stored.get(_MID)
    kernel = target.kernel if mid is None else (1,) * len(target.kernel)
    a, b = _as_matrix(where, "lora_down.weight", down, kernel), _as_matrix(where, "lora_up.weight", up, ())
    if mid is not None:
        r = len(a)
        if not target.kernel or mid.shape != (r, r, *target.kernel) or down.shape[2:].numel() != 1:
            raise _wrong(where, _MID, mid, f"(r, r, *{target.kernel}) of a convolution, with lora_down (r, i, 1, 1)")
        a = torch.einsum("mn...,ni->mi...", mid.float(), a.float()).flatten(1)  # (r, i k)
    values, variant = {"lora_A": a, "lora_B": b}, "lora"
    if _SCALE in stored:
        scale, variant = stored[_SCALE], "dora"
        if scale.ndim < 2 or scale.shape != (rows, *[1] * (scale.ndim - 1)):
            cure = "(o, 1, ...), a norm for each row; LyCORIS' wd_on_out=False, by columns, isn't known here"
            raise _wrong(where, _SCALE, scale, cure)
        values["lora_m"] = scale.flatten().float()
    return variant, {"r": len(a)}, values, len(a)


def _as_matrix(where: str, end: str, tensor: Tensor, kernel: tuple[int, ...]) -> Float[Tensor, "_ _"]:
    """(r, i, *kernel) or (r, i, 1, 1) as a matrix; one that is a matrix already."""
    places = tuple(tensor.shape[2:])
    if tensor.ndim < 2 or not tensor.numel() or (places != kernel and math.prod(places) != 1):
        raise _wrong(where, end, tensor, f"a matrix, or one with the kernel {kernel or '1'}")
    return tensor.flatten(1)


def _wrong(where: str, end: str, tensor: Tensor, wanted: str) -> CheckpointError:
    return CheckpointError(f"{where}.{end} is {tuple(tensor.shape)}\n  wanted {wanted}")


def _loha(where: str, stored: Mapping[str, Tensor], target: Target, rows: int) -> Ours:
    values = {ours: stored[end] for ours, end in _LOHA.items() if end in stored}
    for ours, value in values.items():
        if not value.numel() or (value.ndim != 2 and ours not in ("lora_t1", "lora_t2")):
            raise _wrong(where, _LOHA[ours], value, "a matrix")
    has_core = "lora_t1" in values
    if has_core:
        for name in ("lora_t1", "lora_t2"):
            values[name] = _core(where, _LOHA[name], values[name], target)
    r = len(values["lora_w1_b"])
    return "loha", {"r": r, "use_effective_conv2d": has_core}, values, r


def _core(where: str, end: str, core: Tensor, target: Target) -> Tensor:
    """A core (r, r, *k) with two places at least, as PEFT's has, and ours."""
    if not target.kernel or math.prod(target.kernel) == 1 or tuple(core.shape[2:]) != target.kernel:
        raise _wrong(where, end, core, f"(r, r, *{target.kernel or '()'}) of a convolution above 1")
    return core.reshape(*core.shape, *[1] * (2 - len(target.kernel)))


def _lokr(where: str, stored: Mapping[str, Tensor], target: Target, rows: int) -> Ours:
    """LoKr. A side of which the file has factors is whole here where our rule of ranks, LyCORIS' too, has it so."""
    kernel, places = target.kernel, math.prod(target.kernel)
    values = {ours.removeprefix("lora_"): stored[end] for ours, end in _LOKR.items() if end in stored}
    for name, value in values.items():
        allowed = (kernel,) if name == "t2" else ((), kernel) if name in ("w2", "w2_b") else ((),)
        if value.ndim < 2 or not value.numel() or tuple(value.shape[2:]) not in allowed:
            raise _wrong(where, f"lokr_{name}", value, "a matrix" + f", or one with the kernel {kernel}" * bool(kernel))
    if "t2" in values:
        values["t2"] = _core(where, "lokr_t2", values["t2"], target)
    elif "w2_b" in values:
        values["w2_b"] = values["w2_b"].flatten(1)
    rank = _rank(where, values)
    (w1, w2), has_core = sides(values), "t2" in values  # a core's side is one product already
    (low, m), (k, n) = ((side[0].shape[0], side[-1].shape[1]) for side in (w1, w2))
    n = n // places
    if (low * k, m * n * places) != (rows, target.d_in):
        sizes = f"W1 ({low}, {m}) and W2 ({k}, {n}) are of a layer {(low * k, m * n * places)}"
        raise CheckpointError(f"{where}: wrong shapes: {sizes}, and {target.path} is {(rows, target.d_in)}")
    wanted = (low, k), (m, n)
    for factor in (-1, max(low, m), low, m):
        if (split(rows, factor), split(target.d_in // places, factor)) == wanted:
            break
    else:  # LyCORIS has the smaller part of a side first, whatever its factor is, and ours PEFT's order
        return _as_lora(where, torch.kron(_product(w1).float(), _product(w2).float()), wanted, rank)
    r, is_parted = rank or max(k, n), "w1_a" in values and 2 * rank < max(low, m)
    parts_w2 = {name: value for name, value in values.items() if name in ("w2_a", "w2_b", "t2")}
    if 2 * r >= max(k, n) or not parts_w2:
        parts_w2 = {"w2": _product(w2).reshape(k, n, *kernel)}
        r, is_parted = (r, is_parted) if 2 * r >= max(k, n) else (max(k, n), False)
    parts_w1 = {name: values[name] for name in ("w1_a", "w1_b")} if is_parted else {"w1": _product(w1)}
    fields = {"r": r, "decompose_factor": factor, "decompose_both": is_parted}
    fields["use_effective_conv2d"] = has_core and "t2" in parts_w2
    return "lokr", fields, {f"lora_{name}": value for name, value in (parts_w1 | parts_w2).items()}, rank


def _as_lora(where: str, delta: Float[Tensor, "o i"], sizes: Any, rank: int) -> Ours:
    """Any change of a small layer as a LoRA, one of whose factors is the identity. Raises CheckpointError for more."""
    o, i = delta.shape
    r = min(o, i)
    if r > MOST_AS_LORA:
        problem = f"its sides are split as {sizes}, which no decompose_factor does, and it would be a LoRA of rank {r}"
        raise CheckpointError(f"{where}: {problem}\n  make a LoRA of it with the program that trained it")
    a, b = (torch.eye(i), delta) if i <= o else (delta, torch.eye(o))
    return "lora", {"r": r}, {"lora_A": a, "lora_B": b}, rank


def _product(side: Sequence[Tensor]) -> Tensor:
    """One matrix; of two factors their product, in float32."""
    return side[0] if len(side) == 1 else side[0].float() @ side[1].float()


def _rank(where: str, values: Mapping[str, Tensor]) -> int:
    """The rank of the factors, 0 without any. Raises CheckpointError where they have several."""
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith("_b")}
    ranks |= {
        shape[0 if name == "w2_a" and "t2" in shapes else 1] for name, shape in shapes.items() if name[-2:] == "_a"
    }
    ranks |= {*shapes["t2"][:2]} if "t2" in shapes else set()
    if len(ranks) > 1:
        raise CheckpointError(f"{where}: its factors are {shapes}\n  wanted one rank in all of them: wrong shapes")
    return ranks.pop() if ranks else 0


# ---- ours as theirs ---------------------------------------------------------------------------------


def _split(
    where: str, variant: str, values: Mapping[str, Tensor], place: Place, targets: Sequence[Target]
) -> list[dict[str, Tensor]]:
    """The tensors of each layer whose rows a file's layer has, one above the other. Raises CheckpointError."""
    if variant == "lokr":
        cure = "make a LoRA of it with the program that trained it"
        paths = ", ".join(target.path for target in targets)
        raise CheckpointError(f"{where}: a Kronecker product of the rows of {paths} isn't one of each\n  {cure}")
    heights = [target.d_out for target in targets]
    if wrong := [name for name in _ROWS if name in values and len(values[name]) != sum(heights)]:
        got = tuple(values[wrong[0]].shape)
        raise CheckpointError(f"{where}: wrong shapes: {wrong[0]} is {got}, and its layers have {sum(heights)} rows")
    swapped = {name: swap(value) if place.is_swapped and name in _ROWS else value for name, value in values.items()}
    parts = {name: value.split(heights) for name, value in swapped.items() if name in _ROWS}
    return [swapped | {name: rows[i] for name, rows in parts.items()} for i in range(len(targets))]


def swap(tensor: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return tensor.roll(len(tensor) // 2, 0)


def in_file(piece: Piece, place: Place) -> dict[str, Tensor]:
    """The tensors of a layer by the ends of their keys, in LyCORIS' shapes, with alpha."""
    cfg: Any = piece.cfg
    kernel, values, r = piece.target.kernel, dict(piece.tensors), cfg.r
    alpha = cfg.scaling * r
    ones = (1,) * len(kernel)
    if cfg.variant in ("lora", "dora"):
        a, b = values["lora_A"], values["lora_B"]
        if cfg.variant == "dora":
            values["lora_m"] = lora.magnitude(piece.layer, cfg.scaling, values)
        rows = {"lora_B": b.reshape(*b.shape, *ones)}
        rows |= {"lora_m": values["lora_m"].reshape(-1, 1, *ones)} if "lora_m" in values else {}
        rows = {name: swap(value) if place.is_swapped else value for name, value in rows.items()}
        named = {_LORA["lora_A"]: a.unflatten(1, (-1, *kernel)) if kernel else a, _LORA["lora_B"]: rows["lora_B"]}
        named |= {_SCALE: rows["lora_m"]} if "lora_m" in rows else {}
    else:
        names = _LOHA if cfg.variant == "loha" else _LOKR
        if len(kernel) == 1:  # theirs has no second place
            values = {name: v.flatten(2) if name in ("lora_t1", "lora_t2") else v for name, v in values.items()}
        if {"lora_w1", "lora_w2"} <= values.keys() and cfg.scaling != 1:  # where they take 1, whatever alpha is
            values["lora_w1"], alpha = values["lora_w1"] * cfg.scaling, float(r)
        named = {names[name]: value for name, value in values.items()}
    return named | {_ALPHA: torch.tensor(float(alpha))}


def fused(pieces: Sequence[Piece], where: str) -> dict[str, Tensor]:
    """LoRAs of several linear layers of one input as one of all of their rows.

    A is that of all, one above the other, and B is zero where it is another one's, unless all have the same A.
    """
    configs: list[Any] = [piece.cfg for piece in pieces]
    if others := [cfg.variant for cfg in configs if cfg.variant != "lora"]:
        cure = 'write it with names="diffusers", or give rank= to write a plain LoRA'
        raise CheckpointError(f"{where} is one layer there, and {others[0]!r} of its parts isn't one of it\n  {cure}")
    a, scale = pieces[0].tensors["lora_A"], configs[0].scaling
    bs = [p.tensors["lora_B"] * (cfg.scaling / scale) for p, cfg in zip(pieces, configs, strict=True)]
    if all(torch.equal(p.tensors["lora_A"], a) for p in pieces):
        b = torch.cat(bs)
    else:
        a, b = torch.cat([p.tensors["lora_A"] for p in pieces]), torch.block_diag(*bs)
    return {"lora_down.weight": a, "lora_up.weight": b, _ALPHA: torch.tensor(float(scale * len(a)))}
