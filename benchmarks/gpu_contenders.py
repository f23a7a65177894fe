"""The models that are compared on a GPU, all on the same weights, and runs that may be too large for its memory."""

import copy
import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from contenders import RANK, configured, differentiable, settle, train_step
from gpu_costs import bytes_of, synchronize
from gpu_decode import StaticDecoder
from measure import Times, interleaved
from peft import LoraConfig, get_peft_model
from torch import Tensor

import lora_lite as ll

CONTENDERS = ("frozen base", "LoRA", "DoRA", "PEFT LoRA", "PEFT DoRA")
IN_A_GRAPH = CONTENDERS[:3]
"""Of PEFT a graph would have the scale of its capture."""
OURS = {"LoRA": "lora", "DoRA": "dora"}


def contender(base: Any, name: str) -> Any:
    """A model with this adapter, on the very parameters of the base, which nobody writes."""
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    if name in OURS:
        settle(ll.attach(model, configured(OURS[name])).parameters())
    elif name != "frozen base":
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", use_dora="DoRA" in name)
        model = get_peft_model(model, config)
        settle(p for p in model.parameters() if p.requires_grad)
    return differentiable(model)


def compiled(model: Any) -> Any:
    """Each model has a graph for each size, and none of them falls back to eager mode in silence."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(model, dynamic=False)


@dataclass(eq=False)
class Run:
    """A contender's work, made at its first call. Once it has run out of memory, it does nothing."""

    make: Callable[[], Callable[[], Any]]
    device: torch.device
    run: Callable[[], Any] | None = None
    is_out: bool = False

    def __call__(self) -> None:
        if self.is_out:
            return
        try:
            self.run = self.run or self.make()
            self.run()
            synchronize(self.device)
        except torch.OutOfMemoryError:
            self.is_out, self.run = True, None
        if self.is_out:  # out of the handler, whose exception keeps the frames of the forward
            gc.collect()
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Turns:
    """The times of contenders that took turns, and those for which the memory was too small."""

    times: Times
    out: frozenset[str]


def turns(runs: Mapping[str, Run], rounds: int, what: str) -> Turns:
    """Two calls of each to warm up, then the rounds."""
    times = interleaved(runs, rounds, what, warm=2)
    out = frozenset(name for name, run in runs.items() if run.is_out)
    return Turns(Times({name: each for name, each in times.seconds.items() if name not in out}), out)


@dataclass(eq=False)
class Training:
    """Steps of one contender on one row of tokens, and the memory that they take."""

    base: Any
    name: str
    ids: Tensor  # (1, tokens)
    is_compiled: bool
    checkpointing: bool
    model: Any = field(init=False, default=None)

    def make(self) -> Callable[[], None]:
        self.model = contender(self.base, self.name)
        if self.checkpointing:
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return train_step(compiled(self.model) if self.is_compiled else self.model, self.ids)

    def peak(self, run: Run) -> int | None:
        """Bytes at the highest point of a step, without what is there of other contenders; None without a GPU."""
        if self.ids.device.type != "cuda" or run.is_out:
            return None
        there = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        # Of its own it has the weights, the adapter, and two numbers for each of what is trained (AdamW).
        tensors = [*self.model.state_dict().values(), *self.model.buffers()]  # the scales of 4 bits too
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return None if run.is_out else torch.cuda.max_memory_allocated() - there + bytes_of(tensors) + 2 * trained


@dataclass(eq=False)
class Decoding:
    """Tokens of one contender after short prompts, some of them a call."""

    base: Any
    name: str
    ids: Tensor  # (b, t)
    length: int  # of the cache
    way: str  # "eager", "compiled" or "graph"
    capture: Callable[[StaticDecoder], Callable[[], None]]  # of a step, for a graph
    tokens: int  # a call
    blocks: ExitStack  # where `capturable` ends

    def make(self) -> Callable[[], None]:
        model = contender(self.base, self.name).eval()
        if self.way == "graph" and self.name in OURS:
            self.blocks.enter_context(ll.capturable(model))
        decoder = StaticDecoder(model, self.ids, self.length)
        if self.way == "compiled":
            decoder.model = compiled(model)
        step = decoder.step
        if self.way == "graph":
            step = self.capture(decoder)
            if self.name in OURS:
                check_follows(model, decoder, step)

        def several() -> None:
            for _ in range(self.tokens):
                step()

        return several


@torch.no_grad()
def check_follows(model: Any, decoder: StaticDecoder, replay: Callable[[], None]) -> None:
    """A captured step goes on with another scale, and with other values of the adapter.

    Raises:
        RuntimeError: where it doesn't make what the model itself makes of them.
    """
    adapter = ll.adapters(model)["default"]
    before = adapter.state_dict()
    values = {key: tensor.clone() for key, tensor in before.items()}
    others = {key: 2 * tensor if key.endswith("lora_B") else tensor for key, tensor in values.items()}
    changes: list[tuple[str, Callable[[], object]]] = [
        ("its scale", lambda: setattr(adapter, "scale", 8.0)),
        ("its values", lambda: adapter.load_state_dict(others)),
        ("scale 0", lambda: setattr(adapter, "scale", 0.0)),
    ]
    last = _logits(decoder, decoder.step)
    for what, change in changes:
        change()
        wanted, got = _logits(decoder, decoder.step), _logits(decoder, replay)
        if not (got - wanted).norm() <= 0.1 * (wanted - last).norm():  # so a NaN is caught, too
            raise RuntimeError(f"a captured step doesn't follow a change of {what}")
        last = wanted
    adapter.load_state_dict(values)
    adapter.scale = 1.0
    decoder.rewind()


def _logits(decoder: StaticDecoder, step: Callable[[], None]) -> Tensor:
    decoder.rewind()
    step()
    return decoder.logits.float().clone()  # a step writes the next ones in their place


def row(model: Any, rows: int, tokens: int, device: torch.device) -> Tensor:
    """(rows, tokens) of random ids: what a step costs doesn't depend on them."""
    vocabulary, generator = model.config.vocab_size, torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (rows, tokens), generator=generator).to(device)
