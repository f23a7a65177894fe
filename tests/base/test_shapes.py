"""What looks like a linear layer and is none, and routers: left out by default; by name, the former are refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import OneLinear, moe
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.ibert.quant_modules import QuantLinear

import lora_lite as ll
from lora_lite.base.layer import layer_of
from lora_lite.base.probe import not_linear
from lora_lite.base.stacks import layer_shapes, routers


class Scaled(nn.Linear):
    """y = 2 W x + b."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


class Spelled(nn.Linear):
    """y = W x + b, with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.mT + self.bias


class Wrapped(nn.Module):
    """Another library's adapter around a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = layer, layer.in_features, layer.out_features

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + F.dropout(x, 0.5, self.training).sum()


class WrappedAlone(Wrapped):
    """It adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


class Net(nn.Module):
    """Two layers, of which one is odd."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.odd, self.plain = odd, nn.Linear(8, 8)


ODD: dict[str, tuple[nn.Module, str]] = {
    "grouped": (DeepseekV4GroupedLinear(8, 32, n_groups=2), r"it gives \(1, 2, 16\) for \(1, 2, 8\), not \(1, 2, 32\)"),
    "grouped by four": (
        DeepseekV4GroupedLinear(8, 32, n_groups=4),
        r"it takes no input \(1, 2, 8\): RuntimeError: shape.*",
    ),
    "a tuple": (QuantLinear(8, 8), "it gives a tuple, not a tensor"),
    "scaled": (Scaled(8, 8), r"its forward is not W x \+ b"),
    "attention": (nn.MultiheadAttention(8, 2).out_proj, "nn.MultiheadAttention reads its weight without calling it"),
}


@pytest.fixture(autouse=True)
def _filled() -> None:
    """QuantLinear's weight is made of zeros."""
    with torch.no_grad():
        ODD["a tuple"][0].weight.normal_()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("name", ODD)
