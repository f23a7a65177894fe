"""LoRA in GGUF files: names, orders of rows, options, refusals. llama.cpp is the other end in test_llama_cpp.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import config, moe, perturb, tiny_llama
from test_laws import logits
from transformers import Gemma2Config, Gemma2ForCausalLM

import lora_lite as ll
from lora_lite.io.formats.gguf_names import ARCHITECTURES, named_layers
from lora_lite.io.gguf import read_gguf, write_gguf

gguf: Any = pytest.importorskip("gguf")
FIELDS: dict[str, str | int | float] = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 6.0,
}


def adapted(variant: str = "lora", **fields: Any) -> Any:
    model = tiny_llama()
    perturb(ll.attach(model, config(variant, **fields)), 0.2)
    return model


def write(path: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    merged = {key: value for key, value in (FIELDS | fields).items() if value is not None}
    with path.open("wb") as file:
        write_gguf(file, merged, tensors)
    return path


def pair(name: str, d_in: int, d_out: int, r: int = 3) -> dict[str, torch.Tensor]:
    return {f"{name}.weight.lora_a": torch.randn(r, d_in), f"{name}.weight.lora_b": torch.randn(d_out, r)}


def for_rope(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k: of each head the i-th of the first half, the i-th of the second, ..."""
    size = len(matrix) // heads
    rows = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return matrix[rows]


def test_the_keys_and_the_rows(tmp_path: Path) -> None:
    model = adapted(target_names=r"(q|k|v|o|down)_proj$|lm_head")
    ll.save_as(model, tmp_path / "a.gguf", "gguf")
    file = read_gguf(tmp_path / "a.gguf")
    cfg = config("lora")
    assert file.fields == FIELDS | {"adapter.lora.alpha": cfg.scaling * cfg.r}
    state = ll.adapters(model)["default"].state_dict()
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    for layer, name in names.items():
        path = f"model.layers.1.self_attn.{layer}"
        a, b = (file.matrix_or_vector(f"blk.1.{name}.weight.lora_{side}") for side in "ab")
        assert torch.equal(a, state[f"{path}.lora_A"])
        heads = {"q_proj": 4, "k_proj": 2}.get(layer)
        whole = state[f"{path}.lora_B"]
        assert torch.equal(b, whole if heads is None else for_rope(whole, heads))
    assert torch.equal(file.matrix_or_vector("output.weight.lora_b"), state["lm_head.lora_B"])
    assert torch.equal(
        file.matrix_or_vector("blk.0.ffn_down.weight.lora_a"), state["model.layers.0.mlp.down_proj.lora_A"]
    )


def test_one_alpha_and_the_rest_in_b(tmp_path: Path, log: list[str]) -> None:
    model = adapted(per_layer={r"0\.self_attn\.o_proj": {"r": 2, "alpha": 5.0}})
    ll.save_as(model, tmp_path / "a.gguf", "gguf")
    file, state = read_gguf(tmp_path / "a.gguf"), ll.adapters(model)["default"].state_dict()
    alpha = config("lora").scaling * config("lora").r
    assert file.fields["adapter.lora.alpha"] == alpha
    b = file.matrix_or_vector("blk.0.attn_output.weight.lora_b")
    torch.testing.assert_close(b, state["model.layers.0.self_attn.o_proj.lora_B"] * (5 / alpha))
    assert any(f"one alpha {alpha:g} for all; 1 layers have the rest in lora_b" in line for line in log)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_no_alpha_is_a_scaling_of_1(alpha: float | None, tmp_path: Path) -> None:
    """As in llama.cpp's get_scale."""
    path = write(tmp_path / "a.gguf", pair("blk.0.attn_v", 64, 32), **{"adapter.lora.alpha": alpha})
    (site,) = ll.load(tiny_llama(), path).sites()
    assert site.cfg.scaling == 1  # type: ignore[attr-defined]


def test_a_negative_alpha_is_in_b(tmp_path: Path) -> None:
    tensors = pair("blk.0.attn_v", 64, 32)
    adapter = ll.load(tiny_llama(), write(tmp_path / "a.gguf", tensors, **{"adapter.lora.alpha": -6.0}))
    (site,) = adapter.sites()
    assert site.cfg.scaling == 2  # type: ignore[attr-defined]
    state = adapter.state_dict()
    assert torch.equal(state["model.layers.0.self_attn.v_proj.lora_B"], -tensors["blk.0.attn_v.weight.lora_b"])


