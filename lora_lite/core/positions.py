"""Adapters that act at chosen positions of a sequence: at which, in each call of the model.

A hook on the model that attach was given asks the method (`Variant.positions`) for the mask of the call, and the hooks
on the layers put it on what they make (core/hooks.py). A cache remembers if a row is on in what comes after its prompt.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..base.kinds import is_instance
from ..errors import ConfigError, TargetError
from .names import IN_EXPERT
from .scale import Changes
from .state import AdapterState, Site, session_at
from .variant import lookup

ON_CACHE = "_lora_lite_positions"  # the attribute of a cache: {serial: (is a row on after its prompt, length)}
MOST_MASKS = 64  # kept for gradient checkpointing: a mask takes a byte for each token
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")  # keyword arguments that tell of packed rows
_serial = count()


@dataclass(frozen=True)
class Prompt:
    """A call of the model that is no step of decoding: what it is told of b rows with t columns."""

    ids: Tensor | None
    attended: Bool[Tensor, "b t"]  # no padding
    is_prompt: Bool[Tensor, "b t"]  # and, in training, before the first label that counts; all of a row without one
    offset: int  # how many columns are before these, in a cache that was made without the adapter

    @property
    def tokens(self) -> Int[Tensor, "b t"]:
        if self.ids is None:
            raise ConfigError(
                "an adapter that acts by tokens wants input_ids, and the model was called without\n"
                "  give input_ids in place of inputs_embeds"
            )
        return self.ids


@dataclass(eq=False)
class Mask:
    """Where an adapter acts in one call."""

    where: Bool[Tensor, "b t"]
    after: Bool[Tensor, "b"]  # and in what comes after the prompt


class Positions:
    """Where one config of an adapter acts; its sites share it."""

    NO_WEIGHT = "the adapter acts at some positions of a sequence, and no weight holds that\n  keep it attached"

    def __init__(self) -> None:
        self.__setstate__({"serial": next(_serial)})

    def __getstate__(self) -> dict[str, Any]:
        return {"serial": self.serial}  # no call of a copy is running

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.serial: int = state["serial"]  # a copy goes on with a cache of the original
        self.running: dict[int, Mask] = {}  # by thread
        self.traced: Mask | None = None  # for a graph of torch.compile, which knows no threads
        self.changes: Changes[Mask | None] = Changes(None, "positions", ", before other forwards", MOST_MASKS)

    def enter(self, mask: Mask) -> None:
        """A call of the model begins."""
        self.traced = mask
        if not is_compiling():
            self.running[get_ident()] = mask
            self.changes.change(mask)

    def leave(self) -> Mask | None:
        """It has ended; None if it never began with the adapter at work."""
        mask, self.traced = self.traced, None
        if not is_compiling():
            mask = self.running.pop(get_ident(), None)
            self.changes.set_in = -1  # what a backward runs again after this goes by the number of its node
        return mask

    def choose(self, path: str, new: Tensor, old: Tensor) -> Tensor:
        """The new values at the adapter's positions, and everywhere else the old ones, bit for bit."""
        mask = self._of_this_call(path).where  # (b, t)
        if new.shape[:-1] != mask.shape:
            # A mixture of experts gives its layers all tokens in one row.
            if new.shape[:-1] not in ((mask.numel(),), (1, mask.numel())):
                raise TargetError(
                    f"{path}: wanted hidden states of the call's {' x '.join(map(str, mask.shape))} tokens, got "
                    f"{tuple(new.shape)}\n  what acts at positions can't go there: leave it out with exclude_names"
                )
            mask = mask.reshape(new.shape[:-1])
        return torch.where(mask.to(new.device)[..., None], new, old)

    def _of_this_call(self, path: str) -> Mask:
        if is_compiling():
            mask = self.traced
        else:
            mask = self.changes.of_this_call(self.running.get(get_ident()))
            if torch._C._current_autograd_node() is not None and len(self.changes.threads) > 1:
                raise ConfigError(f"{path}: several threads run forwards, so a checkpoint can't tell its positions")
        if mask is None:
            raise TargetError(
                f"{path}: the adapter acts at some positions of a sequence, and which isn't known in a call of a part "
                f"of the model\n  call the whole model, the one that attach was given"
            )
        return mask


