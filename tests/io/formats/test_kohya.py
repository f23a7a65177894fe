"""kohya's files, with LyCORIS and diffusers on the other end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from models import OneLinear, config, perturb
from safetensors.torch import load_file, save_file
from test_diffusers import MODELS, assert_close, output
from test_for_diffusers import pipeline_of

import lora_lite as ll
from lora_lite.io.formats.kohya_kinds import swap
from lora_lite.io.formats.kohya_names import original_names

lycoris: Any = pytest.importorskip("lycoris")
pytestmark = pytest.mark.filterwarnings("ignore:.*`torch_dtype` is deprecated:FutureWarning")
LINEAR = r"to_(q|out\.0)$|time_emb_proj$|net\.2$|proj_mlp$"
CONV = r"proj_in$|conv1$|conv_shortcut$|samplers\.0\.conv$|" + LINEAR  # proj_in is 1x1
LAYERS: dict[str, dict[str, Any]] = {
    "linear": {"target_names": LINEAR},
    "conv": {"target_names": CONV, "kinds": ("linear", "conv")},
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "alpha": 5.0},
    "lora of ranks": {"r": 3, "alpha": 5.0, "per_layer": {"to_q": {"r": 2, "alpha": 7.0}}, "rslora": True},
    "lora in 16 bits": {"r": 3, "dtype": torch.bfloat16},
    "dora": {"r": 3, "alpha": 5.0},
    "dora in 16 bits": {"r": 3, "dtype": torch.bfloat16},
    "loha": {"r": 3, "alpha": 2.0},
    "loha of cores": {"r": 3, "alpha": 2.0, "use_effective_conv2d": True},
    "lokr": {"r": 1, "alpha": 2.0},
    "lokr of factors": {"r": 1, "alpha": 2.0, "decompose_both": True},
    "lokr, whole": {"r": 50, "alpha": 20.0},
    "lokr by 2": {"r": 1, "alpha": 2.0, "decompose_factor": 2},
}
CASES = [
    *((name, "linear", method) for name in MODELS for method in METHODS if "cores" not in method),
    *(("unet", "conv", method) for method in METHODS),
]


def moved(name: str, layers: str, method: str) -> Any:
    model = MODELS[name]()
    variant = method.replace(",", "").split()[0]
    perturb(ll.attach(model, config(variant, **LAYERS[layers], **METHODS[method])), 0.3)
    assert float((output(model) - output(MODELS[name]())).abs().max()) > 1e-2
    return model


def in_lycoris(model: Any, file: Path) -> Any:
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model)
    network.apply_to()
    return network


@pytest.mark.parametrize(("name", "layers", "method"), CASES)
def test_lycoris_computes_what_we_do(name: str, layers: str, method: str, tmp_path: Path) -> None:
    model, other, file = moved(name, layers, method), MODELS[name](), tmp_path / "a.safetensors"
    assert ll.save_as(model, file, "kohya", prefix="lycoris") < (1e-2 if method == "dora in 16 bits" else 2e-6)
    network = in_lycoris(other, file)
    assert len(network.loras) == len(ll.adapters(model)["default"].targets)
    torch.testing.assert_close(output(other), output(model), rtol=1e-4, atol=2e-5)
    again = MODELS[name]()
    adapter = ll.load(again, file)
    assert adapter.variant == ll.adapters(model)["default"].variant
    assert_close(output(again), output(model))


TRAINED: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "locon with a core": {"algo": "lora", "use_tucker": True},
    "dora": {"algo": "lora", "dora_wd": True},
    "loha": {"algo": "loha"},
    "loha with cores": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr"},
    "lokr of factors": {"algo": "lokr", "decompose_both": True},
    "lokr with a core": {"algo": "lokr", "use_tucker": True, "linear_dim": 1},
    "lokr by 4": {"algo": "lokr", "factor": 2},
    "lokr, whole": {"algo": "lokr", "full_matrix": True},
}


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("name", MODELS)
def test_we_compute_what_lycoris_does(name: str, kind: str, tmp_path: Path) -> None:
    other, fields = MODELS[name](), {"linear_dim": 3, "linear_alpha": 2.0, "preset": "full"} | TRAINED[kind]
    network = lycoris.create_lycoris(other, 1.0, **fields)
    network.apply_to()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    wanted = output(other)
    assert float((wanted - output(MODELS[name]())).abs().max()) > 1e-2
    file = tmp_path / "a.safetensors"
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in network.state_dict().items()}, file)
    model = MODELS[name]()
    adapter = ll.load(model, file)
    assert len(adapter.targets) == len(network.loras)
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=2e-5)
    ll.save_as(model, tmp_path / "b.safetensors", "kohya", prefix="lycoris")
    again = MODELS[name]()
    ll.load(again, tmp_path / "b.safetensors")
    assert_close(output(again), output(model))


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_reads_our_file(name: str, tmp_path: Path) -> None:
    model, other, file = MODELS[name](), MODELS[name](), tmp_path / "a.safetensors"
    names = r"to_(q|k|v)$" if name == "flux" else r"to_(q|k|v|out\.0)$|proj_in$|conv1$|conv_shortcut$"
    ranks = {"to_k": {"r": 2}}  # of alphas that differ diffusers 0.42 drops those of a UNet's attention
    cfg = config("lora", r=4, alpha=6.0, target_names=names, kinds=("linear", "conv"), per_layer=ranks)
    perturb(ll.attach(model, cfg), 0.2)
    ll.save_as(model, file, "kohya")
    pipeline_of(other).load_lora_weights(file)
    assert_close(output(other), output(model))
    assert float((output(model) - output(MODELS[name]())).abs().max()) > 1e-2


# ---- names of SDXL's and Flux's own models --------------------------------------------------------------------------


def sdxl() -> Any:
    """Three blocks a side as SDXL's: the outer ones without attention, and two layers a block."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    ).eval()


