"""The residual stream at a block's output as a site: c v there and nothing else, on any architecture."""

import copy
import json
import os
import pickle
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from models import IDS, SIZES, moe, quantized, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_laws import same_snapshot, snapshot
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import lora_lite as ll

SIDES = {"positive": [IDS[:, :6], IDS[:, 2:8]], "negative": [IDS[:, 6:], IDS[:, 5:11]]}
STEER = ll.SteerConfig(kinds="block")
LLAMA = {**SIZES, "intermediate_size": 96}
SMALL = {"vocab_size": 96, "d_model": 64}
BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
MODELS: dict[str, tuple[Any, list[str]]] = {  # the stacks of each
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), ["model.layers"]),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**LLAMA, head_dim=16)), ["model.layers"]),
    "gemma3": (lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**LLAMA, head_dim=16)), ["model.layers"]),
    "olmo2": (lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**LLAMA)), ["model.layers"]),
    "granite": (
        lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**LLAMA, residual_multiplier=0.25)),
        ["model.layers"],
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(**SMALL, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
        ["encoder.block", "decoder.block"],
    ),
    "bart": (
        lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(**SMALL, **BART, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64)
        ),
        ["model.encoder.layers", "model.decoder.layers"],
    ),
    "xlnet": (
        lambda: tf.XLNetLMHeadModel(tf.XLNetConfig(**SMALL, n_layer=2, n_head=4, d_inner=96)),
        ["transformer.layer"],
    ),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():  # norms too: a weight of 1 would hide what follows a layer
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(model: Any) -> dict[str, Tensor]:
    more = {"decoder_input_ids": IDS[:, :7] + 1} if model.config.is_encoder_decoder else {}
    return {"input_ids": IDS + 1, **more}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**inputs(model)).logits


def vectors(paths: list[str], d: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {path: torch.randn(d, generator=generator) for path in paths}


def blocks(name: str) -> list[str]:
    return [f"{stack}.{i}" for stack in MODELS[name][1] for i in (0, 1)]


def first(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]


@contextmanager
def added(model: Any, changes: dict[str, Tensor]) -> Iterator[None]:
    """Within the block, plain hooks add these vectors at the outputs of these modules."""

    def hook(v: Tensor) -> Any:
        return lambda module, args, y: y + v if isinstance(y, Tensor) else (y[0] + v, *y[1:])

    handles = [model.get_submodule(path).register_forward_hook(hook(v)) for path, v in changes.items()]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def streams(model: Any, paths: list[str]) -> list[Tensor]:
    """What leaves these blocks in a forward, after all hooks."""
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, y: seen.append(first(y).clone()))
        for path in paths
    ]
    model(**inputs(model))
    for handle in handles:
        handle.remove()
    return seen


def steered(model: Any, paths: list[str], **fields: Any) -> ll.Adapter:
    cfg = ll.SteerConfig(kinds="block", **fields)
    return ll.attach(model, cfg, calibration_data={"directions": vectors(paths)})


# ---- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_it_adds_c_v_to_the_stream_and_is_the_base_at_0(name: str) -> None:
    plain, model, paths = build(name), build(name), blocks(name)
    adapter = steered(model, paths)
    assert adapter.targets == dict.fromkeys(paths, (64, 64))
    for c in (1.0, -0.7):
        adapter.scale = c
        with added(plain, {path: c * v for path, v in vectors(paths).items()}):
            wanted, at_blocks = logits(plain), streams(plain, paths)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
        for got, expected in zip(streams(model, paths), at_blocks, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(wanted, logits(plain), atol=1e-3)
    # By itself, a block's output moves by exactly c v.
    one = build(name)
    steered(one, paths, layers=[1]).scale = 0.5
    before, after = streams(plain, paths[1:2]), streams(one, paths[1:2])
    assert torch.equal(after[0], before[0] + 0.5 * vectors(paths)[paths[1]])
    adapter.scale = 0.0
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "granite", "llama"])
def test_a_fit_on_prompts_is_the_contrast_of_the_streams_and_warns_of_nothing(name: str, log: list[str]) -> None:
    found = ll.contrast(build(name), SIDES, progress=False)
    model = build(name)
    ll.attach(model, STEER, calibration_data=SIDES)
    assert not [line for line in log if line.startswith("WARNING")]
    assert list(found) == blocks(name)
    for path, side in found.items():
        torch.testing.assert_close(model.get_submodule(path).lora_v, side.step.float(), rtol=1e-4, atol=1e-6)