def watch(root: nn.Module, sites: Sequence[Site]) -> None:
    """Let these sites of one config, just installed, act at the positions that the root's calls say.

    Raises:
        TargetError: for an encoder-decoder, and for layers that aren't called with all tokens of a call.
    """
    check_can_act(root, sites)
    positions = Positions()
    for site in sites:
        site.positions = positions
    if not sites[0].state.watches:  # another config's sites are asked for, too
        watch_calls(root, sites[0].state)


def watch_calls(root: nn.Module, state: AdapterState) -> None:
    """Let each call of the root say where an adapter acts, if it acts at positions."""
    if any(site.positions is not None for site in state.sites):
        state.watches += [
            root.register_forward_pre_hook(partial(_enter, state.name), with_kwargs=True, prepend=True),
            # An Exception in the forward must not leave a mask for a call of a part of the model.
            root.register_forward_hook(partial(_leave, state.name), with_kwargs=True, always_call=True),
        ]


def check_can_act(root: nn.Module, sites: Sequence[Site]) -> None:
    """TargetError where an adapter can't act at some positions alone."""
    problem = "what acts at positions can't go there\n  leave it out with exclude_names"
    for site in sites:
        if site.through_weight:
            raise TargetError(f"{site.path}: its weight is multiplied where no call shows the tokens: {problem}")
        if IN_EXPERT.search(site.path):
            raise TargetError(f"{site.path}: an expert sees the tokens that are routed to it: {problem}")
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise TargetError(
            f"{type(root).__name__} is an encoder-decoder, with two sequences in a call: what acts at positions "
            f"can't go on it\n  use a model of one sequence, or a method that acts everywhere"
        )


