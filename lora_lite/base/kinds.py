"""Kinds of layer: where a module keeps the matrix W (d_out, d_in) that it multiplies its input by, and how it lies."""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


class Size(NamedTuple):
    """The size of a layer's matrices, and how they lie."""

    d_in: int
    d_out: int
    experts: int = 0  # how many matrices it fuses; 0 for a layer of one
    transposed: bool = False  # each matrix is stored as (d_in, d_out)


class Kind:
    """A kind of layer. It has no state: each question is about the module that is given. A new one has a name, and
    goes into KINDS."""

    weight, bias = "weight", "bias"  # the names of its parameters on the module
    prefix = ""  # of the names of an adapter's tensors there: a module may hold several weights
    shows_bias = True  # of a kind that is reached through its weight: does the product come with the bias?
    category = "linear"  # what a config's `kinds` calls it
    has_matrix = True  # if not, only methods go on it that act on x alone or on y alone, and say so (core/config.py)
    no_weight = ""  # why no weight holds an adapter on it, and what to do; empty where one does

    def __deepcopy__(self, memo: Any) -> "Kind":
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By name, where its module has one for it: kinds are told apart by identity, after pickling too."""
        name = next((name for name, kind in vars(sys.modules[type(self).__module__]).items() if kind is self), None)
        return name or super().__reduce_ex__(protocol)

    def size(self, module: Any) -> Size | None:
        """The size of a module of this kind; None for any other."""
        raise NotImplementedError

    def stored(self, module: Any) -> Tensor:
        """The tensor that holds the weight: codes where it is quantised, all matrices of fused experts."""
        return getattr(module, self.weight)

    def matrices(self, stored: Tensor, transposed: bool) -> Tensor:
        """A tensor that lies as the weight does, as matrices (*experts, d_out, d_in), in the same memory."""
        return stored.mT if transposed else stored

    def computes_its_product(self, module: Any) -> bool:
        """Is its forward known to be x Wᵀ + b, by its class?"""
        return False

    def bias_of(self, module: Any) -> Tensor | None:
        """The bias (d_out,), or (experts, d_out); None for a module without one."""
        bias = getattr(module, self.bias, None)
        return bias if isinstance(bias, Tensor) else None


class Linear(Kind):
    """nn.Linear, and whatever has its attributes: layers of quantisers, of tensor parallelism, of other libraries."""

    shows_bias = False

    def size(self, module: Any) -> Size | None:
        if not isinstance(getattr(module, "weight", None), Tensor):
            return None
        d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
        # By attributes and not by the shape, which codes of 4 bits don't have: two lie in a byte.
        return Size(d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None

    def computes_its_product(self, module: Any) -> bool:
        return type(module).forward is nn.Linear.forward and not is_bypassed(module)


class Packed(Linear):
    """A linear layer of a quantiser that keeps no `weight`, but codes by other names (HQQ, GPTQ, AWQ)."""

    def size(self, module: Any) -> Size | None:
        d_in, d_out = (vars(module).get(name) for name in ("in_features", "out_features"))
        if not (isinstance(d_in, int) and isinstance(d_out, int)) or isinstance(
            getattr(module, "weight", None), Tensor
        ):
            return None
        return Size(d_in, d_out) if _codes(module) else None

    def stored(self, module: Any) -> Tensor:
        return max(_codes(module), key=Tensor.numel)

    def computes_its_product(self, module: Any) -> bool:
        return False


def _codes(module: nn.Module) -> list[Tensor]:
    """The module's own tensors that hold no wide floating numbers."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return [t for t in tensors if t is not None and (t.element_size() == 1 or not t.is_floating_point())]


class Conv1D(Kind):
    """transformers' Conv1D (GPT-2), a linear layer whose weight is (d_in, d_out)."""

    def size(self, module: Any) -> Size | None:
        if not is_instance(module, "transformers.pytorch_utils", "Conv1D") or not isinstance(module.weight, Tensor):
            return None
        return Size(module.nx, module.nf, transposed=True)

    def computes_its_product(self, module: Any) -> bool:
        return True


