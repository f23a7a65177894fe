"""Targeting: by shape and path, in every block naming; the errors; the printed plan."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import IDS, OneLinear, config, moe, tiny_llama
from torch import nn

import lora_lite as ll
from lora_lite.core.targets import Target

SMALL: dict[str, Any] = {"vocab_size": 64}
FAMILIES = {
    "llama": lambda: tiny_llama(num_hidden_layers=3),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=3, n_embd=32, n_head=4, **SMALL)),
    "mpt": lambda: transformers.MptForCausalLM(transformers.MptConfig(n_layers=3, d_model=32, n_heads=4, **SMALL)),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            num_hidden_layers=3, hidden_size=32, num_attention_heads=4, intermediate_size=64, pad_token_id=0, **SMALL
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(num_layers=3, d_model=32, d_kv=8, num_heads=4, d_ff=64, **SMALL)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            num_hidden_layers=3, hidden_size=32, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4
        )
    ),
}
LINEAR_LAYERS_A_BLOCK = {"llama": 7, "gpt2": 4, "mpt": 4, "bert": 6, "t5": None, "vit": 6}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_is_every_linear_layer_of_the_blocks(family: str) -> None:
    model = FAMILIES[family]()
    targets = ll.plan(model, ll.LoRAConfig())
    per_block = LINEAR_LAYERS_A_BLOCK[family]
    if per_block is None:  # T5: 6 in an encoder block, 10 in a decoder block
        assert len(targets) == 3 * 6 + 3 * 10
    else:
        assert len(targets) == 3 * per_block
    assert {target.block for target in targets} == {0, 1, 2}
    assert not any(part in target.path for target in targets for part in ("lm_head", "embed", "classifier", "wte"))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_on_every_block_naming(family: str) -> None:
    model = FAMILIES[family]().eval()
    adapter = ll.attach(model, ll.LoRAConfig(layers=(-1,), r=2))
    ids = torch.arange(8)[None]
    inputs = {"pixel_values": torch.ones(1, 3, 8, 8)} if family == "vit" else {"input_ids": ids}
    if family == "t5":
        inputs["decoder_input_ids"] = ids
    model(**inputs).logits.square().sum().backward()
    grads = {key: tensor.grad for key, tensor in adapter.named_tensors() if key.endswith("lora_B")}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    assert all(".2." in key for key in grads)


def test_conv1d_is_seen_as_a_linear_layer() -> None:
    """GPT-2's Conv1D keeps its weight transposed; the view and the maths don't."""
    from transformers.pytorch_utils import Conv1D

    layer, x = Conv1D(24, 16), torch.randn(5, 16)
    model = OneLinear()
    model.proj = layer
    base = model(x)
    for variant in ("lora", "dora", "pissa"):
        adapter = ll.attach(model, config(variant, target_names="proj"))
        assert adapter.targets == {"proj": (16, 24)}
        assert torch.equal(model(x), base)
        ll.detach(model)
    assert ll.plan(model, config("lora", target_names="proj")).targets[0].d_out == 24


def test_layers_and_ranges() -> None:
    model = tiny_llama(num_hidden_layers=10)

    def blocks(**fields: Any) -> list[int]:
        return sorted({t.block for t in ll.plan(model, ll.LoRAConfig(**fields)) if t.block is not None})

    assert blocks(layers=(0, -1)) == [0, 9]
    assert blocks(layer_range=(0.2, 0.8)) == [2, 3, 4, 5, 6, 7]  # the middle 60 %
    assert blocks(layer_range=(0.0, 1.0)) == list(range(10))
    assert blocks(layer_range=(0.0, 0.5), layers=(4, 5)) == [4]
    with pytest.raises(ll.TargetError, match=r"layers=\(10,\): \[10\] name no block; stacks: \{'model.layers.': 10\}"):
        blocks(layers=(10,))


def test_names_are_searched_in_the_full_path_and_exclusion_wins() -> None:
    model = tiny_llama()

    def paths(**fields: Any) -> list[str]:
        return [t.path for t in ll.plan(model, ll.LoRAConfig(**fields))]

    assert paths(target_names=r"layers\.1\..*up_proj") == ["model.layers.1.mlp.up_proj"]
    assert paths(target_names=("up_proj", "down_proj"), exclude_names=r"\.0\.") == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert paths(target_names="lm_head") == ["lm_head"]


def test_roles() -> None:
    model = tiny_llama()

    def names(**fields: Any) -> set[str]:
        return {t.path.rpartition(".")[2] for t in ll.plan(model, ll.LoRAConfig(**fields))}

    assert names(target_roles="writer") == {"o_proj", "down_proj"}  # a square layer by its name
    assert names(target_roles="reader") == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    for block in model.model.layers:
        block.self_attn.mix = block.self_attn.o_proj
        del block.self_attn.o_proj
    with pytest.raises(
        ll.TargetError, match=r"2 layers are 64 x 64, so they could be readers or writers\n  such as model.*mix"
    ):
        names(target_roles="writer")
    assert names(target_roles="writer", exclude_names="mix") == {"down_proj"}
    assert "mix" in names()  # it blocks nothing when no role is asked for


def test_the_width_comes_from_a_nested_config_and_is_never_guessed() -> None:
    text = SimpleNamespace(hidden_size=16)
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(16, 99), "down": nn.Linear(99, 16)})])}
    )
    with pytest.raises(ll.TargetError, match="no config that gives its width"):
        ll.plan(model, ll.LoRAConfig(target_roles="writer"))
    model.config = SimpleNamespace(get_text_config=lambda: text)  # type: ignore[assignment]
    assert [t.path for t in ll.plan(model, ll.LoRAConfig(target_roles="writer"))] == ["layers.0.down"]


def test_no_match_lists_the_nearest_names() -> None:
    message = (
        r"no layer matched target_names=\('q_poj',\) in LlamaForCausalLM\n"
        r"  15 linear layers searched; nearest: model.layers.0.self_attn.q_proj, .*\n"
        r"  preview with lora_lite.plan\(model, cfg\)"
    )
    for call in (ll.plan, ll.attach):
        with pytest.raises(ll.TargetError, match=message):
            call(tiny_llama(), ll.LoRAConfig(target_names="q_poj"))
    with pytest.raises(ll.TargetError, match="no layer matched the defaults of 'lora' in ReLU"):
        ll.plan(nn.ReLU(), ll.LoRAConfig())


def test_a_name_of_a_layer_of_another_kind_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    match = r"1 linear layers searched; nearest: 2\n  0 is a layer of kinds='conv', which this config doesn't name\n"
    with pytest.raises(ll.TargetError, match=match):
        ll.plan(model, ll.LoRAConfig(target_names="0"))
    with pytest.raises(ll.TargetError, match=r"0 layers of kinds=\('embedding',\) searched"):
        ll.plan(model, ll.LoRAConfig(target_names="0", kinds="embedding"))


def test_a_model_without_blocks_is_adapted_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert [t.path for t in ll.plan(model, ll.LoRAConfig(r=2))] == ["0", "2"]


def test_a_shared_layer_is_adapted_once() -> None:
    layer = nn.Linear(8, 8)
    adapter = ll.attach(nn.Sequential(layer, nn.ReLU(), layer), ll.LoRAConfig(r=2))
    assert list(adapter.targets) == ["0"]


def test_plan_prints_one_row_for_a_kind_of_layer() -> None:
    text = str(ll.plan(tiny_llama(), ll.LoRAConfig(r=4, target_names=("up_proj", "k_proj"))))
    assert text.splitlines() == [
        "lora on LlamaForCausalLM: 4 layers, 2,304 trainable parameters",
        "layer                            in -> out  role    base     n",
        "model.layers.*.self_attn.k_proj  64 -> 32   reader  float32  2",
        "model.layers.*.mlp.up_proj       64 -> 128  reader  float32  2",
    ]


def left_out(plan: ll.Plan) -> list[str]:
    lines = str(plan).splitlines()
    return [line for line in lines if line.startswith(("left out:", " "))]


def test_plan_says_what_the_defaults_leave_out() -> None:
    model = tiny_llama()
    plan = ll.plan(model, ll.LoRAConfig(r=4))
    assert plan.left_out == (("lm_head", "the output head"),)
    # 96 x 64 of 86,336 parameters each; five norms of 64.
    assert left_out(plan) == [
        "left out: model.embed_tokens (embedding, 7 % of the parameters)",
        "left out: lm_head (the output head, 7 %)",
        "left out: norms and other vectors x 5 (0.4 %)",
    ]
    tied = left_out(ll.plan(tiny_llama(tie_word_embeddings=True), ll.LoRAConfig(r=4)))
    assert tied[-1] == "left out: lm_head (the output head, tied)"
    excluded = ll.plan(model, ll.LoRAConfig(r=4, exclude_names=("lm_head", "norm")))
    assert excluded.left_out == ()
    assert [entry.paths for entry in excluded.unadapted] == ["model.embed_tokens"]
    named = ll.plan(model, ll.LoRAConfig(r=4, target_names="up_proj"))
    assert named.left_out == named.unadapted == ()
    assert "left out" not in str(named)
    shallow = ll.plan(model, ll.LoRAConfig(r=4, layers=(0,)))  # the filter says so, not the defaults
    assert shallow.unadapted == plan.unadapted


def test_the_shares_and_what_is_adapted_make_the_model() -> None:
    """Of each kind of layer, with a weight in two places."""
    model = moe("mixtral", tie_word_embeddings=True)
    model.model.conv = nn.Conv1d(8, 8, 3)
    model.model.weighted = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
    model.model.table = nn.Parameter(torch.zeros(5, 7))
    model.model.token = nn.Parameter(torch.zeros(1, 1, 64))
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    reasons = {entry.paths: entry.reason for entry in plan.unadapted}
    assert reasons == {
        "model.layers.*.mlp.experts": 'fused experts: kinds=("experts",) takes their matrices',
        "model.embed_tokens": "embedding",
        "lm_head": "the output head",
        "model.layers.*.mlp.gate.weight": "a router of experts",
        "norms and other vectors": "",
        "model.conv": "convolution",
        "model.weighted.parametrizations.weight.original1": "a bare parameter",
        "model.table": "a bare parameter",
    }
    total = sum(p.numel() for p in model.parameters())  # a tied one once
    adapted = sum(model.get_submodule(target.path).weight.numel() for target in plan)
    assert sum(entry.share for entry in plan.unadapted) == pytest.approx(1 - adapted / total)
    lines = left_out(plan)
    assert lines[:2] == [
        'left out: model.layers.*.mlp.experts x 2 (fused experts: kinds=("experts",)',
        "          takes their matrices, 70 % of the parameters)",
    ]
    experts = ll.plan(model, ll.LoRAConfig(r=2, kinds=("linear", "experts", "conv", "embedding", "matrix")))
    assert not any("experts" in entry.paths or entry.reason == "embedding" for entry in experts.unadapted)
    only = ll.plan(model, ll.LoRAConfig(r=2, kinds=("experts",)))
    assert sum(entry.share for entry in only.unadapted if entry.reason == "linear layer") == pytest.approx(
        adapted / total
    )


def test_packed_codes_count_as_the_numbers_that_they_are() -> None:
    model, packed = tiny_llama(), tiny_llama()
    head = packed.lm_head
    head.weight = nn.Parameter(torch.zeros(96 * 64 // 2, 1, dtype=torch.uint8), requires_grad=False)  # 4 bits each
    shares = [
        {entry.paths: entry.share for entry in ll.plan(each, ll.LoRAConfig(r=2)).unadapted} for each in (model, packed)
    ]
    assert shares[0] == shares[1]


def test_plan_says_it_in_few_lines_of_80_columns() -> None:
    model = tiny_llama()
    model.model.a_projector_with_a_rather_long_name = nn.ModuleList([nn.Linear(8, 8) for _ in range(40)])
    model.model.an_attribute_whose_name_alone_is_longer_than_a_line_of_eighty_columns_can_be_in_all = nn.Linear(8, 8)
    for i in range(8):
        setattr(model.model, f"head_{chr(97 + i)}", nn.Linear(8, 8))
    plan = ll.plan(model, ll.LoRAConfig(r=4))
    lines = left_out(plan)
    assert lines[-3:-1] == [
        "left out: model.a_projector_with_a_rather_long_name.* x 40, 9 more (in no stack",
        "          of blocks, 4 %)",
    ]
    assert max(map(len, lines)) <= 80
    assert len(plan.left_out) == 1 + 40 + 1 + 8
    for i in range(12):  # each with a reason of its own
        setattr(model.model, f"odd_{chr(97 + i)}", Refusing(f"reason {i} " + "is a long one " * 4))
        model.model.layers[0].add_module(f"odd_{chr(97 + i)}", Refusing(f"reason {i} " + "is a long one " * 4))
    lines = left_out(ll.plan(model, ll.LoRAConfig(r=4)))
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("left out: for ")
    assert lines[-1].endswith(" (Plan.unadapted)")


class Refusing(nn.Linear):
    """It takes no input."""

    def __init__(self, reason: str) -> None:
        super().__init__(8, 8)
        self.reason = reason

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(self.reason)


ROLES = {
    "reader": "attn.Wq attention.q_lin self_attn.k_proj.linear attention.receptance self.query_proj self.key_global "
    "self.w2e_query temporal_block.linear_y self_attn.q_a_proj self_attn.kv_a_proj_with_mqa self_attn.linear_v "
    "self_attn.output_gate cross_attn.value_proj cross_attn.attention_weights ffn.intermediate_dense mlp.Wi ffn.lin1",
    "writer": "attn.Wo attention.out_lin self_attn.o_proj.linear attention.output self_attn.output "
    "self_attn.linear_out "
    "temporal_block.linear_out ffn.output_dense self_attn.projection attn.to_out.0 mlp.fc2 attention.output.dense "
    "ffn.lin2 self_attn.post_proj",
    None: "self_attn.mix layers.0.linear attention.self block.dense_of_some_kind",
}


@pytest.mark.parametrize("role", ROLES)
def test_square_layers_by_name(role: str | None) -> None:
    names = ROLES[role].split()
    assert {name: Target(f"model.layers.0.{name}", 8, 8, "float32").role(8) for name in names} == dict.fromkeys(
        names, role
    )
    assert Target("model.layers.0.self_attn.mix", 8, 9, "float32").role(8) == "reader"  # where the shape tells


DIMS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
MLA: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DEFAULTS: dict[str, tuple[Any, str, str, str]] = {  # class and config; targets of ia3, ia3_ff and steer
    "GPT2LMHeadModel": (
        lambda: transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, **SMALL),
        "attn.c_attn",
        "mlp.c_proj",
        "mlp.c_proj",
    ),
    "GPTNeoXForCausalLM": (
        lambda: transformers.GPTNeoXConfig(**DIMS, **SMALL),
        "attention.query_key_value",
        "mlp.dense_4h_to_h",
        "mlp.dense_4h_to_h",
    ),
    "BloomForCausalLM": (
        lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SMALL),
        "self_attention.query_key_value",
        "mlp.dense_4h_to_h",
        "mlp.dense_4h_to_h",
    ),
    "FalconForCausalLM": (
        lambda: transformers.FalconConfig(**(DIMS | {"ffn_hidden_size": 40}), **SMALL),
        "self_attention.query_key_value",
        "mlp.dense_4h_to_h",
        "mlp.dense_4h_to_h",
    ),
    "MptForCausalLM": (
        lambda: transformers.MptConfig(n_layers=2, d_model=32, n_heads=4, **SMALL),
        "attn.Wqkv",
        "ffn.down_proj",
        "ffn.down_proj",
    ),
    "DeepseekV3ForCausalLM": (
        lambda: transformers.DeepseekV3Config(**DIMS, **MLA, **SMALL),
        "self_attn.kv_b_proj",
        "mlp.down_proj mlp.experts.down_proj shared_experts.down_proj",
        "mlp.down_proj mlp.experts",
    ),
    "MixtralForCausalLM": (
        lambda: transformers.MixtralConfig(num_local_experts=4, num_key_value_heads=2, **DIMS, **SMALL),
        "self_attn.k_proj self_attn.v_proj",
        "experts.down_proj",
        "mlp.experts",
    ),
    "GraniteMoeSharedForCausalLM": (
        lambda: transformers.GraniteMoeSharedConfig(
            num_local_experts=4, num_key_value_heads=2, shared_intermediate_size=24, **DIMS, **SMALL
        ),
        "self_attn.k_proj self_attn.v_proj",
        "experts.down_proj shared_mlp.output_linear",
        "block_sparse_moe.experts",  # not the shared part too: the block's output would get the vector twice
    ),
    "BertForMaskedLM": (
        lambda: transformers.BertConfig(**DIMS, **SMALL),
        "self.key self.value",
        "output.dense",
        "output.dense",
    ),
    "ModernBertForMaskedLM": (
        lambda: transformers.ModernBertConfig(**DIMS, pad_token_id=0, **SMALL),
        "attn.Wqkv",
        "mlp.Wo",
        "mlp.Wo",
    ),
    "DistilBertForMaskedLM": (
        lambda: transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=40, **SMALL),
        "attention.k_lin attention.v_lin",
        "ffn.lin2",
        "ffn.lin2",
    ),
    "T5ForConditionalGeneration": (
        lambda: transformers.T5Config(num_layers=2, d_model=32, d_kv=8, num_heads=4, d_ff=40, **SMALL),
        "EncDecAttention.k EncDecAttention.v SelfAttention.k SelfAttention.v",
        "DenseReluDense.wo",
        "DenseReluDense.wo",
    ),
    "MambaForCausalLM": (
        lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, **SMALL),
        "",
        "",
        "mixer.out_proj",
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_ia3_and_steer_know_the_families(name: str) -> None:
    make, *wanted = DEFAULTS[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(make())
    configs: list[Any] = [ll.IA3Config(), ll.IA3FFConfig(), ll.SteerConfig()]
    for cfg, names in zip(configs, wanted, strict=True):
        if not names:
            with pytest.raises(ll.TargetError, match="no layer matched"):
                ll.plan(model, cfg)
            continue
        plan = ll.plan(model, cfg)
        assert {".".join(t.path.split(".")[-len(n.split(".")) :]) for t in plan for n in names.split()} >= set(
            names.split()
        )
        assert all(any(t.path.endswith(f".{n}") for n in names.split()) for t in plan)
        assert {t.block for t in plan} == {0, 1}


def test_ia3_ff_scales_what_each_expert_reads() -> None:
    """W_e (l_e ⊙ x), against a model whose matrices hold the scales."""
    model, other = moe("mixtral", torch.float64), moe("mixtral", torch.float64)
    for each in (model, other):
        each.set_experts_implementation("eager")  # grouped products have no float64
    before = model(input_ids=IDS).logits
    adapter = ll.attach(model, ll.IA3FFConfig(dtype=torch.float64))
    assert {target.path for target in adapter.layers} == {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)}
    assert torch.equal(model(input_ids=IDS).logits, before)
    with torch.no_grad():
        for key, tensor in adapter.named_tensors():
            tensor.add_(torch.randn_like(tensor), alpha=0.3)  # (experts, d_in)
            other.get_parameter(key.removesuffix(".lora_l")).mul_(tensor[:, None])  # (experts, d_out, d_in)
    torch.testing.assert_close(model(input_ids=IDS).logits, other(input_ids=IDS).logits)
    model(input_ids=IDS).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_the_tensors_of_an_adapter_are_no_targets() -> None:
    """Those of fused experts stand beside the matrices, as bare parameters."""
    model, cfg = moe("mixtral"), ll.LoRAConfig(r=2, kinds=("linear", "experts", "matrix", "embedding"))
    before = ll.plan(model, cfg)
    assert ll.attach(model, cfg).targets.keys() == {target.path for target in before}
    assert str(ll.plan(model, cfg)) == str(before)
    assert ll.attach(model, cfg, "second").targets == {t.path: (t.d_in, t.d_out) for t in before}


def test_parametrised_convolutions_and_embeddings_are_in_no_ones_way() -> None:
    """A weight that is computed is no parameter; wav2vec2's positions are such a convolution."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
        layer.words = nn.utils.parametrizations.weight_norm(nn.Embedding(8, 8))
    for kinds in (("linear",), ("linear", "conv", "embedding")):
        targets = {target.path for target in ll.plan(model, ll.LoRAConfig(r=2, kinds=kinds))}
        assert not any("conv" in path or "words" in path for path in targets)