@torch.no_grad()
def sdxl_output(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, states, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 5, 8), (1, 8)))
    conditions = {"text_embeds": text, "time_ids": torch.ones(1, 6)}
    result: torch.Tensor = model(sample, 3, states, added_cond_kwargs=conditions).sample
    return result


@pytest.mark.parametrize("names", ["diffusers", "original"])
def test_diffusers_reads_sdxl_by_its_own_names(names: str, tmp_path: Path) -> None:
    model, other, file = sdxl(), sdxl(), tmp_path / "a.safetensors"
    cfg = config(
        "lora",
        r=3,
        alpha=5.0,
        target_names=r"time_emb_proj|conv|to_|net|proj_(in|out)|linear_",
        kinds=("linear", "conv"),
    )
    perturb(ll.attach(model, cfg), 0.1)
    ll.save_as(model, file, "kohya", names=names)
    assert any("lora_unet_input_blocks_8_1_transformer_blocks_1_attn2_to_k." in key for key in load_file(file)) is (
        names == "original"
    )
    wanted = sdxl_output(model)
    assert float((wanted - sdxl_output(sdxl())).abs().max()) > 1e-2
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=other.config)
    other.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    torch.testing.assert_close(sdxl_output(other), wanted, rtol=1e-5, atol=1e-5)
    again = sdxl()
    assert set(ll.load(again, file).targets) == set(ll.adapters(model)["default"].targets)
    torch.testing.assert_close(sdxl_output(again), wanted, rtol=1e-5, atol=1e-5)


DOUBLE = (
    r"(?<!single_)transformer_blocks.*(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out|net|linear)|proj_out|norm\.linear"
)


