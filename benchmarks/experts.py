"""Multiplications that a LoRA on routed experts adds for a token: 64 experts, 4 of them at work. Counted, not timed."""

from collections.abc import Iterator

import torch
from contenders import RANK, settle
from measure import Ratio
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

import lora_lite as ll

EXPERTS, AT_WORK, WIDTH, INNER = 64, 4, 256, 512


def experts(ids: Tensor, rounds: int) -> Iterator[Ratio]:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
        num_experts_per_tok=AT_WORK,
    )
    model = MixtralForCausalLM(config).eval()
    without = _flops(model)
    settle(ll.attach(model, ll.LoRAConfig(r=RANK, kinds=("experts",))).parameters())
    # B A of gate and up in one, and of down, for every expert: what PEFT forms of each.
    dense = 2 * EXPERTS * RANK * (2 * INNER * WIDTH + WIDTH * INNER)
    added = (_flops(model) - without) / (AT_WORK / EXPERTS * dense)
    yield Ratio("experts: FLOPs added / 4 of 64 of the dense form", added, 1.1, group="experts")


@torch.no_grad()
def _flops(model: MixtralForCausalLM) -> int:
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([[5]]))
    total: int = counter.get_total_flops()
    return total
