"""Files that diffusers writes, with diffusers itself on the other end."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from models import config, perturb, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_laws import same_snapshot, snapshot

import lora_lite as ll

FILE = "pytorch_lora_weights.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:.*`torch_dtype` is deprecated:FutureWarning")


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def flux() -> Any:
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    widths = {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    return FluxTransformer2DModel(**sizes, **widths, axes_dims_rope=(4, 4, 8)).eval()


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if isinstance(model, FluxTransformer2DModel):
        ids = torch.zeros(5, 3)
        states = {"hidden_states": noise(1, 4, 4), "encoder_hidden_states": noise(1, 5, 32)}
        rest = {"pooled_projections": noise(1, 32), "img_ids": ids[:4], "txt_ids": ids}
        sample: torch.Tensor = model(**states, **rest, timestep=torch.tensor([0.5])).sample
    else:
        sample = model(noise(1, 4, 8, 8), 3, noise(1, 5, 8)).sample
    return sample


MODELS = {"unet": unet, "flux": flux}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_v": 5}},
    "dora": {"use_dora": True},
}


def theirs(model: Any, **fields: Any) -> Any:
    """The model with an adapter of diffusers' that has moved."""
    model.add_adapter(peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_v"]} | fields)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_models_own_file(name: str, kind: str, tmp_path: Path) -> None:
    other = theirs(MODELS[name](), **KINDS[kind])
    other.save_lora_adapter(tmp_path)
    wanted = output(other)
    assert float((wanted - output(MODELS[name]())).abs().max()) > 1e-2
    for read in (ll.load, ll.load_peft):
        for path in (tmp_path, tmp_path / FILE):
            model = MODELS[name]()
            adapter = read(model, path)
            assert adapter.variant == ("dora" if kind == "dora" else "lora")
            assert all(target.endswith(("to_q", "to_v")) for target in adapter.targets)
            assert_close(output(model), wanted)


def pipelines_file(folder: Path, *others: str) -> torch.Tensor:
    """A pipeline's file with an adapter of its UNet, and of these other components; the UNet's output."""
    model = theirs(unet())
    held = peft.get_peft_model_state_dict(model)
    described = model.peft_config["default"].to_dict()
    described["target_modules"] = sorted(described["target_modules"])
    encoder = {key.replace("down_blocks", "layers"): tensor.clone() for key, tensor in held.items()}
    layers: dict[str, Any] = {"unet_lora_layers": held, "unet_lora_adapter_metadata": described}
    for component in others:
        layers |= {f"{component}_lora_layers": encoder, f"{component}_lora_adapter_metadata": described}
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return output(model)


@pytest.mark.parametrize("others", [(), ("text_encoder",)])
def test_a_pipelines_file(others: tuple[str, ...], tmp_path: Path, log: list[str]) -> None:
    wanted = pipelines_file(tmp_path, *others)
    model = unet()
    ll.load(model, tmp_path)
    assert_close(output(model), wanted)
    left = [line for line in log if "unet is this model's; 32 tensors of text_encoder left there" in line]
    assert len(left) == len(others)


def test_a_file_for_other_models(tmp_path: Path) -> None:
    pipelines_file(tmp_path, "text_encoder")
    llama = tiny_llama()
    before = snapshot(llama)
    message = r"its lora_adapter_metadata is of 2 models: (unet, text_encoder|text_encoder, unet)\n  load it on one of"
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load(llama, tmp_path)
    assert same_snapshot(before, snapshot(llama))
    pipelines_file(tmp_path)
    with pytest.raises(ll.CheckpointError, match=r"16 of its 16 target layers are not in this LlamaForCausalLM"):
        ll.load(llama, tmp_path)


def test_what_the_settings_cannot_be_is_named_with_its_place(tmp_path: Path) -> None:
    other, model = theirs(unet(), target_modules=["to_q", "conv1"]), unet()
    other.save_lora_adapter(tmp_path)
    ll.load(model, tmp_path)
    assert_close(output(model), output(other))  # convolutions, too
    theirs(unet()).save_lora_adapter(tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = file.metadata()
    described = json.loads(metadata["lora_adapter_metadata"]) | {"use_qalora": True}
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, {"lora_adapter_metadata": json.dumps(described)})
    message = rf"{FILE}: its lora_adapter_metadata: use_qalora=true can't be kept here"
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load(unet(), tmp_path)


def test_a_file_without_settings(tmp_path: Path) -> None:
    """Older files say neither rank nor alpha; the caller's config does."""
    other = theirs(unet())
    other.save_lora_adapter(tmp_path)
    save_file(load_file(tmp_path / FILE), tmp_path / FILE)
    with pytest.raises(
        ll.CheckpointError, match=r"no lora_adapter_metadata, in which diffusers .*\n.*load\(model, path"
    ):
        ll.load_peft(unet(), tmp_path)
    with pytest.raises(ll.CheckpointError, match=r"raw tensors say neither(.*\n)*.* diffusers takes alpha = r"):
        ll.load(unet(), tmp_path)
    model = unet()
    ll.load(model, tmp_path, cfg=ll.LoRAConfig(r=4, alpha=6.0))
    assert_close(output(model), output(other))
    save_file({f"unet.{key}": tensor for key, tensor in load_file(tmp_path / FILE).items()}, tmp_path / FILE)
    with pytest.raises(ll.CheckpointError, match=r"of a pipeline's unet, without .*\n.*: give cfg=LoRAConfig"):
        ll.load(unet(), tmp_path)
    model = unet()
    ll.load(model, tmp_path, cfg=ll.LoRAConfig(r=4, alpha=6.0))
    assert_close(output(model), output(other))
    stored = load_file(tmp_path / FILE)
    save_file(stored | {"text_encoder.a.lora_A.weight": torch.ones(4, 2)}, tmp_path / FILE)
    with pytest.raises(ll.CheckpointError, match=r"of a pipeline's text_encoder, unet, .*\n.* into a file of its own"):
        ll.load(unet(), tmp_path, cfg=ll.LoRAConfig(r=4, alpha=6.0))


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_reads_a_folder_of_ours(name: str, tmp_path: Path) -> None:
    """Its keys have no prefix, and the settings are an argument."""
    model = MODELS[name]()
    perturb(ll.attach(model, config("lora", target_names=r"to_(q|v)$", r=4, alpha=6.0)), 0.2)
    ll.save_peft(model, tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in held.items()}
    other = MODELS[name]()
    other.load_lora_adapter(state, prefix=None, metadata=json.loads((tmp_path / "adapter_config.json").read_text()))
    assert_close(output(other), output(model))
    assert not torch.allclose(output(other), output(MODELS[name]()), atol=1e-3)


def test_layers_that_a_fused_projection_replaces_are_named() -> None:
    """fuse_qkv_projections makes new layers of the weights of to_q, to_k and to_v, which nothing calls any more."""
    model = unet()
    model.fuse_qkv_projections()
    ll.attach(model, config("lora", target_names=r"to_(q|k|v|out\.0)$"))
    generator = torch.Generator().manual_seed(0)
    sample, states = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 5, 8)))
    with pytest.raises(ll.TargetError, match=r"not called in this forward, although the module around it was: .*to_k"):
        ll.audit(model, {"sample": sample, "timestep": 3, "encoder_hidden_states": states})
    model(sample, 3, states)
    with pytest.raises(ll.TargetError, match=r"layers were never called, .*to_q"):
        ll.merge(model)
