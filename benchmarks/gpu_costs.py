"""What an adapter has to cost at least, by the sizes of the layers and two rates of the device that are measured.

A layer is (d_in, d_out), r the rank, T the tokens, F the FLOP/s of a large product, β the bytes/s of a large copy.

    training, frozen     2 (f + 1) T d_in d_out FLOP: f forwards, and the gradient of the input; f is 2 where gradient
                         checkpointing runs each forward again
    LoRA adds            (2 f + 4) T r (d_in + d_out) FLOP, and without fusion 4 (f + 1) T (d_in + d_out) bytes: x is
                         read again, the sum reads y and writes it
    FLOP floor           1 + (f + 2) / (f + 1) r Σ (d_in + d_out) / Σ d_in d_out      1.5 r (i + o) / (i o) at f = 1
    traffic, unfused     1 + 2 (F / β) Σ (d_in + d_out) / Σ d_in d_out
    decoding             1 + bytes of the adapter / bytes of the weights

Sums above go over the adapted layers, those below over all linear layers, the head among them. Attention and norms are
in neither: they bring a ratio nearer to 1, at 32k tokens by much.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lora_lite as ll

Shapes = list[tuple[int, int]]


@dataclass(frozen=True)
class Sizes:
    """The linear layers of a model, (d_in, d_out), and those of them that an adapter is on."""

    every: Shapes
    adapted: Shapes
    weight_bytes: int  # of all linear layers, as they are stored
    rank: int

    @classmethod
    def of(cls, model: nn.Module, rank: int) -> "Sizes":
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        adapted = [(target.d_in, target.d_out) for target in ll.plan(model, ll.LoRAConfig(r=rank))]
        nbytes = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
        return cls([(layer.in_features, layer.out_features) for layer in layers], adapted, nbytes, rank)

    @property
    def _share(self) -> float:
        """Σ (d_in + d_out) / Σ d_in d_out."""
        return sum(i + o for i, o in self.adapted) / sum(i * o for i, o in self.every)

    def flop_floor(self, checkpointing: bool = False) -> float:
        """The ratio of a training step with a LoRA to one of the frozen base, where products alone take time."""
        forwards = 2 if checkpointing else 1
        return 1 + (forwards + 2) / (forwards + 1) * self.rank * self._share

    def traffic(self, rates: "Rates") -> float:
        """The same ratio where its passes over x and y take time, each by itself, and its products none."""
        return 1 + 2 * rates.flops / rates.bandwidth * self._share

    def decode_floor(self, reads_weights_again: bool = False) -> float:
        """The ratio of a decoding step with float32 factors to one of the base, where reading alone takes time."""
        factors = 4 * self.rank * sum(i + o for i, o in self.adapted)
        share = sum(i * o for i, o in self.adapted) / sum(i * o for i, o in self.every)
        return 1 + factors / self.weight_bytes + (share if reads_weights_again else 0.0)


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a large product, and bytes/s of a large copy, which reads and writes."""

    flops: float
    bandwidth: float

    @classmethod
    def measured(
        cls, device: torch.device, dtype: torch.dtype, n: int = 8192, megabytes: int = 1024, rounds: int = 10
    ) -> "Rates":
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        here = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
        there = torch.empty_like(here)
        product = _median(lambda: a @ b, device, rounds)
        copy = _median(lambda: there.copy_(here), device, rounds)
        return cls(2 * n**3 / product, 2 * here.numel() / copy)


def _median(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 2):  # the first two load kernels
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of these tensors' storages, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