def test_a_fit_is_made_on_blocks_that_put_out_a_tuple() -> None:
    torch.manual_seed(0)
    model = tf.T5EncoderModel(tf.T5Config(**SMALL, d_kv=16, d_ff=96, num_layers=2, num_heads=4)).eval()
    found = ll.contrast(model, SIDES, progress=False)
    adapter = ll.attach(model, STEER, calibration_data=SIDES)
    assert list(adapter.targets) == list(found) == ["encoder.block.0", "encoder.block.1"]
    for path, side in found.items():
        torch.testing.assert_close(model.get_submodule(path).lora_v, side.step.float(), rtol=1e-4, atol=1e-6)


def test_a_fit_on_writers_names_the_cure_where_they_are_not_enough(log: list[str]) -> None:
    ll.attach(build("granite"), ll.SteerConfig(), calibration_data=SIDES)
    assert any("kinds=('block',) adds it at the block's output itself" in line for line in log)


def test_start_is_with_a_cache_as_without() -> None:
    plain, model = build("gemma2"), build("gemma2")
    v = vectors(blocks("gemma2"))
    steered(model, list(v), start=4)

    def hook(vector: Tensor) -> Any:
        return lambda module, args, y: torch.cat([first(y)[:, :4], first(y)[:, 4:] + vector], dim=1)

    for path, vector in v.items():
        plain.get_submodule(path).register_forward_hook(hook(vector))
    wanted = logits(plain)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        out = model(input_ids=IDS[:, :6] + 1, use_cache=True)
        for t in range(6, IDS.shape[1]):
            out = model(input_ids=IDS[:, t : t + 1] + 1, past_key_values=out.past_key_values, use_cache=True)
            torch.testing.assert_close(out.logits, wanted[:, t : t + 1], rtol=1e-4, atol=1e-5)


def test_start_works_where_experts_are_fused() -> None:
    model, plain = moe("qwen3"), moe("qwen3")
    steered(model, ["model.layers.0", "model.layers.1"], start=3)
    with torch.no_grad():
        got, base = model(IDS).logits, plain(IDS).logits
    # Not to the bit: steered tokens choose other experts, whose products then have other numbers of rows.
    torch.testing.assert_close(got[:, :3], base[:, :3], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(got[:, 3:], base[:, 3:], atol=1e-3)


def test_abliteration_takes_the_direction_out_of_the_stream() -> None:
    model, plain, paths = build("gemma2"), build("gemma2"), blocks("gemma2")
    model.model.layers[1].bias = torch.ones(64)  # a block's own affair, which is no layer's bias
    d = vectors(paths)
    cfg = ll.AbliterationConfig(kinds="block", layers=[1])
    ll.attach(model, cfg, calibration_data={"directions": d})
    u = d[paths[1]] / d[paths[1]].norm()
    h, stream = streams(plain, paths)[1], streams(model, paths)[1]
    torch.testing.assert_close(stream, h - (h @ u)[..., None] * u, rtol=1e-4, atol=1e-5)
    with pytest.raises(ll.ConfigError, match=r"normalization=.*wanted 'none' on blocks"):
        ll.AbliterationConfig(kinds="block", normalization="pre")


class Odd(nn.Module):
    """A block with this kind of output."""

    def __init__(self, put: Any) -> None:
        super().__init__()
        self.up, self.down, self.put = nn.Linear(8, 16), nn.Linear(16, 8), put

    def forward(self, x: Any) -> Any:
        x = x if isinstance(x, Tensor) else next(iter(x.values() if isinstance(x, dict) else x))
        return self.put(x + self.down(self.up(x)))


class Stack(nn.Module):
    def __init__(self, put: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Odd(put), Odd(put)])
        self.config = tf.PretrainedConfig(hidden_size=8)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Pair(NamedTuple):
    h: Tensor
    one: Tensor


def test_the_stream_is_put_back_as_it_came() -> None:
    one = torch.ones(1)
    x, data = torch.randn(2, 3, 8), {"directions": torch.arange(1.0, 9.0)}
    puts = [
        lambda h: (h, one, None),
        lambda h: [h, one],
        lambda h: Pair(h, one),
        lambda h: BaseModelOutput(last_hidden_state=h, attentions=(one,)),
        lambda h: OrderedDict(h=h, one=one),
    ]
    wanted = Stack(lambda h: h)
    ll.attach(wanted, ll.SteerConfig(kinds="block", layers=[1]), calibration_data=data)
    for put in puts:
        model = Stack(put)
        plain = model(x)
        ll.attach(model, ll.SteerConfig(kinds="block", layers=[1]), calibration_data=data)
        y = model(x)
        assert type(y) is type(plain)
        assert len(y) == len(plain)
        assert torch.equal(next(iter(y.values())) if isinstance(y, dict) else y[0], wanted(x))
        rest = (list(y.values()) if isinstance(y, dict) else list(y))[1:]
        assert all(item is one or item is None or item == (one,) for item in rest)


