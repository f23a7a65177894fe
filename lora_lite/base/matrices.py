"""Kinds of layer beside linear ones: norms, and those that are reached through their weight, as no call of a linear
layer shows the product.

A module that multiplies by such a weight runs with another one in its place (core/adapted_weight.py). Beside these, so
is a linear layer whose weight the model reads without calling it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from .kinds import EXPERTS, Kind, Size, bare_parameters, held
from .sharding import shape_of
from .stacks import NORMS
from .storage import holds_numbers


class Norm(Kind):
    """A norm of the last axis with a weight (d,): y = (w + c) ⊙ n(x) + b, where c is 0, or 1 of Gemma's.

    The parameters of a module tell that it may be one, a run at attach that it normalises (probe.py).
    """

    category, has_matrix = "norm", False

    def size(self, module: Any) -> Size | None:
        weight = module._parameters.get("weight")
        # torch's others have their channels on the second axis (GroupNorm, BatchNorm), or are no norms.
        others = (_ConvNd, _NormBase, nn.GroupNorm, nn.PReLU)
        if weight is None or module._modules or isinstance(module, others) or not holds_numbers(weight):
            return None
        shape = shape_of(weight)
        return Size(*shape, *shape) if len(shape) == 1 else None

    def computes_its_product(self, module: Any) -> bool:
        return type(module) in (nn.LayerNorm, nn.RMSNorm)


def normalized(module: Any, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """n of a norm y = (w + c) ⊙ n + b, (*b, d), for a call with these arguments, the first of them x; a gate is a part
    of n. By the norm's own forward, whatever w, b and c are."""
    has_its_own = "forward" in vars(module)  # a patch's, which is of this very object
    if type(module) is nn.LayerNorm and not has_its_own:
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if type(module) is nn.RMSNorm and not has_its_own:
        return F.rms_norm(x, module.normalized_shape, None, module.eps)
    # Shallow: a call of the norm in another thread keeps its parameters. A graph of torch.compile can't copy a module.
    bare = module if has_its_own or is_dynamo_compiling() else copy.copy(module)
    ones, zeros = torch.ones_like(module.weight), torch.zeros_like(module.weight)
    bias = {} if getattr(module, "bias", None) is None else {"bias": zeros}  # a small n would be lost beside it

    def call() -> Tensor:
        y: Tensor = bare.forward(*args, **kwargs)
        return y

    return with_vectors(bare, {"weight": ones, **bias}, call) - with_vectors(bare, {"weight": zeros, **bias}, call)


def with_vectors(norm: nn.Module, vectors: Mapping[str, Tensor], call: Callable[[], Tensor]) -> Tensor:
    """The result of a call while these vectors are in the places of a norm's parameters."""
    before = {name: norm.__dict__[name] for name in vectors if name in norm.__dict__}  # in a replica of DataParallel
    try:
        norm.__dict__.update(vectors)  # an attribute of the instance is found before a parameter
        return call()
    finally:
        for name in vectors:
            del norm.__dict__[name]
        norm.__dict__.update(before)


class ByWeight(Kind):
    """A kind whose parameter is read by the forward of the module that has it, or of one around that."""

    shows_bias = False
    category = "matrix"  # what a config's `kinds` calls it

    def stored(self, module: Any) -> Tensor:
        return held(module, self.weight)

    def computes_its_product(self, module: Any) -> bool:
        return True


class Convolution(ByWeight):
    """nn.Conv1d, 2d, 3d: a kernel (d_out, channels / groups, *k) that each patch is multiplied by."""

    category, shows_bias = "conv", True

    def size(self, module: Any) -> Size | None:
        if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd):
            return None
        if not module.in_channels or "weight" not in module._parameters:  # lazy; made at each forward (weight_norm)
            return None
        return Size(self.stored(module)[0].numel(), module.out_channels)

    def matrices(self, stored: Tensor, transposed: bool) -> Tensor:
        return stored.flatten(1)


class AllChannels(Convolution):
    """A convolution with groups as PEFT's LoRA takes it, which only its folders ask for: a group of outputs has factors
    of its own, as an expert has, and their A sees the channels of all groups."""

    has_matrix = False
    no_weight = (
        "PEFT's LoRA on a convolution with groups sees the channels of all groups, and no kernel with groups does\n"
        "  keep the adapter attached, outside of torch.compile"
    )

    def size(self, module: Any) -> Size | None:
        if (size := super().size(module)) is None or module.groups == 1:
            return None
        return Size(size.d_in * module.groups, size.d_out // module.groups, module.groups)


class Embedding(ByWeight):
    """nn.Embedding: row t of the weight (d_in = tokens, d_out) is what a one-hot vector gives."""

    category = "embedding"

    def size(self, module: Any) -> Size | None:
        # max_norm writes the rows that are looked up: no frozen weight.
        if not isinstance(module, nn.Embedding) or module.max_norm is not None or "weight" not in module._parameters:
            return None
        return Size(module.num_embeddings, module.embedding_dim, transposed=True)


class Parameter(ByWeight):
    """A bare parameter of a module: a matrix (d_out, d_in), or one for each expert."""

    def __init__(self, name: str, category: str | None = None) -> None:
        self.weight, self.bias, self.prefix = name, f"{name}_bias", name
        self.category = category or self.category

    def size(self, module: Any) -> Size | None:
        shape = tuple(shape_of(bare_parameters(module).get(self.weight, self.stored(module))))
        if len(shape) == 2:
            return Size(shape[1], shape[0])
        # As the module's down-projections lie, so lie the others.
        down = EXPERTS.size(module)
        transposed = down.transposed if down is not None else bool(getattr(module, "is_transposed", False))
        n, a, b = shape
        return Size(a, b, n, transposed=True) if transposed else Size(b, a, n)


CONVOLUTION, ALL_CHANNELS, EMBEDDING, NORM = Convolution(), AllChannels(), Embedding(), Norm()
KINDS_BY_WEIGHT = ("conv", "embedding", "experts", "matrix")
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def kinds_by_weight(module: nn.Module) -> Iterator[Kind]:
    """The kinds of the weights right in a module that are reached so."""
    for kind in (CONVOLUTION, EMBEDDING):
        if kind.size(module) is not None:
            yield kind
    if isinstance(module, (_ConvNd, nn.Embedding, nn.EmbeddingBag, ParametrizationList, *NORMS)):
        return
    for name, parameter in bare_parameters(module).items():
        if not parameter.is_floating_point():
            continue
        shape = shape_of(parameter)
        if isinstance(module, nn.MultiheadAttention):
            if name in _ATTENTION:
                yield Parameter(name, "linear")
        elif len(shape) in (2, 3) and min(shape) > 1:
            yield Parameter(name, "experts" if len(shape) == 3 else "matrix")
