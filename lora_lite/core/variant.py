"""The contract between the runtime and an adapter method, and the registry of methods."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, VariantError, brief
from .config import AdapterConfig, BaseConfig
from .layer import Layer
from .targets import Target

if TYPE_CHECKING:
    from .positions import Prompt

__all__ = ["REGISTRY", "Layer", "ParamSpec", "Variant", "config_for", "lookup", "register", "seeded"]


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of an adapter at one layer.

    shape       of the tensor
    init        "zeros", "ones", "kaiming" (uniform, a = √5: PyTorch's and PEFT's for a linear
                layer), "normal" (std 0.02), or a callable that fills the tensor in place
    trainable   a Parameter if true, else a buffer; either way it is saved
    keep_dtype  in `forward` the view hands tensors out in the compute dtype; with keep_dtype this
                one comes as stored, for a difference or a norm that must be formed in float32
    dtype       None: the config's. An integer dtype makes it a table: it is never trained, cast or searched for NaN
    below       of a table: its numbers are from 0 to below this, in order of size if `is_sorted`; a file's are checked
    saved       "always"; "resume": in what a training needs to go on, and not in the adapter's file, such as the
                state of a schedule; "never": made again by `init` at load, which must give the same bits on every
                machine (`seeded`)
    is_shift    it is added to the output whatever x is: no weight holds it, so nn.MultiheadAttention can't carry it
    """

    shape: tuple[int, ...]
    init: str | Callable[[Tensor], Any] = "zeros"
    trainable: bool = True
    keep_dtype: bool = False
    dtype: torch.dtype | None = None
    saved: Literal["always", "resume", "never"] = "always"
    below: int | None = None
    is_sorted: bool = False
    is_shift: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None or self.saved != "always":
            self._check_table_or_remade()
        if isinstance(self.init, str) and self.init not in _FILL:
            raise VariantError(f"ParamSpec(init={self.init!r}): wanted {sorted(_FILL)} or a callable")

    def _check_table_or_remade(self) -> None:
        if self.dtype is not None and self.dtype not in TABLES:
            raise VariantError(f"ParamSpec(dtype={self.dtype}): wanted one of {', '.join(map(str, TABLES))}, or None")
        if self.dtype is not None:
            object.__setattr__(self, "trainable", False)
            object.__setattr__(self, "keep_dtype", True)
        if self.saved not in ("always", "resume", "never") or (self.saved == "never" and self.trainable):
            wanted = "'always', 'resume', or 'never' of what isn't trained"
            raise VariantError(f"ParamSpec(saved={self.saved!r}, trainable={self.trainable}): wanted {wanted}")

    @torch.no_grad()
    def fill(self, tensor: Tensor) -> None:
        """Give the tensor its starting values, in place."""
        result = (_FILL[self.init] if isinstance(self.init, str) else self.init)(tensor)
        if isinstance(result, Tensor) and result is not tensor:  # torch.randn_like for normal_, say
            raise VariantError(f"{self}: init made a new tensor, which would be lost\n  fill the one given, in place")


TABLES = torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8
"""The dtypes of integer tables."""


def seeded(fill: Callable[[Tensor, torch.Generator], Any], seed: int) -> Callable[[Tensor], None]:
    """An `init` that gives the same bits wherever it runs: in float32 on the CPU, from a generator of its own.

    fill    `(tensor, generator)` fills the tensor in place, such as `lambda t, g: t.normal_(generator=g)`
    """

    def init(tensor: Tensor) -> None:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        drawn = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        fill(drawn, torch.Generator("cpu").manual_seed(seed))
        tensor.copy_(drawn)

    return init


_FILL: dict[str, Callable[[Tensor], Any]] = {
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
    "kaiming": lambda t: nn.init.kaiming_uniform_(t, a=math.sqrt(5)),
    "normal": lambda t: nn.init.normal_(t, std=0.02),
}