def test_diffusers_reads_flux_by_its_own_names(tmp_path: Path) -> None:
    """But for linear1, of which diffusers knows one width; of its parts none is adapted here."""
    model, other, file = MODELS["flux"](), MODELS["flux"](), tmp_path / "a.safetensors"
    exclude = {"exclude_names": r"single_transformer_blocks.*attn|^proj_out"}
    cfg = config("lora", r=3, alpha=5.0, target_names=DOUBLE, per_layer={"to_k": {"r": 2}}, **exclude)
    perturb(ll.attach(model, cfg), 0.2)
    assert ll.save_as(model, file, "kohya", prefix="lora_unet", names="original") < 1e-6
    assert load_file(file)["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (8, 32)
    pipeline_of(other).load_lora_weights(file)
    assert_close(output(other), output(model))
    again = MODELS["flux"]()
    assert set(ll.load(again, file).targets) == set(ll.adapters(model)["default"].targets)
    assert_close(output(again), output(model))


def test_bfls_names_are_of_the_layers_that_diffusers_has_for_them() -> None:
    """Each name's rows go to the same layers in the same order, linear1's and the last norm's too."""
    paths = [name for name, module in MODELS["flux"]().named_modules() if isinstance(module, torch.nn.Linear)]
    places = original_names(MODELS["flux"](), paths)
    guidance = {"guidance_in_in_layer", "guidance_in_out_layer"}  # of a model with guidance_embeds
    assert len(places) == 10 + 3 + 10 - len(guidance)
    rows = {name: 21504 if name.endswith("linear1") else 12 for name in places}
    state = {f"lora_unet_{name}.lora_down.weight": torch.ones(1, 2) for name in places}
    numbers = {name: torch.arange(1.0, n + 1)[:, None] for name, n in rows.items()}
    state |= {f"lora_unet_{name}.lora_up.weight": numbers[name] for name in places}
    theirs = {key.removeprefix("transformer."): t for key, t in _convert_kohya_flux_lora_to_diffusers(state).items()}
    for name, place in places.items():
        parts = [theirs.pop(f"{path}.lora_B.weight") for path in place.paths]
        joined = torch.cat(parts)
        assert torch.equal(joined, swap(numbers[name]) if place.is_swapped else numbers[name])
    assert all(key.endswith("lora_A.weight") for key in theirs)


def test_a_fused_layer_of_flux(tmp_path: Path) -> None:
    """One A of all parts stays one; their own are written one above the other, beside zeros. A norm's halves swap."""
    names = r"single_transformer_blocks.*(to_[qkv]|proj_mlp)|norm_out\.linear"
    model, file = MODELS["flux"](), tmp_path / "a.safetensors"
    adapter = ll.attach(model, config("lora", r=3, alpha=5.0, target_names=names))
    perturb(adapter, 0.2)
    same = {k: t for k, t in adapter.state_dict().items() if k.endswith("lora_A")}
    first = next(iter(same.values()))
    adapter.load_state_dict(adapter.state_dict() | {k: first.clone() for k in same})
    for rank in (3, 12):
        assert ll.save_as(model, file, "kohya", prefix="lora_unet", names="original") < 1e-6
        stored = load_file(file)
        assert stored["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (rank, 32)
        again = MODELS["flux"]()
        ll.load(again, file)
        assert_close(output(again), output(model))
        b = adapter.state_dict()["norm_out.linear.lora_B"]
        assert torch.equal(stored["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"], b.roll(len(b) // 2, 0))
        perturb(adapter, 0.1, seed=2)  # each A is its own now


@pytest.mark.parametrize("variant", ["loha", "dora", "lokr"])
def test_a_fused_layer_by_other_methods(variant: str, tmp_path: Path) -> None:
    """Rows of LoHa and DoRA are those of each part; a Kronecker product of all isn't one of each."""
    file, name = tmp_path / "a.safetensors", "lora_unet_double_blocks_0_img_attn_qkv"
    wide = OneLinear(32, 96)
    perturb(ll.attach(wide, config(variant, r=2, target_names="proj")), 0.3)
    with torch.no_grad():  # W' of the fused layer
        before = wide.proj.weight.clone()
        ll.save_as(wide, file, "kohya", prefix="lora_unet")
    save_file({key.replace("lora_unet_proj", name): t for key, t in load_file(file).items()}, file)
    model = MODELS["flux"]()
    if variant == "lokr":
        with pytest.raises(ll.CheckpointError, match=r"a Kronecker product of the rows of .*to_q, .*\n  make a LoRA"):
            ll.load(model, file)
        return
    attention = model.transformer_blocks[0].attn
    parts = (attention.to_q, attention.to_k, attention.to_v)
    with torch.no_grad():
        for part, rows in zip(parts, before.chunk(3), strict=True):
            part.weight.copy_(rows)
    ll.load(model, file)
    ll.merge(model)
    ll.merge(wide)
    merged = torch.cat([part.weight for part in parts])
    assert float((merged - before).abs().max()) > 1e-2
    torch.testing.assert_close(merged, wide.proj.weight, rtol=1e-5, atol=1e-5)
    other = MODELS["flux"]()
    ll.attach(other, config(variant, r=2, target_names=r"^transformer_blocks.*to_[qkv]"))
    with pytest.raises(ll.CheckpointError, match=r"qkv is one layer there, and .* of its parts isn't one of it\n"):
        ll.save_as(other, tmp_path / "b.safetensors", "kohya", names="original")