def test_a_vector_of_three_dimensions_writes_nothing() -> None:
    """RWKV keeps (1, 1, d) beside its layers."""
    with torch.device("meta"):
        model = transformers.RwkvForCausalLM(transformers.RwkvConfig(hidden_size=32, num_hidden_layers=2, **SMALL))
    names = {".".join(t.path.split(".")[-2:]) for t in ll.plan(model, ll.AbliterationConfig())}
    assert names == {"attention.output", "feed_forward.value"}


def test_the_head_of_a_model_without_blocks_is_left_out() -> None:
    """A classifier is the last layer and has a row for each label."""
    model: Any = nn.ModuleDict({"stem": nn.Linear(4, 8), "classifier": nn.Sequential(nn.ReLU(), nn.Linear(8, 5))})
    model.config = transformers.PretrainedConfig(num_labels=5)
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    assert [target.path for target in plan] == ["stem"]
    assert plan.left_out == (("classifier.1", "the output head"),)
    named = ll.plan(model, ll.LoRAConfig(r=2, target_names="classifier"))
    assert [target.path for target in named] == ["classifier.1"]
    resnet = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    )
    with pytest.raises(
        ll.TargetError,
        match=r"nearest: classifier.1\n  left out by default: classifier.1 \(the output head\)\n  preview",
    ):
        ll.plan(resnet, ll.LoRAConfig(r=2))


