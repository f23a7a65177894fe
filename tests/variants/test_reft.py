"""LoReFT: the paper's formula at the ends of a prompt, pyreft's intervention, and rows that stay orthonormal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, attach, perturb, tiny_llama
from oracles import reft as oracle
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.variants.reft import orthonormal

BLOCKS = ["model.layers.0", "model.layers.1"]


def edited(model: Any, **fields: Any) -> ll.Adapter:
    adapter = ll.attach(model, ll.ReFTConfig(r=3, **fields))
    perturb(adapter, 0.2)
    return adapter


def ends(ids: Tensor, first: int, last: int, begin: int = 0, end: int | None = None) -> list[int]:
    """The columns of a prompt that lies in these."""
    columns = list(range(begin, ids.shape[1] if end is None else end))
    return sorted({*columns[:first], *columns[len(columns) - last :]})


class PyreftIntervention(nn.Module):
    """pyreft's LoreftIntervention (stanfordnlp/pyreft, interventions.py), written anew."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__()

        class Rotate(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.empty(d, r, dtype=torch.float64))
                nn.init.orthogonal_(self.weight)

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.weight

        self.rotate_layer: Any = nn.utils.parametrizations.orthogonal(Rotate())
        self.learned_source = nn.Linear(d, r, dtype=torch.float64)

    def forward(self, base: Tensor) -> Tensor:
        rotated = self.rotate_layer(base)
        return base + torch.matmul(self.learned_source(base) - rotated, self.rotate_layer.weight.T)


