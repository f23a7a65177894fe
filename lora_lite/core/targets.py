"""Which layers an adapter goes on, found by shape and path, never by class name."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from ..base.kinds import bare_parameters
from ..base.layer import BaseLayer, find_layers, shapes_of, stream_of
from ..base.matrices import kinds_by_weight
from ..base.probe import not_linear
from ..base.sharding import shape_of
from ..base.stacks import NORMS, Modules, Place, Stacks, find_stacks, place, routers, starred
from ..errors import TargetError
from .config import BaseConfig
from .names import SITES
from .shared import Shared

_READS = re.compile(
    r"(?:^|\.)(?:"
    r"(?:\w+_)?(?:q|k|v|r|qkv|kv|query|key|value|gate|[io]gate|up|in|intermediate|pos|weights|offsets)(?:_\w+)?"
    r"|W[qkvi]|Wqkv|w[13qkv]|wi|wi_[01]|fc1|lin(?:ear)?_?1|linear_(?:[xy]|fc1)|c_fc|c_attn|dense_h_to_4h|receptance"
    r")(?:\.linear)?$"
)
_WRITES = re.compile(
    r"(?:^|\.)(?:"
    r"(?:\w+_)?(?:o|out|output|down)(?:_\w+)?"  # o_proj, out_lin, attention_out, output_dense
    r"|Wo|wo|w2|fc2|lin(?:ear)?_?2|linear_(?:fc2|end)|(?:temporal_)?dense|dense_4h_to_h|proj|c_proj|post|post_proj"
    r"|(?:\w+_)?projection(?:_layer)?"
    r")(?:\.linear|\.0)?$"
)
"""The last parts of paths that tell whether a square layer reads or writes, since its shape doesn't."""

MLP = r"\.(?:mlp|mlp_block|ffn|feed_forward|block_sparse_moe|shared_mlp|DenseReluDense|ffns\.\d+)"
"""The names of a block's feed-forward part."""
MLP_OUT = (
    r"\.(?:down_proj|c_proj|dense_4h_to_h|w2|[wW]o|(?:fc_?|lin|linear_|linear_fc)2|fc_out|w_out|out_proj"
    r"|output(?:[._]dense)?|output_linear|proj_down|value)$"
)
"""The names of its last layer there."""

_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)
"""Dtypes that packed weights are kept in; masks are bools, and indices are of 64 bits."""


@dataclass(frozen=True)
class Target:
    """A layer of the model: weight (d_out, d_in), or one such matrix for each of the experts that it fuses."""

    path: str
    d_in: int
    d_out: int
    kind: str  # how its weight is stored, for people: "bfloat16", "nf4, 4-bit bitsandbytes"
    stack: str | None = None  # "model.layers."
    block: int | None = None  # 3 in model.layers.3
    experts: int = 0
    by_weight: bool = False  # reached through its weight: a bare parameter, or a layer that is read and not called
    has_bias: bool = False  # does its output hold a bias?
    is_diagonal: bool = False  # a norm, whose weight is a vector: its matrix is diag(w), its x the normalised input
    kernel: tuple[int, ...] = ()  # of a convolution, whose d_in is channels / groups times these

    @classmethod
    def of(cls, layer: BaseLayer, stacks: Stacks | None = None) -> "Target":
        """A layer of a model with these stacks of blocks; without them, its place is that of the path alone."""
        stack, block = place(layer.path) if stacks is None else stacks.place(layer.path)
        sizes = layer.d_in, layer.d_out, layer.describe(), stack, block, layer.experts, layer.by_weight
        has_bias, kind = not layer.is_block and layer.bias is not None, layer.kind.category
        kernel = tuple(layer.module.kernel_size) if kind == "conv" else ()
        return cls(layer.path, *sizes, has_bias, kind == "norm", kernel)

    def on(self, layer: BaseLayer) -> "Target":
        """The target of the same module as a layer of another kind."""
        return replace(self, d_in=layer.d_in, d_out=layer.d_out, experts=layer.experts)

    @property
    def place(self) -> Place:
        """The stack of blocks, and the index of the block in it."""
        return self.stack, self.block

    @property
    def is_block(self) -> bool:
        """Is it the residual stream at a block's output, and not a layer?"""
        return self.path == f"{self.stack}{self.block}"

    @property
    def pattern(self) -> str:
        """The path with a star for the block index."""
        return starred(self.path, self.place)

    def role(self, d_model: int) -> str | None:
        """ "reader", "writer" or "inner" by the model width; None for a square layer whose name says nothing either."""
        if self.is_block:
            return "writer"
        # Fused experts are down-projections: they read what is inside of the expert, however wide that is.
        reads = self.d_in == d_model and (self.by_weight or not self.experts)
        writes = self.d_out == d_model
        if reads and writes:
            # Readers first: `output_gate` reads.
            return "reader" if _READS.search(self.path) else "writer" if _WRITES.search(self.path) else None
        return "reader" if reads else "writer" if writes else "inner"