def test_float64_is_rounded_and_said(tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora", dtype=torch.float64)), 0.2)
    worst = ll.save_as(model, tmp_path / "a.gguf", "gguf")
    assert 1e-9 < worst < 1e-7
    assert {entry.dtype for entry in read_gguf(tmp_path / "a.gguf").header.entries.values()} == {"F32"}


def test_an_embedding_has_a_form_of_its_own(tmp_path: Path) -> None:
    """src/llama-graph.cpp looks tokens up in lora_a."""
    model = adapted(kinds="embedding", target_names="embed_tokens")
    ll.save_as(model, tmp_path / "a.gguf", "gguf")
    file, state = read_gguf(tmp_path / "a.gguf"), ll.adapters(model)["default"].state_dict()
    a = file.matrix_or_vector("token_embd.weight.lora_a")
    assert torch.equal(a, state["model.embed_tokens.lora_A"].mT)  # (V, r)
    other = tiny_llama()
    ll.load(other, tmp_path / "a.gguf")
    assert torch.equal(logits(other), logits(model))


def test_ollamas_modelfile(tmp_path: Path) -> None:
    model = adapted(target_names="v_proj")
    ll.save_as(model, tmp_path / "a.gguf", "gguf", modelfile="llama3.2:1b")
    assert (tmp_path / "Modelfile").read_text() == "FROM llama3.2:1b\nADAPTER ./a.gguf\n"
    ll.save_as(model, tmp_path / "a.gguf", "gguf", modelfile="llama3.2:1b")  # the same again
    for wrong in ("", "a\nPARAMETER x", " a", 3):
        with pytest.raises(ll.ConfigError, match=r"wanted the name of Ollama's base model, such as 'llama3"):
            ll.save_as(model, tmp_path / "b.gguf", "gguf", modelfile=wrong)
    with pytest.raises(ll.CheckpointError, match=r"Modelfile exists, and says something else\n  name a folder"):
        ll.save_as(model, tmp_path / "b.gguf", "gguf", modelfile="qwen3:4b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "a.gguf"]


# ---- other architectures ----------------------------------------------------------------------------


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()


def phi3() -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    return Phi3ForCausalLM(Phi3Config(vocab_size=96, hidden_size=64, pad_token_id=0, **sizes)).eval()


def gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=96, hidden_size=64, **sizes)).eval()


def falcon(**fields: Any) -> Any:
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
    return FalconForCausalLM(FalconConfig(vocab_size=96, hidden_size=64, **sizes, **fields)).eval()


