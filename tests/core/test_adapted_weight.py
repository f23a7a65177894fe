"""Adapters that are reached through the weight: experts, nn.MultiheadAttention, layers that are read, convolutions,
embeddings. Each against the dense formula W' = W + s B A in float64, gradients too."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from models import moe, perturb, tiny_llama
from torch import Tensor, nn
from torch.func import functional_call

import lora_lite as ll

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": 0}
MOE = {
    "mixtral": lambda: moe("mixtral"),
    "qwen3_moe": lambda: moe("qwen3"),
    "gpt_oss": lambda: moe("gpt_oss"),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2)),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(**SMALL, num_local_experts=4, head_dim=8, intermediate_size_mlp=24)
    ),
    "granitemoe": lambda: tf.GraniteMoeForCausalLM(tf.GraniteMoeConfig(**SMALL, num_local_experts=4)),
    "phimoe": lambda: tf.PhimoeForCausalLM(tf.PhimoeConfig(**SMALL, num_local_experts=4)),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **SMALL | {"num_key_value_heads": 4},
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        )
    ),
    "dbrx": lambda: tf.DbrxForCausalLM(
        tf.DbrxConfig(
            vocab_size=64,
            d_model=32,
            n_heads=4,
            n_layers=2,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        )
    ),
    "jetmoe": lambda: tf.JetMoeForCausalLM(
        tf.JetMoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=8,
            num_local_experts=4,
        )
    ),
}
IDS = torch.arange(1, 13).reshape(2, 6)


@pytest.fixture(autouse=True)
def _one_path():
    """A hook takes torch's fused attention off; so that outputs can be compared bit for bit, the base goes without."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


randomize = partial(perturb, size=0.3)


def built(make) -> nn.Module:
    torch.manual_seed(0)
    model = make().double().eval().requires_grad_(False)
    model.set_experts_implementation("eager")  # torch's grouped products know no float64
    return model


