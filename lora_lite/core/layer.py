"""`Layer`: the view of a target layer that a variant works on."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..base.layer import BaseLayer
from ..errors import ConfigError, VariantError
from ..ops.equal import same
from ..ops.low_rank import is_transformed
from ..ops.recompute import recomputed
from .scale import Scale
from .state import Site

NOTHING: Mapping[str, Any] = {}  # one for all views: a call makes no dict


class Layer:
    """A target layer as one adapter sees it: made for one call, holding no tensor of its own.

    layer.lora_*           this adapter's tensors; in `forward` and `forward_input` cast to the compute dtype
                           (the activation's), unless their ParamSpec says keep_dtype
    layer.grad("lora_A")   the gradient of one of them, or None
    layer.cfg, .scale      the adapter's config at this layer; its scale, a number, and in a graph of
                           torch.compile a tensor without dimensions
    layer.is_off, .is_whole    is the scale 0, or 1; layer.scaled(t) is t times the scale
    layer.in_graph         is the call of a graph (torch.compile, `capturable`), which can't choose by values
    layer.in_features, .out_features, .bias, .training
    layer.weight           (d_out, d_in), of a dense layer only
    layer.path, .block     where it is: its path, and the stack of blocks with the index in it
    layer.experts          how many experts it fuses; 0 for a linear layer
    layer.diagonal(w, x)   w ⊙ x of a norm, for which no x is kept
    layer.has_bias, .is_diagonal, .kernel    has the layer a bias; is it a norm; the size of a convolution's kernel

    Of fused experts whose tensors are stacked, it shows one expert. What `instead` names is shown in place of what is
    there: tensors by their name, `bias`, `training`. `scale` is that of the whole call; without it, the adapter's at
    each reading. Of several methods that share an adapter, the one with a `prefix` has `lora_<prefix>_A` as `lora_A`.
    """

    cfg: Any
    _site: Site
    _expert: int | None = None
    _instead: Mapping[str, Any] = NOTHING
    _scale: Scale | None = None
    _prefix: str = ""

    def __init__(
        self,
        module: nn.Module,
        site: Site,
        dtype: torch.dtype | None = None,
        scale: Scale | None = None,
        expert: int | None = None,
        instead: Mapping[str, Any] = NOTHING,
        prefix: str = "",
        cfg: Any = None,
    ) -> None:
        fields = self.__dict__  # one by one: a view is made at every call of every layer
        fields["_module"], fields["_site"], fields["_dtype"] = module, site, dtype
        if expert is not None or instead is not NOTHING or prefix:
            fields["_expert"], fields["_instead"], fields["_prefix"] = expert, instead, prefix
        elif scale is not None:
            parameters = module._parameters
            for name, attribute in site.as_they_are:  # at hand for this call: `__getattr__` takes ten times as long
                if (tensor := parameters.get(attribute)) is not None:
                    fields[name] = tensor
        if scale is not None:  # the view of one call; any other sees what `configure` changes
            fields["_scale"], fields["cfg"] = scale, site.cfg if cfg is None else cfg

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"{self.path}: a view holds nothing, so {name!r} would be lost\n  use layer.{name}.copy_(...)"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # copy and pickle ask a view without fields: `_site` would recurse
        site = self._site
        if self._prefix and name.startswith("lora_"):
            name = f"lora_{self._prefix}_{name.removeprefix('lora_')}"
        spec = site.specs.get(name)
        if spec is None:
            if name == "cfg":  # of a view that was made for no single call
                return site.cfg
            return self._shared(name)
        tensor = self._instead.get(name)  # under vmap over experts, the tensors of one
        if tensor is None:
            module, attribute = self._module, site.attribute(name) if site.is_named else name + site.state.suffix
            tensor = module._parameters.get(attribute)  # getattr finds it too, and takes three times as long
            tensor = getattr(module, attribute) if tensor is None else tensor  # a buffer, or DataParallel's replica
            tensor = tensor if self._expert is None else tensor[self._expert]  # (experts, ...) -> (...)
        return tensor if spec.keep_dtype or self._dtype is None else tensor.to(self._dtype)

    def _shared(self, name: str) -> Tensor:
        site, plain = self._site, name.removeprefix("lora_")
        shared = site.method.shared
        known = {} if shared is None else shared.specs
        if name == plain or plain not in known or shared is None:
            names = ", ".join([*site.specs, *(f"lora_{each}" for each in known)])
            raise AttributeError(f"{site.path}: this adapter has no {name!r}, only {names}")
        tensor = self._instead.get(name)
        tensor = shared.tensor(plain) if tensor is None else tensor
        return tensor if known[plain].keep_dtype or self._dtype is None else tensor.to(self._dtype)

    @property
    def scale(self) -> Any:
        value = (self._scale or self._site.state.scale_of_call()).value
        if value is None:
            raise ConfigError(f"{self.path}: each row has a scale of its own\n  leave the block of `rows` first")
        return value

    @property
    def is_off(self) -> bool:
        return (self._scale or self._site.state.scale_of_call()).is_zero

    @property
    def is_whole(self) -> bool:
        return (self._scale or self._site.state.scale_of_call()).is_one

    def scaled(self, change: Tensor) -> Tensor:
        """The scale times a change; the change itself at 1, for which a graph, which serves any scale, doesn't ask."""
        product: Tensor = change if not self.in_graph and self.is_whole else self.scale * change
        return product

    @property
    def in_graph(self) -> bool:
        return is_compiling() or self._site.state.in_place is not None

    def grad(self, name: str) -> Tensor | None:
        """The gradient of one of its tensors. Of an expert it is a part of the stack's: a slice has no `.grad`."""
        gradient = self._site.tensor(name).grad
        return gradient if gradient is None or self._expert is None else gradient[self._expert]

    @property
    def path(self) -> str:
        return self._site.target.path

    @property
    def block(self) -> tuple[str, int] | None:
        """("model.layers.", 3) in the block `model.layers.3`; None outside of every stack of blocks."""
        stack, block = self._site.target.place
        return None if stack is None or block is None else (stack, block)

    @property
    def experts(self) -> int:
        return self._site.target.experts

    @property
    def in_features(self) -> int:
        return self._site.target.d_in

    @property
    def out_features(self) -> int:
        return self._site.target.d_out

    @property
    def has_bias(self) -> bool:
        """Did the layer have a bias when the adapter was attached?"""
        return self._site.target.has_bias

    @property
    def is_diagonal(self) -> bool:
        """Is it a norm, whose matrix is a diagonal, and whose x is the normalised input?"""
        return self._site.target.is_diagonal

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of a convolution's kernel; () of any other layer."""
        return self._site.target.kernel

    @property
    def training(self) -> bool:
        return bool(self._instead.get("training", self._module.training))

    @property
    def bias(self) -> Tensor | None:
        """(d_out,), cast to the compute dtype, or None; experts' biases are added outside of what a variant sees."""
        if "bias" in self._instead:
            bias = self._instead["bias"]
        else:
            base = self._site.base  # its `shows_bias`, without the calls: a token passes every layer
            bias = getattr(self._module, "bias", None) if base.reader is None or base.kind.shows_bias else None
        return bias if bias is None or self._dtype is None else bias.to(self._dtype)

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weight as stored, in its own dtype.

        Raises:
            QuantizedWeightError: on a quantised layer, whose stored numbers aren't its weight.
        """
        return self._base("weight").weight(self._expert)

    def dense_weight(self, of: str = "base") -> Float[Tensor, "o i"]:
        """A float32 copy (of a float64 layer float64) of the numbers that it computes with; dequantises. For `init`.

        of      "base", or what else is registered in WEIGHTS: "history", while an adapter is attached, is the weight
                with what the layer's histories change in it, exactly
        """
        weight = self._base("dense_weight()").dense_weight(self._expert)
        return weight if of == "base" else WEIGHTS[of](self._site, self._expert, weight)

    def matrix(self) -> Float[Tensor, "o i"]:
        """As `dense_weight()`, for a forward: no copy of a dense layer of that dtype, and no look at its numbers."""
        return self._base("matrix()").matrix(self._expert)

    def linear(self, t: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """t Wᵀ in t's dtype, through the layer's own kernel where it has one: no bias, no hooks."""
        return self._base("linear()").linear(t, self._expert)

    def diagonal(self, w: Float[Tensor, "d"], x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """w ⊙ x in x's dtype, of a norm, where x is the normalised input: the backward keeps what the norm was called
        with, and makes x again."""
        norm, dtype = self._instead.get("normalised"), x.dtype
        if norm is None:
            return w.to(dtype) * x
        return recomputed(lambda w, *tensors: w.to(dtype) * norm[0](*tensors), w, *norm[1])

    def generator(self, x: Tensor) -> torch.Generator | None:
        """A generator for the random numbers of this forward, on x's device: one that gradient checkpointing runs again
        draws them again. In a graph of torch.compile None, which stands for torch's own."""
        if is_compiling():
            return None
        seed = int(torch.randint(2**62, (), device="cpu"))  # of the generator whose state a checkpoint sets back
        return torch.Generator(x.device).manual_seed(seed)

    def constant(self, name: str, compute: Callable[..., Any], *inputs: Tensor) -> Any:
        """compute(*inputs), a tensor or some, as a constant, without gradient, tangent or autocast; remembered by name
        for equal inputs.

        It is remembered in eval mode with gradients off and outside of every function transform, so that a training
        step, a transform and a graph never meet a kept tensor. Equal means by value, against kept copies: version
        counters or addresses would miss an edit through `.data`, a swapped tensor or a reshard. The comparison reads
        the inputs, the result may read the (d_out, d_in) weight too, which is read-only while an adapter is on it.
        """
        memo, name = self._site.memo, f"{self._prefix} {name}" if self._prefix else name
        name = name if self._expert is None else f"{name}[{self._expert}]"
        is_recorded = is_compiling() or self._site.state.in_place is not None  # `in_graph`, without its call
        remember = not (self.training or torch.is_grad_enabled() or is_recorded or is_transformed())
        if not (remember or is_compiling()):
            memo.pop(name, None)  # it takes as much memory as the adapter
        kept_inputs, result = memo.get(name, ((), None)) if remember else ((), None)
        if result is not None and all(map(same, kept_inputs, inputs)):
            return result
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):  # autocast would round to 16 bits
            value: Any = compute(*inputs)
            value = value.detach() if isinstance(value, Tensor) else tuple(t.detach() for t in value)
            if remember:
                memo[name] = [t.clone() for t in inputs], value  # clones: an edit in place must show
            return value

    def part(self, prefix: str, cfg: Any, factor: float) -> "Layer":
        """One of several methods that share this adapter, as if it were attached by itself with this config, at
        `factor` times the adapter's scale. It is always out of training, so nothing is dropped."""
        scale, shown = self._scale or self._site.state.scale_of_call(), {**self._instead, "training": False}
        # In this order: a graph that has asked whether the scale is 1 is made again when it changes.
        scale = Scale(scale.value * factor, factor == 0 or scale.is_zero, factor == 1 and scale.is_one)
        return Layer(self._module, self._site, self._dtype, scale, self._expert, shown, prefix, cfg)

    def _base(self, reads: str) -> BaseLayer:
        if self._site.base_weight == "unused":
            raise VariantError(
                f"{self.path}: {reads} was used by a variant whose base_weight is 'unused'\n"
                f"  declare base_weight = 'read' (dequantised values will do) or 'dense' on the variant class"
            )
        base = self._site.base  # of the module attached to; the one that is called may be its replica (DataParallel)
        base = base if base.module is self._module else replace(base, module=self._module)
        return base if base.storage.decodes else base.as_it_is_now()


WEIGHTS: dict[str, Callable[[Site, int | None, Tensor], Tensor]] = {}
"""The weights that `dense_weight(of)` can give beside "base": (site, expert, base weight (d_out, d_in)) -> weight."""
