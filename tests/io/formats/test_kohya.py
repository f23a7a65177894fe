"""kohya's files, with LyCORIS and diffusers on the other end."""

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from models import OneLinear, config, perturb
from safetensors.torch import load_file, save_file
from test_diffusers import MODELS, assert_close, output, unet
from test_for_diffusers import pipeline_of
from test_laws import same_snapshot, snapshot
from transformers import CLIPTextConfig, CLIPTextModel

import lora_lite as ll
from lora_lite.io.formats.kohya_kinds import ENDS, swap
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
    assert ll.save_as(model, file, "kohya", prefix="lycoris") < 2e-6
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
    "lokr by 2": {"algo": "lokr", "factor": 2},
    "lokr, whole": {"algo": "lokr", "full_matrix": True},
    "lokr by a large factor": {"algo": "lokr", "factor": 8, "use_tucker": True},
    "lokr, its larger parts first": {"algo": "lokr", "unbalanced_factorization": True, "decompose_both": True},
}
SPLIT_OTHERWISE = ("lokr by a large factor", "lokr, its larger parts first")  # at some layers, which are LoRAs here


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
    variants = {{"locon": "lora"}.get(name, name) for name in [kind.replace(",", "").split()[0]]}
    assert {*adapter.variant.split(" + ")} == variants | ({"lora"} if kind in SPLIT_OTHERWISE else set())
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
    places, kinds = r"time_emb_proj|conv|to_|net|proj_(in|out)|linear_", ("linear", "conv")
    left = "add_embedding" if names == "diffusers" else ()  # diffusers takes its own name of it for another layer's
    perturb(ll.attach(model, config("lora", r=3, alpha=5.0, target_names=places, exclude_names=left, kinds=kinds)), 0.1)
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


DOUBLE = r"(?<!single_)transformer_blocks.*(to_[qkv]|add_[qkv]|to_out\.0|to_add_out|net|linear)|proj_out|norm\.linear"


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


# ---- what a file cannot be ------------------------------------------------------------------------------------------


