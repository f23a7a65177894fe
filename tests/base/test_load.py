"""load_base: quantisation, the dtype cascade, remote code, and what it says."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, perturb, tiny_folder, tiny_llama

import lora_lite as ll
from lora_lite.base import load as base

Timed = Callable[..., None]


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    """Sets how long a product takes, in ms by the dtype's name; before that, as on a CPU with native 16 bits."""

    def set_to(**milliseconds: float) -> None:
        monkeypatch.setattr(base, "product_milliseconds", lambda dtype: milliseconds[base._name(dtype)])

    set_to(bfloat16=0.25, float16=0.25, float32=0.75)
    return set_to


def test_nf4_with_double_quantisation_is_the_default_and_compute_dtype_is_explicit(tiny: str) -> None:
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in ll.load_base(tiny, quantization="nf4").modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    assert {(m.weight.quant_state.quant_type, m.weight.quant_state.nested, m.compute_dtype) for m in layers} == {
        ("nf4", True, torch.bfloat16)
    }
    plain = ll.load_base(tiny, quantization="fp4", compute_dtype=torch.float32, double_quant=False)
    layer = plain.model.layers[0].mlp.up_proj
    assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested, layer.compute_dtype) == (
        "fp4",
        False,
        torch.float32,
    )
    assert plain.lm_head.weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def held(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders that are quantised already; the 4-bit ones compute in float32."""
    folders = {}
    for kind, quantization, double_quant in (("nf4", "nf4", True), ("plain nf4", "nf4", False), ("int8", "int8", True)):
        folder = str(tmp_path_factory.mktemp("held"))
        how = {"quantization": quantization, "compute_dtype": torch.float32, "double_quant": double_quant}
        model = ll.load_base(tiny, torch.bfloat16, **how)
        model.save_pretrained(folder)
        folders[kind] = folder
    return folders


@pytest.mark.parametrize("asked", [{}, {"quantization": "nf4"}, {"compute_dtype": torch.float16}])
def test_the_compute_dtype_is_ours_on_a_folder_that_is_quantised_already(
    asked: dict[str, Any], held: dict[str, str], log: list[str]
) -> None:
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in ll.load_base(held["nf4"], **asked).modules() if isinstance(m, Linear4bit)]
    wanted = asked.get("compute_dtype", torch.bfloat16)
    assert {(m.compute_dtype, m.compute_type_is_set) for m in layers} == {(wanted, True)}
    assert len(log) == 1
    assert f"4 bit (nf4, computing in {str(wanted).removeprefix('torch.')})" in log[0]


def test_a_quantization_config_of_the_callers_own_keeps_its_compute_dtype(tiny: str) -> None:
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = ll.load_base(tiny, quantization_config=how, device_map="cpu")
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "asked", "found", "wanted"),
    [
        ("nf4", {"quantization": "fp4"}, "nf4 with double quantisation", "fp4 with double quantisation"),
        ("nf4", {"quantization": "int8"}, "nf4 with double quantisation", "int8"),
        (
            "nf4",
            {"quantization": "nf4", "double_quant": False},
            "nf4 with double quantisation",
            "nf4 without double quantisation",
        ),
        ("plain nf4", {"quantization": "nf4"}, "nf4 without double quantisation", "nf4 with double quantisation"),
        ("int8", {"quantization": "nf4"}, "int8", "nf4 with double quantisation"),
    ],
)
def test_a_folder_that_is_quantised_in_another_way_is_refused(
    kind: str, asked: dict[str, Any], found: str, wanted: str, held: dict[str, str]
) -> None:
    message = rf"{held[kind]} holds {found}, and {wanted} was asked for\n  use quantization=None for what it holds"
    with pytest.raises(ll.ConfigError, match=message):
        ll.load_base(held[kind], **asked)


def test_a_folder_that_is_quantised_as_asked_opens(held: dict[str, str]) -> None:
    ll.load_base(held["int8"], quantization="int8", double_quant=False)  # which has no scales to quantise
    ll.load_base(held["int8"])
    ll.load_base(held["plain nf4"], quantization="nf4", double_quant=False)


def test_an_unknown_quantization_is_refused(tiny: str) -> None:
    with pytest.raises(ll.ConfigError, match=r"quantization='int4': wanted None or one of \('nf4', 'fp4', 'int8'\)"):
        ll.load_base(tiny, quantization="int4")


@pytest.mark.parametrize(
    ("quantization", "message"), [("nf4", r"4 bit \(nf4, computing in bfloat16\)"), ("int8", "8 bit")]
)
def test_one_message_says_how_a_quantised_model_was_loaded_and_where(
    quantization: str, message: str, tiny: str, log: list[str]
) -> None:
    ll.load_base(tiny, quantization=quantization)
    assert len(log) == 1
    assert re.search(rf"INFO loaded {tiny} in {message}.*, on cpu of cpu \(.+, \d+ threads\)", log[0])


def test_what_a_folder_lacks_is_a_warning(tiny: str, log: list[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    ll.load_base(tiny)
    assert len(log) == 1
    ll.load_base(tiny, auto_class=AutoModelForSequenceClassification, pad_token_id=0)
    match = r"WARNING .* lacks 1 tensors of this LlamaForSequenceClassification, which start at random: score\.weight\n"
    assert re.match(match + r".*attach\(model, \[cfg, ll\.FullConfig\(target_names='score'\)\]\)$", log[-1])


def test_the_message_names_an_unknown_kind(tiny: str, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained

    def in_float8(*args: Any, **kwargs: Any) -> Any:
        model, info = load(*args, **kwargs)
        layer = model.model.layers[0].mlp.up_proj
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", in_float8)
    monkeypatch.setattr(base, "_one_token", lambda model: None)
    ll.load_base(tiny)
    assert f"loaded {tiny} in unknown (Parameter, float8_e4m3fn) weights, all else in bfloat16, on cpu" in log[0]


def test_a_folder_with_an_adapter_beside_the_base_is_spoken_of(tmp_path: Path, log: list[str]) -> None:
    """As Trainer and accelerator.save_state write it without our part: from_pretrained drops the adapter."""
    model = tiny_llama()
    adapter = ll.attach(model, ll.LoRAConfig(r=2, target_names="q_proj"))
    perturb(adapter)
    ll.save(model, tmp_path / "alone.safetensors")
    model.save_pretrained(tmp_path / "both")
    again = ll.load_base(str(tmp_path / "both"), torch.float32)
    warned = [line for line in log if line.startswith("WARNING")]
    assert len(warned) == 1
    assert "holds 4 tensors of an adapter, which this model is without, such as model.layers.0.self_attn" in warned[0]
    assert "lora_lite.load(model, '" in warned[0]
    ll.load(again, tmp_path / "both", cfg=ll.LoRAConfig(r=2))
    assert all(
        torch.equal(t, adapter.state_dict()[key]) for key, t in ll.adapters(again)["default"].state_dict().items()
    )
    with pytest.raises(ll.CheckpointError, match=r"both holds 4 tensors of an adapter beside the base.*\n  give the"):
        ll.merge_checkpoint(tmp_path / "both", tmp_path / "alone.safetensors", tmp_path / "merged")


def test_the_checkpoints_dtype_is_tried_first(tiny: str) -> None:
    assert ll.load_base(tiny).dtype == torch.bfloat16
    assert ll.load_base(tiny, torch.float16).dtype == torch.float16
    assert not ll.load_base(tiny).training


# ---- the faster dtype of a CPU --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("milliseconds", "dtype"),
    [(0.2, torch.bfloat16), (0.8, torch.bfloat16), (1.4, torch.bfloat16), (1.6, torch.float32), (24, torch.float32)],
)
def test_auto_takes_the_faster_dtype_on_a_cpu_and_says_why(
    milliseconds: float, dtype: torch.dtype, tiny: str, timed: Timed, log: list[str]
) -> None:
    timed(bfloat16=milliseconds, float32=1.0)
    model = ll.load_base(tiny)
    assert {p.dtype for p in model.parameters()} == {dtype}
    times = f"take one thread {milliseconds:.2g} ms in bfloat16, 1 ms in float32"
    assert len(log) == 1
    assert re.search(
        rf"loaded {tiny} in {base._name(dtype)}, on cpu .*; 64 tokens through a layer of 576 x 1536 {times}$", log[0]
    )


def test_the_values_of_the_weights_are_the_same_in_the_faster_dtype(tiny: str, timed: Timed) -> None:
    plain = ll.load_base(tiny).state_dict()
    timed(bfloat16=24.0, float32=1.0)
    for name, tensor in ll.load_base(tiny).state_dict().items():
        assert torch.equal(tensor, plain[name].float())


@pytest.mark.parametrize(("milliseconds", "dtype"), [(0.2, torch.bfloat16), (24.0, torch.float32)])
def test_a_4_bit_base_computes_in_the_faster_dtype(
    milliseconds: float, dtype: torch.dtype, tiny: str, held: dict[str, str], timed: Timed, log: list[str]
) -> None:
    from bitsandbytes.nn import Linear4bit

    timed(bfloat16=milliseconds, float32=1.0)
    name = base._name(dtype)
    for load in (lambda: ll.load_base(tiny, quantization="nf4"), lambda: ll.load_base(held["nf4"])):
        assert {m.compute_dtype for m in load().modules() if isinstance(m, Linear4bit)} == {dtype}
        assert f"computing in {name})" in log[-1]
        assert log[-1].endswith(f"take one thread {milliseconds:.2g} ms in bfloat16, 1 ms in float32")
    for quantization in ("nf4", "int8"):
        assert ll.load_base(tiny, quantization=quantization).lm_head.weight.dtype == dtype


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("asked", ["auto", torch.float32])
def test_a_folder_that_is_quantised_already_is_in_that_dtype_outside_its_packed_layers(
    kind: str, asked: Any, held: dict[str, str], timed: Timed, log: list[str]
) -> None:
    stored = ll.load_base(held[kind])
    assert stored.lm_head.weight.dtype == torch.bfloat16
    timed(bfloat16=24.0, float32=1.0)
    model = ll.load_base(held[kind], asked)
    assert "all else in float32" in log[-1]
    assert model.lm_head.weight.dtype == model.dtype == torch.float32
    assert {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} == {torch.float32}
    packed = {"nf4": torch.uint8, "int8": torch.int8}[kind]
    assert model.model.layers[0].mlp.up_proj.weight.dtype == packed
    assert torch.equal(model.model.embed_tokens.weight, stored.model.embed_tokens.weight.float())
    adapter = ll.attach(model, ll.LoRAConfig())
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad.any() for p in adapter.parameters() if p.grad is not None)


@pytest.mark.parametrize(("quantization", "milliseconds"), [(None, 0.2), (None, 24.0), ("nf4", 24.0)])
def test_a_checkpoint_that_does_not_tell_its_dtype_is_timed_after_the_load(
    quantization: str | None, milliseconds: float, tmp_path: Path, timed: Timed, log: list[str]
) -> None:
    tiny_folder(tmp_path, torch.float16)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    timed(float16=milliseconds, bfloat16=milliseconds, float32=1.0)
    model = ll.load_base(str(tmp_path), quantization=quantization)
    wanted = torch.float32 if milliseconds > 1 else torch.float16
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == wanted
    assert len(log) == 1
    assert f"in {base._name(wanted)}, on cpu" in log[0]
    assert log[0].endswith(f"{milliseconds:.2g} ms in float16, 1 ms in float32")


def test_only_what_finds_the_config_is_read_with_it(tmp_path: Path) -> None:
    """What else from_pretrained gets, such as a state_dict, is neither copied nor asked to be copyable."""

    class Once(dict[str, torch.Tensor]):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("copied")

    state = Once(tiny_llama(seed=1).state_dict())
    tiny_llama().save_pretrained(tmp_path / "inner")
    options: dict[str, Any] = {"state_dict": state, "subfolder": "inner"}
    assert base._stored_config(str(tmp_path), options)["dtype"] == "float32"


@pytest.mark.parametrize("asked", [torch.bfloat16, "bfloat16", torch.float16, torch.float32])
def test_an_explicit_dtype_is_not_timed_and_4_bit_layers_compute_in_it(
    asked: Any, tiny: str, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "product_milliseconds", lambda dtype: pytest.fail("timed"))
    dtype = asked if isinstance(asked, torch.dtype) else getattr(torch, asked)
    assert ll.load_base(tiny, asked).dtype == dtype
    model = ll.load_base(tiny, asked, "nf4")
    assert (model.dtype, model.model.layers[0].mlp.up_proj.compute_dtype) == (dtype, dtype)
    assert not any("take" in line for line in log)


def test_a_float32_checkpoint_stays_as_it_is(tmp_path: Path, timed: Timed, log: list[str]) -> None:
    tiny_llama().save_pretrained(tmp_path)
    timed(bfloat16=0.1, float32=1.0)
    assert ll.load_base(str(tmp_path)).dtype == torch.float32
    assert "take" not in log[0]


def test_a_float16_checkpoint_is_timed_in_float16(tmp_path: Path, timed: Timed, log: list[str]) -> None:
    tiny_llama(torch.float16).save_pretrained(tmp_path)
    for milliseconds, dtype in ((0.5, torch.float16), (30.0, torch.float32)):
        timed(float16=milliseconds, float32=1.0)
        assert ll.load_base(str(tmp_path)).dtype == dtype
        assert log[-1].endswith(f"take one thread {milliseconds:.2g} ms in float16, 1 ms in float32")


def test_the_config_of_the_caller_says_the_checkpoints_dtype(tiny: str, timed: Timed) -> None:
    from transformers import AutoConfig

    timed(bfloat16=24.0, float32=1.0)
    assert ll.load_base(tiny, config=AutoConfig.from_pretrained(tiny)).dtype == torch.float32


def test_another_device_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert base._on_cpu(None)
    assert base._on_cpu("auto")
    with torch.device("meta"):
        assert not base._on_cpu(None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert not base._on_cpu(None)
    assert base._on_cpu("cpu")
    assert base._on_cpu({"": torch.device("cpu")})
    assert not base._on_cpu("auto")
    assert not base._on_cpu({"": 0})
    assert not base._on_cpu({"model": "cpu", "lm_head": "cuda:0"})


def test_a_build_for_cuda_runs_on_a_machine_without_a_gpu(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch of the package index, on Linux without a driver: the accelerator that it was built for isn't there."""
    built_for = torch.device("cuda")
    device = lambda check_available=False: None if check_available else built_for  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", device)
    assert base._on_cpu(None)
    assert len(base.devices()) == 1
    assert ll.load_base(tiny, quantization="nf4").device.type == "cpu"


def test_a_faster_dtype_that_does_not_work_gives_way_to_the_checkpoints(
    tiny: str, timed: Timed, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_float32(model: Any) -> None:
        if model.dtype == torch.float32:
            raise RuntimeError("no float32 here")

    monkeypatch.setattr(base, "_one_token", no_float32)
    timed(bfloat16=24.0, float32=1.0)
    assert ll.load_base(tiny).dtype == torch.bfloat16
    assert log[0].endswith("does not work in float32: RuntimeError: no float32 here")
    assert len(log) == 2


MEASURE = """
import torch
from lora_lite.base.load import faster_on_cpu, product_milliseconds
torch.manual_seed(0)
torch.set_num_threads(3)
state = torch.get_rng_state()
with torch.autocast("cpu"), torch.device("meta"):
    times = [product_milliseconds(dtype) for dtype in (torch.bfloat16, torch.float32)]
assert torch.get_num_threads() == 3
assert torch.equal(torch.get_rng_state(), state)
assert times == [product_milliseconds(dtype) for dtype in (torch.bfloat16, torch.float32)]
print(faster_on_cpu(torch.bfloat16), *times)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these variables are those of x86 kernels")
def test_a_cpu_without_native_bfloat16_is_measured_as_one() -> None:
    """Restricted to AVX2, every x86 machine emulates bfloat16: 5 to 60 times as slow."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    dtype, slow, fast = done.stdout.split()
    assert float(slow) > float(fast) > 0
    # Another process may have slowed one of the two times down.
    assert dtype == ("torch.float32" if float(slow) > base.WORTH * float(fast) else "torch.bfloat16")


# ---- the cascade, remote code, other classes ------------------------------------------------------


@pytest.fixture
def overflowing(tmp_path: Path) -> str:
    """Finite in bfloat16 and float32, infinite in float16: one weight is above 65504."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_cascade_falls_back_and_says_why(overflowing: str, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def no_float32(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.dtype == torch.float32:
            raise RuntimeError("no float32 kernel on this device\nwith a long trace")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", no_float32)
    model = ll.load_base(overflowing)
    assert model.dtype == torch.bfloat16
    assert log[0].endswith("does not work in auto: RuntimeError: no float32 kernel on this device")
    assert log[1].endswith("does not work in float16: RuntimeError: the logits of one token are not finite")
    assert log[2].startswith(f"INFO loaded {overflowing} in bfloat16")


def test_an_explicit_dtype_has_no_fallback(overflowing: str) -> None:
    message = r"works in none of 1 dtypes on cpu .*\n  float16: RuntimeError: the logits of one token are not finite"
    with pytest.raises(ll.BaseModelError, match=message):
        ll.load_base(overflowing, torch.float16)


def test_a_model_that_is_not_there_is_not_tried_four_times(tmp_path: Path, log: list[str]) -> None:
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        ll.load_base(str(tmp_path))
    assert log == []


CUSTOM = """
from transformers import LlamaForCausalLM
from .configuration_custom import CustomConfig

class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
"""


@pytest.fixture
def custom(tmp_path: Path) -> str:
    """A model that brings its own code."""
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "modeling_custom.py").write_text(CUSTOM)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "customllama"
    config["auto_map"] = {
        "AutoConfig": "configuration_custom.CustomConfig",
        "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM",
    }
    (tmp_path / "configuration_custom.py").write_text(
        "from transformers import LlamaConfig\n\nclass CustomConfig(LlamaConfig):\n    model_type = 'customllama'\n"
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_remote_code_runs_on_the_callers_word_only_and_is_remembered_once_it_worked(
    custom: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    monkeypatch.setattr(base, "_trusted", set())
    with pytest.raises(ValueError, match="trust_remote_code"):
        ll.load_base(custom, trust_remote_code=False)
    with pytest.raises(ValueError, match="trust_remote_code"):
        ll.load_base(custom)
    model = ll.load_base(custom, trust_remote_code=True)
    assert type(model).__name__ == "CustomForCausalLM"
    assert base._trusted == {custom}
    assert type(ll.load_base(custom)).__name__ == "CustomForCausalLM"
    with pytest.raises(ValueError, match="trust_remote_code"):
        ll.load_base(custom, trust_remote_code=False)
    ll.load_base(tiny, trust_remote_code=True)  # has no code of its own, so there is nothing to remember
    assert base._trusted == {custom}


def test_a_load_that_failed_is_not_remembered(custom: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_trusted", set())

    def broken(model: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(base, "_one_token", broken)
    with pytest.raises(ll.BaseModelError, match="works in none of 4 dtypes"):
        ll.load_base(custom, trust_remote_code=True)
    assert base._trusted == set()


def test_other_auto_classes(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

    config = T5Config(num_layers=1, d_model=32, d_kv=8, num_heads=4, d_ff=64, vocab_size=64)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = ll.load_base(str(tmp_path), auto_class=AutoModelForSeq2SeqLM)
    assert model(input_ids=IDS, decoder_input_ids=IDS).logits.isfinite().all()