def _enter(name: str, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The root is called: work out where the adapter of this name acts."""
    state = session_at(root).adapters[name]
    if state.is_idle:
        return
    # A call gives as many arguments by position as it likes.
    named = dict(zip(inspect.signature(root.forward).parameters, args, strict=False)) | kwargs if args else kwargs
    cache = _cache_in(named)
    for positions, cfg in _configs(state.sites).items():
        known = None if cache is None else vars(cache).get(ON_CACHE, {}).get(positions.serial)
        offset = 0 if cache is None else _length(cache)
        if known is not None and offset:
            mask = _step(named, known[0], known[1], offset)
        else:
            mark: Any = lookup(cfg.variant).positions(cfg)
            where = mark(_prompt(root, named, offset))  # (b, t + 1)
            mask = Mask(where[:, :-1], where[:, -1])
        positions.enter(mask)


def _leave(name: str, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """The call has ended: the cache remembers what comes after the prompt."""
    for positions in _configs(session_at(root).adapters[name].sites):
        mask = positions.leave()
        caches = (_cache_in(values) for values in (args, kwargs, output))  # an empty one is false
        cache = next((cache for cache in caches if cache is not None), None)
        if mask is not None and cache is not None:
            vars(cache).setdefault(ON_CACHE, {})[positions.serial] = mask.after, _length(cache)


def _configs(sites: Sequence[Site]) -> dict[Positions, Any]:
    return {site.positions: site.cfg for site in sites if site.positions is not None}


def _step(named: Mapping[str, Any], after: Tensor, length: int, now: int) -> Mask:
    """The mask of a call that goes on after a prompt."""
    shape = tuple(_sequence(named)[1])
    if len(shape) != 2 or shape[1] != 1:
        raise ConfigError(
            f"{' x '.join(map(str, shape))} tokens come after a prompt that is in the cache: what acts at positions "
            f"takes a prompt whole, and then one token a call\n  no prefill_chunk_size and no assistant; a cache "
            f"of what many prompts begin with: make it inside of lora_lite.disabled(model)"
        )
    if length != now or len(after) != shape[0]:
        raise ConfigError(
            f"the cache holds {now} tokens of {shape[0]} rows, and {length} of {len(after)} when the adapter was last "
            f"at work: where it acts isn't known\n  run the prompt again, with a new cache"
        )
    return Mask(after[:, None], after)


def _prompt(root: nn.Module, named: Mapping[str, Any], offset: int) -> Prompt:
    """The prompt of a call. Raises ConfigError where it doesn't say which tokens are a row's own."""
    ids, shape = _sequence(named)
    problem = ""
    if len(shape) != 2:
        problem = f"the model was called with {tuple(shape)}, wanted tokens (b, t)"
    elif offset and shape[1] == 1:
        problem = f"a step of decoding after {offset} tokens in a cache that the adapter hasn't seen"
    elif not offset and named.get("use_cache") is False and named.get("logits_to_keep") == 1:
        problem = "a step of generate(use_cache=False) looks like a prompt"
    attended, mask = torch.ones(shape, dtype=torch.bool, device=_tensor(named).device), named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and (mask.shape[1] == shape[1] or offset):
        attended = mask[:, -shape[1] :] != 0
    elif mask is not None:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        problem = problem or f"attention_mask is {got} for {tuple(shape)} tokens, wanted one of these two axes"
    if not problem and _is_packed(named, attended):
        problem = "rows hold several sequences (packed, position_ids start again)"
    if problem:
        raise ConfigError(f"{problem}: where a prompt is isn't known\n  {_CURE}")
    return Prompt(ids, attended, _before_labels(root, named.get("labels"), attended), offset)


_CURE = (
    "give what acts at positions one sequence a row with its attention_mask (b, t), and let generate use its "
    "default cache"
)


def _before_labels(root: Any, labels: Any, attended: Tensor) -> Bool[Tensor, "b t"]:
    """The part of each row that a language model isn't trained to say: its prompt; the row where that is nothing."""
    is_language_model = getattr(root, "can_generate", None) is not None and root.can_generate()
    if not is_language_model or not isinstance(labels, Tensor) or labels.shape != attended.shape:
        return attended
    prompt = attended & ((labels != -100).cumsum(1) == 0)  # (b, t); -100 is what the loss leaves out
    counts = (labels != -100).any(1) & prompt.any(1)  # (b,)
    return torch.where(counts[:, None], prompt, attended)


def _is_packed(named: Mapping[str, Any], attended: Tensor) -> bool:
    positions = named.get("position_ids")
    if any(named.get(name) is not None for name in _PACKED):
        return True
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] != attended.shape[1]:
        return False
    return bool(((positions.diff(dim=1) <= 0) & attended[:, 1:] & attended[:, :-1]).any())


def _tensor(named: Mapping[str, Any]) -> Tensor:
    """The tensor that has the sequence: input_ids, inputs_embeds, or of another model the first one."""
    given = (named.get("input_ids"), named.get("inputs_embeds"), *named.values())
    tensor = next((value for value in given if isinstance(value, Tensor)), None)
    if tensor is None:
        raise ConfigError("the model was called without a tensor, so what acts at positions has no sequence")
    return tensor


def _sequence(named: Mapping[str, Any]) -> tuple[Tensor | None, torch.Size]:
    """The tokens (b, t), or None where there are embeddings, and that shape; rows of one sequence are a batch of 1."""
    tensor = _tensor(named)
    if tensor.is_floating_point():
        shape = tensor.shape[:-1]  # (b, t, d)
        return None, torch.Size([1] * (2 - len(shape)) + list(shape))
    ids = tensor[None] if tensor.ndim == 1 else tensor
    return ids, ids.shape


def _cache_in(values: Any) -> Any:
    """The cache among a call's arguments or in its output; None if there is none."""
    members = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else ()
    return next((value for value in members if is_instance(value, "transformers.cache_utils", "Cache")), None)


def _length(cache: Any) -> int:
    """How many tokens it holds; 1 for all that a model without attention remembers."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return int(cache.has_previous_state())
