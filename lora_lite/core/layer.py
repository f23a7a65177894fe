"""One adapter at one layer: what is kept there, and the view of it that a variant works on."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from ..base import quant
from ..errors import VariantError
from ..ops.low_rank import is_transformed
from .scale import Timeline, backward_node
from .targets import Target


class Coefficient(NamedTuple):
    """The scale c of one call. In a graph of torch.compile a tensor without dimensions: a number would be a part of the
    graph, or break it (torch 2.13, with checkpointing)."""

    c: Any
    is_off: bool
    """c = 0"""
    is_whole: bool
    """c = 1"""


@dataclass(eq=False)
class AdapterState:
    """What all layers of one adapter share. Its tensors live on the layers."""

    name: str
    cfg: Any
    targets: list[Target]
    """As attached."""
    base: dict[str, Any]
    scale: float = 1.0
    """As it was set; hooks go by `now`."""
    merged: bool = False
    """True while its effect is in the weights, and its hooks do nothing."""
    layers: list[nn.Module] = field(default_factory=list)
    """The adapted modules, in the order of `targets`."""
    per_layer: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path of a target -> the config fields that differ there."""
    set_in: int = -1
    """The backward inside of which the scale was set, by who runs a forward there: it counts as it is."""
    timeline: Timeline = field(default_factory=Timeline)
    suffix: str = field(init=False)
    """What the names of its tensors on a layer end with."""
    plain: Coefficient = field(init=False)
    """The scale as it is set."""
    traced: Coefficient = field(init=False)
    """The same for a graph of torch.compile, an input of it that may change."""

    def __post_init__(self) -> None:
        self.suffix = "" if self.name == "default" else f"__{self.name}"
        self._show()

    def set_scale(self, scale: float, set_in: int | None = None) -> tuple[float, int]:
        """Returns the arguments that undo it."""
        before = self.scale, self.set_in
        if is_compiling():
            self.timeline = Timeline()  # there is no clock in a graph: what is pending goes by the scale as it is
        else:
            self.timeline.change(self.scale, scale)
            self.set_in = torch._C._current_graph_task_id() if set_in is None else set_in  # -1 outside of all
        self.scale = scale
        self._show()
        return before

    def _show(self) -> None:
        fresh = nullcontext() if is_compiling() else torch.inference_mode(False)
        with fresh:  # a tensor of inference mode could take part in no training later
            c = torch.tensor(self.scale, dtype=torch.float64, device="cpu")  # without dimensions: it casts nothing up
        self.plain = Coefficient(self.scale, self.scale == 0, self.scale == 1)
        self.traced = self.plain._replace(c=c)

    @property
    def now(self) -> Coefficient:
        """The scale; for a forward that gradient checkpointing runs again, the one at which it ran first."""
        return self.traced if is_compiling() else self.outside_of_graphs()

    def outside_of_graphs(self) -> Coefficient:
        """The same for who knows that nothing is compiled."""
        node = backward_node()
        if node is None:
            if self.timeline.since:
                self.timeline.first_run(self.scale)
        elif self.set_in != torch._C._current_graph_task_id():
            c = self.timeline.at(node._sequence_nr(), self.scale)
            return self.plain if c == self.scale else Coefficient(c, c == 0, c == 1)
        return self.plain

    @property
    def is_idle(self) -> bool:
        """Do its hooks leave everything as it is?"""
        return self.merged or self.now.is_off

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"timeline": Timeline()}  # no forward of a copy is pending

    def attribute(self, tensor: str) -> str:
        """The name on the layer of this adapter's `tensor`: `lora_A`, or `lora_A__fr` for adapter fr."""
        return tensor + self.suffix