def test_a_block_that_puts_out_something_else_is_an_error_in_words() -> None:
    data = {"directions": torch.arange(1.0, 9.0)}
    for put, got in ((lambda h: h[..., :4], r"got \(2, 3, 4\)"), (lambda h: (None, h), "got tuple")):
        model = Stack(put)
        ll.attach(model, ll.SteerConfig(kinds="block", layers=[0]), calibration_data=data)
        with pytest.raises(ll.TargetError, match=rf"layers.0: wanted hidden states of width 8 from this block, {got}"):
            model(torch.randn(2, 3, 8))


# ---- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "t5"])
def test_files_copies_and_detach(name: str, tmp_path: Path) -> None:
    model, paths = build(name), blocks(name)
    before, base = snapshot(model), logits(model)
    adapter = steered(model, paths)
    adapter.scale = -0.7
    with_it = logits(model)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = build(name)
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), with_it)
    assert (loaded.config, loaded.targets) == (adapter.config, adapter.targets)
    loaded.scale = 2.0
    ll.restore(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), with_it)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ll.adapters(other)["default"].scale = 0.0
        assert torch.equal(logits(other), base)
        assert torch.equal(logits(model), with_it)
        ll.detach(other)
        assert torch.equal(logits(other), base)
    ll.detach(model)
    assert same_snapshot(snapshot(model), before)
    assert torch.equal(logits(model), base)


def test_it_stands_beside_a_lora_that_is_trained_through_it() -> None:
    model = build("gemma2")
    steered(model, blocks("gemma2"))
    lora = ll.attach(model, ll.LoRAConfig(r=2), "lora")
    steered_only = logits(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    model(input_ids=IDS + 1, labels=IDS + 1).loss.backward()
    model.eval()
    assert all(p.grad is not None for p in lora.parameters())
    assert torch.equal(logits(model), steered_only)
    with ll.scaled(model, 0.0, "default"):
        assert torch.equal(logits(model), logits(build("gemma2")))


PROCESS = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from test_blocks import blocks, build, logits, steered

for name in ("llama", "t5"):
    model = build(name)
    adapter = steered(model, blocks(name))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name == "llama")
    for c in (1.0, 0.3, -2.0, 0.0):
        adapter.scale = c
        torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)

