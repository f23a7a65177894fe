"""MLX's folders, with mlx-lm on the other end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, config, perturb, tiny_llama
from safetensors.torch import load_file, save_file
from test_laws import logits
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import lora_lite as ll

mx: Any = pytest.importorskip("mlx.core")
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def in_mlx(model: Any, folder: Path) -> Any:
    """The base in MLX."""
    from mlx_lm.utils import load_model

    model.save_pretrained(folder)
    return load_model(folder)[0]


def answers(other: Any) -> torch.Tensor:
    return torch.tensor(other(mx.array(IDS.tolist())).tolist())


def adapted(folder: Path, variant: str = "lora", **fields: Any) -> tuple[Any, Any]:
    """A model of ours with an adapter, and one of MLX's that has read its folder."""
    from mlx_lm.tuner.utils import load_adapters

    model = tiny_llama()
    other = in_mlx(model, folder / "base")
    torch.testing.assert_close(answers(other), logits(model), rtol=1e-4, atol=1e-4)
    perturb(ll.attach(model, config(variant, **fields)), 0.2)
    ll.save_as(model, folder / "mlx", "mlx")
    other = load_adapters(other, str(folder / "mlx"))
    other.set_dtype(mx.float32)  # of 16 bits it rounds products, too, and what is compared is the file
    return model, other


CASES: dict[str, dict[str, Any]] = {
    "square": {"target_names": r"(q|o)_proj$"},
    "ranks": {"per_layer": {r"0\.mlp\.up": {"r": 2, "alpha": 5.0}}, "rslora": True},
    "last block": {"layers": [1]},
    "first block": {"layers": [0]},
    "head": {"target_names": "lm_head|q_proj"},
    "dora": {"variant": "dora", "target_names": r"(q|o|up)_proj$"},
    "dora in 16 bits": {"variant": "dora", "target_names": r"(q|o|up)_proj$", "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", CASES)
def test_mlx_computes_what_we_do(case: str, tmp_path: Path) -> None:
    model, other = adapted(tmp_path, **CASES[case])
    assert (logits(model) - logits(tiny_llama())).abs().max() > 1e-2
    torch.testing.assert_close(answers(other), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("dora", [False, True])
def test_we_compute_what_mlx_does(dora: bool, bits: int, tmp_path: Path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = tiny_llama()
    other = in_mlx(model, tmp_path / "base")
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    other.freeze()
    linear_to_lora_layers(other, 1, parameters, use_dora=dora)
    mx.random.seed(0)
    dtype = mx.bfloat16 if bits == 16 else mx.float32
    trained = {
        k: (mx.random.normal(v.shape) * 0.03 + (v if k.endswith(".m") else 0)).astype(dtype)
        for k, v in tree_flatten(other.trainable_parameters())
    }
    other.load_weights([(key, value.astype(mx.float32)) for key, value in trained.items()], strict=False)
    (tmp_path / "mlx").mkdir()
    mx.save_safetensors(str(tmp_path / "mlx" / "adapters.safetensors"), trained)
    settings = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 1, "lora_parameters": parameters}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(settings))
    adapter = ll.load(model, tmp_path / "mlx")
    assert set(adapter.targets) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    torch.testing.assert_close(logits(model), answers(other), rtol=1e-5, atol=1e-5)


def test_names_within_a_block_where_blocks_are_alike(tmp_path: Path) -> None:
    for fields, keys, blocks in (
        ({"target_names": "q_proj", "layers": [1]}, ["self_attn.q_proj"], 1),
        ({"target_names": "q_proj"}, ["self_attn.q_proj"], 2),
        ({"target_names": "q_proj", "layers": [0]}, ["model.layers.0.self_attn.q_proj"], 2),
    ):
        model = tiny_llama()
        ll.attach(model, config("lora", **fields))
        ll.save_as(model, tmp_path / "a", "mlx")
        settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert (settings["lora_parameters"]["keys"], settings["num_layers"]) == (keys, blocks)


def test_what_a_folder_cannot_be_is_named(tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora", target_names="q_proj")))
    ll.save_as(model, tmp_path, "mlx")
    weights, settings = tmp_path / "adapters.safetensors", tmp_path / "adapter_config.json"
    tensors, described = load_file(weights), json.loads(settings.read_text())

    def refused(match: str, changed: dict[str, torch.Tensor] | None = None, **fields: Any) -> None:
        save_file({key: t.contiguous() for key, t in (tensors if changed is None else changed).items()}, weights)
        settings.write_text(json.dumps(described | fields))
        with pytest.raises(ll.CheckpointError, match=match):
            ll.load(tiny_llama(), tmp_path)

    path = "model.layers.0.self_attn.q_proj"
    refused(r"fine_tune_type='full': wanted 'lora' or 'dora'\n  a full fine-tuning", fine_tune_type="full")
    refused(r"lora_parameters.scale=None: wanted a number", lora_parameters={"rank": 4})
    refused(r"v_scale is no LoRA's tensor\n  nothing is left out", tensors | {"v_scale": torch.ones(2)})
    refused(r"q_proj has lora_A\n  wanted lora_A, lora_B", {f"{path}.lora_a": tensors[f"{path}.lora_a"]})
    refused(r"lora_b is F32 \(2, 2, 2\)\n  wanted a matrix", tensors | {f"{path}.lora_b": torch.ones(2, 2, 2)})
    refused(r"wrong shapes", tensors | {f"{path}.lora_b": torch.ones(3, 64)})
    refused(r"NaN", tensors | {f"{path}.lora_b": torch.full((4, 64), float("nan"))})
    refused(
        r"embed_tokens: MLX's LoRA of a layer of the kind 'embedding'|is no linear layer",
        {"model.embed_tokens.lora_a": torch.ones(96, 2), "model.embed_tokens.lora_b": torch.ones(2, 64)},
    )
    with pytest.raises(ll.CheckpointError, match="is a file; what is written is a folder"):
        ll.save_as(model, weights, "mlx")


def test_what_is_not_written_is_named(tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, config("lora", kinds="embedding", target_names="embed_tokens"))
    with pytest.raises(ll.CheckpointError, match=r"embed_tokens: MLX's LoRA of a layer of the kind 'embedding'"):
        ll.save_as(model, tmp_path / "a", "mlx")
    ll.detach(model)
    ll.attach(model, [config("lora", target_names="q_proj"), config("dora", target_names="v_proj")])
    with pytest.raises(ll.CheckpointError, match=r"holds one method, and here are dora, lora\n.*rank="):
        ll.save_as(model, tmp_path / "a", "mlx")
    assert not (tmp_path / "a").exists()


def test_layers_that_mlx_lm_cannot_load_are_named(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    ll.attach(model, config("lora", target_names="lm_head", tied_weights="apart"))
    with pytest.raises(ll.CheckpointError, match=r"lm_head is tied to the embedding, and mlx-lm has no such layer"):
        ll.save_as(model, tmp_path / "a", "mlx")


def test_a_vision_tower_is_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(**sizes, vocab_size=50)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=5))
    ll.attach(model, config("lora", target_names="vision_tower.*q_proj"))
    with pytest.raises(ll.CheckpointError, match=r"vision_tower.*q_proj is outside of the language model"):
        ll.save_as(model, tmp_path / "a", "mlx")
    ll.detach(model)
    ll.attach(model, config("lora", target_names="language_model.*q_proj"))
    assert ll.save_as(model, tmp_path / "a", "mlx") < 1e-6