class LowRank(NamedTuple):
    """A change of the output y by factors A (r, d_in), B (d_out, r), s: y + B (s ⊙ A drop(x)); with a gain g (d_out,)
    on y without its bias, y + c [(g - 1) ⊙ (y - b) + g ⊙ B (s ⊙ A drop(x))].

    For A, None stands for the identity, so that B is ΔW itself; a table (r,) of indices, in order, for the rows of the
    identity at these: a change at some input channels alone, such as some tokens of an embedding.
    """

    a: Tensor | None
    b: Tensor
    s: float | Tensor
    dropout: float = 0.0  # on x; 0 outside of training
    gain: Tensor | None = None
    c: float | Tensor = 1.0
    shift: Tensor | None = None  # (d_out,), or (groups, d_out per group), added to the output whatever x is

    @property
    def is_dense(self) -> bool:
        """Are both factors matrices of numbers?"""
        return self.a is not None and self.a.is_floating_point()

    def branch(self, x: Tensor) -> Tensor:
        """B (s ⊙ A drop(x)), (*b, d_out)."""
        h, a = F.dropout(x, self.dropout), self.a
        if a is not None:
            h = F.linear(h, a.to(x.dtype)) if self.is_dense else h.index_select(-1, a)  # (*b, r)
        return F.linear((h * self.s).to(h.dtype), self.b.to(x.dtype))  # a vector s may be wider

    def of_rows(self, y: Tensor, d_in: int) -> Tensor:
        """Aᵀ (s ⊙ Bᵀ drop(y)), (*b, d_in): the change of a product with the transpose."""
        h, a = ((F.dropout(y, self.dropout) @ self.b.to(y.dtype)) * self.s).to(y.dtype), self.a  # (*b, r)
        if a is None:
            return h
        return h @ a.to(h.dtype) if self.is_dense else h.new_zeros(*h.shape[:-1], d_in).index_add(-1, a, h)

    def delta(self, d_in: int, dtype: torch.dtype) -> Tensor:
        """B (s ⊙ A), (d_out, d_in)."""
        b, a = (self.b * self.s).to(dtype), self.a  # (d_out, r)
        if a is None:
            return b
        return b @ a.to(dtype) if self.is_dense else b.new_zeros(len(b), d_in).index_add(1, a, b)

    def added(self, y: Tensor, branch: Tensor, bias: Tensor | None) -> Tensor:
        """The new output, for branch = B (s ⊙ A drop(x)) of the shape of y (*b, d_out)."""
        branch = branch.to(y.dtype)  # factors may be wider than the activations
        if self.gain is None:
            return y + branch if self.shift is None else y + branch + self.shift.flatten().to(y.dtype)
        wx = y if bias is None else y - bias
        return y + self.c * ((self.gain - 1).to(y.dtype) * wx + self.gain.to(y.dtype) * branch)


