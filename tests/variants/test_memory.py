"""What a layer keeps for its backward, beside what PEFT's keeps for the same adapter: exact bytes, by storages."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lora_lite as ll
from lora_lite.io.peft.formats import FORMATS

METHODS = sorted({"lora", "dora"} | {form.variant for form in FORMATS})
FIELDS: dict[str, dict[str, object]] = {
    "adamss": {"num_subspaces": 1},  # or of a random W both find other clusters
    "randlora": {"save_projection": True},
    "vblora": {"vector_length": 64},
}
OF_ITS_OWN = {"velora": 36}
"""The mean direction of a batch, 9 float32 numbers, which is made anew at each step; PEFT writes it into a buffer."""


def kept(model: nn.Module, x: Tensor) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.train()(x)  # held, so that no storage's address is used again
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert y.requires_grad
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_no_more_is_kept_than_by_peft(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("proj", nn.Linear(576, 1536, dtype=dtype))
    theirs = copy.deepcopy(model)
    ll.attach(model, ll.config_for(method)(target_names="proj", target_roles=(), **FIELDS.get(method, {})))
    ll.save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    x = torch.randn(1, 64, 576, dtype=dtype, requires_grad=True)
    assert kept(model, x) <= kept(theirs, x) + OF_ITS_OWN.get(method, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, nn.LayerNorm, nn.RMSNorm])
def test_no_more_is_kept_at_a_norm_than_by_peft(kind: Any, dtype: torch.dtype) -> None:
    model = nn.Sequential()
    model.add_module("norm", kind(576).to(dtype))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LNTuningConfig(target_modules=["norm"]))
    ll.attach(model, ll.NormConfig())
    x = torch.randn(1, 64, 576, dtype=dtype, requires_grad=True)
    assert kept(model, x) <= kept(theirs, x)