MODELS: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    "gpt2": (gpt2, r"c_attn$|c_fc$", ["attn_qkv", "ffn_up"]),
    "phi3": (phi3, r"_proj$", ["attn_output", "attn_qkv", "ffn_down", "ffn_up"]),
    "gpt_neox": (gpt_neox, r"query_key_value$|dense$", ["attn_output", "attn_qkv"]),
    "falcon": (falcon, r"query_key_value$", ["attn_qkv"]),
    "falcon groups": (
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=256),
        r"query_key_value$",
        ["attn_qkv"],
    ),
    "mixtral": (lambda: moe("mixtral"), r"(q|v)_proj$", ["attn_q", "attn_v"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_architectures_there_and_back(name: str, tmp_path: Path) -> None:
    build, targets, names = MODELS[name]
    torch.manual_seed(0)
    model = build()
    before = logits(model)
    perturb(ll.attach(model, config("lora", target_names=targets)), 0.2)
    after = logits(model)
    assert ll.save_as(model, tmp_path / "a.gguf", "gguf") == 0
    keys = read_gguf(tmp_path / "a.gguf").header.entries
    assert sorted({key.split(".")[2] for key in keys}) == names
    ll.detach(model)
    ll.load(model, tmp_path / "a.gguf")
    assert torch.equal(logits(model), after)
    assert (after - before).abs().max() > 1e-3


def test_a_fused_qkv_by_heads_becomes_all_q_all_k_all_v(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gpt_neox()
    perturb(ll.attach(model, config("lora", target_names="query_key_value$")), 0.2)
    ll.save_as(model, tmp_path / "a.gguf", "gguf")
    b = ll.adapters(model)["default"].state_dict()["gpt_neox.layers.0.attention.query_key_value.lora_B"]
    heads = b.reshape(4, 3, 16, -1)
    apart = torch.cat([heads[:, part].reshape(64, -1) for part in range(3)])
    assert torch.equal(read_gguf(tmp_path / "a.gguf").matrix_or_vector("blk.0.attn_qkv.weight.lora_b"), apart)


def test_falcons_orders_are_whole() -> None:
    """Every row once, for each way in which heads share k and v."""
    for build in (falcon, lambda: falcon(multi_query=False), MODELS["falcon groups"][0]):
        model = build()
        d_out = model.transformer.h[0].self_attention.query_key_value.out_features
        rows = named_layers(model).rows("blk.0.attn_qkv.weight", d_out)
        assert rows is not None
        assert torch.equal(rows.sort().values, torch.arange(d_out))


def test_the_table_names_architectures_of_the_package() -> None:
    assert {known.name for known in ARCHITECTURES.values()} <= set(gguf.MODEL_ARCH_NAMES.values())
    from transformers import CONFIG_MAPPING

    assert set(ARCHITECTURES) <= set(CONFIG_MAPPING)


# ---- refusals ---------------------------------------------------------------------------------------


def test_what_is_not_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"

    def refused(match: str, model: Any) -> None:
        with pytest.raises(ll.CheckpointError, match=match):
            ll.save_as(model, path, "gguf")
        assert not path.exists()

    experts = moe("mixtral")
    ll.attach(experts, config("lora", kinds="experts", target_names="experts.*up_proj"))
    refused(r"experts.gate_up_proj has no name in llama.cpp's 'llama'\n.*merge the adapter", experts)
    ll.detach(experts)
    ll.attach(experts, config("lora", kinds="experts", target_names="experts.*down_proj"))
    refused(
        r"experts.down_proj: .* LoRA of a layer of the kind 'experts' isn't .*\n.*merge the adapter",
        experts,
    )
    refused(r"can't hold 'dora', only lora\n.*rank=", adapted("dora"))
    refused(r"can't hold 'norm', only lora\n", adapted("norm"))
    tied = tiny_llama(tie_word_embeddings=True)
    ll.attach(tied, config("lora", target_names="lm_head"))
    refused(r"lm_head is tied to another layer, which llama.cpp would change too\n.*merge the adapter", tied)
    ll.detach(tied)
    ll.attach(tied, config("lora", kinds="embedding", target_names="embed_tokens"))
    refused(r"embed_tokens is tied to another layer", tied)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads))  # llama.cpp takes its embedding for the head, always
    ll.attach(gemma, config("lora", kinds="embedding", target_names="embed_tokens"))
    refused(r"embed_tokens is tied to another layer", gemma)
    tied.config.tie_word_embeddings = False  # as a file's config may say
    refused(r"embed_tokens is tied to another layer", tied)
    other = tiny_llama()
    ll.attach(other, config("lora"))
    other.config.model_type = "x\ny"
    refused(
        r"LlamaForCausalLM \(model_type 'x\\ny'\) has no GGUF architecture .*\n  known: apertus, .*\n  merge it",
        other,
    )
    ll.detach(other)
    other.config.model_type = "llama"
    other.extra_proj = torch.nn.Linear(64, 64)
    ll.attach(other, config("lora", target_names="extra_proj"))
    refused(r"extra_proj has no name in llama.cpp's 'llama'\n.*merge the adapter", other)
    with pytest.raises(ll.CheckpointError, match=r"is a folder; GGUF is one file, such as .*adapter.gguf"):
        ll.save_as(adapted(), tmp_path, "gguf")


def test_what_a_file_cannot_be_is_named(tmp_path: Path) -> None:
    good = pair("blk.0.attn_v", 64, 32)
    name = "blk.0.attn_v.weight"

    def refused(match: str, tensors: dict[str, torch.Tensor], **fields: Any) -> None:
        path = write(tmp_path / "a.gguf", tensors, **fields)
        with pytest.raises(ll.CheckpointError, match=match):
            ll.load(tiny_llama(), path)

    refused(r"general.type='model', adapter.type='lora'\n  wanted a LoRA", good, **{"general.type": "model"})
    refused(
        r"an adapter of another model: general.architecture='qwen2'\n.* is 'llama'",
        good,
        **{"general.architecture": "qwen2"},
    )
    refused(r"adapter.lora.alpha='6': wanted a number", good, **{"adapter.lora.alpha": "6"})
    refused(r"adapter.lora.alpha=nan: wanted a number", good, **{"adapter.lora.alpha": float("nan")})
    refused(r"begins to act at some tokens isn't read", good, **{"adapter.alora.invocation_tokens": 3})
    refused(
        r"blk.0.attn_norm.weight is no LoRA's tensor\n  nothing is left out in silence",
        good | {"blk.0.attn_norm.weight": torch.ones(64)},
    )
    refused(r"attn_v.weight has lora_A alone\n", {f"{name}.lora_a": torch.ones(3, 64)})
    refused(
        r"has \(3, 64\) of torch.float32, \(32,\) of torch.float32\n  wanted two matrices",
        good | {f"{name}.lora_b": torch.ones(32)},
    )
    refused(r"1 of its 1 layers are not in this LlamaForCausalLM, such as blk.9", pair("blk.9.attn_v", 64, 32))
    refused(r"wrong shapes", good | {f"{name}.lora_b": torch.ones(31, 3)})
    refused(r"wrong shapes", pair("blk.0.attn_q", 64, 62))
    refused(r"there is no adapter in it", {})