def few_layers() -> Any:
    """A square layer, a convolution, an embedding, and two layers that share a name with underscores."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.a = torch.nn.Linear(6, 6)
    model.conv = torch.nn.Conv2d(4, 6, 3)
    model.wide = torch.nn.Linear(300, 300)
    model.token = torch.nn.Embedding(5, 6)
    model.b = torch.nn.Module()
    model.b.c = torch.nn.Linear(6, 8)
    model.b_c = torch.nn.Linear(6, 8)
    return model.eval()


def tensors_of(**others: torch.Tensor) -> dict[str, torch.Tensor]:
    """A LoRA of the square layer, and what else is said: `a__alpha` is lora_unet_a.alpha."""
    given = {"a__lora_down.weight": torch.randn(2, 6), "a__lora_up.weight": torch.randn(6, 2)} | others
    return {f"lora_unet_{key.replace('__', '.')}": tensor for key, tensor in given.items()}


ONE = torch.ones
REFUSED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no partner": ({"conv__lora_up.weight": ONE(6, 2, 1, 1)}, r"unet_conv has lora_up.weight\n  wanted lora_down"),
    "alpha alone": ({"conv__alpha": ONE(())}, r"unet_conv has alpha\n  wanted the factors of one method"),
    "two methods": ({"a__hada_w1_a": ONE(6, 2)}, r"unet_a has hada_w1_a, .*\n  wanted the factors of one method"),
    "an unknown kind": ({"a__diff_b": ONE(6)}, r"unet_a.diff_b is of no kind that is known\n  nothing is left out"),
    "an unknown model": (
        {"": ONE(2)},
        r"lora_unet_ is of no model that is known here\n  names .* begin with lora",
    ),
    "an unknown layer": ({"x__lora_up.weight": ONE(6, 2)}, r"1 of its 2 layers of lora_unet are not in this Module"),
    "a shared name": (
        {"b_c__lora_down.weight": ONE(2, 6), "b_c__lora_up.weight": ONE(8, 2)},
        r"lora_unet_b_c is the name of b.c, b_c\n  rename it",
    ),
    "an embedding": (
        {"token__lora_down.weight": ONE(2, 5), "token__lora_up.weight": ONE(6, 2)},
        r"token is of token, a layer of the kind 'embedding'\n  leave it out",
    ),
    "a wide alpha": ({"a__alpha": ONE(2)}, r"a.alpha is F32 \(2,\)\n  wanted one finite number"),
    "alpha of nothing": ({"a__alpha": torch.tensor(float("nan"))}, r"a.alpha is F32 \(\)\n  wanted one finite number"),
    "another kernel": (
        {"conv__lora_down.weight": ONE(2, 4, 5, 5), "conv__lora_up.weight": ONE(6, 2, 1, 1)},
        r"conv.lora_down.weight is \(2, 4, 5, 5\)\n  wanted a matrix, or one with the kernel \(3, 3\)",
    ),
    "a kernel above": ({"a__lora_up.weight": ONE(6, 2, 3, 3)}, r"lora_up.weight is \(6, 2, 3, 3\)\n  wanted a matrix"),
    "ranks": ({"a__lora_up.weight": ONE(6, 3)}, r"wrong shapes"),
    "a core on a linear": ({"a__lora_mid.weight": ONE(2, 2, 3, 3)}, r"lora_mid.weight is \(2, 2, 3, 3\)\n  wanted"),
    "norms by columns": (
        {"a__dora_scale": ONE(1, 6)},
        r"a.dora_scale is \(1, 6\)\n  wanted .* wd_on_out=False",
    ),
    "NaN": ({"a__lora_up.weight": ONE(6, 2) / 0}, r"lora_unet_a: 1 tensors hold NaN"),
    "a part of LoHa": (
        {f"conv__hada_{name}": ONE(2, 2) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1")},
        r"wanted hada_w1_a, hada_w1_b, hada_w2_a and hada_w2_b, and both cores or none",
    ),
    "LoHa's core": (
        {f"conv__hada_w{i}_{x}": ONE(2, 6 if x == "a" else 4) for i in (1, 2) for x in "ab"}
        | {f"conv__hada_t{i}": ONE(2, 2, 5, 5) for i in (1, 2)},
        r"hada_t1 is \(2, 2, 5, 5\)\n  wanted \(r, r, \*\(3, 3\)\)",
    ),
    "LoHa's matrix": (
        {f"conv__hada_{name}": ONE(6) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        r"hada_w1_a is \(6,\)\n  wanted a matrix",
    ),
    "a decomposed LoKr": (
        {"conv__lokr_w1": ONE(2, 2), "conv__lokr_w2": ONE(3, 2, 3, 3), "conv__dora_scale": ONE(6, 1, 1, 1)},
        r"LoHa and LoKr with a dora_scale .* aren't known here",
    ),
    "a half of LoKr": ({"conv__lokr_w1": ONE(2, 2)}, r"has lokr_w1\n  wanted lokr_w1 or its two factors, and lokr_w2"),
    "LoKr's kernel": (
        {"conv__lokr_w1": ONE(2, 2), "conv__lokr_w2": ONE(3, 2, 5, 5)},
        r"lokr_w2 is \(3, 2, 5, 5\)\n  wanted a matrix, or one with the kernel",
    ),
    "LoKr's ranks": (
        {"conv__lokr_w1": ONE(2, 2), "conv__lokr_w2_a": ONE(3, 1), "conv__lokr_w2_b": ONE(2, 18)},
        r"its factors are .*\n  wanted one rank in all",
    ),
    "LoKr of another size": (
        {"conv__lokr_w1": ONE(2, 2), "conv__lokr_w2": ONE(3, 3, 3, 3)},
        r"wrong shapes: W1 \(2, 2\) and W2 \(3, 3\) are of a layer \(6, 54\), and conv is \(6, 36\)",
    ),
    "LoKr of a split": (
        {"wide__lokr_w1": ONE(20, 1), "wide__lokr_w2": ONE(15, 300)},
        r"its sides are split as \(\(20, 15\), \(1, 300\)\), which no .* a LoRA of rank 300\n  make a LoRA",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_cannot_be_is_named(case: str, tmp_path: Path) -> None:
    others, message = REFUSED[case]
    file, model = tmp_path / "a.safetensors", few_layers()
    save_file(tensors_of(), file)
    ll.detach(model, ll.load(model, file).name)
    save_file(tensors_of(**others), file)
    before = snapshot(model)
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load(model, file)
    assert same_snapshot(before, snapshot(model))


def test_what_is_not_written_is_named(tmp_path: Path) -> None:
    model, file = few_layers(), tmp_path / "a.safetensors"
    ll.attach(model, config("lora", target_names=r"b_c|b\.c|^a$"))
    with pytest.raises(ll.CheckpointError, match=r"b.c: b_c is the name of b.c, b_c\n  leave them out"):
        ll.save_as(model, file, "kohya")
    with pytest.raises(ll.CheckpointError, match=r"a: the original of a Module has no such layer\n  write it with"):
        ll.save_as(model, file, "kohya", names="original")
    with pytest.raises(ll.ConfigError, match=r"names='sgm': wanted 'diffusers' or 'original'"):
        ll.save_as(model, file, "kohya", names="sgm")
    with pytest.raises(ll.ConfigError, match=r"prefix='unet': wanted one of lora_unet, "):
        ll.save_as(model, file, "kohya", prefix="unet")
    with pytest.raises(ll.CheckpointError, match=r"is a folder; kohya's format is one file"):
        ll.save_as(model, tmp_path, "kohya")
    ll.detach(model)
    ll.attach(model, config("lora", target_names="token", kinds="embedding"))
    with pytest.raises(ll.CheckpointError, match=r"token: kohya's format has no adapter on .* 'embedding'\n  leave it"):
        ll.save_as(model, file, "kohya")
    flux = MODELS["flux"]()
    ll.attach(flux, config("lora", target_names=r"^transformer_blocks.*to_q"))
    with pytest.raises(ll.CheckpointError, match=r"to_q is a part of double_blocks_0_img_attn_qkv there, .*to_k"):
        ll.save_as(flux, file, "kohya", names="original")
    assert not file.exists()


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (3.0, 1.5), (-1.0, -0.5), ("int", 2.0)])
def test_alpha(alpha: Any, scale: float, tmp_path: Path) -> None:
    """None and 0 are the rank, to kohya and LyCORIS too; some files have it as an integer."""
    value = torch.tensor(4) if alpha == "int" else None if alpha is None else torch.tensor(alpha)
    stored = tensors_of() | ({} if value is None else {"lora_unet_a.alpha": value})
    save_file(stored, tmp_path / "a.safetensors")
    model = few_layers()
    ll.load(model, tmp_path / "a.safetensors")
    x, before = torch.randn(3, 6), few_layers().a
    down, up = stored["lora_unet_a.lora_down.weight"], stored["lora_unet_a.lora_up.weight"]
    wanted = before(x) + scale * x @ down.T @ up.T
    torch.testing.assert_close(model.a(x), wanted, rtol=1e-5, atol=1e-5)


def text_encoder(width: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=50, max_position_embeddings=8)).eval()


def test_a_file_of_a_pipeline(tmp_path: Path, log: list[str]) -> None:
    """Each model takes its own; of two text encoders with one set of names the one of its width."""
    file, stored, wanted = tmp_path / "a.safetensors", {}, []
    models = [("lora_unet", unet), ("lora_te1", lambda: text_encoder(16)), ("lora_te2", lambda: text_encoder(24))]
    for prefix, build in models:
        model = build()
        perturb(ll.attach(model, config("lora", target_names=r"(to_q|q_proj)$")), 0.2)
        ll.save_as(model, file, "kohya", prefix=prefix)
        stored |= load_file(file)
        wanted.append({key: t.clone() for key, t in ll.adapters(model)["default"].state_dict().items()})
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha" in stored  # as in transformers 4
    save_file(stored, file)
    for (prefix, build), tensors in zip(models, wanted, strict=True):
        loaded = ll.load(build(), file).state_dict()
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
        assert any(f"{prefix} is this model's; " in line and "left there" in line for line in log)
    save_file(stored | {key.replace("te2", "te3"): t.clone() for key, t in stored.items() if "te2" in key}, file)
    with pytest.raises(ll.CheckpointError, match=r"lora_te3.*, 2 have names and sizes of this CLIP.*\n  write the one"):
        ll.load(text_encoder(24), file)


def test_layers_of_this_model_under_another_prefix_are_not_left_there(tmp_path: Path) -> None:
    model, file = text_encoder(16), tmp_path / "a.safetensors"
    perturb(ll.attach(model, config("lora", target_names=r"(q_proj|fc2)$")), 0.2)
    ll.save_as(model, file, "kohya")
    stored = {key.replace("lora_te", "lycoris") if "fc2" in key else key: t for key, t in load_file(file).items()}
    other = {
        "lycoris_elsewhere.lora_down.weight": torch.ones(2, 16),
        "lycoris_elsewhere.lora_up.weight": torch.ones(16, 2),
    }
    save_file(stored | other, file)
    match = r"lycoris_\w*fc2 is this CLIPTextModel's, too, beside lora_te\n  give all of them one prefix"
    with pytest.raises(ll.CheckpointError, match=match):
        ll.load(text_encoder(16), file)


def test_files_without_a_name_for_them_are_known_by_their_keys(tmp_path: Path) -> None:
    save_file({"diffusion_model.x.lora_down.weight": ONE(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(ll.CheckpointError, match=r"diffusion_model.x.lora_down.weight is of no model that is known"):
        ll.load(few_layers(), tmp_path / "a.safetensors")


OTHER_ENDS = [*sorted(ENDS), "diff", "lokr_t1", "lora_A.weight", "", "x.alpha", "bias"]
OTHER_NAMES = ["lora_unet_", "lora_te_x", "x", "lora_unet_b", "lora_unet_a", "lora_unet_conv", "lora_unet_a_"]
SHAPES = [(), (0,), (1,), (2, 2), (6, 6), (1, 1, 3, 3), (2, 2, 3, 3), (0, 6), (6, 0, 3, 3), (2,) * 6]
DTYPES = [torch.int64, torch.bool, torch.float16, torch.float64]


def damaged(key: str, tensor: torch.Tensor, rng: random.Random) -> dict[str, torch.Tensor]:
    """Nothing, or the tensor by another name, or of another shape, dtype or order."""
    name, _, end = key.partition(".")
    turned = tensor.mT if tensor.ndim > 1 else tensor[None]
    shapes = [torch.ones(rng.choice(SHAPES)), tensor.flatten(), turned, tensor[..., None, None]]
    names = [f"{name}.{rng.choice(OTHER_ENDS)}", f"{rng.choice(OTHER_NAMES)}.{end}"]
    others = [(key, value) for value in (*shapes, tensor.to(rng.choice(DTYPES)), tensor / 0)]
    return dict([rng.choice([*others, *((other, tensor) for other in names)])] if rng.random() < 0.9 else [])


@pytest.mark.parametrize("method", [method for method in METHODS if "bits" not in method and "ranks" not in method])
def test_a_damaged_file_loads_or_is_refused(method: str, tmp_path: Path) -> None:
    file, model, rng, raised = tmp_path / "a.safetensors", few_layers(), random.Random(method), 0
    adapted, variant = few_layers(), method.replace(",", "").split()[0]
    perturb(ll.attach(adapted, config(variant, target_names="^(a|conv)$", kinds=("linear", "conv"), **METHODS[method])))
    ll.save_as(adapted, file, "kohya", prefix="lora_unet")
    stored, before = load_file(file), snapshot(model)
    for _ in range(150):
        changed = dict(stored)
        for key in rng.sample(sorted(stored), rng.randint(1, 2)):
            changed |= damaged(key, changed.pop(key), rng)
        save_file({key: tensor.clone().contiguous() for key, tensor in changed.items()}, file)
        with contextlib.suppress(ll.LoraLiteError):
            ll.load(model, file)
        if ll.adapters(model):
            ll.detach(model)
        else:
            raised += 1
        assert same_snapshot(before, snapshot(model))
    assert 75 < raised < 150


def test_two_names_of_one_layer_are_refused(tmp_path: Path) -> None:
    model, file, stored = MODELS["flux"](), tmp_path / "a.safetensors", {}
    ll.attach(model, config("lora", target_names=r"single_transformer_blocks.*proj_out"))
    for names in ("diffusers", "original"):
        ll.save_as(model, file, "kohya", prefix="lora_unet", names=names)
        stored |= load_file(file)
    save_file(stored, file)
    with pytest.raises(ll.CheckpointError, match=r"is of .*proj_out, as another name in the file is"):
        ll.load(MODELS["flux"](), file)


def test_an_upsampler_without_attention_before_it_is_the_second_part_of_its_block() -> None:
    model = unet()
    names = original_names(model, {path for path, _ in model.named_modules()})
    ups = {name: place.paths for name, place in names.items() if name.startswith("output_blocks")}
    assert ups["output_blocks_1_1_conv"] == ("up_blocks.0.upsamplers.0.conv",)
    assert names["input_blocks_2_0_op"].paths == ("down_blocks.0.downsamplers.0.conv",)
