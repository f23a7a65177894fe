"""Control vectors in GGUF files: steering, there and back, and files as repeng writes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, config, moe, perturb, tiny_llama
from test_laws import logits, same_snapshot, snapshot

import lora_lite as ll
from lora_lite.io.gguf import read_gguf, write_gguf

FIELDS: dict[str, str | int | float] = {
    "general.architecture": "controlvector",
    "controlvector.model_hint": "llama",
    "controlvector.layer_count": 2,
}
DIRECTIONS = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def four_blocks(**fields: Any) -> Any:
    return tiny_llama(num_hidden_layers=4, **fields)


def steer(model: Any, directions: Any = None, **fields: Any) -> ll.Adapter:
    data = {"directions": DIRECTIONS[:, None] if directions is None else directions}
    return ll.attach(model, ll.SteerConfig(**fields), calibration_data=data)


def write(path: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    with path.open("wb") as file:
        write_gguf(file, FIELDS | fields, tensors)
    return path


@pytest.mark.parametrize("layers", [[2], [1, 2, 3]])
@pytest.mark.parametrize("c", [1.0, -0.5])
def test_there_and_back(layers: list[int], c: float, tmp_path: Path) -> None:
    model = four_blocks()
    steer(model, kinds="block", layers=layers, strength=1.5).scale = c
    assert ll.save_as(model, tmp_path / "a.gguf", "gguf-control-vector") < 1e-7
    file = read_gguf(tmp_path / "a.gguf")
    assert file.fields == FIELDS | {"controlvector.layer_count": len(layers)}
    assert list(file.header.entries) == [f"direction.{block}" for block in layers]
    for block in layers:
        torch.testing.assert_close(file.matrix_or_vector(f"direction.{block}"), c * 1.5 * DIRECTIONS[block])
    other = four_blocks()
    before = logits(other)
    adapter = ll.load(other, tmp_path / "a.gguf")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(other) - before).abs().max() > 1e-2
    adapter.configure(strength=2.0)  # a strength of the file's own vectors
    adapter.scale = 0.5
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)


def test_on_the_mlps_last_layer_it_is_the_same_vector(tmp_path: Path) -> None:
    model = four_blocks()
    steer(model, layers=[1, 3])
    assert set(ll.adapters(model)["default"].targets) == {f"model.layers.{b}.mlp.down_proj" for b in (1, 3)}
    assert ll.save_as(model, tmp_path / "a.gguf", "gguf-control-vector") < 1e-7
    other = four_blocks()
    adapter = ll.load(other, tmp_path / "a.gguf")
    assert set(adapter.targets) == {"model.layers.1", "model.layers.3"}
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)


def test_a_file_as_repeng_writes_it(tmp_path: Path) -> None:
    """Its export_gguf: architecture, model_hint (the model_type) and layer_count; direction.1 to the last block."""
    gguf: Any = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 3)
    for block in (3, 2, 1):
        writer.add_tensor(f"direction.{block}", DIRECTIONS[block].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, other = four_blocks(), four_blocks()
    steer(model, kinds="block", layers=[1, 2, 3])
    ll.load(other, tmp_path / "a.gguf")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    fresh = four_blocks()
    for block in (1, 2, 3):  # its ControlModel adds the vector to what the block gives
        fresh.model.layers[block].register_forward_hook(lambda module, args, y, v=DIRECTIONS[block]: y + v)
    torch.testing.assert_close(logits(other), logits(fresh), rtol=1e-5, atol=1e-5)


def test_other_models_take_one_too(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=4, n_head=4, n_positions=64)).eval()
    steer(model, layers=[2])
    path = tmp_path / "a.gguf"
    ll.save_as(model, path, "gguf-control-vector")
    after = logits(model)
    ll.detach(model)
    ll.load(model, path)
    torch.testing.assert_close(logits(model), after, rtol=1e-5, atol=1e-5)
    assert read_gguf(path).fields["controlvector.model_hint"] == "gpt2"


def test_what_is_not_written_is_named(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config, T5ForConditionalGeneration

    path = tmp_path / "a.gguf"

    def refused(match: str, model: Any) -> None:
        with pytest.raises(ll.CheckpointError, match=match):
            ll.save_as(model, path, "gguf-control-vector")
        assert not path.exists()
        ll.detach(model)

    model = four_blocks()
    steer(model, kinds="block")
    refused(r"layers.0: llama.cpp has no place for a vector at block 0\n  leave it out \(layers=\)", model)
    steer(model, kinds="block", layers=[2], start=3)
    refused(r"start=3: llama.cpp adds a vector at all tokens\n  keep it as our file", model)
    steer(model, layers=[2], target_names=r"o_proj$")
    refused(r"o_proj: a vector added there is no vector at its block's output\n  fit it with .*kinds='block'", model)
    steer(model, kinds="block", layers=[2]).scale = 0.0
    refused(r"scale 0, which does nothing", model)
    perturb(ll.attach(model, config("lora", target_names="v_proj")))
    refused(r"can't hold 'lora', only steer\n  keep it as our file", model)
    cfg = ll.AbliterationConfig(target_names=r"down_proj$")
    ll.attach(model, cfg, calibration_data={"directions": DIRECTIONS[:, None]})
    refused(r"can't hold 'abliteration', only steer\n  keep it as our file", model)
    both = [ll.SteerConfig(kinds="block", layers=[2]), ll.SteerConfig(layers=[2])]
    ll.attach(model, both, calibration_data={"directions": DIRECTIONS[:, None]})
    refused(r"a second vector at block 2\n  steer at one place", model)
    experts = moe("mixtral")
    steer(experts, directions=DIRECTIONS[:2, None], layers=[1])
    refused(r"experts: a vector added there is no vector at its block's output", experts)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=96, hidden_size=64, head_dim=16, **sizes)).eval()
    steer(gemma, directions=DIRECTIONS[:2, None], layers=[1])
    refused(r"'gemma2' has a norm or a factor between it and its block's output\n  fit it with", gemma)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4))
    steer(t5, directions=DIRECTIONS[:2, None], kinds="block", layers=[1])
    refused(r"model_type 't5'\) has no GGUF architecture that is known here", t5)
    steer(model, kinds="block", layers=[2])
    with pytest.raises(ll.ConfigError, match=r"rank and energy make a LoRA, and it holds none\n  leave them out"):
        ll.save_as(model, path, "gguf-control-vector", rank=4)
    with pytest.raises(ll.CheckpointError, match=r"is a folder; GGUF is one file, such as .*vector.gguf"):
        ll.save_as(model, tmp_path, "gguf-control-vector")


def test_what_a_file_cannot_be_is_named(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    one = torch.ones(64)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4))

    def refused(match: str, tensors: dict[str, torch.Tensor], model: Any = None, **fields: Any) -> None:
        model = model or four_blocks()
        before = snapshot(model)
        with pytest.raises(ll.CheckpointError, match=match):
            ll.load(model, write(tmp_path / "a.gguf", tensors, **fields))
        assert same_snapshot(before, snapshot(model))

    refused(r"direction.x is no direction\n  wanted direction.1", {"direction.x": one})
    refused(r"direction.01 is no direction", {"direction.01": one})
    refused(
        r"direction.0: llama.cpp refuses a vector at block 0, .*\n  write the file again without", {"direction.0": one}
    )
    refused(r"block 4 is not in this LlamaForCausalLM, which has 4\n  its .* is 'llama'", {"direction.4": one})
    refused(r"has the shape \(63,\), where this .* has the width 64: a vector of another", {"direction.1": one[1:]})
    refused(r"has the shape \(1, 64\), where", {"direction.1": one[None]})
    refused(r"NaN, infinities", {"direction.1": one / 0})
    refused(r"there is no adapter in it", {})
    refused(
        r"has 2 stacks of blocks \(decoder.block., encoder.block.\)\n  a control vector is of one",
        {"direction.1": one},
        t5,
    )


def test_the_table_says_where_nothing_follows() -> None:
    """A vector on a Llama's MLP is one at its block's output, on a Gemma 2's it isn't: what `is_plain` says."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from lora_lite.io.formats.gguf_names import ARCHITECTURES

    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=96, hidden_size=64, head_dim=16, **sizes)).eval()
    for model, kind in ((four_blocks(), "llama"), (gemma, "gemma2")):
        outputs = []
        for fields in ({"kinds": "block"}, {}):
            steer(model, layers=[2], **fields)
            outputs.append(model(input_ids=IDS).logits.detach())
            ll.detach(model)
        assert torch.allclose(*outputs, rtol=1e-4, atol=1e-5) == ARCHITECTURES[kind].is_plain