class Variant:
    """An adapter method: static maths over a Layer view, and what it asks of the runtime.

    The class itself is used; it is never instantiated. A registered class needs `name`, `param_specs` and at least one
    of `forward` and `forward_input`, and need not inherit: `register` makes it a subclass of this one. So all else has
    the defaults below, and the runtime reads declared attributes and never probes.

    base_weight        "unused": any kind of layer. "read": its values, dequantised ones too.
                       "dense": an unquantised layer only. Or a function of the config that gives one of them
    has_identity_init  a fresh adapter leaves every output bit-exact
    handles_scale      the maths uses `layer.scale` itself; otherwise the runtime blends y + c·(f(y) - y), which
                       rounds a small change to y's dtype twice
    needs_calibration  `group_init` needs `attach(..., calibration_data=...)`. Or a function of the config that says so;
                       where that says no, data is an error
    live               config fields that `Adapter.configure` may change while the adapter is attached
    reads_input        `forward` looks at x. If not, no patches or one-hot vectors have to be made for it
    leads              its adapters come before those that don't lead, whenever they were attached
    not_capturable     why no graph can follow it (`capturable`); empty for a method that one can. Or a function of the
                       config that says so

    On fused experts (a config with FUSED_EXPERTS): where the weight is unused, `forward` runs once, on the block's
    output, and must be affine in y alone (what it adds whatever y is can't be merged); otherwise every expert has
    tensors of its own, and `init`, `forward_input` and `forward` see it as the linear layer that it is (x an identity
    matrix, y its weight).
    """

    name: str
    config: type[BaseConfig] = AdapterConfig
    base_weight: Literal["unused", "read", "dense"] | Callable[[Any], str] = "unused"
    has_identity_init: bool = True
    handles_scale: bool = False
    needs_calibration: bool | Callable[[Any], bool] = False
    live: tuple[str, ...] = ()
    reads_input: bool = True
    leads: bool = False
    not_capturable: str | Callable[[Any], str] = ""

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
        """The tensors at a layer (d_out, d_in), by a name that starts with `lora_`."""
        raise NotImplementedError

    @classmethod
    def layer_specs(cls, target: Target, cfg: Any) -> dict[str, ParamSpec]:
        """As `param_specs`, of a layer of which more is known than its size: `target.has_bias`, and
        `target.is_diagonal` of a norm, whose weight is a vector. A method declares one of the two."""
        return cls.param_specs(target.d_in, target.d_out, cfg)

    @staticmethod
    def shared_specs(targets: Sequence[Target], cfg: Any) -> dict[str, ParamSpec]:
        """The tensors that the adapter has once, by name: `layer.lora_A` of a view is the one called "A". `targets`
        are all its layers (`path`, `d_in`, `d_out`) in module order; in a file the key is `lora_shared.A`."""
        return {}

    @staticmethod
    def init(layer: Layer, cfg: Any) -> None:
        """Fill what `ParamSpec.init` could not, from the layer's weight. Never run by a load."""

    @staticmethod
    def group_init(model: nn.Module, targets: Mapping[str, Layer], cfg: Any, calibration_data: Any) -> None:
        """As `init`, once for all layers, after it; `targets` maps path to view. The model runs without the adapter."""

    @staticmethod
    def refresh(targets: Mapping[str, Layer], cfg: Any) -> None:
        """Bring the tensors in line with the config: after `group_init`, and whenever its `live` fields change."""

    @staticmethod
    def on_step(targets: Mapping[str, Layer], cfg: Any, step: int) -> None:
        """A schedule: `Adapter.step` calls it after each step of the optimizer, the first with step = 1, while the
        gradients are there. What it has to remember between steps are buffers with saved="resume"."""

    @staticmethod
    def penalty(targets: Mapping[str, Layer], cfg: Any) -> Tensor | None:
        """A number that training adds to the loss, over all layers, as `Adapter.penalty` gives it; None for nothing."""
        return None

    @staticmethod
    def positions(cfg: Any) -> "Callable[[Prompt], Tensor] | None":
        """Where in a sequence it acts: None for everywhere, or a function of the prompt of b rows and t columns that
        gives (b, t + 1) booleans, the last of a row for all that comes after its prompt. Elsewhere the runtime keeps
        what was there, bit for bit. One config has one mask: what it depends on is the same at all layers."""
        return None

    @staticmethod
    def low_rank(layer: Layer) -> "LowRank | tuple[Tensor, Tensor, float | Tensor] | None":
        """(A (r, d_in), B (d_out, r), s), exact, if all it does at `layer.scale` is to add B (s ⊙ A x), whatever y is:
        then the rounds that a history keeps are one pair of products, and a convolution, an embedding or experts take
        two small ones of their own kind. s is a number or (r,). None for any other change but those of `LowRank`.
        """
        return None

    forward: Callable[[Layer, Tensor, Tensor], Tensor] | None = None
    """`(layer, x, y) -> y_new`, with x (*b, d_in) and y (*b, d_out), the layer's output, of one dtype."""

    forward_input: Callable[[Layer, Tensor], Tensor] | None = None
    """`(layer, x) -> x_new`, before the layer."""


_BY_SIZE: Any = Variant.__dict__["layer_specs"].__func__

REGISTRY: dict[str, type[Variant]] = {}  # every registered variant, by name

_USES = ("unused", "read", "dense")
_SPECS = ("param_specs", "layer_specs")
V = TypeVar("V", bound=type[Any])


