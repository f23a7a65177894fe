"""What an adapter file remembers of the base that it belongs to, and whether another base is that one."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..dtypes import STORAGE_DTYPES, dtype_name
from ..errors import brief
from . import quant

LONGEST_TEXT = 400
"""Characters of a name or a path in a file, so that messages are bounded."""

_NOT_VALUES = ("compute_dtype", "weight_dtype", "modules")
"""Entries of a quantisation record that leave a weight's values as they are."""

_DTYPES = {dtype_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
"""By name: torch's own attributes are never looked up by a name out of a file."""

_OPTIONAL_TEXT = (str, type(None))
_FORM = {"class": (str,), "dtype": (str,)}
_FORM_OF_QUANTIZATION = {
    "method": (str,),
    "quant_type": (str,),
    "blocksize": (int, type(None)),
    "double_quant": (bool,),
    "compute_dtype": _OPTIONAL_TEXT,
    "modules": (list,),
}


def base_record(model: nn.Module, targets: Mapping[str, quant.Linear]) -> dict[str, Any]:
    """What an adapter was attached to, for its file.

    The fingerprint holds, for each target, the dtype of the stored weight and a few of its elements (`quant.samples`);
    of an unknown kind the dtype alone, which tells no two such weights apart.
    """
    config = getattr(model, "config", None)
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {
        "class": type(model).__name__,
        "name_or_path": getattr(config, "_name_or_path", None) or None,
        "dtype": dtype_name(floating),
        "quantization": quant.quantization(model),
        "fingerprint": {path: [dtype_name(quant.stored(m).dtype), *quant.samples(m)] for path, m in targets.items()},
    }


def same_base(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Are two records of one base? Elements of one dtype must be equal, of two equal to the coarser one's rounding."""
    how = [{k: v for k, v in (each["quantization"] or {}).items() if k not in _NOT_VALUES} for each in (a, b)]
    prints = a["fingerprint"], b["fingerprint"]
    if how[0] != how[1] or prints[0].keys() != prints[1].keys():
        return False
    return all(same_weight(prints[0][path], prints[1][path]) for path in prints[0])


def base_line(base: Mapping[str, Any]) -> str:
    """A record in a few words, for messages."""
    how = base["quantization"] or {"quant_type": base["dtype"]}
    return f"{base['class']} {brief(base['name_or_path'] or '')} {how['quant_type']}"


def is_record(base: Any, targets: Iterable[str]) -> bool:
    """Has it the form of a base record with a fingerprint for each target?"""
    if not (_has(base, _FORM) and {"name_or_path", "quantization", "fingerprint"} <= base.keys()):
        return False
    if not isinstance(base["name_or_path"], str | None) or base["dtype"] not in _DTYPES:
        return False
    how, prints = base["quantization"], base["fingerprint"]
    if how is not None:
        if not (_has(how, _FORM_OF_QUANTIZATION) and all(map(_is_text, how["modules"]))):
            return False
        if not all(how[key] in (None, *_DTYPES) for key in how if key.endswith("dtype")):
            return False
    return isinstance(prints, dict) and prints.keys() == set(targets) and all(map(_is_print, prints.values()))


def _has(value: Any, form: Mapping[str, tuple[type, ...]]) -> bool:
    """Is it an object with these keys, each of one of its types, and text short enough for a message?"""
    return isinstance(value, dict) and all(
        key in value and type(value[key]) in types and (type(value[key]) is not str or _is_text(value[key]))
        for key, types in form.items()
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and value.isprintable()


def _is_print(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and isinstance(value[0], str)
        and value[0] in _DTYPES
        and all(isinstance(number, float) for number in value[1:])
    )


def same_weight(a: list[Any], b: list[Any]) -> bool:
    """Are two prints of one weight: the dtype, then elements?"""
    if a[0] == b[0]:
        return a[1:] == b[1:]
    dtypes = [_DTYPES[name] for name in (a[0], b[0])]
    if not all(dtype in STORAGE_DTYPES for dtype in dtypes):
        return False
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    tiny = max(torch.finfo(dtype).tiny for dtype in dtypes)
    pairs = zip(a[1:], b[1:], strict=True)
    return len(a) == len(b) > 1 and all(abs(x - y) <= eps * abs(x) + tiny for x, y in pairs)