class LeftOut(NamedTuple):
    """A layer, or matrices that are in none, without an adapter though no filter of the config says so."""

    path: str
    reason: str


class Selection(NamedTuple):
    """The choice of a config in a model."""

    targets: dict[Target, BaseLayer]
    left_out: list[LeftOut]
    asked: bool  # were the targets run, where that can be, to see that they are linear?
    all_plain: bool  # is every layer of the model known to compute x Wᵀ + b? Then no gradient has to be checked


def select(model: nn.Module, cfg: BaseConfig) -> Selection:
    """The layers that every filter of the config lets pass, in module order, and what its defaults leave out."""
    modules = dict(model.named_modules())
    every = find_layers(modules).values()
    stacks, layers = find_stacks(modules, shapes_of(every)), [layer for layer in every if _is_wanted(layer, cfg)]
    if cfg.on_blocks:
        layers = list(block_layers(model, modules, stacks).values())
    known = {Target.of(layer, stacks): layer for layer in layers}
    reachable = [t for t in known if cfg.FUSED_EXPERTS or t.by_weight or not t.experts]
    if cfg.layers is not None:
        _check_layers(cfg.layers, stacks)
    # Asked for writers, what no adapter can reach is an error and no choice: it would leave a part of the stream alone.
    asked = not cfg.target_names and "writer" not in cfg.target_roles
    left_out = [] if cfg.target_names else _left_out(model, modules, known, stacks, cfg, asked)
    unasked = {path for path, _ in left_out}
    targets = [t for t in reachable if t.path not in unasked and _named(t.path, cfg) and _deep(t.place, cfg, stacks)]
    if cfg.target_roles:
        width, text = model_width(model), _text_part(model, modules)
        targets = _with_roles([t for t in targets if t.path.startswith(text)], cfg, width)
        if "writer" in cfg.target_roles and not cfg.target_names and not cfg.on_blocks:
            blocks = {p: m for p, m in stacks.blocks(modules).items() if _deep(stacks.place(p), cfg, stacks)}
            _check_writers({p: m for p, m in blocks.items() if p.startswith(text)}, cfg, reachable, targets, width)
    if cfg.tied_weights == "as_base":
        targets = _first_holders(targets, known)
    if not targets:
        raise TargetError(_nothing_found(model, cfg, reachable, left_out, every))
    return Selection({t: known[t] for t in targets}, left_out, asked, all(layer.is_plain for layer in layers))


def _first_holders(targets: list[Target], layers: Mapping[Target, BaseLayer]) -> list[Target]:
    """The first of the targets that are one weight, as T5's `shared` and both `embed_tokens`; others are its ties."""
    weights = [layers[target].stored for target in targets]  # all at once: an id is one tensor's while that is there
    first = {id(weight): target for weight, target in list(zip(weights, targets, strict=True))[::-1]}
    return [target for weight, target in zip(weights, targets, strict=True) if first[id(weight)] is target]


