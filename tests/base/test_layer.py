"""bitsandbytes for real: what a quantised weight is, before and after a forward, and the repacking hazard."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from models import config, loss_of, perturb, quantized, tiny_llama
from oracles import ORACLES
from test_laws import logits
from torch import nn

import lora_lite as ll
from lora_lite.base import fingerprint, storage
from lora_lite.base.bitsandbytes import Bnb4bit, Bnb8bit, raise_if_repacked
from lora_lite.base.kinds import size_of
from lora_lite.base.layer import layer_of, quantization_of

QUANTIZATIONS = ["nf4", "fp4", "int8"]
ERROR = {"nf4": (0.08, 0.10), "fp4": (0.10, 0.14), "int8": (0.002, 0.02)}
"""Relative errors: nf4 about 0.092, fp4 about 0.122 of a normal weight; int8 by its 127 steps a row."""


def up_proj(model: Any) -> Any:
    return model.model.layers[1].mlp.up_proj


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_dense_weight_is_right_before_and_after_the_first_forward(quantization: str, tiny: str) -> None:
    dense = up_proj(ll.load_base(tiny)).weight.float()
    layer = up_proj(quantized(tiny, quantization))
    before = layer_of(layer, "up_proj").dense_weight()
    with torch.no_grad():
        layer(torch.ones(1, 128, dtype=torch.bfloat16))
    after = layer_of(layer, "up_proj").dense_weight()
    assert torch.equal(before, after)
    assert before.dtype == torch.float32
    low, high = ERROR[quantization]
    assert low < (before - dense).norm() / dense.norm() < high


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("forward_first", [False, True])
def test_linear_is_the_product_with_dense_weight(quantization: str, forward_first: bool, tiny: str) -> None:
    layer = up_proj(ll.load_base(tiny, torch.float32, quantization, compute_dtype=torch.float32))
    if forward_first:
        layer(torch.ones(1, 128))
    weight = layer_of(layer, "up_proj").dense_weight()
    t = torch.randn(2, 3, 128, requires_grad=True)
    out = layer_of(layer, "up_proj").linear(t)
    torch.testing.assert_close(out, t @ weight.mT, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(out.sum(), t)
    torch.testing.assert_close(grad, weight.sum(0).expand_as(t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_on_a_dense_layer_takes_another_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ROWS", 5)  # 24 rows in blocks that don't divide them
    layer = nn.Linear(16, 24, dtype=dtype)
    t = torch.randn(3, 16)
    torch.testing.assert_close(layer_of(layer, "").linear(t), t @ layer.weight.float().mT)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_dora_on_a_quantised_layer_is_the_formula_on_its_dequantised_weight(quantization: str, tiny: str) -> None:
    model = ll.load_base(tiny, torch.float32, quantization, compute_dtype=torch.float32)
    layer = up_proj(model)
    weight = layer_of(layer, "up_proj").dense_weight().double()
    cfg = config("dora", target_names=r"1\.mlp\.up_proj")
    adapter = ll.attach(model, cfg)
    perturb(adapter)
    tensors = {key.rpartition(".")[2]: value.double() for key, value in adapter.state_dict().items()}
    x = torch.randn(5, 128)
    wanted = ORACLES["dora"](weight, torch.zeros(256).double(), cfg, tensors, x.double())
    layer.train()  # bitsandbytes' 8-bit eval kernel rounds x to int8 on top
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_capability_table(quantization: str, tiny: str) -> None:
    layer = up_proj(quantized(tiny, quantization))
    bits = "8" if quantization == "int8" else "4"
    assert layer_of(layer).describe() == f"{quantization}, {bits}-bit bitsandbytes"
    assert isinstance(layer_of(layer).storage, Bnb8bit if bits == "8" else Bnb4bit)


class Codes(nn.Linear):
    """A layer of another library: what it multiplies by is made of its weight's codes, here ones of any code."""

    def __init__(self, codes: torch.Tensor) -> None:
        super().__init__(8, 8, bias=False)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.ones(8, 8)


def test_of_an_unknown_kind_the_numbers_are_measured_and_never_guessed() -> None:
    layer = Codes(torch.ones(8, 8, dtype=torch.int8))
    model = nn.ModuleDict({"proj": layer})
    assert layer_of(layer).describe() == "unknown (Parameter, int8)"
    assert torch.equal(layer_of(layer, "proj").dense_weight(), torch.ones(8, 8))
    with pytest.raises(ll.QuantizedWeightError, match=r"'pissa' needs a dense weight, and this one is unknown \("):
        ll.attach(model, config("pissa", target_names="proj"))
    for variant in ("dora", "lora"):
        ll.attach(model, config(variant, target_names="proj"), variant)
    stored = nn.Linear(8, 8)
    stored.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ll.QuantizedWeightError, match="proj: its own forward can't be run on rows"):
        layer_of(stored, "proj").dense_weight()


