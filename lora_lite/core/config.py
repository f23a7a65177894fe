"""Adapter configs: frozen, valid once constructed, and the same after a trip through JSON."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch

from ..dtypes import STORAGE_DTYPES, dtype_name
from ..errors import ConfigError, brief
from .validate import compiles, is_number

ROLES = ("reader", "writer", "inner")
KINDS = ("linear", "conv", "embedding", "experts", "matrix", "norm", "block")
TIED_WEIGHTS = ("apart", "together", "as_base", "refuse")
CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "dropout": (lambda value: is_number(value) and 0 <= value < 1, "a probability below 1"),
    "seed": (lambda value: type(value) is int and 0 <= value < 2**63, "an integer from 0 to 2^63"),
    "dtype": (STORAGE_DTYPES.__contains__, "a floating dtype of torch"),
    "tied_weights": (TIED_WEIGHTS.__contains__, f"one of {TIED_WEIGHTS}"),
}
"""Fields by their name: which values are valid, and in words."""

Config = TypeVar("Config", bound="BaseConfig")


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The part of every config that says which layers are adapted, and how parameters are stored.

    The filters are a conjunction; a filter left at its default lets everything pass. Each takes a list or a tuple
    (a single regex may stand alone) and becomes a tuple.

    target_names    regexes, searched in the full module path. Default: every linear layer in a stack of
                    blocks but routers of experts (`plan` prints what is left out); in a model without
                    blocks, every one but the output head. A regex can name any linear layer, the head
                    included.
    exclude_names   regexes; a path that matches one is left out
    target_roles    any of "reader" (reads the residual stream: d_in is the model width), "writer"
                    (writes it: d_out is) and "inner" (neither)
    kinds           of layer: any of "linear", "conv" (Conv1d, 2d, 3d), "embedding", "experts" (the fused matrices of a
                    mixture of experts, `...experts.gate_up_proj`) and "matrix" (other bare parameters). "linear" are
                    layers of that shape and the projections of nn.MultiheadAttention (`...in_proj_weight`).
                    "norm" are norms of the last axis (ia3, ia3_ff, steer, plain abliteration). "block", by itself, is
                    the residual stream at the outputs of blocks (steer, reft, plain ablation). For these two alone, a
                    method's default names and roles don't count: they are of linear layers
    tied_weights    of a target whose weight another module holds too, as an embedding's the head: "apart" adapts the
                    target alone (its weight can't be merged while it is tied), "together" has all that hold an
                    embedding's weight multiply by the adapted one (low-rank methods), "as_base" is together where the
                    base ties them and apart where it doesn't, "refuse" raises
    layers          block indices, negative ones from the end
    layer_range     depth fractions: (0.2, 0.8) keeps the middle 60 % of the blocks
    dtype           in which parameters are stored. float32 by default: bfloat16 masters lose
                    optimiser steps below 2^-9 of a parameter's size
    per_layer       {regex: {field: value}}, searched as target_names are: fields of the method that
                    differ at the layers it finds; of several, the later entry wins. attach resolves it
                    once, and an entry that finds no target is an error

    Raises:
        ConfigError: for a field that isn't valid.
    """

    variant: str
    target_names: Sequence[str] = ()
    exclude_names: Sequence[str] = ()
    target_roles: Sequence[str] = ()
    kinds: Sequence[str] = ("linear",)
    tied_weights: str = "apart"
    layers: Sequence[int] | None = None
    layer_range: Sequence[float] | None = None
    dtype: torch.dtype = torch.float32
    per_layer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    # Facts of a config class, for the runtime; fields of a config are above.
    FILTERS: ClassVar[tuple[str, ...]] = (
        *("target_names", "exclude_names", "target_roles", "kinds", "layers", "layer_range"),
    )
    REGEXES: ClassVar[tuple[str, ...]] = ("target_names", "exclude_names")
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = ("variant", "dtype", "per_layer", "tied_weights", *FILTERS)
    ADDED_LATER: ClassVar[tuple[str, ...]] = ()  # fields that files of earlier versions lack: they have the default
    # Files leave these out, so those of one config for all layers, all of them linear, are the same to every version.
    UNSAID: ClassVar[Mapping[str, Any]] = {"per_layer": {}, "kinds": ["linear"], "tied_weights": "apart"}
    FUSED_EXPERTS: ClassVar[bool] = False  # can it go on the fused experts of a mixture-of-experts block?
    NEEDS_BIAS: ClassVar[bool] = False  # does it go on layers with a bias alone?
    WITHOUT_MATRIX: ClassVar[tuple[str, ...]] = ()  # "norm", "block": as a change of x or of y alone, without a weight

    def __post_init__(self) -> None:
        for name in self.FILTERS:
            value = getattr(self, name)
            # The config is frozen once it is made, so its own fields are set past the dataclass.
            if isinstance(value, Sequence):
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
            else:
                self.require(value is None and name in ("layers", "layer_range"), name, "a list or a tuple")
        for member in fields(self):
            value = getattr(self, member.name)
            if isinstance(member.default, bool):
                self.require(isinstance(value, bool), member.name, "True or False")
            elif member.name in CHECKS:
                self.require(CHECKS[member.name][0](value), member.name, CHECKS[member.name][1])
            elif isinstance(member.default, enum.Enum):  # a file, or a user, gives the value of one
                values = [choice.value for choice in type(member.default)]
                self.require(value in values, member.name, f"one of {values}")
                object.__setattr__(self, member.name, type(member.default)(value))
        self.require(all(role in ROLES for role in self.target_roles), "target_roles", f"any of {ROLES}")
        self.require(bool(self.kinds) and all(kind in KINDS for kind in self.kinds), "kinds", f"any of {KINDS}")
        if not {"norm", "block"}.isdisjoint(self.kinds):
            self._check_without_matrix()
        if self.layers is not None:
            ok = bool(self.layers) and all(type(i) is int for i in self.layers)  # a bool is an int to isinstance
            self.require(ok, "layers", "one or more block indices")
        if self.layer_range is not None:
            ok = len(self.layer_range) == 2 and all(map(is_number, self.layer_range))
            ok = ok and 0 <= self.layer_range[0] < self.layer_range[1] <= 1
            self.require(ok, "layer_range", "two fractions, 0 <= low < high <= 1")
        self._check_per_layer()
        self.check_regexes()

    def _check_without_matrix(self) -> None:
        """ConfigError where the method can't go on these kinds; defaults that name linear layers don't count here."""
        for kind, why in (("norm", "its method needs a matrix"), ("block", "it reads or changes a layer")):
            self.require(kind not in self.kinds or kind in self.WITHOUT_MATRIX, "kinds", f"no {kind!r}: {why}")
        self.require("block" not in self.kinds or self.kinds == ("block",), "kinds", "'block' by itself")
        if set(self.kinds) <= {"norm", "block"} and self.kinds != type(self).kinds:
            for name in ("target_names", "target_roles"):
                value = getattr(self, name)
                object.__setattr__(self, name, () if value == getattr(type(self), name) else value)

    def _check_per_layer(self) -> None:
        entries = self.per_layer
        ok = isinstance(entries, Mapping) and all(isinstance(overrides, Mapping) for overrides in entries.values())
        self.require(ok, "per_layer", "{regex: {field: value}}")
        checked = {}
        for pattern, overrides in entries.items():
            self.require(isinstance(pattern, str), "per_layer", "{regex: {field: value}}")
            try:
                checked[pattern] = self.checked_overrides(overrides)
            except ConfigError as error:
                raise ConfigError(f"per_layer[{pattern!r}]: {error}") from error
        object.__setattr__(self, "per_layer", checked)  # a copy: the caller may change the dict that was given

    def with_overrides(self: Config, overrides: Mapping[str, Any]) -> Config:
        """The config of a layer where these fields differ. Raises ConfigError; a file's regexes aren't compiled."""
        if not overrides:
            return self
        may_differ = [field.name for field in fields(self) if field.name not in self.SAME_AT_ALL_LAYERS]
        wrong = [name for name in overrides if name not in may_differ]
        if wrong:
            raise ConfigError(f"{type(self).__name__}: {wrong} can't differ by layer; wanted some of {may_differ}")
        # Regexes are set afterwards: a config checks them as it is made, and those of a file may take minutes.
        bare: dict[str, Any] = {"per_layer": {}, **dict.fromkeys(self.REGEXES, ())}
        config = replace(self, **bare, **overrides)
        for name in self.REGEXES:
            object.__setattr__(config, name, getattr(self, name))
        return config

    def checked_overrides(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The overrides as a config at a layer holds them. Raises ConfigError."""
        config = self.with_overrides(overrides)
        return {name: getattr(config, name) for name in overrides}

    def check_regexes(self) -> None:
        """ConfigError unless they compile."""
        for name in self.REGEXES:
            for pattern in getattr(self, name):
                self.require(compiles(pattern), name, "regexes that compile")
        self.require(all(map(compiles, self.per_layer)), "per_layer", "regexes that compile")

    def require(self, ok: bool, field: str, wanted: str) -> None:
        if not ok:
            got = brief(repr(getattr(self, field)), 400)  # a list of tokens may be long
            raise ConfigError(f"{type(self).__name__}({field}={got}): wanted {wanted}")

    @property
    def on_blocks(self) -> bool:
        """Is it asked onto the outputs of blocks?"""
        return "block" in self.kinds

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON values, the dtype by its name; per_layer and kinds only where they say something."""
        out = {f.name: to_json(getattr(self, f.name)) for f in fields(self)}
        return {name: value for name, value in out.items() if name not in self.UNSAID or value != self.UNSAID[name]}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The config that `to_dict` wrote.

        Its regexes may be anyone's: they aren't compiled, which can take minutes. `attach` and `plan` do that.

        Raises:
            ConfigError: for a field that is unknown, missing or not valid.
        """
        later = {f.name: to_json(f.default) for f in fields(cls) if f.name in cls.ADDED_LATER}
        values = {**later, **cls.UNSAID, **values}
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise ConfigError(
                f"{cls.__name__}: the stored fields are not this version's\n"
                f"  unknown: {sorted(set(values) - known)}, missing: {sorted(known - set(values))}"
            )
        dtypes = {dtype_name(dtype): dtype for dtype in STORAGE_DTYPES}
        if values["dtype"] not in dtypes:
            raise ConfigError(f"{cls.__name__}: stored dtype {values['dtype']!r}: wanted one of {sorted(dtypes)}")
        regexes = {name: values[name] for name in cls.REGEXES}  # set past the check that compiles them
        bare = {"dtype": dtypes[values["dtype"]], "per_layer": {}, **dict.fromkeys(cls.REGEXES, ())}
        config = cls(**{**values, **bare})
        object.__setattr__(config, "per_layer", values["per_layer"])
        config._check_per_layer()
        for name, patterns in regexes.items():
            object.__setattr__(config, name, tuple(patterns) if isinstance(patterns, list) else patterns)
            config.require(isinstance(patterns, list) and {*map(type, patterns)} <= {str}, name, "a list of regexes")
        return config


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(BaseConfig):
    """A BaseConfig with a rank: the config of a low-rank variant that brings none of its own."""

    r: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.r) is int and self.r > 0, "r", "a rank of at least 1")


def to_json(value: Any) -> Any:
    """A value of a config field, or a mapping of them, as JSON has it."""
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