def block_layers(model: nn.Module, modules: Modules, stacks: Stacks) -> dict[str, BaseLayer]:
    """The residual stream at the output of each block of the language model, by the path of the block.

    Raises TargetError for a model whose config doesn't give its width.
    """
    width, text = model_width(model), _text_part(model, modules)
    # A list is never called: no output of it is to be seen.
    called = {p: m for p, m in stacks.blocks(modules).items() if type(m).forward is not nn.Module.forward}
    if called and width is None:
        raise TargetError(
            f"kinds=('block',): this {type(model).__name__} has no config that gives its width (hidden_size)\n"
            f"  target the layers that write to the stream, without kinds"
        )
    return {p: stream_of(m, p, width or 0) for p, m in called.items() if p.startswith(text)}


def _is_wanted(layer: BaseLayer, cfg: BaseConfig) -> bool:
    """Is it of a kind that the config asks for, or the block of experts, whose output is adapted?"""
    if cfg.NEEDS_BIAS and layer.bias is None:
        return False
    if not layer.by_weight:
        return layer.experts > 0 or layer.kind.category in cfg.kinds
    # A module's bare parameters may be an adapter's: one attached before must not become a target.
    if isinstance(layer.module, Shared):
        return False
    sites = layer.module.__dict__.get(SITES, {}).values()
    is_adapters = any(layer.kind.weight == site.attribute(name) for site in sites for name in site.specs)
    return layer.kind.category in cfg.kinds and not is_adapters


def _left_out(
    model: nn.Module, modules: Modules, layers: dict[Target, BaseLayer], stacks: Stacks, cfg: BaseConfig, asked: bool
) -> list[LeftOut]:
    """The layers that a config without target_names leaves out, in module order; nothing that was excluded.

    In a model with blocks, these are all outside of them; in another, its output head. A layer that no adapter can
    reach is left out too, but not where the writers of the residual stream are asked for: there it is an error.
    """
    called = [t for t, layer in layers.items() if layer.kind.category == "linear" and not layer.kind.prefix]
    shapes = {t.path: (t.d_in, t.d_out) for t in called if not t.experts}
    heads = _output_heads(model, modules, list(layers))
    outside = [t.path for t in layers if not t.stack]
    stacked = len(outside) < len(layers)  # if not, a bare nn.Sequential: everything is a target but its head
    reasons = dict.fromkeys(outside, "in no stack of blocks") if stacked else {}
    reasons |= dict.fromkeys(heads.intersection(outside), "the output head")
    reasons |= dict.fromkeys(routers(modules, shapes), "a router of experts")
    if asked:  # only those that nothing has left out yet: asking runs a layer
        reasons |= not_linear(layers[t] for t in layers if not t.experts and t.path not in reasons)
    if not cfg.FUSED_EXPERTS and "experts" not in cfg.kinds:
        fused = 'fused experts: kinds=("experts",) takes their matrices'
        reasons |= {t.path: fused for t in layers if t.experts and not t.by_weight and t.path not in reasons}
    known, within = {t.path for t in layers}, "."  # matrices inside of a known layer are that layer's affair
    for path, module in modules.items():
        within = f"{path}." if path in known else within
        if (
            "linear" in cfg.kinds
            and not f"{path}.".startswith(within)
            and _has_matrices(module)
            and stacks.place(path)[0]
        ):
            kinds = list(kinds_by_weight(module))
            if not kinds or any(kind.category not in cfg.kinds for kind in kinds):
                reasons.setdefault(path, "matrices that are no linear layer")
    order = {path: i for i, path in enumerate(modules)}  # a bare parameter stands where its module does
    paths = sorted(reasons, key=lambda path: order[path if path in order else path.rpartition(".")[0]])
    return [LeftOut(path, reasons[path]) for path in paths if not _excluded(path, cfg)]


def _has_matrices(module: nn.Module) -> bool:
    """Are there matrices right in this module, which is no norm, embedding, convolution or parametrisation of one?"""
    if not module._parameters and "parametrizations" not in module._modules:  # nearly all modules
        return False
    if isinstance(module, (_ConvNd, nn.Embedding, nn.EmbeddingBag, ParametrizationList, *NORMS)):
        return False
    tensors = [p for p in bare_parameters(module).values() if p.is_floating_point()]
    return any(len(shape_of(p)) > 1 and min(shape_of(p)) > 1 for p in tensors)


