"""How things are measured: interleaved times, bytes that autograd keeps, bytes at the highest point of a step."""

import gc
import itertools
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import loss_of, train_step
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm


@dataclass(frozen=True)
class Ratio:
    """One line of the table.

    low, high  the quartiles of the ratios by round, or None
    of         where these are None, what the value is: "exact", or of the "fastest" round, the "highest"
    floors     what the products, and what the passes over memory, would take alone, as the same ratio
    """

    measure: str
    value: float
    mark: float | None = None
    low: float | None = None
    high: float | None = None
    group: str = ""
    of: str = "exact"
    floors: tuple[float, ...] = ()

    @property
    def met(self) -> bool | None:
        """None without a mark."""
        return None if self.mark is None else self.value <= self.mark

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


@dataclass(frozen=True)
class Times:
    """Seconds by contender, one a round."""

    seconds: dict[str, list[float]]

    def ratio(
        self,
        measure: str,
        one: str,
        other: str,
        mark: float | None = None,
        group: str = "",
        floors: tuple[float, ...] = (),
    ) -> Ratio:
        """The median of the rounds' ratios: what slows the machine down for some rounds slows both."""
        of_rounds = sorted(a / b for a, b in zip(self.seconds[one], self.seconds[other], strict=True))
        low, middle, high = statistics.quantiles(of_rounds, n=4)
        return Ratio(measure, middle, mark, low, high, group, floors=floors)

    def above(self, other: str) -> "Times":
        """The time that each contender takes above another one's, by round."""
        return Times(
            {
                name: [a - b for a, b in zip(seconds, self.seconds[other], strict=True)]
                for name, seconds in self.seconds.items()
                if name != other
            }
        )


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int, what: str, warm: int = 1) -> Times:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        for _ in range(warm):
            run()
    order = random.Random(0)
    for _ in tqdm(range(rounds), desc=what, disable=not sys.stderr.isatty(), leave=False):
        for name in order.sample(list(contenders), len(contenders)):  # none is always after the same one
            started = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - started)
    return Times(seconds)


def saved_storages(model: Any, ids: Any) -> dict[int, torch.UntypedStorage]:
    """The storages that autograd keeps of one forward for its backward: each once, parameters and buffers aside."""
    storages: dict[int, torch.UntypedStorage] = {}  # by address

    def pack(tensor: Tensor) -> None:  # no backward is run, and an output handed back would keep its graph alive
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage()

    model.train()
    with saved_tensors_hooks(pack, lambda nothing: nothing):
        loss = loss_of(model, ids)
    of_model = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    del loss
    return {address: storage for address, storage in storages.items() if address not in of_model}


def saved(model: Any, ids: Any) -> int:
    """The bytes of those storages."""
    return sum(storage.nbytes() for storage in saved_storages(model, ids).values())


def floor(model: Any, ids: Tensor, paths: Any) -> int:
    """Bytes of the distinct inputs of these layers that the frozen model doesn't keep anyway: dA needs them."""
    inputs: dict[int, torch.UntypedStorage] = {}

    def remember(module: Any, args: Any) -> None:
        inputs[args[0].untyped_storage().data_ptr()] = args[0].untyped_storage()

    handles = [model.get_submodule(path).register_forward_pre_hook(remember) for path in paths]
    saved_anyway = saved_storages(model, ids)
    for handle in handles:
        handle.remove()
    return sum(storage.nbytes() for address, storage in inputs.items() if address not in saved_anyway)


def peak_of(make: Callable[[], Any], ids: Any) -> int:
    """Bytes of all tensors, from the making of a model on, at the highest point of its second training step."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints when it starts and stops
    gc.collect()  # what an earlier contender has left would count as freed by this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step = train_step(make(), ids)
        step()
        with record_function("second step"):
            step()
    events = profiler.profiler.kineto_results.events()
    begins = next(event.start_ns() for event in events if event.name() == "second step")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    sizes = itertools.accumulate(nbytes for _, nbytes in changes)
    return max(size for (time_ns, _), size in zip(changes, sizes, strict=True) if time_ns >= begins)


def in_a_process(*arguments: str) -> str:
    """The output of a command of Python; from its second run on it need not compile what it imports."""
    caching = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, env=caching)
    return done.stdout


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "system": platform.platform()}