def register(cls: V) -> V:
    """Class decorator: make a variant known under `cls.name`; what it doesn't declare has `Variant`'s defaults.

    Raises:
        VariantError: for a class that lacks a part of the contract, or a name that is taken.
    """
    missing = [] if getattr(cls, "name", None) else ["name"]
    if not any(part in vars(base) for base in cls.__mro__ if base is not Variant for part in _SPECS):
        missing.append("param_specs")
    if not (getattr(cls, "forward", None) or getattr(cls, "forward_input", None)):
        missing.append("forward or forward_input")
    if missing:
        raise VariantError(
            f"variant class {cls.__name__} lacks {', '.join(missing)}\n  the contract is lora_lite.Variant's docstring"
        )
    name: str = cls.name
    # A second class under a name would change what a file of the first one loads.
    if name in REGISTRY:
        first, second = (f"{one.__module__}.{one.__qualname__}" for one in (REGISTRY[name], cls))
        raise VariantError(f"variant {name!r} is registered already, by {first}\n  give {second} another name")
    if not issubclass(cls, Variant):  # so that a class needs no base, and the runtime never asks what it lacks
        same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        cls = cast(V, type(cls.__name__, (cls, Variant), same))
    _check(cls)
    REGISTRY[name] = cls
    return cls


def _check(cls: Any) -> None:
    """VariantError for a declaration that the runtime could not keep."""
    if not callable(cls.base_weight) and cls.base_weight not in _USES:
        problem = f"base_weight is 'unused', 'read' or 'dense', got {cls.base_weight!r}"
    elif not (callable(cls.needs_calibration) or isinstance(cls.needs_calibration, bool)):
        problem = f"needs_calibration is True, False or a function of the config, got {cls.needs_calibration!r}"
    elif not (isinstance(cls.config, type) and issubclass(cls.config, BaseConfig)):
        problem = f"config is a subclass of BaseConfig, got {cls.config!r}"
    elif cls.forward and cls.forward_input and not cls.handles_scale:
        problem = "with both forward and forward_input it must handle layer.scale itself: handles_scale = True"
    else:
        return
    raise VariantError(f"variant {cls.name!r}: {problem}")


def lookup(name: str) -> type[Variant]:
    """The variant registered under a name."""
    if name not in REGISTRY:
        raise VariantError(
            f"no variant is registered as {brief(name)!r}\n"
            f"  registered: {', '.join(sorted(REGISTRY))}\n"
            f"  a variant of your own: import the file that has its @lora_lite.register first"
        )
    return REGISTRY[name]


def weight_use(cfg: BaseConfig) -> str:
    """How a config's variant uses the base weight: "unused", "read" or "dense"."""
    declared = lookup(cfg.variant).base_weight
    use = declared(cfg) if callable(declared) else declared
    if use not in _USES:
        raise VariantError(f"variant {cfg.variant!r}: base_weight gave {use!r}; wanted one of {_USES}")
    return use


def reason_for_no_graph(cfg: BaseConfig) -> str:
    """Why no captured graph can follow a config's variant; empty if one can."""
    declared = lookup(cfg.variant).not_capturable
    return declared(cfg) if callable(declared) else declared


def asks_more(cfg: BaseConfig) -> bool:
    """Do a config's tensors at a layer depend on more than its size?"""
    return getattr(lookup(cfg.variant).layer_specs, "__func__", None) is not _BY_SIZE


def needs_data(cfg: BaseConfig) -> bool:
    """Does a config's variant want calibration data?"""
    declared = lookup(cfg.variant).needs_calibration
    return bool(declared(cfg) if callable(declared) else declared)


def adds_constant(specs: Mapping[str, ParamSpec]) -> bool:
    """Does a method with these tensors at a layer add something to its output whatever x is?"""
    return any(spec.is_shift for spec in specs.values())


def check_takes_data(cfg: BaseConfig) -> None:
    """ConfigError for calibration data that the variant would never look at."""
    variant = lookup(cfg.variant)
    if variant.group_init is Variant.group_init:
        raise ConfigError(f"variant {cfg.variant!r} takes no calibration_data\n  it is trained: leave it out")
    if callable(variant.needs_calibration) and not needs_data(cfg):  # a plain False: data may be given, or not
        unwanted = f"variant {cfg.variant!r} takes no calibration_data as it is configured"
        raise ConfigError(f"{unwanted}\n  leave it out, or change what the config says of it")


def config_for(name: str) -> type[BaseConfig]:
    """The config class of a registered variant.

    Raises:
        VariantError: if no variant has this name.
    """
    return lookup(name).config
