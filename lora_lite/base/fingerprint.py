"""The record of a base in an adapter's file, and the check that another base is the same one."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from loguru import logger
from torch import nn

from ..dtypes import STORAGE_DTYPES, dtype_name
from ..errors import CheckpointError, brief
from .layer import BaseLayer, quantization_of
from .storage import Quantization

Fingerprint = list[Any]  # ["bfloat16", 0.125, -0.5, ...]: the dtype of a stored weight, then a few of its elements
LONGEST_TEXT = 400  # characters of a name or a path in a file: messages quote them

BY_VALUES = "load it on its own base, or say verify_base=False if you know that the difference does not matter"

# By name, because torch's attributes must never be looked up by a name out of a file.
_DTYPES = {dtype_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class BaseRecord:
    """The base that an adapter was attached to, as its file remembers it."""

    class_name: str
    name_or_path: str | None
    dtype: str
    quantization: Quantization | None
    fingerprint: dict[str, Fingerprint]  # path of each target -> the fingerprint of its weight

    def to_json(self) -> dict[str, Any]:
        """The record in a file's metadata."""
        return {"class": self.class_name, **{k: v for k, v in asdict(self).items() if k != "class_name"}}

    @classmethod
    def from_json(cls, value: Any, targets: Iterable[str]) -> "BaseRecord | None":
        """The record in a file's metadata; None for anything but a record with a fingerprint for each target."""
        names = ("class", "name_or_path", "dtype", "quantization", "fingerprint")
        if not (isinstance(value, dict) and set(names) <= value.keys()):
            return None
        class_name, name, dtype, quantization, fingerprint = (value[name] for name in names)
        known = _quantization_from(quantization)  # None for a malformed one too
        valid = _is_text(class_name) and isinstance(name, str | None) and _is_dtype(dtype)
        valid = valid and (known is None) == (quantization is None)
        valid = valid and isinstance(fingerprint, dict) and fingerprint.keys() == set(targets)
        valid = valid and all(map(_is_fingerprint, fingerprint.values()))
        return cls(class_name, name, dtype, known, fingerprint) if valid else None

    def at(self, paths: Iterable[str]) -> "BaseRecord":
        """The record with the fingerprints of these layers alone."""
        return replace(self, fingerprint={path: self.fingerprint[path] for path in paths})

    def renamed(self, paths: Mapping[str, str]) -> "BaseRecord":
        """The record with the path that each layer has in another model."""
        return replace(self, fingerprint={new: self.fingerprint[path] for path, new in paths.items()})

    def __str__(self) -> str:
        """The record in a few words, for messages."""
        stored = self.quantization.quant_type if self.quantization else self.dtype
        return f"{self.class_name} {brief(self.name_or_path or '')} {stored}"


def base_record(model: nn.Module, layers: Iterable[BaseLayer]) -> BaseRecord:
    """The record of the base that an adapter on these layers is attached to.

    The fingerprint of a layer of an unknown storage is the dtype alone, which tells no two such weights apart.
    """
    layers = list(layers)
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return BaseRecord(
        type(model).__name__,
        None if name is None else str(name),  # diffusers keeps the Path that a model was loaded from
        dtype_name(floating),
        quantization_of(model, layers),
        {layer.path: [dtype_name(layer.stored.dtype), *layer.storage.samples(layer)] for layer in layers},
    )


def same_base(a: BaseRecord, b: BaseRecord) -> bool:
    """Are two records of one base? Elements of one dtype must be equal, of two equal to the coarser one's rounding."""
    if a.quantization != b.quantization or a.fingerprint.keys() != b.fingerprint.keys():
        return False
    return all(same_weight(a.fingerprint[path], b.fingerprint[path]) for path in a.fingerprint)


def same_weight(a: Fingerprint, b: Fingerprint) -> bool:
    """Are two fingerprints of one weight?"""
    if a[0] == b[0]:
        return a[1:] == b[1:]
    dtypes = [_DTYPES[name] for name in (a[0], b[0])]
    if not all(dtype in STORAGE_DTYPES for dtype in dtypes):
        return False
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)  # a cast rounds by half of it: two casts by one at most
    tiny = max(torch.finfo(dtype).tiny for dtype in dtypes)  # below it float16 has fewer bits
    pairs = zip(a[1:], b[1:], strict=True)
    return len(a) == len(b) > 1 and all(abs(x - y) <= eps * abs(x) + tiny for x, y in pairs)


def other_base(file: str, recorded: BaseRecord, live: BaseRecord) -> str:
    """The first lines of a message on two bases."""
    return f"{file} was trained on another base than this one\n  file:  {recorded}\n  model: {live}"


def tell_other_base(message: str, variant: str, reads: bool, verify: bool, cure: str = BY_VALUES) -> None:
    """Warn that a base is another one than the adapter's.

    Raises:
        CheckpointError: for a method that reads its base weight, unless the caller takes it on with verify=False.
    """
    if reads and verify:
        raise CheckpointError(f"{message}\n  {variant!r} depends on the values of its base weight: {cure}")
    logger.warning(f"{message}\n  its outputs will not be those that it was trained for")


# ---- a record as untrusted input ----------------------------------------------------------------


def _quantization_from(value: Any) -> Quantization | None:
    names = {field.name for field in fields(Quantization)}
    if not (isinstance(value, dict) and names - {"weight_dtype"} <= value.keys()):  # early files lack it
        return None
    known = Quantization(**{name: value[name] for name in names & value.keys()})
    texts = [known.method, known.quant_type, *known.modules] if isinstance(known.modules, list) else [None]
    # type(), because isinstance would take True for an int.
    sizes = isinstance(known.double_quant, bool) and (known.blocksize is None or type(known.blocksize) is int)
    dtypes = all(name is None or _is_dtype(name) for name in (known.compute_dtype, known.weight_dtype))
    return known if sizes and dtypes and all(map(_is_text, texts)) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and value.isprintable()


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in _DTYPES


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and _is_dtype(value[0]) and all(type(n) is float for n in value[1:])
