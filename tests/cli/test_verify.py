"""A merged checkpoint beside base and adapter, on a text."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import attach, config, perturb, quantized, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import lora_lite as ll
from lora_lite.base import load as base_module
from lora_lite.base.fingerprint import BaseRecord
from lora_lite.base.layer import layer_of, quantization_of
from lora_lite.base.load import load_as_recorded
from lora_lite.base.storage import Quantization
from lora_lite.cli.commands import app
from lora_lite.cli.convert import convert
from lora_lite.cli.verify import verify_merge

WORDS = [f"w{i}" for i in range(90)]
TEXT = " ".join(WORDS * 2)


def with_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words, in the folder of a tiny model."""
    made = Tokenizer(WordLevel({"[UNK]": 0} | {word: i + 1 for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)
    return folder


@torch.no_grad()
def merged_by_hand(model: Any, adapter: ll.Adapter, folder: Path, share: float = 1.0) -> Path:
    """The model with s·BA in its weights, where `quant` says what those are, as a folder."""
    dense = tiny_llama(model.dtype, **{key: getattr(model.config, key) for key in ("hidden_size", "intermediate_size")})
    state = {key: value for key, value in model.state_dict().items() if key in dense.state_dict()}
    for site in adapter.sites():
        module = site.module
        change = adapter.config.scaling * module.lora_B @ module.lora_A
        state[f"{site.path}.weight"] = layer_of(module, site.path).dense_weight() + share * change
    dense.load_state_dict(state)
    dense.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return with_tokenizer(tmp_path / "base")


def test_a_right_merge_is_told_from_a_wrong_one(base: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = attach(model, config("lora", r=4, alpha=8.0))
    perturb(adapter)
    ll.save(model, tmp_path / "a.safetensors")
    right = verify_merge(base, tmp_path / "a.safetensors", merged_by_hand(model, adapter, tmp_path / "right"), TEXT)
    assert right.tokens == 180  # in windows of the model's 64 positions
    assert abs(right.mean_kl) < 1e-6
    assert right.max_logit < 1e-4
    half = merged_by_hand(model, adapter, tmp_path / "half", share=0.5)
    wrong = verify_merge(base, tmp_path / "a.safetensors", half, TEXT)
    assert wrong.mean_kl > 1e-4
    assert wrong.max_kl > wrong.mean_kl
    assert wrong.max_logit > 0.01
    assert str(wrong).startswith(f"KL(base + adapter || merged): mean {wrong.mean_kl:.3g}, max {wrong.max_kl:.3g} nats")


def test_its_divergence_is_that_of_the_two_models(base: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = attach(model, config("lora", r=4))
    perturb(adapter)
    ll.save(model, tmp_path / "a.safetensors")
    found = verify_merge(base, tmp_path / "a.safetensors", base, TEXT[:150])  # as if nothing had been merged
    ids = torch.tensor([[int(word[1:]) + 1 for word in TEXT[:150].split()]])
    with torch.no_grad():
        adapted = model(input_ids=ids).logits[0].double()
        with ll.disabled(model):
            plain = model(input_ids=ids).logits[0].double()
    p, q = adapted.log_softmax(-1), plain.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.mean_kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.max_kl == pytest.approx(float(kl.max()), rel=1e-3)
    assert found.max_logit == pytest.approx(float((adapted - plain).abs().max()), rel=1e-3)


def test_as_trained_is_on_the_quantised_base(tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.symlink_to(tiny)
    model = quantized(tiny, "nf4")
    adapter = attach(model, config("lora", r=4))
    perturb(adapter)
    ll.save(model, tmp_path / "a.safetensors")
    merged = merged_by_hand(model, adapter, tmp_path / "merged")
    (tmp_path / "words").mkdir()
    for file in [*Path(tiny).iterdir(), *with_tokenizer(tmp_path / "tokens").iterdir()]:
        (tmp_path / "words" / file.name).symlink_to(file)
    args = (tmp_path / "words", tmp_path / "a.safetensors", merged, TEXT)
    as_trained, original = verify_merge(*args, "as_trained"), verify_merge(*args, "original")
    assert as_trained.mean_kl < original.mean_kl / 5
    assert as_trained.max_logit < original.max_logit


def recorded(quantization: Quantization | None) -> BaseRecord:
    return BaseRecord("LlamaForCausalLM", None, "bfloat16", quantization, {})


def test_a_base_is_opened_as_it_was_recorded(tiny: str) -> None:
    for quantization, double in (("nf4", False), ("fp4", True), ("int8", False)):
        how = {"double_quant": double} if quantization != "int8" else {}
        live = quantization_of(quantized(tiny, quantization, **how))
        again = quantization_of(load_as_recorded(tiny, recorded(live), dtype=torch.bfloat16))
        assert asdict(again) == asdict(live)
    assert quantization_of(load_as_recorded(tiny, recorded(None))) is None
    assert quantization_of(load_as_recorded(tiny, None)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_opened_in_its_recorded_dtype_whatever_is_fast_here(
    dtype: torch.dtype, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "product_milliseconds", lambda _: pytest.fail("timed"))
    for quantization in (None, "nf4"):
        adapter = attach(ll.load_base(tiny, dtype, quantization), config("lora", r=4))
        assert load_as_recorded(tiny, adapter.base_record).dtype == dtype
    model = ll.load_base(tiny, dtype)
    attach(model, config("lora", r=4))
    ll.save(model, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "peft", Path(tiny))
    assert (tmp_path / "peft").is_dir()


def test_a_base_that_cant_be_as_recorded_is_an_error(tiny: str) -> None:
    live = quantization_of(quantized(tiny, "nf4"))
    fewer = recorded(replace(live, modules=live.modules[:3]))
    with pytest.raises(ll.BaseModelError, match="quantises to 14 modules, where the adapter was trained on 3"):
        load_as_recorded(tiny, fewer)
    unknown = recorded(replace(live, quant_type="unknown (GGUF)"))
    with pytest.raises(ll.BaseModelError, match=r"trained on unknown \(GGUF\) weights, which can't be made again"):
        load_as_recorded(tiny, unknown)


@pytest.mark.parametrize("kind", ["classifier", "trunk", "encoder-decoder", "vision"])
def test_a_base_without_next_tokens_is_refused_before_the_work(kind: str, tmp_path: Path) -> None:
    """A language model's head on such a base would start at random, another time in each of the two."""
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    bart = BartConfig(vocab_size=100, encoder_attention_heads=2, decoder_attention_heads=2, **small)
    models: dict[str, Callable[[], Any]] = {
        "classifier": lambda: LlamaForSequenceClassification(tiny_llama().config),
        "trunk": lambda: tiny_llama().model,
        "encoder-decoder": lambda: BartForConditionalGeneration(bart),
        "vision": lambda: LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=tiny_llama().config,
                vision_config=CLIPVisionConfig(hidden_size=24, intermediate_size=16, num_hidden_layers=1),
            )
        ),
    }
    model = models[kind]()
    model.save_pretrained(tmp_path / "base")
    attach(model, config("lora", target_names="q_proj"))
    ll.save(model, tmp_path / "a.safetensors")
    (tmp_path / "text.txt").write_text(TEXT)
    folders = [with_tokenizer(tmp_path / "base"), tmp_path / "a.safetensors", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, ["merge", *folders, "--verify", tmp_path / "text.txt"])])
    assert result.exit_code == 2
    message = f"verified by the next tokens of a causal language model, which a {type(model).__name__} isn't"
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_class_is_verified_on_a_language_model(base: Path, tmp_path: Path) -> None:
    for model in (tiny_llama().model, LlamaForSequenceClassification.from_pretrained(base)):
        perturb(attach(model, config("lora", target_names="q_proj")))
        ll.save(model, tmp_path / "a.safetensors")
        ll.merge_checkpoint(base, tmp_path / "a.safetensors", tmp_path / type(model).__name__)
        assert verify_merge(base, tmp_path / "a.safetensors", tmp_path / type(model).__name__, TEXT).max_kl < 1e-5


def test_bad_arguments(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ll.ConfigError, match="wanted 'original' or 'as_trained'"):
        verify_merge(base, tmp_path / "a.safetensors", base, TEXT, "trained")
    with pytest.raises(ll.ConfigError, match="the text has 1 tokens; wanted two or more"):
        verify_merge(base, tmp_path / "a.safetensors", base, "w1")
    with pytest.raises(ll.CheckpointError, match="is not a file"):
        verify_merge(base, tmp_path / "a.safetensors", base, TEXT)
