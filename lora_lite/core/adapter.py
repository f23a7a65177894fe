"""The handle on an attached adapter, where to find it, and its scale.

An adapter's tensors are parameters and buffers of the layers that it adapts. Each of these layers keeps a `Site` per
adapter, and the model that `attach` was given keeps a `Session`. The handle holds the model and a name, nothing else.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base import sharding
from ..base.fingerprint import BaseRecord
from ..base.kinds import is_instance
from ..base.split import is_block_of_parts
from ..dtypes import dtype_name
from ..errors import CheckpointError, ConfigError, TargetError
from .layer import Layer
from .names import check_shapes
from .scaled import check_in_use, finite_scale, scaled
from .shared import Shared
from .state import (
    AdapterState,
    Method,
    Site,
    check_unmerged,
    not_attached,
    session_at,
    session_of,
    sites_of,
    within_capturable,
)
from .targets import Target
from .variant import ParamSpec, Variant, check_takes_data, lookup


class Adapter:
    """A handle on one attached adapter; keep it, or get it again from `adapters(model)`."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model = model
        self.name = name

    @property
    def config(self) -> Any:
        """The config it was attached with; a tuple of them, where it was given several."""
        return self.configs[0] if len(self.configs) == 1 else self.configs

    @property
    def configs(self) -> tuple[Any, ...]:
        """The config of each of its methods."""
        return tuple(method.cfg for method in self._state.methods)

    @property
    def methods(self) -> list[Method]:
        """Its methods: of each the config and the layers."""
        return self._state.methods

    @property
    def variant(self) -> str:
        """The name of its method in REGISTRY; of several, "lora + full"."""
        return " + ".join(method.cfg.variant for method in self._state.methods)

    @property
    def leads(self) -> bool:
        """Does it come before adapters that don't, whenever it was attached?"""
        return self._state.is_first

    @property
    def base(self) -> dict[str, Any]:
        """The base that it was attached to, as an adapter file records it."""
        return self.base_record.to_json()

    @property
    def base_record(self) -> BaseRecord:
        return cast(BaseRecord, self._state.base)

    @property
    def per_layer(self) -> dict[str, dict[str, Any]]:
        """Path of each layer at which the config differs, with the fields that do; of the second method there, `<path>
        (2)`."""
        sites = [site for site in self._state.sites if site.overrides]
        return {f"{s.path} ({s.number})" if s.number > 1 else s.path: dict(s.overrides) for s in sites}

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """Path of each adapted layer, relative to the model given to `attach`, with its (d_in, d_out)."""
        return {site.path: (site.target.d_in, site.target.d_out) for site in self._state.sites}

    @property
    def layers(self) -> list[Target]:
        """The layers that it was attached to, as `plan` describes them."""
        return [site.target for site in self._state.sites]

    @property
    def scale(self) -> float:
        """The coefficient c: 0 is the base, bit for bit; 1 the method; otherwise y + c·(f(y) - y)."""
        return self._state.scale

    @scale.setter
    def scale(self, c: float | int) -> None:
        self._check_unmerged("change the scale")
        check_in_use([self._state])
        if self._state.row_scales is not None:
            raise ConfigError(
                f"adapter {self.name!r}: each row has a scale of its own\n  leave the block of `scaled` first"
            )
        self._state.set_scale(finite_scale(c))

    def configure(self, *, calibration_data: Any = None, **changes: Any) -> None:
        """Change config fields that the method can follow while attached (its `live` ones), at once and on all layers
        but those where `per_layer` sets them; with calibration_data, compute it anew from that.

        Raises:
            ConfigError: for another field, a bad value, or data that the method doesn't take.
            TargetError: while it is merged.
            After these, and after what the variant's own code raises, the adapter is as it was.
        """
        self._check_unmerged("configure")
        if self._state.in_place is not None:
            raise within_capturable("configure")
        methods = self._state.methods
        fixed = {name for method in methods for name in changes.keys() - set(lookup(method.cfg.variant).live)}
        following = [method for method in methods if changes.keys() <= set(lookup(method.cfg.variant).live)]
        if not following:
            live = dict.fromkeys(name for method in methods for name in lookup(method.cfg.variant).live)
            raise ConfigError(
                f"adapter {self.name!r}: {', '.join(sorted(fixed))} can't change while it is attached\n"
                f"  {self.variant!r} can follow {', '.join(live) or 'no field'}; for others detach and attach"
            )
        if calibration_data is not None:  # methods that would not look at it are not meant
            takers = [m for m in following if lookup(m.cfg.variant).group_init is not Variant.group_init]
            following = takers or following[:1]
        if len(following) > 1:
            problem = f"adapter {self.name!r}: several of its methods, {self.variant}, can follow this"
            raise ConfigError(f"{problem}\n  attach them as adapters of their own")
        self._configure(following[0], calibration_data, changes)

    def _configure(self, method: Method, calibration_data: Any, changes: Mapping[str, Any]) -> None:
        variant, old = lookup(method.cfg.variant), method.cfg
        if calibration_data is not None:
            check_takes_data(old)
        new = replace(old, **changes)
        _use(method, new)
        views = self.views(method)
        # New data fills tensors that a failure must put back; a changed field alone can be undone by a refresh.
        before = {} if calibration_data is None else {key: t.clone() for key, t in self.state_dict().items()}
        with torch.no_grad():
            try:
                if calibration_data is not None:
                    with scaled(self._model, 0.0, self.name):
                        variant.group_init(self._model, views, new, calibration_data)
                variant.refresh(views, new)
            except BaseException:  # Ctrl-C in a long calibration, too
                _use(method, old)
                if before:
                    self.load_state_dict(before)
                else:
                    variant.refresh(self.views(method), old)
                raise

    def step(self) -> None:
        """Let the methods' schedules take a step: after `optimizer.step()`, before `zero_grad()`. AdapterTrainer does.

        Raises:
            TargetError: while it is merged.
        """
        self._check_unmerged("take a step")
        state, step = self._state, self.steps + 1
        for method in state.methods:
            variant = lookup(method.cfg.variant)
            if variant.on_step is not Variant.on_step:
                with torch.no_grad():
                    variant.on_step(self.views(method), method.cfg, step)
        state.steps = step

    def penalty(self) -> Tensor | None:
        """The number that its methods add to the loss, with its gradient; None if they add nothing, as one adds that
        isn't `in_training`. AdapterTrainer adds it to each loss in training."""
        methods = [(lookup(method.cfg.variant), method) for method in self._state.methods if self.in_training]
        penalties = [v.penalty(self.views(m), m.cfg) for v, m in methods if v.penalty is not Variant.penalty]
        terms = [term for term in penalties if term is not None]
        return torch.stack(terms).sum() if len(terms) > 1 else next(iter(terms), None)

    @property
    def in_training(self) -> bool:
        """Does a loss reach it: is it on and not merged, and does one of its parameters want a gradient?"""
        return not self._state.is_idle and any(parameter.requires_grad for parameter in self.parameters())

    @property
    def steps(self) -> int:
        """How many steps `step` has counted; a file that was saved with resume=True holds it."""
        return self._state.steps or 0

    @steps.setter
    def steps(self, steps: int) -> None:
        self._state.steps = steps

    @property
    def never_stepped(self) -> bool:
        """Is `steps` 0, and known to be? A file without a count may be of a training that has ended."""
        return self._state.steps == 0

    @property
    def is_sharded(self) -> bool:
        """True once each process has a part of its parameters or of its layers' weights: all save together."""
        # Parameters of the root itself stay whole after a forward, and are fully_shard's all the same.
        return any(map(sharding.is_sharded, self._tensors())) or is_instance(self._model, *sharding.FSDP2)

    def _tensors(self) -> list[Tensor]:
        """Its own and its layers' weights."""
        return [*(site.base.stored for site in self._state.sites), *dict(self.named_tensors()).values()]

    @property
    def sharded_by(self) -> str:
        """By what it is sharded: "fully_shard", "ZeRO-3", "tensor parallelism", or "DTensors" that somebody else has
        put there; "" while it is whole."""
        if not self.is_sharded:
            return ""
        if any(is_instance(module, *sharding.FSDP2) for module in self._model.modules()):
            return "fully_shard"
        if any(map(sharding.is_of_zero, self._tensors())):
            return "ZeRO-3"
        sites = [site for site in self._state.sites if site.parts is None]
        weights = [site.base.stored for site in sites if not is_block_of_parts(site.base)]
        rest = [tensor for place in self._places(sites) for _, tensor in place.tensors()]
        return "DTensors" if any(map(sharding.is_dtensor, [*weights, *rest])) else "tensor parallelism"

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers by their key in a file: `<path>.lora_A`, whatever the adapter's name."""
        return ((p.key(name), t) for p in self._places(self.sites()) for name, t in p.tensors())

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable tensors, for an optimiser."""
        tensors = (tensor for place in self._places(self.sites()) for _, tensor in place.tensors())
        return (tensor for tensor in tensors if isinstance(tensor, nn.Parameter))

    def state_dict(self, resume: bool = True) -> dict[str, Tensor]:
        """Every tensor that is saved by its key in a file, detached; a sharded one stays sharded. Without `resume`, not
        what only a training needs that goes on."""
        specs = self.specs(resume)
        return {key: tensor.detach() for key, tensor in self.named_tensors() if key in specs}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values in place: an optimiser keeps its parameters, and a sharded one takes its shard.

        Raises:
            CheckpointError: before anything is copied, unless keys and shapes are exactly this adapter's, and where
                ZeRO-3's optimizer would undo it.
            TargetError: while it is merged.
        """
        self._check_unmerged("load values")
        specs = self.specs()
        mine = {key: tensor for key, tensor in self.named_tensors() if key in specs}
        if any(map(sharding.has_master, mine.values())):
            raise CheckpointError(
                f"adapter {self.name!r}: ZeRO-3's optimizer has copies of its values, and its next step starts there\n"
                f"  load values before the trainer or deepspeed.initialize, or resume from DeepSpeed's own checkpoint"
            )
        # Of the tensors as they are: another library may have partitioned them, and a copy would broadcast.
        check_shapes(tensors, self.shapes(), f"adapter {self.name!r}")
        with sharding.gathered(mine.values(), modifier_rank=0):  # ZeRO-3: whole for the copy, then sharded again
            for key, tensor in mine.items():
                tensor.copy_(sharding.sharded_like(tensor, tensors[key].to(tensor.device, tensor.dtype)))

    def set_base_record(self, base: BaseRecord) -> None:
        """A loaded adapter keeps the record of the base that its values belong to."""
        self._state.base = base

    def sites(self) -> Iterator[Site]:
        """Each adapted layer that is still in the model, and not something else in its place."""
        merged: list[Any] = [swap.before for swap in session_at(self._model).merged]  # may be put back
        present = {id(module) for module in (*self._model.modules(), *merged)}
        return (site for site in self._state.sites if id(site.module) in present and site.slot in sites_of(site.module))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that is saved, as it is now, by its key in a file; of a sharded one, the whole."""
        specs = self.specs()  # of the tensors themselves: a detached one forgets what ZeRO-3 took out of it
        return {key: tuple(sharding.shape_of(tensor)) for key, tensor in self.named_tensors() if key in specs}

    def specs(self, resume: bool = True) -> dict[str, Any]:
        """The ParamSpec of each tensor that is saved, by its key in a file."""
        methods = self._state.methods
        places = [(m, p) for m in methods for p in (*m.sites, m.shared) if p is not None]
        known = ((m, p, name, spec) for m, p in places for name, spec in p.specs.items())
        return {p.key(n): s for m, p, n, s in known if s.saved == "always" or _goes(m, p, n, s, resume)}

    def _places(self, sites: Iterable[Site]) -> Iterator[Site | Shared]:
        """Where its tensors lie: at these sites, and what it has once."""
        return chain(sites, (m.shared for m in self._state.methods if m.shared is not None))

    def views(self, method: Method | None = None) -> dict[str, Layer]:
        """Each adapted layer as the variant sees it, by path; experts with tensors of their own as `path[i]`.

        method      of its methods, the one whose layers are wanted; None: of an adapter of one method
        """
        method = self._state.methods[0] if method is None else method
        views: dict[str, Layer] = {}
        for site in method.sites:  # no walk over the model: a search changes the config at every trial
            for expert in range(site.target.experts) if site.stacked else [None]:
                path = site.path if expert is None else f"{site.path}[{expert}]"
                views[path] = Layer(site.module, site, expert=expert)
        return views

    def counts(self) -> str:
        """How many layers of each kind, for messages: "30 o_proj, 30 down_proj"; of the stream, "30 block"."""
        sites = list(self.sites())
        kinds = Counter({s.path: "block" if s.base.is_block else s.path.rpartition(".")[2] for s in sites}.values())
        fused = {site.path.rpartition(".")[2] for site in sites if site.target.experts}
        return ", ".join(f"{n} {'blocks of fused ' if kind in fused else ''}{kind}" for kind, n in kinds.items())

    def _check_unmerged(self, what: str) -> None:
        if self._state.merged:
            check_unmerged(session_at(self._model), what)

    @property
    def _state(self) -> AdapterState:
        state = session_at(self._model).adapters.get(self.name)  # asked each time: it may be detached meanwhile
        if state is None:
            raise TargetError(not_attached(self.name, self._model))
        return state

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        base = self.base_record
        kind = base.quantization.in_words() if base.quantization else base.dtype
        dtypes = " and ".join(dict.fromkeys(dtype_name(cfg.dtype) for cfg in self.configs))
        return (
            f"{self.variant} {self.name!r}: {len(self.targets)} layers, {count:,} trainable parameters in "
            f"{dtypes}, on {base.class_name} ({kind})"
            f"{'' if self.scale == 1 else f', scale {self.scale:g}'}"
        )


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model (or on what a wrapper holds), by name, in the order attached."""
    root, session = session_of(model)
    return {name: Adapter(root, name) for name in session.adapters}