os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": sys.argv[1]}
dist.init_process_group("gloo", rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
for name in ("llama", "t5"):
    model = build(name)
    adapter = steered(model, blocks(name))
    adapter.scale = -0.7
    wanted = logits(model)
    for path in blocks(name):
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(logits(model), wanted)
    adapter.scale = 0.0
    torch.testing.assert_close(logits(model), logits(build(name)))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_compiled_and_sharded_it_is_the_same_and_follows_the_scale() -> None:
    """In a process of its own: the check of shapes that the tests run with breaks graphs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parents[1]
    paths = [tests, tests / "core", tests / "laws", tests.parent]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", PROCESS, str(port)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_streams_keep_their_dtype(dtype: torch.dtype) -> None:
    model, paths = build("llama").to(dtype), blocks("llama")
    steered(model, paths, layers=[1])
    plain = streams(build("llama").to(dtype), paths)[1]
    stream = streams(model, paths)[1]
    assert stream.dtype == dtype
    assert torch.equal(stream, plain + vectors(paths)[paths[1]].to(dtype))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_on_a_quantised_base_a_file_finds_its_base_again(
    quantization: str, tiny: str, tmp_path: Path, log: list[str]
) -> None:
    """The fingerprint is of a norm: 8-bit codes come into being later, and IA3's vectors are no base's."""
    model, v = quantized(tiny, quantization), vectors(["model.layers.0", "model.layers.1"], 128)
    ll.attach(model, ll.IA3Config(), "ia3")
    ll.attach(model, STEER, calibration_data={"directions": v})
    with torch.no_grad(), ll.scaled(model, 0.0, "ia3"):
        wanted = model(IDS).logits
    ll.save(model, tmp_path / "a.safetensors")
    fresh = quantized(tiny, quantization)
    ll.load(fresh, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, wanted)
        plain = quantized(tiny, quantization)
        with added(plain, {path: vector.bfloat16() for path, vector in v.items()}):
            assert torch.equal(plain(IDS).logits, wanted)
    assert not [line for line in log if line.startswith("WARNING")]
    norms = [layer.input_layernorm.weight for layer in model.model.layers]
    sites = ll.adapters(model)["default"].sites()
    assert all(site.base.stored is norm for site, norm in zip(sites, norms, strict=True))


# ---- refusals -----------------------------------------------------------------------------------


def test_what_holds_weights_has_no_place_for_it(tmp_path: Path) -> None:
    model, folder, file = tiny_llama(), tmp_path / "base", tmp_path / "a.safetensors"
    model.save_pretrained(folder)
    before = snapshot(model)
    steered(model, ["model.layers.0", "model.layers.1"])
    ll.save(model, file)
    with pytest.raises(
        ll.TargetError, match=r"model.layers.0: the adapter is on the residual stream.*\n.*without kinds="
    ):
        ll.merge(model)
    with pytest.raises(
        ll.CheckpointError, match=r"a.safetensors: the adapter is on the residual stream at a block's outp"
    ):
        ll.merge_checkpoint(folder, file, tmp_path / "merged")
    for rank in (None, 4):
        with pytest.raises(
            ll.CheckpointError, match=r"stream at a block's output, and PEFT's.*\n.*our file .lora_lite.save.$"
        ):
            ll.save_peft(model, tmp_path / "peft", rank=rank)
    with pytest.raises(ll.TargetError, match=r"a history is of layers, and this adapter is on the residual stream"):
        ll.freeze_into(model)
    assert not (tmp_path / "merged").exists()
    ll.detach(model)
    assert same_snapshot(snapshot(model), before)


def test_configs_that_ask_for_what_is_not_there() -> None:
    with pytest.raises(ll.ConfigError, match=r"LoRAConfig\(kinds=\('block',\)\): wanted no 'block'"):
        ll.LoRAConfig(kinds="block")
    with pytest.raises(ll.ConfigError, match=r"wanted 'block' by itself"):
        ll.SteerConfig(kinds=["linear", "block"])
    model = Stack(lambda h: h)
    del model.config
    for fields in ({}, {"target_roles": ()}):
        with pytest.raises(ll.TargetError, match=r"has no config that gives its width"):
            ll.plan(model, ll.SteerConfig(kinds="block", **fields))
    with pytest.raises(ll.TargetError, match=r"no layer matched.*\n  2 blocks searched"):
        ll.plan(tiny_llama(), ll.SteerConfig(kinds="block", target_names="nothing"))


def test_names_depth_and_plan_choose_among_blocks() -> None:
    model = build("t5")
    assert [t.path for t in ll.plan(model, ll.SteerConfig(kinds="block", target_names="decoder"))] == [
        "decoder.block.0",
        "decoder.block.1",
    ]
    assert [t.path for t in ll.plan(model, ll.SteerConfig(kinds="block", layers=[-1], exclude_names="encoder"))] == [
        "decoder.block.1"
    ]
    text = str(ll.plan(model, STEER))
    assert "encoder.block.*  64 -> 64   writer  no weight  2" in text


def test_of_a_multimodal_model_it_is_the_language_models_stream() -> None:
    model = nn.ModuleDict({"vision": Stack(lambda h: h), "text": Stack(lambda h: h)})
    model.config = SimpleNamespace(get_text_config=lambda: model["text"].config)
    for fields in ({}, {"target_roles": ()}):
        plan = ll.plan(model, ll.SteerConfig(kinds="block", **fields))
        assert [t.path for t in plan] == ["text.layers.0", "text.layers.1"]


def test_a_list_that_is_never_called_is_no_block_to_look_at() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleList(Odd(None).children()) for _ in (0, 1)])})
    model.config = SimpleNamespace(hidden_size=8)
    with pytest.raises(ll.TargetError, match="0 blocks searched"):
        ll.plan(model, STEER)


def test_files_that_are_not_of_blocks_go_on_no_block(tmp_path: Path) -> None:
    """A file's paths are taken for blocks only where its config says so, and then for nothing else."""
    model, file = tiny_llama(), tmp_path / "a.safetensors"
    steered(model, ["model.layers.0", "model.layers.1"])
    ll.save(model, file)
    with safe_open(file, "pt") as opened:
        (key,) = (key for key in opened.metadata() if key != "format")
        record = json.loads(opened.metadata()[key])
    tensors = load_file(file)
    del record["config"]["kinds"]  # as if it were of layers
    save_file(tensors, file, {"format": "pt", key: json.dumps(record)})
    with pytest.raises(ll.CheckpointError, match=r"model.layers.0 is no linear layer of this"):
        ll.load(tiny_llama(), file)
    record["config"]["kinds"] = ["block"]
    renamed = {f"{k.rpartition('.')[0]}.mlp.down_proj.{k.rpartition('.')[2]}": t for k, t in tensors.items()}
    record["targets"] = {f"{path}.mlp.down_proj": size for path, size in record["targets"].items()}
    prints = record["base"]["fingerprint"]
    record["base"]["fingerprint"] = {f"{path}.mlp.down_proj": value for path, value in prints.items()}
    save_file(renamed, file, {"format": "pt", key: json.dumps(record)})
    with pytest.raises(ll.CheckpointError, match=r"mlp.down_proj is no block of this"):
        ll.load(tiny_llama(), file)


def test_blocks_are_counted_as_such() -> None:
    adapter = ll.attach(tiny_llama(), ll.ReFTConfig(r=2))
    assert adapter.counts() == "2 block"
