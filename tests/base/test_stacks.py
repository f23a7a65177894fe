"""Stacks of blocks are found by what they are: in toys of each form, in real classes of odd names, and after a load."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import transformers
from models import tiny_llama
from torch import nn

import lora_lite as ll
from lora_lite.base.stacks import find_stacks, place, starred

D = 8


class Block(nn.Module):
    """Two linear layers and a norm."""

    def __init__(self, d: int = D, d_out: int = D) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d_out)


class Other(Block):
    """A block of another class."""


def residual(d_out: int = D) -> nn.Module:
    """No norm; it gives back the width that it takes, or another one, as a head does."""
    return nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, d_out))


def listed(*children: nn.Module, kind: Any = nn.ModuleList) -> nn.Module:
    return kind(children) if kind is nn.ModuleList else kind(*children)


def numbered(*names: int) -> nn.ModuleDict:
    return nn.ModuleDict({str(name): Block() for name in names})


def named(*children: nn.Module) -> nn.Module:
    """Not a list: a module that has two others."""
    module = nn.Module()
    for i, child in enumerate(children):
        setattr(module, f"tower_{i}", child)
    return module


def with_experts() -> nn.Module:
    block = Block()
    block.experts = nn.ModuleList([residual() for _ in range(4)])  # type: ignore[assignment]
    return block


FORMS: dict[str, tuple[nn.Module, dict[str, int]]] = {
    "a list": (listed(Block(), Block(), Block()), {"net.": 3}),
    "one block": (listed(Block()), {"net.": 1}),
    "two classes in a list": (listed(Block(), Other()), {"net.": 2}),
    "nn.Sequential of one class": (listed(Block(), Block(), kind=nn.Sequential), {"net.": 2}),
    "nn.Sequential of two classes": (listed(Block(), Other(), kind=nn.Sequential), {}),
    "numbers from 2": (numbered(2, 5), {"net.": 6}),
    "a name among the numbers": (nn.ModuleDict({"0": Block(), "norm": Block()}), {}),
    "one name with numbers": (
        nn.Sequential(OrderedDict(encoder_layer_0=Block(), encoder_layer_1=Block())),
        {"net.encoder_layer_": 2},
    ),
    "one name with numbers, no list": (named(Block(), Block()), {}),
    "two names with numbers": (nn.ModuleDict({"a_0": Block(), "b_1": Block()}), {}),
    "a list of lists": (listed(listed(nn.Linear(D, D), Block())), {"net.": 1}),
    "stages of blocks": (listed(listed(Block(), Block()), listed(Block(), Block())), {"net.": 2}),
    "experts in a block": (listed(with_experts(), with_experts()), {"net.": 2}),
    "blocks without a norm": (listed(residual(), residual()), {"net.": 2}),
    "projections, another width": (listed(Block(d_out=3), Block(d_out=3)), {"net.": 2}),
    "heads: another width, no norm": (listed(residual(4), residual(4)), {}),
    "linear layers (q, k, v; a head)": (listed(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 4)), {}),
    "one linear layer each": (listed(nn.Sequential(nn.Linear(D, D), nn.ReLU()), nn.Sequential(nn.Linear(D, D))), {}),
    "nothing linear": (listed(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_is_a_list_of_equal_blocks(form: str) -> None:
    net, depths = FORMS[form]
    modules = dict(nn.ModuleDict({"net": net}).named_modules())
    stacks = find_stacks(modules)
    assert stacks.depths == depths
    assert list(stacks.blocks(modules)) == [f"net.{name}" for name in net._modules if depths]
    for path in stacks.blocks(modules):
        stack, block = stacks.place(f"{path}.up")
        assert f"{stack}{block}" == path
        assert starred(f"{path}.up", (stack, block)) == f"{stack}*.up"


def test_blocks_of_one_name_with_numbers_are_chosen_by_depth() -> None:
    """As torchvision's ViT has them."""
    blocks = OrderedDict((f"encoder_layer_{i}", Block()) for i in range(12))
    model = nn.ModuleDict({"encoder": nn.Sequential(blocks), "heads": nn.Linear(D, 3)})
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    assert plan.left_out == (("heads", "in no stack of blocks"),)
    assert [(t.stack, t.block) for t in plan.targets[-2:]] == [("encoder.encoder_layer_", 11)] * 2
    assert "encoder.encoder_layer_*.up " in str(plan)
    last = ll.plan(model, ll.LoRAConfig(r=2, layers=[-1]))
    assert [target.path for target in last] == ["encoder.encoder_layer_11.up", "encoder.encoder_layer_11.down"]


def test_a_model_itself_is_no_stack() -> None:
    model = nn.Sequential(Block(), Block())
    assert find_stacks(dict(model.named_modules())).depths == {}
    assert len(ll.plan(model, ll.LoRAConfig(r=2))) == 4