def test_it_is_pyrefts_intervention_outputs_and_gradients() -> None:
    theirs = PyreftIntervention(16, 3)
    root = nn.Sequential(nn.Linear(16, 16).double())
    cfg = ll.ReFTConfig(r=3, first=1 << 20, kinds="linear", target_names="0", dtype=torch.float64)
    adapter = ll.attach(root, cfg)
    ours = dict(adapter.named_tensors())
    with torch.no_grad():
        ours["0.lora_R"].copy_(theirs.rotate_layer.weight.T)
        ours["0.lora_W"].copy_(theirs.learned_source.weight)
        ours["0.lora_b"].copy_(theirs.learned_source.bias)
    x, weights = torch.randn(2, 5, 16).double(), torch.randn(2, 5, 16).double()
    wanted = theirs(nn.functional.linear(x, root[0].weight, root[0].bias))
    torch.testing.assert_close(root(x), wanted)
    (root(x) * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(ours["0.lora_W"].grad, theirs.learned_source.weight.grad)
    torch.testing.assert_close(ours["0.lora_b"].grad, theirs.learned_source.bias.grad)
    # pyreft trains other numbers for R. The derivative along a turn of R, the same for both, is compared.
    turn = torch.randn(16, 16).double()
    turn = 1e-6 * (turn - turn.T)
    along = (ours["0.lora_R"].grad * (ours["0.lora_R"].detach() @ turn)).sum()
    moved = theirs.rotate_layer.weight.detach().T @ (
        torch.eye(16, dtype=torch.float64) + turn
    )  # (3, 16), orthonormal to 1e-12
    h = nn.functional.linear(x, root[0].weight, root[0].bias).detach()
    changed = h + (theirs.learned_source(h) - h @ moved.T) @ moved
    torch.testing.assert_close(((changed - wanted) * weights).sum(), along, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("first", "last"), [(1, 2), (0, 3), (4, 0), (7, 7)])
def test_it_edits_the_ends_of_each_prompt_and_nothing_else(first: int, last: int) -> None:
    model = tiny_llama().double()
    adapter = edited(model, first=first, last=last, dtype=torch.float64)
    tensors = {key.rpartition(".")[2]: t.detach() for key, t in adapter.named_tensors() if key.startswith(BLOCKS[0])}
    with torch.no_grad():
        after = block_output(model, IDS)
        with ll.disabled(model):
            before = block_output(model, IDS)
    columns = ends(IDS, first, last)
    others = [c for c in range(12) if c not in columns]
    eye, zero = torch.eye(64).double(), torch.zeros(64).double()
    wanted = oracle(eye, zero, None, tensors, before[:, columns].flatten(0, 1)).unflatten(0, (2, -1))
    torch.testing.assert_close(after[:, columns], wanted)
    assert torch.equal(after[:, others], before[:, others])
    assert not torch.isclose(after[:, columns], before[:, columns]).all(-1).any()


def block_output(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """What leaves the first block, after all hooks."""
    seen: list[Tensor] = []
    handle = model.model.layers[0].register_forward_hook(
        lambda module, args, y: seen.append(y if isinstance(y, Tensor) else y[0])
    )
    model(input_ids=ids, **more)
    handle.remove()
    return seen[0].detach()


def changed(model: Any, ids: Tensor = IDS, **more: Any) -> list[list[int]]:
    """The columns that are edited in each row."""
    with ll.disabled(model):
        before = block_output(model, ids, **more)
    is_changed = (block_output(model, ids, **more) != before).any(-1)
    return [row.nonzero()[:, 0].tolist() for row in is_changed]


def test_a_prompt_ends_before_the_first_label_that_counts() -> None:
    model, labels, mask = tiny_llama(), IDS.clone(), torch.ones_like(IDS)
    edited(model, first=1, last=2)
    labels[0, :5] = labels[1, :9] = -100
    labels[0, 8] = -100  # one in the answer says nothing
    assert changed(model, labels=labels) == [[0, 3, 4], [0, 7, 8]]
    mask[0, :2] = mask[1, 11:] = 0
    assert changed(model, labels=labels, attention_mask=mask) == [[2, 3, 4], [0, 7, 8]]
    for whole in (IDS, torch.full_like(IDS, -100)):
        assert changed(model, labels=whole) == [[0, 10, 11]] * 2
    assert changed(model, attention_mask=mask) == [[2, 10, 11], [0, 9, 10]]
    assert changed(model, IDS[:, :2]) == [[0, 1]] * 2
    assert changed(model, IDS[:, :1]) == [[0]] * 2


def test_in_generation_the_prompt_is_edited_and_the_answer_is_not() -> None:
    model = tiny_llama()
    edited(model, first=1, last=2)
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=95)
    for length in range(12, 18):
        labels = tokens[:, :length].clone()
        labels[:, :12] = -100
        best = model(input_ids=tokens[:, :length], labels=labels).logits[:, -1].argmax(-1)
        assert torch.equal(best, tokens[:, length])
    with ll.disabled(model):
        assert not torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=95), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_rows_stay_orthonormal_whatever_an_optimizer_does(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    adapter = ll.attach(model, ll.ReFTConfig(r=4, first=2, last=2))
    start = {key: t.detach().clone() for key, t in adapter.named_tensors()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.3, weight_decay=0.1)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS.where(torch.arange(12) > 7, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for key, tensor in adapter.named_tensors():
        if key.endswith("lora_R"):
            rows = orthonormal(tensor.detach())
            torch.testing.assert_close(rows @ rows.mT, torch.eye(4), rtol=0, atol=1e-5)
            assert (rows - orthonormal(start[key])).norm() > 0.1
            assert (tensor @ tensor.mT - torch.eye(4)).abs().max() > 0.1  # AdamW by itself keeps none


def test_dropout_is_of_the_stream_and_in_training_alone() -> None:
    model = tiny_llama()
    edited(model, first=2, last=0, dropout=0.5)
    plain = block_output(model, IDS)
    assert torch.equal(plain, block_output(model, IDS))
    model.train()
    with ll.disabled(model):
        base = block_output(model, IDS)
    dropped = block_output(model, IDS)
    zeros = (dropped[:, :2].abs() < 1e-6).float().mean()
    assert 0.3 < zeros < 0.7
    left = dropped[:, :2].abs() > 1e-6
    torch.testing.assert_close(dropped[:, :2][left], 2 * plain[:, :2][left], rtol=1e-4, atol=1e-4)
    assert torch.equal(dropped[:, 2:], base[:, 2:])


def test_configs_that_can_not_be() -> None:
    for fields, message in (
        ({"first": 0, "last": 0}, r"first=0\): wanted a token or more at one of the ends"),
        ({"last": -1}, r"last=-1\): wanted a number of tokens, 0 or more"),
        ({"dropout": 1.0}, r"dropout=1.0\): wanted a probability below 1"),
    ):
        with pytest.raises(ll.ConfigError, match=message):
            ll.ReFTConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ll.ConfigError, match=r"model.layers.0: ReFTConfig\(r=65\): 64 channels have no more"):
        attach(tiny_llama(), ll.ReFTConfig(r=65))


def test_on_blocks_it_is_saved_and_nothing_else_takes_it(tmp_path: Path) -> None:
    model, fresh = tiny_llama(), tiny_llama()
    fresh.save_pretrained(tmp_path / "base")
    adapter = edited(model)
    assert list(adapter.targets) == BLOCKS
    ll.save(model, tmp_path / "a.safetensors")
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(model(IDS).logits, fresh(IDS).logits)
    with pytest.raises(ll.TargetError, match=r"on the residual stream at a block's output, and no weight holds that"):
        ll.merge(model)
    with pytest.raises(ll.CheckpointError, match=r"on the residual stream at a block's output, and no weight holds"):
        ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "merged")