class FusedExperts(Kind):
    """The down-projections of a mixture-of-experts block as one bare parameter (experts, ...), with no layer to hook.

    A method that is linear in the block's output and reads no weight goes on that output, a weighted sum of what the
    experts write. Any other goes on each expert's matrix, through the weight.
    """

    weight, bias = "down_proj", "down_proj_bias"

    def stored(self, module: Any) -> Tensor:
        return held(module, self.weight)

    def size(self, module: Any) -> Size | None:
        if not isinstance(matrices := _bare(module, self.weight), Tensor) or matrices.ndim != 3:
            return None
        up = _bare(module, "gate_up_proj" if _bare(module, "gate_up_proj") is not None else "up_proj")
        if not isinstance(up, Tensor) or up.ndim != 3:
            return None
        n, a, b = matrices.shape  # (experts, d_out, d_in), or (experts, d_in, d_out) as in GPT-OSS and Llama 4
        # Told apart even where a = b: the axis that is twice as long is the one that holds gate and up.
        by_shape: dict[tuple[int, ...], bool] = {(n, 2 * b, a): False, (n, b, 2 * a): True}
        transposed = by_shape.get(
            tuple(up.shape), getattr(module, "is_transposed", None)
        )  # which is transformers' flag
        if transposed is None:
            return None
        return Size(a, b, n, transposed=True) if transposed else Size(b, a, n)


class Block(Kind):
    """The residual stream as it leaves a block: d_in = d_out = d_model, and no weight holds it.

    It is none of KINDS: a module doesn't say that it is a block, the model's stacks do (core/targets.block_layers).
    """

    category, has_matrix = "block", False
    no_weight = (
        "the adapter is on the residual stream at a block's output, and no weight holds that\n"
        "  keep it attached, or attach one to the layers that write to the stream: without kinds=('block',)"
    )

    def size(self, module: Any) -> Size | None:
        return None

    def stored(self, module: Any) -> Tensor:
        """A vector of the block, such as a norm's, for device and fingerprint: quantisers leave vectors as they are."""
        base = (p for name, p in module.named_parameters() if "lora_" not in name)  # no adapter's
        return min(base, key=lambda p: (not p.is_floating_point(), p.ndim))  # of equals the first


_PARAMETRIZATION = "bitsandbytes.nn.parametrize", "Bnb4bitParametrization"
LINEAR, PACKED, CONV1D, EXPERTS, BLOCK = Linear(), Packed(), Conv1D(), FusedExperts(), Block()
KINDS: list[Kind] = [EXPERTS, CONV1D, LINEAR, PACKED]  # the first that knows a module's size is its kind


def held(module: nn.Module, name: str) -> Tensor:
    """A weight that the module holds itself, and not what a running call has put in its place."""
    parameter = module._parameters.get(name)
    if parameter is None and name in (packed := packed_in(module)):
        codes: Tensor = packed[name].original
        return codes
    if parameter is None:  # in a replica of DataParallel
        parameter = getattr(module, name)
        parameter = getattr(parameter, "plain", parameter)
    return parameter


def packed_in(module: nn.Module) -> dict[str, Any]:
    """The bare parameters that bitsandbytes keeps in 4 bits, by name: for each the parametrisation that decodes it."""
    lists = module._modules.get("parametrizations")
    known: Any = lists.items() if isinstance(lists, nn.ModuleDict) else ()
    return {name: given for name, given in known if len(given) == 1 and is_instance(given[0], *_PARAMETRIZATION)}


def bare_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters right in a module, by name; for one in bitsandbytes' 4 bits, a meta tensor that is like it."""
    states = {name: packed[0].quant_state for name, packed in packed_in(module).items()}
    like = {name: torch.empty(state.shape, dtype=state.dtype, device="meta") for name, state in states.items()}
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None} | like


def _bare(module: nn.Module, name: str) -> Any:
    # Not getattr, which is slow where there is no such attribute (in nearly every module), and would dequantise.
    tensor = vars(module).get(name, module._parameters.get(name))
    return bare_parameters(module).get(name) if tensor is None and "parametrizations" in module._modules else tensor


def size_of(module: nn.Module) -> Size | None:
    """The size of anything that is a layer of some kind, else None."""
    return next((size for kind in KINDS if (size := kind.size(module)) is not None), None)


def is_bypassed(module: nn.Module) -> bool:
    """True for the out-projection of nn.MultiheadAttention, whose weight is read without calling the layer."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def is_instance(value: Any, module: str, name: str) -> bool:
    """isinstance of a class in a package that may be missing: while nothing has imported it, nothing is of it."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)
