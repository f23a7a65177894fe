"""llama.cpp with our GGUF files: it computes what the adapter computes here, to the noise of the base."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import config, perturb, tiny_llama
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import lora_lite as ll
from lora_lite.io.gguf import read_gguf

pytest.importorskip("llama_cpp", reason="llama-cpp-python is compiled, in about half an hour")

import llama_cpp_models
from llama_cpp_models import TYPES, tiny
from llama_cpp_runs import Base, kl, write_base
from test_gguf import gpt_neox, phi3

from lora_lite.io.formats.gguf_names import ARCHITECTURES, named_layers

IDS = list(range(3, 27))
NOISE = 2e-5
"""Of logits around 4; GELU is a table in 16 bits in llama.cpp, which makes it 5e-3."""


def sharp(model: Any) -> Any:
    """Logits of some size, and norms and biases that aren't all 1 and 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=96, hidden_size=64, head_dim=16, **sizes)).eval()


MODELS: dict[str, tuple[Callable[[], Any], str, float]] = {
    "llama": (lambda: tiny_llama(num_hidden_layers=3), "llama", NOISE),
    "qwen3": (qwen3, "qwen3", NOISE),
    "phi3": (phi3, "phi3", NOISE),
    "gpt_neox": (gpt_neox, "gptneox", 5e-3),
}


@pytest.fixture(params=MODELS)
def both(request: Any, tmp_path: Path) -> Iterator[tuple[Any, Base, float]]:
    """A model here and in llama.cpp, and how far their logits may be apart."""
    build, architecture, noise = MODELS[request.param]
    model = sharp(build())
    base = Base(write_base(model, tmp_path / "base.gguf", architecture))
    torch.testing.assert_close(base.logits(IDS), logits(model), rtol=0, atol=noise)
    yield model, base, noise
    base.close()


@torch.no_grad()
def logits(model: Any, ids: Any = IDS) -> Tensor:
    answer: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return answer


def test_a_lora(both: tuple[Any, Base, float], tmp_path: Path) -> None:
    """On all linear layers and the head, of several ranks and alphas, at three scales."""
    model, base, noise = both
    before = logits(model)
    layers = r"_proj$|query_key_value$|dense|lm_head$|embed_out$"
    perturb(ll.attach(model, config("lora", target_names=layers, per_layer={r"\.0\.": {"r": 3, "alpha": 5.0}})), 0.1)
    ll.save_as(model, tmp_path / "a.gguf", "gguf")
    for scale in (1.0, 0.5, -1.0):
        with base.lora(tmp_path / "a.gguf", scale), ll.scaled(model, scale):
            wanted = logits(model)
            torch.testing.assert_close(base.logits(IDS), wanted, rtol=0, atol=noise)
            assert (wanted - before).abs().max() > 0.3
    torch.testing.assert_close(base.logits(IDS), before, rtol=0, atol=noise)


def test_a_lora_of_an_embedding(both: tuple[Any, Base, float], tmp_path: Path) -> None:
    model, base, noise = both
    before = logits(model)
    perturb(ll.attach(model, config("lora", kinds="embedding", target_names=r"embed_(tokens|in)$")), 0.3)
    ll.save_as(model, tmp_path / "a.gguf", "gguf")
    with base.lora(tmp_path / "a.gguf"):
        torch.testing.assert_close(base.logits(IDS), logits(model), rtol=0, atol=noise)
        assert (logits(model) - before).abs().max() > 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(both: tuple[Any, Base, float], dtype: torch.dtype, tmp_path: Path) -> None:
    """llama.cpp reads both; it rounds the layer's input to them, as a product in 16 bits does."""
    model, base, _ = both
    before = logits(model)
    perturb(ll.attach(model, config("lora", dtype=dtype, target_names=r"_proj$|query_key_value$")), 0.1)
    ll.save_as(model, tmp_path / "a.gguf", "gguf")
    with base.lora(tmp_path / "a.gguf"):
        rest, effect = (base.logits(IDS) - logits(model)).abs().max(), (logits(model) - before).abs().max()
    assert rest < 0.02 * effect