def get_adapter(model: nn.Module, name: str) -> Adapter:
    """The adapter of that name. Raises TargetError."""
    root, session = session_of(model)
    if name not in session.adapters:
        raise TargetError(not_attached(name, model))
    return Adapter(root, name)


def _use(method: Method, cfg: Any) -> None:
    """Make this the config, and at each layer the one with the fields that differ there. Raises ConfigError."""
    configs = [cfg.with_overrides(site.overrides) for site in method.sites]  # all, before one is set
    method.cfg = cfg
    for site, at_layer in zip(method.sites, configs, strict=True):
        site.cfg = at_layer


@torch.no_grad()
def _goes(method: Method, place: Site | Shared, name: str, spec: ParamSpec, resume: bool) -> bool:
    """Is a tensor saved that need not be? One that is made again at load is, where it isn't what would be made: a cast
    has rounded it, or it came from elsewhere."""
    if spec.saved == "resume":
        return resume
    tensor, variant = place.tensor(name), lookup(method.cfg.variant)
    # Anew: the specs of a copy, or of what was pickled, have lost their functions.
    if isinstance(place, Site):
        spec = variant.layer_specs(place.target, place.cfg)[name]
    else:
        spec = variant.shared_specs([site.target for site in method.sites], method.cfg)[name]
    again = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    for part in again if isinstance(place, Site) and place.stacked else [again]:
        spec.fill(part)
    return not torch.equal(tensor, again)