def oracle(model: nn.Module, adapter, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters with W + s B A for each target, differentiable in the factors."""
    parameters = dict(model.named_parameters())
    changed = {}
    for path, (_d_in, _d_out) in adapter.targets.items():
        weight = parameters[path if path in parameters else f"{path}.weight"]
        a, b = factors[f"{path}.lora_A"], factors[f"{path}.lora_B"]
        delta = adapter.config.scaling * b @ a  # (o, i) or (e, o, i)
        key = path if path in parameters else f"{path}.weight"
        flat = delta if delta.shape == weight.shape and not _transposed(model, path) else delta.mT
        changed[key] = weight + (flat if flat.shape == weight.shape else delta.reshape(weight.shape))
    return changed


def _transposed(model: nn.Module, path: str) -> bool:
    owner, _, _name = path.rpartition(".")
    holder = model.get_submodule(owner)
    if isinstance(dict(model.named_modules()).get(path), nn.Embedding):
        return True
    return bool(getattr(holder, "is_transposed", False)) or type(holder).__name__ in (
        "Llama4TextExperts",
        "GptOssExperts",
    )


def check_against_oracle(model: nn.Module, cfg, *args, atol: float = 1e-9, least: float = 1e-4, **kwargs) -> None:
    base = copy.deepcopy(model)
    before = _output(base(*args, **kwargs))
    adapter = ll.attach(model, cfg)
    with torch.no_grad():  # torch's matmul folds an input by whether the weight wants a gradient, as W' does
        assert torch.equal(_output(model(*args, **kwargs)), before)  # identity, bit for bit
    randomize(adapter)
    factors = {key: t.detach().clone().requires_grad_() for key, t in adapter.state_dict().items()}
    wanted = _output(functional_call(base, oracle(base, adapter, factors), args, kwargs))
    got = _output(model(*args, **kwargs))
    assert (got - before).abs().max() > least
    torch.testing.assert_close(got, wanted, atol=atol, rtol=max(1e-8, atol))
    direction = torch.randn_like(got)
    got.backward(direction)
    wanted.backward(direction)
    for key, tensor in adapter.named_tensors():
        torch.testing.assert_close(tensor.grad, factors[key].grad, atol=atol, rtol=max(1e-7, atol))
    ll.detach(model)
    assert torch.equal(_output(model(*args, **kwargs)), before)


def _output(out) -> Tensor:
    return (
        out
        if isinstance(out, Tensor)
        else out[0]
        if isinstance(out, tuple)
        else out.logits
        if "logits" in out
        else out[0]
    )


@pytest.mark.parametrize("kind", MOE)
def test_experts_equal_the_dense_formula(kind: str) -> None:
    model = built(MOE[kind])
    # DBRX keeps the rows of all experts in one matrix.
    cfg = ll.LoRAConfig(r=2, kinds=["matrix" if kind == "dbrx" else "experts"], dtype=torch.float64)
    check_against_oracle(model, cfg, input_ids=IDS)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_every_implementation_of_experts(kind: str, implementation: str) -> None:
    model = built(MOE[kind])
    model.set_experts_implementation(implementation)
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    model.to(dtype)
    atol = 1e-4 if implementation == "grouped_mm" else 1e-9
    check_against_oracle(model, ll.LoRAConfig(r=2, kinds=["experts"], dtype=dtype), input_ids=IDS, atol=atol)


def test_multihead_attention_is_a_default_target() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2, enable_nested_tensor=False
    )
    model = model.double().eval().requires_grad_(False)
    plan = ll.plan(model, ll.LoRAConfig())
    assert {t.pattern.rpartition("*.")[2] for t in plan} == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj",
        "linear1",
        "linear2",
    }
    check_against_oracle(model, ll.LoRAConfig(r=2, dtype=torch.float64), torch.randn(2, 5, 32).double())


class Attention(nn.Module):
    def __init__(self, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attn(q, k, v)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_with_parts_of_other_widths(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Attention(nn.MultiheadAttention(32, 4, kdim=16, vdim=24, batch_first=batch_first)).double()
    model.eval().requires_grad_(False)
    q, k, v = (torch.randn(2, 2, d).double() for d in (32, 16, 24))
    check_against_oracle(model, ll.LoRAConfig(r=2, dtype=torch.float64), q, k, v)


def test_a_layer_that_is_read_is_reached() -> None:
    model = built(
        lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8))
    )
    cfg = ll.LoRAConfig(r=4, target_names=[r"dt_proj$"], dtype=torch.float64)
    # The mixer computes in float32 whatever its weights are.
    check_against_oracle(model, cfg, input_ids=IDS, atol=1e-5, least=1e-5)
    ll.attach(model, cfg)
    randomize(ll.adapters(model)["default"])
    audit = ll.audit(model, {"input_ids": IDS})
    assert all(layer.ran for layer in audit.layers)
    attached = _output(model(input_ids=IDS))
    ll.merge(model)
    torch.testing.assert_close(_output(model(input_ids=IDS)), attached)


class Functional(nn.Module):
    """A bare matrix, used in each way that the tensor can tell."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.matrix = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        w = self.matrix
        return {
            "linear": lambda: F.linear(x, w, torch.ones(6).to(x)),
            "x @ w.T": lambda: x @ w.T,
            "x @ w.mT": lambda: x @ w.mT,
            "matmul": lambda: torch.matmul(x, w.t()),
            "transpose": lambda: x @ w.transpose(0, 1),
            "w @ x": lambda: (w @ x.mT).mT,
            "w @ vector": lambda: torch.stack([w @ row for row in x.reshape(-1, 4)]),
            "einsum": lambda: torch.einsum("...i,oi->...o", x, w),
            "chunk": lambda: torch.cat([F.linear(x, part) for part in w.chunk(2)], -1),
            "cast": lambda: F.linear(x, w.to(x.dtype)),
            "by keyword": lambda: F.linear(weight=w, input=x, bias=torch.ones(6).to(x)),
            "matmul by keyword": lambda: torch.matmul(other=w.transpose(dim0=0, dim1=1), input=x),
        }[self.use]()


USES = ["linear", "x @ w.T", "x @ w.mT", "matmul", "transpose", "w @ x", "w @ vector", "einsum", "chunk", "cast"]
USES += ["by keyword", "matmul by keyword"]


@pytest.mark.parametrize("use", USES)
def test_a_bare_matrix_in_any_use(use: str) -> None:
    torch.manual_seed(0)
    model = Functional(use).double().eval().requires_grad_(False)
    cfg = ll.LoRAConfig(r=2, kinds=["matrix"], dtype=torch.float64)
    check_against_oracle(model, cfg, torch.randn(2, 3, 4).double())


@pytest.mark.parametrize("use", ["linear", "x @ w.T", "einsum"])
@pytest.mark.parametrize("cfg", [ll.IA3Config, ll.IA3FFConfig, ll.DoRAConfig], ids=lambda c: c.__name__)
def test_a_bias_that_the_module_adds_is_no_methods_affair(cfg, use: str) -> None:
    """So that the adapter does the same wherever the product is made, and merges."""
    torch.manual_seed(0)
    model = Functional(use).double().eval().requires_grad_(False)
    x = torch.randn(2, 3, 4).double()
    rank = {"r": 2} if cfg is ll.DoRAConfig else {}
    adapter = ll.attach(model, cfg(kinds=["matrix"], dtype=torch.float64, target_names=["."], **rank))
    randomize(adapter)
    attached = model(x)
    ll.merge(model)
    torch.testing.assert_close(model(x), attached, atol=1e-6, rtol=1e-6)


CONVS = list(itertools.product((1, 2, 3), (1, 2), (1, 3)))


@pytest.mark.parametrize(("dims", "groups", "kernel"), CONVS)
def test_convolutions_equal_the_dense_formula(dims: int, groups: int, kernel: int) -> None:
    torch.manual_seed(0)
    conv = getattr(nn, f"Conv{dims}d")
    model = nn.Sequential(
        conv(4, 6, kernel, stride=2, padding=1, groups=groups, padding_mode="reflect"),
        nn.ReLU(),
        conv(6, 4, kernel, dilation=2, padding="same", groups=groups, bias=False),
    )
    model = model.double().eval().requires_grad_(False)
    x = torch.randn(2, 4, *[9] * dims).double()
    check_against_oracle(model, ll.LoRAConfig(r=2, kinds=["conv"], dtype=torch.float64), x)
    check_against_oracle(model, ll.LoRAConfig(r=2, kinds=["conv"], dtype=torch.float64), x[0])


def test_an_embedding_equals_the_dense_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8, padding_idx=0), nn.Linear(8, 3)).double().eval().requires_grad_(False)
    ids = torch.tensor([[1, 2, 3], [4, 1, 9]])
    check_against_oracle(model, ll.LoRAConfig(r=2, kinds=["embedding"], dtype=torch.float64), ids)