def test_a_control_vector(both: tuple[Any, Base, float], tmp_path: Path) -> None:
    model, base, noise = both
    before, depth = logits(model), model.config.num_hidden_layers
    cfg = ll.SteerConfig(kinds="block", layers=list(range(1, depth)))
    ll.attach(model, cfg, calibration_data={"directions": torch.randn(depth, 1, 64)}).scale = 0.7
    ll.save_as(model, tmp_path / "a.gguf", "gguf-control-vector")
    with base.control_vector(tmp_path / "a.gguf"):
        torch.testing.assert_close(base.logits(IDS), logits(model), rtol=0, atol=noise)
        assert (logits(model) - before).abs().max() > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpps_own_converter(name: str, tmp_path: Path) -> None:
    """convert_lora_to_gguf.py makes of a PEFT folder what we write: the same keys, types and numbers."""
    source = os.environ.get("LLAMA_CPP_SOURCE")
    if source is None:
        pytest.skip("LLAMA_CPP_SOURCE names no checkout of llama.cpp")
    model = sharp(MODELS[name][0]())
    model.save_pretrained(tmp_path / "base")
    perturb(ll.attach(model, config("lora", target_names=r"_proj$|query_key_value$|dense|embed_out$")), 0.2)
    ll.save_peft(model, tmp_path / "peft")
    ll.save_as(model, tmp_path / "ours.gguf", "gguf")
    arguments = [tmp_path / "peft", "--base", tmp_path / "base", "--outfile", tmp_path / "theirs.gguf"]
    script = Path(source) / "convert_lora_to_gguf.py"
    subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True)
    ours, theirs = (read_gguf(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    assert {key: theirs.fields.get(key) for key in ours.fields} == ours.fields
    assert ours.header.entries.keys() == theirs.header.entries.keys()
    for key, entry in ours.header.entries.items():
        assert entry.dtype == theirs.header.entries[key].dtype
        assert torch.equal(ours.matrix_or_vector(key), theirs.matrix_or_vector(key))
    before = logits(model)
    ll.detach(model)
    ll.load(model, tmp_path / "theirs.gguf")
    assert torch.equal(logits(model), before)


# ---- every type of model, of llama.cpp's own conversion ----------------------------------------------

GELU = {"gemma", "gemma2", "gemma3_text", "phi", "gpt2", "gpt_bigcode", "starcoder2", "gpt_neox", "bloom", "falcon"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each type: the model of transformers, and what llama.cpp makes of it."""
    source = os.environ.get("LLAMA_CPP_SOURCE")
    if source is None:
        pytest.skip("LLAMA_CPP_SOURCE names no checkout of llama.cpp")
    parent = tmp_path_factory.mktemp("types")
    for kind in TYPES:
        tiny(kind).save_pretrained(parent / kind)
    packages = os.pathsep.join((source, f"{source}/gguf-py", os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, llama_cpp_models.__file__, *(parent / kind for kind in TYPES)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": packages}, capture_output=True, text=True)
    missing = [kind for kind in TYPES if not (parent / kind / "base.gguf").exists()]
    assert (done.returncode, missing) == (0, []), done.stderr
    return parent


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers warns of its own models
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_type_of_llama_cpps_own_conversion(
    kind: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA of every linear layer, one of the embedding, and a control vector."""
    model, base = tiny(kind), Base(folders / kind / "base.gguf")
    before, noise = logits(model), 5e-3 if kind in GELU else 1e-4
    modules, names = dict(model.named_modules()), named_layers(model).by_name
    embedding = names["token_embd.weight"]
    is_tied = model.config.tie_word_embeddings
    linear = [path for path, module in modules.items() if isinstance(module, torch.nn.Linear | Conv1D)]
    linear = [path for path in linear if not (is_tied and path == "lm_head")]
    assert set(linear) <= set(names.values())
    lora = config("lora", target_names=f"^({'|'.join(map(re.escape, linear))})$")
    adapters: list[tuple[Any, dict[str, Any], str]] = [(lora, {}, "gguf")]
    if not is_tied:
        adapters.append((config("lora", kinds="embedding", target_names=re.escape(embedding)), {}, "gguf"))
    directions = {"directions": 0.5 * torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(3))}
    steer = ll.SteerConfig(kinds="block", layers=[1, 2])
    adapters.append((steer, {"calibration_data": directions}, "gguf-control-vector"))
    line = f"{kind}: base {(base.logits(IDS) - before).abs().max():.1e}"
    for cfg, data, form in adapters:
        adapter = ll.attach(model, cfg, **data)
        if form == "gguf":
            perturb(adapter, 0.05)
        ll.save_as(model, tmp_path / "a.gguf", form)
        with base.lora(tmp_path / "a.gguf") if form == "gguf" else base.control_vector(tmp_path / "a.gguf"):
            after = logits(model)
            worst, effect = (base.logits(IDS) - after).abs().max(), (after - before).abs().max()
        line += f", {worst:.1e} of {effect:.2f}"
        assert worst < noise < effect / 50, line
        ll.detach(model)
    torch.testing.assert_close(base.logits(IDS), before, rtol=0, atol=noise)
    base.close()
    with capsys.disabled():
        print(line)


def test_every_type_has_a_model() -> None:
    assert list(TYPES) == list(ARCHITECTURES)


# ---- a real model -----------------------------------------------------------------------------------

TEXT = "The capital of France is Paris, and the river that runs through it is the Seine. In spring the chestnut trees"


@pytest.fixture(scope="module")
def real(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Base, list[int]]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    base = Base(write_base(model, tmp_path_factory.mktemp("real") / "base.gguf", "llama"))
    yield model, base, AutoTokenizer.from_pretrained(smollm2)(TEXT)["input_ids"]
    base.close()


def test_smollm2(real: tuple[Any, Base, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The divergence of llama.cpp from here is the base's own, with an adapter of 210 layers and with a vector."""
    model, base, ids = real
    lines = {"base": kl(before := logits(model, ids), base.logits(ids))}
    perturb(ll.attach(model, ll.LoRAConfig(r=8, alpha=16.0)), 0.02)
    assert ll.save_as(model, tmp_path / "a.gguf", "gguf") == 0
    for scale in (1.0, 0.5):
        with base.lora(tmp_path / "a.gguf", scale), ll.scaled(model, scale):
            after = logits(model, ids)
            lines[f"LoRA at {scale}"], lines[f"its effect at {scale}"] = kl(after, base.logits(ids)), kl(before, after)
    ll.detach(model)
    cfg = ll.SteerConfig(kinds="block", layers=[12])
    ll.attach(model, cfg, calibration_data={"directions": torch.randn(576)}).scale = 2.0
    ll.save_as(model, tmp_path / "v.gguf", "gguf-control-vector")
    with base.control_vector(tmp_path / "v.gguf"):
        after = logits(model, ids)
        lines["vector"], lines["its effect"] = kl(after, base.logits(ids)), kl(before, after)
    ll.detach(model)
    with capsys.disabled():
        print("\n" + "\n".join(f"KL {name}: {value:.1e}" for name, value in lines.items()))
    assert max(lines[name] for name in ("base", "LoRA at 1.0", "LoRA at 0.5", "vector")) < 1e-7
    assert min(lines[name] for name in ("its effect at 1.0", "its effect at 0.5", "its effect")) > 1e-3