def test_a_layer_of_an_unknown_kind_that_cannot_run_is_not_trained() -> None:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ll.QuantizedWeightError,
        match=r"proj: adapters can't be trained through .* \(unknown \(Parameter, int8\)\): its own forward fails",
    ):
        ll.attach(nn.ModuleDict({"proj": layer}), config("lora", target_names="proj"))


def test_a_layer_that_is_not_quantised_yet_is_unknown() -> None:
    import bitsandbytes as bnb

    for layer in (
        bnb.nn.Linear4bit(64, 64),
        bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True),
        bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    ):
        assert not layer_of(layer).storage.is_known
        assert layer_of(layer).describe() == f"unknown ({type(layer.weight).__name__}, float32)"
        model = nn.ModuleDict({"proj": layer})
        with pytest.raises(ll.QuantizedWeightError, match=r"proj: 'dora' reads the weight, and this one is unknown \("):
            ll.attach(model, config("dora", target_names="proj"))
        ll.attach(model, config("lora", target_names="proj"))
    layer.to("cpu")
    assert isinstance(layer_of(layer).storage, Bnb8bit)


class Opaque(torch.Tensor):
    """A tensor subclass of another library: it has a dtype and a shape, and all else fails."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.reshape, torch.Tensor.flatten, torch.Tensor.__getitem__, torch.Tensor.float):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (torch.empty(8, 8, dtype=torch.uint4), "unknown (Parameter, uint4)"),
        (torch.ones(8, 8).as_subclass(Opaque), "unknown (Opaque, float32)"),
    ],
)
def test_of_an_unknown_kind_the_record_says_just_that(
    weight: torch.Tensor, kind: str, tmp_path: Path, log: list[str]
) -> None:
    """Its elements may be no numbers, so those of the fingerprint are measured too."""

    def model(dense: bool = False) -> Any:
        return nn.ModuleDict({"proj": nn.Linear(8, 8) if dense else Codes(weight)})

    first = model()
    adapter = ll.attach(first, config("lora", target_names="proj"))
    assert adapter.base["fingerprint"] == {"proj": [kind.rpartition(" ")[2].rstrip(")"), 1.0, 1.0, 1.0, 1.0]}
    assert adapter.base["quantization"] == {
        "method": "unknown",
        "quant_type": kind,
        "blocksize": None,
        "double_quant": False,
        "compute_dtype": None,
        "weight_dtype": "float32",
        "modules": ["proj"],
    }
    assert f"on ModuleDict ({kind})" in repr(adapter)
    ll.save(first, tmp_path / "a.safetensors")
    ll.load(model(), tmp_path / "a.safetensors")
    assert not any(line.startswith("WARNING") for line in log)
    ll.load(model(dense=True), tmp_path / "a.safetensors")
    assert sum("trained on another base" in line for line in log) == 1


def test_weights_without_samples_are_the_same_by_dtype_alone() -> None:
    assert fingerprint.same_weight(["uint4"], ["uint4"])
    assert not fingerprint.same_weight(["float32"], ["bfloat16"])
    assert not fingerprint.same_weight(["float32"], ["float32", 1.0])
    assert not fingerprint.same_weight(["float32"], ["bfloat16", 1.0])


def test_a_layer_without_a_shape_yet_is_no_quantisation() -> None:
    assert quantization_of(nn.ModuleDict({"proj": nn.LazyLinear(8)})) is None


def hazardous(folder: str) -> Any:
    """A 4-bit model as transformers alone loads it, on a CPU with AVX512-BF16 (or as if on one)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.bfloat16, device_map="cpu"
    ).eval()
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = True
    return model


def test_attach_forbids_repacking_and_detach_allows_it_again(tiny: str) -> None:
    model = hazardous(tiny)
    weight = layer_of(up_proj(model), "up_proj").dense_weight()
    ll.attach(model, config("lora", target_names="q_proj"))
    logits(model)
    logits(model)
    for layer in (up_proj(model), model.model.layers[0].self_attn.q_proj):  # not only the targets
        assert not layer.support_avx512bf16_for_cpu
        raise_if_repacked(layer, "")
    assert torch.equal(layer_of(up_proj(model), "up_proj").dense_weight(), weight)
    ll.detach(model)
    assert up_proj(model).support_avx512bf16_for_cpu