class Read(nn.Module):
    """A layer whose weight and bias are read, and not called."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


@pytest.mark.parametrize("cfg", [partial(ll.AdaLoRAConfig, init_r=2, target_r=2), partial(ll.VeRAConfig, r=2)])
@pytest.mark.parametrize("kind", ["conv", "embedding", "tied", "read"])
def test_a_vector_s_in_float32_beside_a_16_bit_base(cfg, kind: str) -> None:
    torch.manual_seed(0)
    model, x = {
        "conv": lambda: (nn.Sequential(nn.Conv1d(4, 6, 3)), torch.randn(2, 4, 9).bfloat16()),
        "embedding": lambda: (nn.Sequential(nn.Embedding(20, 8)), torch.randint(0, 20, (3, 5))),
        "tied": lambda: (tiny_llama(tie_word_embeddings=True), IDS),
        "read": lambda: (Read(), torch.randn(3, 8).bfloat16()),
    }[kind]()
    model = model.bfloat16().eval()
    tied = {"target_names": "embed_tokens", "tied_weights": "together"} if kind == "tied" else {"target_names": "."}
    before = _output(model(x))
    adapter = ll.attach(model, cfg(kinds=("linear", "conv", "embedding"), **tied))
    assert torch.equal(_output(model(x)), before)
    perturb(adapter, 0.3)
    attached = _output(model(x))
    assert attached.dtype == torch.bfloat16
    assert not torch.equal(attached, before)
    attached.sum().backward()
    ll.merge(model)
    torch.testing.assert_close(_output(model(x)), attached.detach(), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("cfg", [ll.DoRAConfig, ll.IA3Config, ll.PiSSAConfig, ll.IA3FFConfig], ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", ["conv", "embedding", "experts", "linear"])
def test_every_method_on_every_kind_merges_as_it_is_attached(cfg, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "conv":
        model, x = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1, groups=2)), torch.randn(2, 4, 7, 7).double()
    elif kind == "embedding":
        model, x = nn.Sequential(nn.Embedding(10, 8)), torch.tensor([[1, 2, 3], [4, 1, 9]])
    elif kind == "experts":
        model, x = built(MOE["mixtral"]), IDS
    else:
        model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8).double()
    model = model.double().eval().requires_grad_(False)
    before = _output(model(x))
    adapter = ll.attach(
        model,
        cfg(
            kinds=[kind],
            **({"r": 2} if cfg is not ll.IA3Config and cfg is not ll.IA3FFConfig else {}),
            dtype=torch.float64,
            target_names=["."],
        ),
    )
    assert torch.allclose(_output(model(x)), before, atol=1e-12)
    randomize(adapter)
    attached = _output(model(x))
    assert not torch.allclose(attached, before, atol=1e-5)
    attached.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    ll.merge(model)
    precise = 1e-6 if cfg is ll.DoRAConfig else 1e-9  # DoRA forms its norms in float32
    torch.testing.assert_close(_output(model(x)), attached.detach(), atol=precise, rtol=precise)
    ll.unmerge(model)
    ll.detach(model)
    assert torch.equal(_output(model(x)), before)
