"""A site outlives much that others do to its layer: modules come and go, weights are quantised, modes differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import OneLinear, perturb, tiny_llama
from torch import Tensor, nn

import lora_lite as ll


def cfg(name: str = "proj") -> ll.LoRAConfig:
    return ll.LoRAConfig(r=2, target_names=name)


def test_a_layer_that_comes_back_with_a_leftover_adapter_is_refused() -> None:
    """Its old hooks would act beside the new ones."""
    model = OneLinear()
    ll.attach(model, cfg())
    ll.attach(model, cfg(), "b")
    old, model.proj = model.proj, nn.Linear(16, 24)
    ll.detach(model, "default")
    model.proj = old
    with pytest.raises(ll.TargetError, match="proj: it has lora_A, lora_B already, put there by something else"):
        ll.attach(model, cfg())


@pytest.mark.parametrize("live", [torch.empty(0), torch.zeros(3, 24, 2)])
def test_values_go_only_into_tensors_of_their_shape(live: Tensor, tmp_path: Path) -> None:
    """As another library's partitioning leaves them; a larger one would take a value by broadcasting."""
    model = OneLinear()
    adapter = ll.attach(model, cfg())
    ll.save(model, tmp_path / "a.safetensors")
    values = {key: tensor.clone() + 1 for key, tensor in adapter.state_dict().items()}
    before = model.proj.lora_A.detach().clone()
    model.proj.lora_B.data = live
    with pytest.raises(ll.CheckpointError, match="1 wrong shapes"):
        adapter.load_state_dict(values)
    with pytest.raises(ll.CheckpointError, match="1 wrong shapes"):
        ll.restore(model, tmp_path / "a.safetensors")
    assert torch.equal(model.proj.lora_A, before)


def test_what_is_put_on_within_inference_mode_can_be_trained(tmp_path: Path) -> None:
    trained = tiny_llama()
    perturb(ll.attach(trained, cfg("q_proj")))
    ll.save(trained, tmp_path / "a.safetensors")
    ll.save_peft(trained, tmp_path / "peft")
    raw = {key: tensor for key, tensor in trained.state_dict().items() if "lora_" in key}
    torch.manual_seed(0)
    from safetensors.torch import save_file

    save_file(raw, tmp_path / "raw.safetensors")
    puts: list[Any] = [
        lambda model: ll.load(model, tmp_path / "a.safetensors"),
        lambda model: ll.load(model, tmp_path / "raw.safetensors", cfg=cfg("q_proj")),
        lambda model: ll.load_peft(model, tmp_path / "peft"),
    ]
    ids = torch.arange(6)[None]
    for put in puts:
        model = tiny_llama()
        with torch.inference_mode():
            put(model)
            ll.freeze_into(model)
        ll.attach(model, cfg("q_proj"), "next")
        model(input_ids=ids, labels=ids).loss.backward()
        assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


def test_a_stack_of_matrices_with_the_names_of_a_linear_layer_is_not_probed() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 8, 8
            self.weight = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("...i,eio->...o", x, self.weight)

    assert len(ll.plan(nn.ModuleDict({"a": Stacked(), "b": nn.Linear(8, 8)}), cfg("[ab]"))) == 2


class Opaque(Tensor):
    """A quantiser's tensor, of which only the layer's own product can be asked."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype)

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(("aten.detach", "aten.alias")):
            return Opaque(args[0].numbers)
        assert str(func) == "aten.t.default", func
        return func(args[0].numbers)


def test_rounds_are_kept_of_a_layer_that_was_quantised_after_attach() -> None:
    model = OneLinear(bias=False)
    for name in ("a", "b"):
        perturb(ll.attach(model, cfg(), name))
    model.proj.weight = nn.Parameter(Opaque(model.proj.weight.data), requires_grad=False)
    for name in ("a", "b"):
        ll.freeze_into(model, name)
    assert len(ll.history(model)) == 2


def test_a_4_bit_layer_that_was_quantised_after_attach_is_read(tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    model = nn.ModuleDict({"proj": Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)})
    perturb(ll.attach(model, ll.IA3Config(target_names="proj")))
    model.to("cpu")  # the move to a device is what quantises
    ll.save_peft(model, tmp_path / "peft", rank=64)
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


def test_a_view_that_is_kept_follows_the_config() -> None:
    model = tiny_llama()
    rows = torch.nn.functional.normalize(torch.randn(1, 64), dim=1)
    data = {"directions": rows[0]}
    adapter = ll.attach(model, ll.AbliterationConfig(target_names="down_proj"), calibration_data=data)
    view = next(iter(adapter.views().values()))
    assert view.cfg.strength == 1.0
    adapter.configure(strength=0.5)
    assert view.cfg.strength == 0.5