@pytest.mark.parametrize("twin", [lambda m: m, copy.deepcopy])
def test_detach_allows_repacking_again_inside_wrappers_and_in_copies(twin: Any, tiny: str) -> None:
    model = hazardous(tiny)
    ll.attach(model, config("lora", target_names="q_proj"))
    model = twin(model)
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    model.model.layers[0] = torch.compile(model.model.layers[0])
    model.model.layers[1].mlp.up_proj = nn.Linear(128, 256, bias=False)
    ll.detach(model)
    assert len(layers) == 14
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [True] * 14


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no AVX512-BF16, so nothing repacks")
def test_a_layer_that_was_repacked_before_attach_is_refused_with_the_cure(tiny: str) -> None:
    model = hazardous(tiny)
    logits(model)
    message = (
        r"(?s)q_proj: an eval forward has repacked this 4-bit weight.*load the model again, with lora_lite.load_base"
    )
    for target in ("q_proj", "down_proj"):
        with pytest.raises(ll.QuantizedWeightError, match=message):
            ll.attach(model, config("lora", target_names=target))
    assert ll.adapters(model) == {}
    with pytest.raises(ll.QuantizedWeightError, match=message):
        layer_of(model.model.layers[0].self_attn.q_proj, "model.layers.0.self_attn.q_proj").dense_weight()


def test_load_base_forbids_repacking(tiny: str) -> None:
    model = quantized(tiny, "nf4")
    logits(model)
    logits(model)
    adapter = ll.attach(model, config("lora"))
    model.train()
    loss_of(model).backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for k, t in adapter.named_tensors() if k.endswith("B"))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_gradients_through_a_quantised_base_are_those_of_its_dequantised_twin(quantization: str, tiny: str) -> None:
    model = ll.load_base(tiny, torch.float32, quantization, compute_dtype=torch.float32)
    twin = ll.load_base(tiny, torch.float32)
    with torch.no_grad():
        for path, layer in model.named_modules():
            if size_of(layer) and not layer_of(layer).storage.is_dense:
                twin.get_submodule(path).weight.copy_(layer_of(layer, path).dense_weight())
    grads = []
    for each in (model, twin):
        torch.manual_seed(0)
        adapter = ll.attach(each, config("lora"))
        perturb(adapter)
        each.train()
        loss_of(each).backward()
        grads.append(torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_deepcopy_and_pickle_of_a_quantised_model(quantization: str, tiny: str) -> None:
    model = quantized(tiny, quantization)
    perturb(ll.attach(model, config("lora")))
    wanted = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), wanted)
        ll.detach(twin)


def test_a_saved_quantised_model_reopens_with_its_adapter(tiny: str, tmp_path: Path) -> None:
    """The base's own save_pretrained, then ours: both halves of what a user keeps."""
    for quantization in ("nf4", "int8"):
        model = quantized(tiny, quantization)
        folder = tmp_path / quantization
        model.save_pretrained(folder)
        perturb(ll.attach(model, config("dora")))
        ll.save(model, folder / "adapter.safetensors")
        again = ll.load_base(str(folder), torch.bfloat16)
        ll.load(again, folder / "adapter.safetensors")
        assert torch.equal(logits(again), logits(model))


def test_samples_are_the_stored_elements() -> None:
    layer = nn.Linear(3, 2)
    flat = layer.weight.detach().flatten()
    assert layer_of(layer).storage.samples(layer_of(layer)) == [float(flat[i]) for i in (0, 1, 3, 5)]


def test_tiny_llama_is_dense() -> None:
    assert quantization_of(tiny_llama()) is None


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_with_the_same_codes_and_other_scales_is_another_base(
    quantization: str, tiny: str, tmp_path: Path
) -> None:
    model = quantized(tiny, quantization)
    ll.attach(model, config("dora"))
    ll.save(model, tmp_path / "a.safetensors")
    twice = ll.load_base(tiny)
    with torch.no_grad():
        for target in ll.plan(twice, config("lora")):
            twice.get_submodule(target.path).weight.mul_(2)
    twice.save_pretrained(tmp_path / "twice")
    with pytest.raises(ll.CheckpointError, match="trained on another base"):
        ll.load(quantized(str(tmp_path / "twice"), quantization), tmp_path / "a.safetensors")
    if quantization == "nf4":
        with pytest.raises(ll.CheckpointError, match="trained on another base"):
            ll.load(quantized(tiny, "nf4", double_quant=False), tmp_path / "a.safetensors")


def test_a_weight_in_another_order_that_cannot_run_is_not_read() -> None:
    layer = nn.Linear(16, 24)
    layer.weight = nn.Parameter(layer.weight.detach().mT.contiguous())
    assert not layer_of(layer).storage.is_dense
    with pytest.raises(ll.QuantizedWeightError, match="its own forward can't be run on rows"):
        layer_of(layer).dense_weight()