def test_what_is_not_w_x_plus_b_is_left_out_by_default_and_refused_by_name(name: str) -> None:
    layer, reason = ODD[name]
    model = Net(layer)
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    assert [target.path for target in plan] == ["plain"]
    assert [path for path, _ in plan.left_out] == ["odd"]
    assert ll.attach(model, ll.LoRAConfig(r=2)).targets == {"plain": (8, 8)}
    keys = list(model.state_dict())
    for call in (ll.plan, ll.attach):
        with pytest.raises(ll.TargetError, match=rf"odd: an adapter can't act on this .*: {reason}\n  leave it out"):
            call(model, ll.LoRAConfig(r=2, target_names="odd|plain"), *(["named"] if call is ll.attach else []))
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    "layer",
    [Spelled(8, 8), FalconLinear(8, 8), Wrapped(nn.Linear(8, 8)), Scaled(8, 8, device="meta"), nn.LazyLinear(8)],
    ids=["spelled", "falcon", "wrapped", "meta", "lazy"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_linear_or_can_not_be_asked_stays(layer: nn.Module, dtype: torch.dtype) -> None:
    assert not_linear([layer_of(layer.to(dtype), "odd")]) == {}


def test_a_layer_is_asked_without_a_trace() -> None:
    """Neither hooks, modes, gradients nor the generator see the question."""
    layers = {"a": Spelled(8, 8).train(), "b": Scaled(8, 8).train()}
    for layer in layers.values():
        layer.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert not_linear([layer_of(layer, path) for path, layer in layers.items()]) == {
            "b": "its forward is not W x + b"
        }
    assert all(layer.training for layer in layers.values())
    assert torch.equal(torch.get_rng_state(), before)


class Changed(nn.Linear):
    """A layer with this forward, given the layer and its arguments."""

    def __init__(self, change: Any, d: int = 8) -> None:
        super().__init__(d, d)
        self.change = change

    def forward(self, *args: Tensor) -> Any:
        return self.change(self, *args)


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def in_batches(layer: nn.Linear, x: Tensor) -> Tensor:
    b, n, d = x.shape
    return product(layer, x).view(b, n, d)


def in_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    assert layer.bias is not None
    return torch.addmm(layer.bias, x, layer.weight.mT)


class Residual(nn.Linear):
    """It wants another argument."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + residual


def out_of_memory(*_: Any) -> Tensor:
    raise torch.OutOfMemoryError


def in_two_dtypes() -> nn.Module:
    """A 16-bit weight and a float32 bias."""
    layer = Changed(lambda layer, x: F.linear(x, layer.weight).float() + layer.bias)
    layer.weight.data = layer.weight.data.bfloat16()
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: Changed(in_batches),
        lambda: Changed(in_rows),
        lambda: Residual(8, 8),
        lambda: Changed(out_of_memory),
        in_two_dtypes,
    ],
    ids=["batches only", "rows only", "another argument", "no memory", "two dtypes"],
)
def test_no_layer_is_refused_for_the_question(make: Any) -> None:
    assert not_linear([layer_of(make(), "odd")]) == {}


def test_each_layer_answers_for_itself() -> None:
    def scaled(layer: nn.Linear, x: Tensor) -> Tensor:
        return 2 * product(layer, x)

    layers: dict[str, nn.Module] = {
        "meta": Changed(scaled).to("meta"),
        "zero": Changed(scaled),
        "full": Changed(scaled),
    }
    for parameter in layers["zero"].parameters():
        nn.init.zeros_(parameter)
    assert not_linear([layer_of(layer, path) for path, layer in layers.items()]) == {
        "full": "its forward is not W x + b"
    }
    assert not_linear([layer_of(patched(), "replaced")]) == {"replaced": "its forward is not W x + b"}


def patched() -> nn.Module:
    """An nn.Linear with a forward of the instance."""
    layer: Any = nn.Linear(8, 8)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    return layer


def test_a_layer_is_asked_once() -> None:
    rows: list[int] = []

    def counted(layer: nn.Linear, x: Tensor) -> Tensor:
        rows.append(x.shape[-2])
        return product(layer, x)

    model = nn.ModuleList([Changed(counted) for _ in range(3)])
    for names in ((), "."):
        for call in (ll.plan, ll.attach):
            rows.clear()
            call(model, ll.LoRAConfig(r=2, target_names=names))
            assert rows.count(2) == 3  # the others are the gradient's
        ll.detach(model)


def test_a_question_takes_none_of_the_random_numbers() -> None:
    layer = Changed(lambda layer, x: product(layer, x) + 0 * torch.rand(()))
    before = torch.get_rng_state()
    assert not_linear([layer_of(layer, "drawing")]) == {}
    assert torch.equal(torch.get_rng_state(), before)


def test_an_encoder_of_torch_takes_an_adapter_as_it_is() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False
    )
    adapter = ll.attach(model, ll.LoRAConfig(r=2))
    parts = ("linear1", "linear2", "self_attn.in_proj_weight", "self_attn.out_proj")
    assert set(adapter.targets) == {f"layers.{i}.{part}" for i in (0, 1) for part in parts}
    model(torch.randn(2, 3, 16)).square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_writers_asked_for_by_role_are_never_left_out_in_silence() -> None:
    model: Any = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
    model.config = transformers.PretrainedConfig(hidden_size=16)
    plan = ll.plan(model, ll.LoRAConfig(r=2, target_roles="writer"))
    assert {t.path for t in plan} == {
        f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.out_proj", "linear2")
    }


SMALL: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0}
ROUTED: dict[str, tuple[Any, set[str]]] = {
    "switch, experts by name": (
        lambda: transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(
                d_model=32,
                d_kv=8,
                d_ff=40,
                num_layers=2,
                num_decoder_layers=2,
                num_heads=4,
                num_experts=4,
                num_sparse_encoder_layers=2,
                num_sparse_decoder_layers=2,
                relative_attention_num_buckets=32,
                **SMALL,
            )
        ),
        {
            f"{part}.{i}.layer.{j}.mlp.router.classifier"
            for part, j in (("encoder.block", 1), ("decoder.block", 2))
            for i in (0, 1)
        },
    ),
    "phimoe, a tuple": (
        lambda: transformers.PhimoeForCausalLM(
            transformers.PhimoeConfig(
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=4,
                **SMALL,
            )
        ),
        {f"model.layers.{i}.mlp.router" for i in (0, 1)},
    ),
    "dbrx, experts in one matrix": (
        lambda: transformers.DbrxForCausalLM(
            transformers.DbrxConfig(
                d_model=32,
                n_heads=2,
                n_layers=2,
                attn_config={"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 10000.0},
                ffn_config={"ffn_hidden_size": 40, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
                **SMALL,
            )
        ),
        {f"transformer.blocks.{i}.ffn.router.layer" for i in (0, 1)},
    ),
    "jetmoe, of attention too": (
        lambda: transformers.JetMoeForCausalLM(
            transformers.JetMoeConfig(
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=2,
                num_key_value_heads=2,
                kv_channels=8,
                num_local_experts=4,
                num_experts_per_tok=2,
                **SMALL,
            )
        ),
        {f"model.layers.{i}.{part}.router.layer" for i in (0, 1) for part in ("mlp", "self_attention.experts")},
    ),
    "longcat, some experts without a matrix": (
        lambda: transformers.LongcatFlashForCausalLM(
            transformers.LongcatFlashConfig(
                hidden_size=32,
                ffn_hidden_size=40,
                expert_ffn_hidden_size=24,
                num_layers=1,
                num_attention_heads=2,
                kv_lora_rank=8,
                q_lora_rank=8,
                qk_nope_head_dim=8,
                qk_rope_head_dim=8,
                v_head_dim=8,
                n_routed_experts=4,
                zero_expert_num=2,
                moe_topk=2,
                **SMALL,
            )
        ),
        {"model.layers.0.mlp.router.classifier"},
    ),
    "no experts: t5, whose tables are as long as its layers are wide": (
        lambda: transformers.T5EncoderModel(
            transformers.T5Config(
                d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, relative_attention_num_buckets=32, **SMALL
            )
        ),
        set(),
    ),
}


class Plain(nn.Module):
    """A linear layer that is no nn.Linear, as DeepSeek's own code has it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Table(nn.Module):
    """Relative positions: 64 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(64, 4))


def block(linear: type[nn.Module], **others: nn.Module) -> nn.Module:
    """Attention of 16 channels, and an MLP."""
    shapes = {"q": (16, 16), "k": (16, 16), "v": (16, 16), "o": (16, 16), "w1": (16, 32), "w2": (32, 16)}
    return nn.ModuleDict({"norm": nn.LayerNorm(16)} | {n: linear(*shape) for n, shape in shapes.items()} | others)


@pytest.mark.parametrize(
    "make", [lambda: block(Plain), lambda: block(nn.Linear, table=Table())], ids=["layers of another class", "a table"]
)
def test_neither_linear_layers_nor_tables_are_experts(make: Any) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([make(), make()])})
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    wanted = ("q", "k", "v", "o", "w1", "w2")
    assert [target.path for target in plan] == [f"layers.{i}.{name}" for i in (0, 1) for name in wanted]
    assert not any(why == "a router of experts" for _, why in plan.left_out)


@pytest.mark.parametrize("name", ROUTED)
def test_a_router_is_left_out_by_what_it_is(name: str) -> None:
    make, paths = ROUTED[name]
    with torch.device("meta"):
        model = make()
    modules = dict(model.named_modules())
    assert routers(modules, layer_shapes(modules)) == paths
    plan = ll.plan(model, ll.LoRAConfig(r=2))
    assert {path for path, why in plan.left_out if why == "a router of experts"} == paths
    if paths:
        assert {t.path for t in ll.plan(model, ll.LoRAConfig(r=2, target_names=r"router"))} == paths


def test_a_router_that_gives_a_tuple_is_refused_by_name() -> None:
    model = ROUTED["phimoe, a tuple"][0]()
    with pytest.raises(
        ll.TargetError, match=r"model.layers.0.mlp.router: an adapter can't act on this PhimoeTopKRouter"
    ):
        ll.attach(model, ll.LoRAConfig(r=2, target_names="router"))
    adapter = ll.attach(model.eval(), ll.LoRAConfig(r=2))
    model(input_ids=torch.arange(8)[None]).logits.square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_fused_experts_are_named_in_the_plan() -> None:
    plan = ll.plan(moe("mixtral"), ll.LoRAConfig(r=2))
    reason = 'fused experts: kinds=("experts",) takes their matrices'
    assert [path for path, why in plan.left_out if why == reason] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert "left out: model.layers.*.mlp.experts x 2 (fused experts:" in str(plan)
    whole = ll.plan(moe("mixtral"), ll.AbliterationConfig())
    assert not any("experts" in path for path, _ in whole.left_out)


MATRICES = "matrices that are no linear layer"


def test_no_matrices_of_a_block_are_omitted_in_silence() -> None:
    """Dbrx keeps the rows of all experts in one matrix, nn.MultiheadAttention those of q, k and v."""
    with torch.device("meta"):
        dbrx = ROUTED["dbrx, experts in one matrix"][0]()
    plan = ll.plan(dbrx, ll.LoRAConfig(r=2))
    assert [path for path, why in plan.left_out if why == MATRICES] == [
        f"transformer.blocks.{i}.ffn.experts.mlp" for i in (0, 1)
    ]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False
    )
    plan = ll.plan(encoder, ll.LoRAConfig(r=2))
    assert not plan.left_out  # nn.MultiheadAttention's projections are targets
    assert max(map(len, str(plan).splitlines())) <= 80


def test_what_is_no_projection_is_not_named() -> None:
    """Convolutions, in parametrisations too, norms, embeddings, vectors, and what a linear layer holds."""
    blocks = nn.ModuleList([block(nn.Linear) for _ in range(2)])
    others = {
        "conv": nn.Conv1d(4, 4, 3),
        "weighted": nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
        "normed": nn.LayerNorm((2, 4)),
        "words": nn.Embedding(4, 4),
        "bags": nn.EmbeddingBag(4, 4),
        "wrapped": WrappedAlone(nn.Linear(16, 16)),
        "parametrised": nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
    }
    for name, module in others.items():
        blocks[0].add_module(name, module)
    blocks[0].register_parameter("scale", nn.Parameter(torch.ones(1, 16)))
    plan = ll.plan(nn.ModuleDict({"layers": blocks}), ll.LoRAConfig(r=2))
    assert plan.left_out == ()
    blocks[1].register_parameter("table", nn.Parameter(torch.ones(8, 16)))
    assert ll.plan(nn.ModuleDict({"layers": blocks}), ll.LoRAConfig(r=2)).left_out == (("layers.1", MATRICES),)


def test_one_layer_is_a_model() -> None:
    assert ll.plan(OneLinear(), ll.LoRAConfig(r=2)).left_out == ()