def model_width(model: nn.Module) -> int | None:
    """d_model, the width of the residual stream, from the model's config; never guessed from shapes."""
    config = _text_config(model)
    widths = (getattr(config, name, None) for name in ("hidden_size", "d_model", "n_embd", "dim"))
    return next((width for width in widths if isinstance(width, int)), None)  # most models; T5; GPT-2; DistilBERT


def _text_part(model: nn.Module, modules: Modules) -> str:
    """The path of the language model inside a multimodal one, whose width the roles are of; else the empty path."""
    text = _text_config(model)
    if text is getattr(model, "config", None):
        return ""
    return next((f"{path}." for path, m in modules.items() if path and getattr(m, "config", None) is text), "")


def _text_config(model: nn.Module) -> Any:
    """The config of the language model; of one with two, a prompt's and the decoder's (MusicGen), the decoder's."""
    config = getattr(model, "config", None)
    nested = getattr(config, "get_text_config", None)
    if nested is None:
        return config
    try:
        return nested()
    except ValueError:  # transformers: "Multiple valid text configs"
        return nested(decoder=True)


def _named(path: str, cfg: BaseConfig) -> bool:
    named = not cfg.target_names or any(re.search(pattern, path) for pattern in cfg.target_names)
    return named and not _excluded(path, cfg)


def _excluded(path: str, cfg: BaseConfig) -> bool:
    return any(re.search(pattern, path) for pattern in cfg.exclude_names)


def _output_heads(model: nn.Module, modules: Modules, layers: list[Target]) -> set[str]:
    """The paths of a transformers model's output head: what it calls so, and the last layer of one that classifies."""
    find: Any = getattr(model, "get_output_embeddings", None)  # transformers' own name for it: no guess by path
    head = None if find is None else find()
    heads = {path for path, module in modules.items() if module is head}
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    return heads | {t.path for t in layers[-1:] if t.d_out == labels and not t.stack}


def _deep(place: Place, cfg: BaseConfig, stacks: Stacks) -> bool:
    stack, block = place
    if stack is None or block is None:
        return cfg.layers is None and cfg.layer_range is None
    n = stacks.depths[stack]
    listed = cfg.layers is None or block in {i % n for i in cfg.layers if -n <= i < n}  # stacks differ in depth
    low, high = cfg.layer_range or (0.0, 1.0)
    return listed and low <= (block + 0.5) / n <= high  # its middle: (0, 0.5) and (0.5, 1) take half of an even n each


def _check_layers(layers: Sequence[int], stacks: Stacks) -> None:
    longest = max(stacks.depths.values(), default=0)
    wrong = [i for i in layers if not -longest <= i < longest]
    if wrong:
        raise TargetError(
            f"layers={layers}: {wrong} name no block; stacks: {stacks.depths or 'none'}\n"
            f"  block indices run from 0; negative ones count from the end"
        )


def _with_roles(targets: list[Target], cfg: BaseConfig, d_model: int | None) -> list[Target]:
    if d_model is None:
        raise TargetError(
            f"target_roles={cfg.target_roles}: this model has no config that gives its width (hidden_size)\n"
            f"  choose the layers with target_names or exclude_names"
        )
    # Only of layers that passed the other filters: a square one that nobody targeted is no error.
    square = [t.path for t in targets if t.role(d_model) is None]
    if square:
        raise TargetError(
            f"target_roles={cfg.target_roles}: {len(square)} layers are {d_model} x {d_model}, "
            f"so they could be readers or writers\n"
            f"  such as {', '.join(square[:3])}\n"
            f"  choose among them with target_names or exclude_names"
        )
    return [t for t in targets if t.role(d_model) in cfg.target_roles]