REAL: dict[str, tuple[Any, dict[str, int]]] = {
    "videomae": (
        lambda: transformers.VideoMAEForPreTraining(
            transformers.VideoMAEConfig(
                image_size=8,
                patch_size=4,
                num_frames=2,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=40,
                decoder_hidden_size=16,
                decoder_num_attention_heads=4,
                decoder_num_hidden_layers=3,
                decoder_intermediate_size=40,
            )
        ),
        {"videomae.encoder.layer.": 2, "decoder.decoder_layers.": 3},
    ),
    "lxmert": (
        lambda: transformers.LxmertModel(
            transformers.LxmertConfig(
                vocab_size=64,
                hidden_size=32,
                num_attention_heads=2,
                intermediate_size=40,
                l_layers=1,
                r_layers=2,
                x_layers=3,
            )
        ),
        {"encoder.layer.": 1, "encoder.r_layers.": 2, "encoder.x_layers.": 3},
    ),
    "gemma3n audio": (
        lambda: transformers.Gemma3nAudioEncoder(
            transformers.Gemma3nAudioConfig(
                hidden_size=32,
                conf_num_hidden_layers=2,
                conf_num_attention_heads=4,
                input_feat_size=32,
                sscp_conv_channel_size=[16, 8],
            )
        ),
        {"conformer.": 2},
    ),
    "jamba": (
        lambda: transformers.JambaForCausalLM(
            transformers.JambaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=4,
                num_attention_heads=2,
                num_key_value_heads=2,
                attn_layer_period=2,
                attn_layer_offset=1,
                num_experts=2,
                mamba_dt_rank=2,
                use_mamba_kernels=False,
                pad_token_id=0,
            )
        ),
        {"model.layers.": 4},
    ),
    "swin": (
        lambda: transformers.SwinModel(
            transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2])
        ),
        {"encoder.layers.": 2},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_stacks_of_real_models(name: str) -> None:
    make, depths = REAL[name]
    model = make()
    assert find_stacks(dict(model.named_modules())).depths == depths
    assert {target.stack for target in ll.plan(model, ll.LoRAConfig(r=2))} == set(depths)


def test_a_box_heads_list_of_linear_layers_is_no_stack() -> None:
    model = transformers.YolosForObjectDetection(
        transformers.YolosConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            image_size=[16, 16],
            patch_size=8,
            num_detection_tokens=3,
        )
    )
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    assert {target.stack for target in plan} == {"vit.encoder.layer."}
    assert ("bbox_predictor.layers.2", "in no stack of blocks") in plan.left_out
    named = ll.plan(model, ll.LoRAConfig(r=2, target_names="bbox_predictor"))
    assert [target.path for target in named] == [f"bbox_predictor.layers.{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("path", "at", "star"),
    [
        ("model.layers.3.mlp.up", ("model.layers.", 3), "model.layers.*.mlp.up"),
        ("h.12.attn", ("h.", 12), "h.*.attn"),
        (
            "0.auto_model.encoder.layer.3.dense",
            ("0.auto_model.encoder.layer.", 3),
            "0.auto_model.encoder.layer.*.dense",
        ),
        ("encoder.layers.1.blocks.0.up", ("encoder.layers.", 1), "encoder.layers.*.blocks.0.up"),
        ("model.layers.0.mlp.experts.5.w1", ("model.layers.", 0), "model.layers.*.mlp.experts.5.w1"),
        ("audio.encoders.2.q_proj", ("audio.encoders.", 2), "audio.encoders.*.q_proj"),
        ("merger.mlp.2", (None, None), "merger.mlp.2"),  # a layer, no block
        ("encoder.encoder_layer_3.up", (None, None), "encoder.encoder_layer_3.up"),  # a stack where there is a model
        ("lm_head", (None, None), "lm_head"),
        ("2", (None, None), "2"),
    ],
)
def test_a_path_alone_says_as_much_where_there_is_no_model(path: str, at: Any, star: str) -> None:
    assert place(path) == at
    assert starred(path) == star


def oddly_named() -> Any:
    """A tiny Llama, its blocks under another name."""
    model = tiny_llama()
    model.model.bricks = model.model.layers
    del model.model.layers
    return model


def test_a_loaded_adapter_is_where_the_attached_one_was(tmp_path: Path) -> None:
    model, path = oddly_named(), tmp_path / "adapter.safetensors"
    attached = ll.attach(model, ll.LoRAConfig(r=2, layers=[-1], target_names=("lm_head", r"bricks.*up_proj")))
    ll.save(model, path)
    ll.save_peft(model, tmp_path / "peft")
    raw = {key: tensor.clone() for key, tensor in attached.named_tensors()}
    places = [(target.stack, target.block) for target in attached.layers]
    assert places == [("model.bricks.", 1)]
    loaded = (
        lambda other: ll.load(other, path),
        lambda other: ll.load_peft(other, tmp_path / "peft"),
    )
    for load in loaded:
        adapter = load(oddly_named())
        assert [(target.stack, target.block) for target in adapter.layers] == places
    assert raw.keys() == {f"model.bricks.1.mlp.up_proj.{name}" for name in ("lora_A", "lora_B")}