def test_musicgen_has_two_language_models_and_roles_are_the_decoders() -> None:
    model = transformers.MusicgenForConditionalGeneration(
        transformers.MusicgenConfig(
            text_encoder={"model_type": "t5", "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
            | SMALL,
            audio_encoder={"model_type": "encodec", "num_filters": 4, "hidden_size": 16, "codebook_size": 32},
            decoder={
                "hidden_size": 16,
                "ffn_dim": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_codebooks": 2,
                "pad_token_id": 0,
            }
            | SMALL,
        )
    )
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    assert plan.d_model == 16
    assert {t.stack for t in plan} == {"text_encoder.encoder.block.", "decoder.model.decoder.layers."}
    assert len(ll.attach(model, ll.LoRAConfig(r=2)).targets) == len(plan)
    writers = ll.plan(model, ll.LoRAConfig(r=2, target_roles="writer"))
    assert {t.stack for t in writers} == {"decoder.model.decoder.layers."}


def test_a_mask_is_no_packed_weight() -> None:
    """GPT-Neo's blocks hold their causal mask as a buffer of bools; a packed weight's codes are integers."""
    cfg = ll.AbliterationConfig()
    model = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], **SMALL
        )
    )
    names = {t.path.rpartition(".")[2] for t in ll.plan(model, cfg)}
    assert names == {"out_proj", "c_proj"}
    attention: Any = model.transformer.h[1].attn
    del attention.attention.out_proj
    attention.attention.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
    with pytest.raises(ll.TargetError, match=r"transformer.h.1.attn.attention: this GPTNeoSelfAttention may write"):
        ll.plan(model, cfg)


def test_plan_agrees_with_attach_and_leaves_the_model_alone() -> None:
    model = tiny_llama()
    keys = list(model.state_dict())
    plan = ll.plan(model, ll.LoRAConfig(r=4))
    assert list(model.state_dict()) == keys
    adapter = ll.attach(model, ll.LoRAConfig(r=4))
    assert adapter.targets == {t.path: (t.d_in, t.d_out) for t in plan}
    assert plan.parameters == sum(p.numel() for p in adapter.parameters())