def _check_writers(
    blocks: Modules, cfg: BaseConfig, everything: list[Target], targets: list[Target], d_model: int | None
) -> None:
    """TargetError if a part of these blocks has matrices in no layer that could write to the residual stream.

    Three dimensions are experts in a form that isn't known; two dimensions, in a part where nothing else was found, are
    a projection without a module. A module with d_out features and no weight is packed by some other library.
    """
    linear, reached = {t.path for t in everything}, [t.path for t in targets]
    for path, block in blocks.items():
        for part, holder, kind, ndim in _bare(path, block, linear, d_model):
            if _excluded(holder, cfg):
                reached.append(holder)  # what was left out on purpose explains what goes with it, such as a router
            elif ndim > 2 or not any(f"{other}.".startswith(f"{part}.") for other in reached):
                raise TargetError(
                    f"{holder}: this {kind} may write to the residual stream, and {cfg.variant!r} can't go on it\n"
                    f"  to leave it as it is, say so: exclude_names={holder.rpartition('.')[2]!r}"
                )


def _bare(path: str, block: nn.Module, linear: set[str], d_model: int | None) -> list[tuple[str, str, str, int]]:
    """(part of the block, module, its class, dimensions) of matrices of the model's width in no known layer, most
    dimensions first; a packed layer counts as three."""
    out = []
    for holder, module in block.named_modules(prefix=path):
        if holder in linear or isinstance(module, _ConvNd | nn.Embedding | ParametrizationList):
            continue
        part, kind = ".".join(holder.split(".")[: path.count(".") + 2]), type(module).__name__  # the block's child
        for t in (*bare_parameters(module).values(), *module.buffers(recurse=False)):
            packed = t.dtype in _PACKED and 1 < t.ndim < 4  # older masks are bytes (1, 1, n, n)
            is_matrix = sum(n > 1 for n in t.shape) > 1  # RWKV's `time_mix_key` (1, 1, d) is a vector
            if packed or (is_matrix and t.is_floating_point() and d_model in t.shape[-2:]):
                out.append((part, holder, kind, t.ndim))
        if getattr(module, "out_features", None) == d_model:
            out.append((part, holder, kind, 3))  # packed by another library: no weight to look at
    return sorted(out, key=lambda entry: -entry[3])


def _nothing_found(
    model: nn.Module, cfg: BaseConfig, everything: list[Target], left_out: list[LeftOut], every: Iterable[BaseLayer]
) -> str:
    filters = {name: getattr(cfg, name) for name in cfg.FILTERS if getattr(cfg, name)}
    if cfg.kinds == ("linear",):  # the default says nothing
        del filters["kinds"]
    given = ", ".join(f"{name}={value!r}" for name, value in filters.items()) or f"the defaults of {cfg.variant!r}"
    unasked = "".join(f"  left out by default: {path} ({reason})\n" for path, reason in left_out[:3])
    named = [layer for layer in every if cfg.target_names and _named(layer.path, cfg)]
    others = [(layer.path, layer.kind.category) for layer in named if layer.kind.category not in cfg.kinds]
    unasked += "".join(
        f"  {path} is a layer of kinds={kind!r}, which this config doesn't name\n" for path, kind in others[:3]
    )
    noun = {"linear": "linear layers", "norm": "norms"}.get(",".join(cfg.kinds), f"layers of kinds={tuple(cfg.kinds)}")
    noun = "blocks" if cfg.on_blocks else noun
    nearest = ", ".join(_nearest(cfg, everything)) or "none"
    searched = f"{len(everything)} {noun} searched; nearest: {nearest}"
    if cfg.NEEDS_BIAS and not everything:
        searched = f"no layer of kinds={cfg.kinds} has a bias, and {cfg.variant!r} trains those alone"
    return (
        f"no layer matched {given} in {type(model).__name__}\n"
        f"  {searched}\n"
        f"{unasked}"
        f"  preview with lora_lite.plan(model, cfg)"
    )


def _nearest(cfg: BaseConfig, everything: list[Target], n: int = 3) -> list[str]:
    """Paths whose last name is the most like a wanted one, one path for each last name."""
    first: dict[str, str] = {}
    for target in everything:
        first.setdefault(target.path.rpartition(".")[2], target.path)
    # A regex without its signs is about the name that was meant: `q_proj$` -> q_proj.
    wanted = [re.sub(r"[^\w.]", "", pattern).rpartition(".")[2] for pattern in cfg.target_names] or [""]
    ranked = sorted(first, key=lambda name: -max(difflib.SequenceMatcher(None, w, name).ratio() for w in wanted))
    return [first[name] for name in ranked[:n]]