@dataclass(eq=False)
class Slot:
    """What one adapter keeps at one target layer, beside its tensors."""

    state: AdapterState
    target: Target
    cfg: Any
    """The config at this layer."""
    base_weight: str
    """What the variant does with it: "unused", "read" or "dense"."""
    stacked: bool
    """True if each tensor has a leading axis over the experts that the layer fuses."""
    tensors: dict[str, bool] = field(default_factory=dict)
    """Names of the tensors; True for those that keep their storage dtype in `forward`."""
    handles: list[RemovableHandle] = field(default_factory=list)
    memo: dict[str, tuple[list[Tensor], Tensor]] = field(default_factory=dict)
    ran: bool = False
    """True once a forward outside of torch.compile has called the layer, at any scale, since its first adapter came."""
    never_ran: bool = False
    """True if none had when the adapter's file was written, although one had called others."""

    @property
    def path(self) -> str:
        return self.target.path

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"memo": {}}


_NOTHING: Mapping[str, Any] = {}


class Layer:
    """A target layer as one adapter sees it: made for one call, holding no tensor of its own.

    layer.lora_*           this adapter's tensors; in `forward` and `forward_input` cast to the compute dtype
                           (the activation's), unless their ParamSpec says keep_dtype
    layer.cfg, .scale      the adapter's config at this layer; its coefficient c, a number, and in a graph of
                           torch.compile a tensor without dimensions
    layer.is_off, .is_whole    is c 0, or 1
    layer.in_features, .out_features, .bias, .training
    layer.weight           (d_out, d_in), of a dense layer only
    layer.path, .block     where it is: its path, and the stack of blocks with the index in it
    layer.experts          how many experts it fuses

    Of fused experts whose tensors are stacked, it shows one expert. What `instead` names is shown in place of what is
    there: tensors by their name, `bias`, `training`; `history` makes the weight that `dense_weight("history")` gives.
    `now` is the scale for the whole of a call; without it, the adapter's at each reading.
    """

    def __init__(
        self,
        module: nn.Module,
        slot: Slot,
        dtype: torch.dtype | None = None,
        expert: int | None = None,
        instead: Mapping[str, Any] | None = None,
        now: Coefficient | None = None,
    ) -> None:
        own = self.__dict__  # one by one: a view is made at every call of every layer
        own["_module"], own["_slot"], own["_dtype"] = module, slot, dtype
        own["_expert"], own["_instead"], own["_now"] = expert, instead or _NOTHING, now

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"{self.path}: a view holds nothing, so {name!r} would be lost\n  use layer.{name}.copy_(...)"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        slot = self._slot
        keep_dtype = slot.tensors.get(name)
        if keep_dtype is None:
            raise AttributeError(f"{slot.path}: this adapter has no {name!r}, only {', '.join(slot.tensors)}")
        tensor = self._instead.get(name)
        if tensor is None:
            module, attribute = self._module, name + slot.state.suffix
            tensor = module._parameters.get(attribute)  # getattr finds it too, and takes three times as long
            tensor = getattr(module, attribute) if tensor is None else tensor
            tensor = tensor if self._expert is None else tensor[self._expert]
        return tensor if keep_dtype or self._dtype is None else tensor.to(self._dtype)

    @property
    def cfg(self) -> Any:
        return self._slot.cfg

    @property
    def scale(self) -> Any:
        return (self._now or self._slot.state.now).c

    @property
    def is_off(self) -> bool:
        return (self._now or self._slot.state.now).is_off

    @property
    def is_whole(self) -> bool:
        return (self._now or self._slot.state.now).is_whole

    @property
    def path(self) -> str:
        """The layer's path in the model."""
        return self._slot.path

    @property
    def block(self) -> tuple[str, int] | None:
        """("model.layers.", 3) in the block `model.layers.3`; None outside of every stack of blocks."""
        target = self._slot.target
        return None if target.stack is None or target.block is None else (target.stack, target.block)

    @property
    def experts(self) -> int:
        """How many experts it fuses; 0 for a linear layer."""
        return self._slot.target.experts

    @property
    def in_features(self) -> int:
        return self._slot.target.d_in

    @property
    def out_features(self) -> int:
        return self._slot.target.d_out

    @property
    def training(self) -> bool:
        training: bool = self._instead.get("training", self._module.training)
        return training

    @property
    def bias(self) -> Tensor | None:
        """(d_out,), cast to the compute dtype, or None; experts' biases are added outside of what a variant sees."""
        bias = self._instead["bias"] if "bias" in self._instead else getattr(self._module, "bias", None)
        return bias if bias is None or self._dtype is None else bias.to(self._dtype)

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weight as stored. Raises QuantizedWeightError on a quantised layer."""
        self._may_read("weight")
        return quant.plain_weight(self._module, self.path, self._expert)

    def dense_weight(self, of: str = "base") -> Float[Tensor, "o i"]:
        """A float32 copy (of a float64 layer float64) of the numbers that it computes with; dequantises. For `init`.

        of="history", while an adapter is attached: with what the layer's histories change in it, exactly.
        """
        self._may_read("dense_weight()")
        weight = quant.dense_weight(self._module, self.path, self._expert)
        if of == "base":
            return weight
        worked_in: Tensor = self._instead["history"](weight)
        return worked_in

    def linear(self, t: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """t Wᵀ in t's dtype, through the layer's own kernel where it has one: no bias, no hooks."""
        self._may_read("linear()")
        return quant.linear(self._module, t, self.path, self._expert)

    def constant(self, name: str, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """compute(*inputs) as a constant, without gradient, tangent or autocast; remembered by name for equal inputs.

        It is remembered in eval mode with gradients off and outside of every function transform, so that a training
        step, a transform and compile never meet a kept tensor. Equal means by value, against kept copies: neither an
        edit through `.data`, a swapped tensor nor a reshard can leave a stale result, as version counters or addresses
        would. The comparison reads (r, d) tensors where the result reads the (d_out, d_in) weight, which is read-only
        while an adapter is on it.
        """
        remember = not (self.training or torch.is_grad_enabled() or is_compiling() or is_transformed())
        if not (remember or is_compiling()):
            self._slot.memo.pop(name, None)  # it takes as much memory as the adapter
        memo = self._slot.memo.get(name) if remember else None
        if memo is not None and all(map(_same, memo[0], inputs)):
            return memo[1]
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            value = compute(*inputs).detach()
            if remember:
                self._slot.memo[name] = [t.clone() for t in inputs], value
            return value

    def part(self, prefix: str, cfg: Any, c: float) -> "Layer":
        """One of several methods that share this adapter, as if it were attached by itself with this config at scale c:
        its `lora_A` is `lora_<prefix>_A` here. It is always out of training, so nothing is dropped."""
        return _Part(self, prefix, cfg, c)

    def _may_read(self, what: str) -> None:
        if self._slot.base_weight == "unused":
            raise VariantError(
                f"{self.path}: {what} was used by a variant whose base_weight is 'unused'\n"
                f"  declare base_weight = 'read' (dequantised values will do) or 'dense' on the variant class"
            )


class _Part(Layer):
    def __init__(self, whole: Layer, prefix: str, cfg: Any, c: float) -> None:
        super().__init__(whole._module, whole._slot, whole._dtype, whole._expert, {**whole._instead, "training": False})
        for name, value in {"_whole": whole, "_prefix": prefix, "_cfg": cfg, "_c": c}.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("lora_"):
            raise AttributeError(name)
        return getattr(self._whole, f"lora_{self._prefix}_{name.removeprefix('lora_')}")

    @property
    def cfg(self) -> Any:
        return self._cfg

    @property
    def scale(self) -> Any:
        return self._whole.scale * self._c

    @property
    def is_off(self) -> bool:
        return self._c == 0 or self._whole.is_off

    @property
    def is_whole(self) -> bool:
        return self._c == 1 and self._whole.is_whole

    def constant(self, name: str, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return super().constant(f"{self._prefix} {name}", compute, *inputs)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
