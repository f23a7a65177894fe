"""PEFT's folders over the space of peft_space.py: made by PEFT, loaded here, written here, loaded by PEFT."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_space import MODELS, Case, built, cases, output
from torch import Tensor, nn

import lora_lite as ll

CASES = list(cases())
pytestmark = [
    pytest.mark.slow,  # six hundred folders, a quarter of a second each
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's own words on Conv1D, groups and ties
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def made_by_peft(case: Case, folder: Path) -> nn.Module:
    """PEFT's model with every trained tensor away from its start, and its folder."""
    model = built(case.model)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model, case.made()).eval()
    with torch.no_grad():
        for tensor in theirs.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    theirs.save_pretrained(str(folder))
    return theirs


def backward(model: nn.Module, x: Tensor) -> Tensor:
    """The output; each trained tensor has its gradient of one loss then."""
    y = output(model, x)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return y.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def has_equal(gradient: Tensor, others: list[Tensor]) -> bool:
    """Has one of them these numbers, in whatever order a shape of ours has them?"""
    numbers = gradient.flatten().sort().values
    alike = (other.flatten().sort().values for other in others if other.numel() == gradient.numel())
    return any(torch.allclose(numbers, other, rtol=1e-3, atol=1e-5) for other in alike)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_peft_to_us_and_back(case: Case, tmp_path: Path) -> None:
    x, theirs = MODELS[case.model][1], made_by_peft(case, tmp_path / "theirs")
    ours = built(case.model)
    before = output(ours, x)
    if case.refused:
        state = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
        with pytest.raises(ll.CheckpointError, match=case.refused):
            ll.load_peft(ours, tmp_path / "theirs")
        assert ours.state_dict().keys() == state.keys()
        assert torch.equal(output(ours, x), before)
        return
    ll.load_peft(ours, tmp_path / "theirs")
    wanted = backward(theirs, x)
    assert not torch.allclose(before, wanted, atol=1e-4)
    torch.testing.assert_close(backward(ours, x), wanted, rtol=1e-4, atol=2e-5)
    if case.gradients:
        mine = list(gradients(ours).values())
        lacking = [name for name, gradient in gradients(theirs).items() if not has_equal(gradient, mine)]
        assert not lacking
    if case.unwritten:
        with pytest.raises(ll.CheckpointError, match=case.unwritten):
            ll.save_peft(ours, tmp_path / "ours")
        return
    ll.save_peft(ours, tmp_path / "ours")
    again: Any = peft.PeftModel.from_pretrained(built(case.model), tmp_path / "ours").eval()
    torch.testing.assert_close(output(again, x), wanted, rtol=1e-4, atol=2e-5)
