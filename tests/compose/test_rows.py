"""A batch in which each row has its own adapter or its own scale: as the adapters one by one, and errors elsewhere."""

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import BUT_THREE, attach, config, is_trained, moe, perturb, quantized_llama, tiny_llama
from torch import Tensor, nn
from torch.func import functional_call
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

import lora_lite as ll

VARIANTS = sorted(ll.REGISTRY)
NAMES = ["b", None, "a", "b"]
ROWS = torch.arange(28).reshape(4, 7) % 23 + 1
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def two(model: Any, variant: str = "lora", **fields: Any) -> Any:
    """The model with two adapters of a method, which differ in their numbers."""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        perturb(attach(model, config(variant, **fields), name), 0.2, seed)
    ll.adapters(model)["b"].scale = 0.7
    return model


@contextmanager
def alone(model: Any, name: str | None, c: float | None = None) -> Iterator[None]:
    """The model with this adapter alone."""
    handles = ll.adapters(model)
    before = {each: handle.scale for each, handle in handles.items()}
    for each, handle in handles.items():
        handle.scale = 0.0 if each != name else handle.scale if c is None else c
    yield
    for each, handle in handles.items():
        handle.scale = before[each]


def one_by_one(model: Any, x: dict[str, Tensor], names: Any = NAMES) -> Tensor:
    """The output of each row, from a batch of the rows of its adapter."""
    outputs = {}
    for name in dict.fromkeys(names):
        mine = [i for i, each in enumerate(names) if each == name]
        with alone(model, name):
            outputs |= dict(zip(mine, output(model, {key: tensor[mine] for key, tensor in x.items()}), strict=True))
    return torch.stack([outputs[i] for i in range(len(names))])


def output(model: Any, x: dict[str, Tensor]) -> Tensor:
    y = model(**x)
    y = y if isinstance(y, tuple | Tensor) else y[0] if "last_hidden_state" in y else y.logits
    return y[0] if isinstance(y, tuple) else y


def small(**overrides: Any) -> Any:
    return tiny_llama(torch.float64, num_hidden_layers=1, bias=True, **overrides)


def filters(variant: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"dtype": torch.float64, "exclude_names": BUT_THREE}
    if variant == "abliteration":
        fields |= {"target_roles": ("writer",), "target_names": ()}
    return fields


# ---- laws over the registry ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_each_row_has_the_output_of_its_adapter(variant: str) -> None:
    model = two(small(), variant, **filters(variant))
    x = {"input_ids": ROWS}
    wanted = one_by_one(model, x)
    with ll.rows(model, NAMES):
        y = output(model, x)
    torch.testing.assert_close(y, wanted, **EXACT)
    with ll.disabled(model):
        assert torch.equal(y[1], output(model, x)[1]), "a row without an adapter is the base, bit for bit"
    assert (wanted[0] - wanted[1]).abs().max() > 1e-6
    for name in "ab":
        with ll.rows(model, [name] * 4), torch.enable_grad():
            y = output(model, x)
        with alone(model, name), torch.enable_grad():
            assert torch.equal(y, output(model, x)), "one adapter for all rows is that adapter, bit for bit"
        with ll.rows(model, [name] * 4):  # without gradients: of few tokens, another product
            torch.testing.assert_close(output(model, x), y, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_each_row_has_the_output_at_its_scale(variant: str) -> None:
    model, scales = two(small(), variant, **filters(variant)), [-0.5, 1.0, 0.0, 1.0]
    x = {"input_ids": ROWS}
    wanted = torch.empty(4, 7, 96, dtype=torch.float64)
    for c in set(scales):
        mine = [i for i, each in enumerate(scales) if each == c]
        with alone(model, "a", c):
            wanted[mine] = output(model, {"input_ids": ROWS[mine]})
    with ll.scaled(model, 0.0, "b"), ll.scaled(model, scales, "a"):
        y = output(model, x)
    torch.testing.assert_close(y, wanted, **EXACT)
    with ll.rows(model, ["a", "b", "b", None]), ll.scaled(model, scales):
        y = output(model, x)
    for i, name in enumerate(("a", "b", "b", None)):
        with alone(model, name, scales[i]):
            torch.testing.assert_close(y[i : i + 1], output(model, {"input_ids": ROWS[i : i + 1]}), **EXACT)


@pytest.mark.parametrize("variant", [*filter(is_trained, VARIANTS)])
def test_the_gradients_are_those_of_an_adapters_rows(variant: str) -> None:
    model = two(small(), variant, **filters(variant))
    weight = torch.randn(4, 7, 96, dtype=torch.float64)

    def gradients(run: Any) -> dict[str, dict[str, Tensor | None]]:
        model.zero_grad()
        torch.manual_seed(3)
        (run() * weight).sum().backward()
        handles = ll.adapters(model).items()
        return {name: {key: t.grad for key, t in handle.named_tensors()} for name, handle in handles}

    def together() -> Tensor:
        with ll.rows(model, NAMES):
            return output(model, {"input_ids": ROWS})

    got = gradients(together)
    for name in "ab":
        mine = [i for i, each in enumerate(NAMES) if each == name]

        def by_itself(name: str = name, mine: list[int] = mine) -> Tensor:
            with alone(model, name):
                y = output(model, {"input_ids": ROWS[mine]})
            return torch.zeros_like(weight).index_copy(0, torch.tensor(mine), y)

        wanted = gradients(by_itself)[name]
        assert any(gradient is not None for gradient in wanted.values())
        for key, gradient in wanted.items():
            if gradient is not None:
                torch.testing.assert_close(got[name][key], gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("variant", ["lora", "dora", "ia3", "oft"])
@torch.no_grad()
def test_rows_on_a_quantised_base(variant: str, quantization: str) -> None:
    model = two(quantized_llama(quantization), variant)
    wanted = one_by_one(model, {"input_ids": ROWS})
    with ll.rows(model, NAMES):
        y = output(model, {"input_ids": ROWS})
    torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
    if quantization != "int8":  # bitsandbytes' outliers are those of the whole batch
        with ll.disabled(model):
            assert torch.equal(y[1], output(model, {"input_ids": ROWS})[1])
    assert (wanted[0] - wanted[1]).abs().max() > 0.1 * wanted.abs().max()


# ---- kinds of layer -------------------------------------------------------------------------------


class Chain(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first, self.mha = batch_first, nn.MultiheadAttention(16, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:  # (b, t, 16)
        turned = x if self.batch_first else x.transpose(0, 1)
        hidden = torch.zeros(len(x), x.shape[1], dtype=torch.bool)
        hidden[:, -2:] = True
        mask = torch.zeros(len(x) * 2, x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y, _ = self.mha(turned, turned, turned, key_padding_mask=hidden, attn_mask=mask)
        return y if self.batch_first else y.transpose(0, 1)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix)


X = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
KINDS: dict[str, tuple[Any, dict[str, Tensor], dict[str, Any]]] = {
    "conv": (lambda: Chain(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten()), {"x": IMAGES}, {"kinds": ("conv",)}),
    "embedding": (lambda: Chain(nn.Embedding(30, 16)), {"x": ROWS}, {"kinds": ("embedding",)}),
    "attention": (lambda: Attention(True), {"x": X}, {}),
    "attention, tokens first": (lambda: Attention(False), {"x": X}, {}),
    "bare": (Bare, {"x": X}, {"kinds": ("matrix",)}),
    "block": (lambda: tiny_llama(), {"input_ids": ROWS}, {"kinds": ("block",)}),
    "mixtral": (
        lambda: moe("mixtral"),
        {"input_ids": ROWS},
        {"kinds": ("linear", "experts"), "exclude_names": "gate$"},
    ),
    "gpt_oss": (lambda: moe("gpt_oss"), {"input_ids": ROWS}, {"kinds": ("experts",)}),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), {"input_ids": ROWS}, {"kinds": ("embedding",)}),
}


def on_kind(kind: str, variant: str = "lora") -> tuple[Any, dict[str, Tensor]]:
    build, x, fields = KINDS[kind]
    if kind == "tied":
        fields = fields | {"tied_weights": "together"}
    variant = "reft" if kind == "block" else variant
    torch.manual_seed(0)
    dtype = torch.float32 if kind in MOE else torch.float64  # torch has grouped products of no float64
    return two(build().to(dtype).eval(), variant, **{"target_names": (), "dtype": dtype} | fields), x


MOE = ("mixtral", "gpt_oss")


def same(kind: str, y: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(y, wanted, **({"rtol": 1e-4, "atol": 1e-5} if kind in MOE else EXACT))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_on_every_kind_of_layer(kind: str) -> None:
    model, x = on_kind(kind)
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    wanted = one_by_one(model, x)
    with ll.rows(model, NAMES):
        y = output(model, x)
    same(kind, y, wanted)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3
    assert all(before[path].keys() == module.__dict__.keys() for path, module in model.named_modules())


@pytest.mark.parametrize("kind", ["conv", "attention, tokens first", "mixtral"])
def test_gradients_through_weights(kind: str) -> None:
    model, x = on_kind(kind)
    with ll.rows(model, NAMES):
        output(model, x)[[0, 3]].square().sum().backward()
    got = {key: t.grad for key, t in ll.adapters(model)["b"].named_tensors()}
    assert not any(t.grad is not None and t.grad.any() for t in ll.adapters(model)["a"].parameters())
    model.zero_grad()
    with alone(model, "b"):
        output(model, {name: tensor[[0, 3]] for name, tensor in x.items()}).square().sum().backward()
    for key, tensor in ll.adapters(model)["b"].named_tensors():
        same(kind, got[key], tensor.grad)


def test_a_module_that_reads_a_weight_and_calls_a_layer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.out = nn.Parameter(torch.randn(8, 16)), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(nn.functional.linear(x, self.matrix).tanh())

    model = two(Both().double(), "lora", target_names=(), kinds=("linear", "matrix"), dtype=torch.float64)
    wanted = one_by_one(model, {"x": X})
    with ll.rows(model, NAMES):
        torch.testing.assert_close(output(model, {"x": X}), wanted, **EXACT)


@torch.no_grad()
def test_mamba_whose_mixer_reads_weights_and_calls_layers() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "use_cache": False}
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(**sizes)).double().eval()
    model, x = two(mamba, target_names="_proj$", dtype=torch.float64), {"input_ids": ROWS}
    assert any(site.through_weight for site in ll.adapters(model)["a"].sites())
    wanted = one_by_one(model, x)
    with ll.rows(model, NAMES):
        torch.testing.assert_close(output(model, x), wanted, **EXACT)


# ---- generate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_beams_have_the_adapter_of_their_row(options: dict[str, Any]) -> None:
    model = two(tiny_llama(torch.float64), dtype=torch.float64)
    prompt = {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}
    options = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, **options}
    each = options.get("num_return_sequences", 1)
    wanted = []
    for i, name in enumerate(NAMES):
        with alone(model, name):
            wanted.append(model.generate(**{k: t[i : i + 1] for k, t in prompt.items()}, **options))
    with ll.rows(model, NAMES):
        got = model.generate(**prompt, **options)
        with pytest.raises(ll.ConfigError, match="4 rows have an adapter or a scale, and the model was called with 2"):
            model.generate(ROWS[:2], **options)
    assert torch.equal(got, torch.cat(wanted))
    assert len(got) == 4 * each
    assert len({tuple(row.tolist()) for row in got}) > 1
    assert "generate" not in vars(model)


def test_an_encoder_and_its_decoder_generate() -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    model = two(
        T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval(), target_names=r"\.(q|v|wo)$"
    )
    options = {"num_beams": 3, "max_new_tokens": 4}
    with ll.rows(model, NAMES):
        got = model.generate(ROWS, **options)
    for i, name in enumerate(NAMES):
        with alone(model, name):
            wanted = model.generate(ROWS[i : i + 1], **options)[0]
        assert torch.equal(got[i][: len(wanted)], wanted)
        assert not got[i][len(wanted) :].any()


# ---- packed rows ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_tokens_of_packed_sequences_go_by_their_label(kind: str) -> None:
    model = two(tiny_llama(torch.float64), dtype=torch.float64) if kind == "llama" else on_kind("mixtral")[0]
    a, b = torch.arange(1, 6)[None], torch.arange(9, 13)[None]
    packed = {"input_ids": torch.cat([a, b], 1), "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])}
    packed["use_cache"] = False  # else transformers doesn't tell the sequences apart
    with ll.rows(model, ["b", None, "a"], tokens=torch.tensor([[2] * 5 + [0] * 4])):
        y = output(model, packed)
    for name, ids, part in (("a", a, slice(0, 5)), ("b", b, slice(5, 9))):
        with alone(model, name):
            same(kind, y[:, part], output(model, {"input_ids": ids}))
    with (
        ll.rows(model, ["a"], tokens=torch.zeros(1, 4, dtype=torch.int64)),
        pytest.raises(ll.ConfigError, match=r"tokens= has 1 x 4 labels, and the model was called with 1 x 9 tokens"),
    ):
        output(model, packed)


# ---- few tokens -----------------------------------------------------------------------------------


@torch.no_grad()
def test_what_few_tokens_remember_is_never_stale() -> None:
    model = two(tiny_llama(torch.float64), dtype=torch.float64)
    perturb(ll.attach(model, ll.LoRAConfig(r=2, dtype=torch.float64), "c"), 0.3, 5)  # of another rank and alpha
    x, names = {"input_ids": ROWS[:, :2]}, ["b", "c", "a", None]

    handle = ll.adapters(model)["a"]
    for change in (
        lambda: None,
        lambda: next(handle.parameters()).mul_(3),
        lambda: setattr(handle, "scale", 0.3),
        lambda: handle.load_state_dict({key: 0.5 * t for key, t in handle.state_dict().items()}),
        lambda: setattr(next(handle.parameters()), "data", torch.ones_like(next(handle.parameters()))),
    ):
        with ll.rows(model, names):
            output(model, x)
            change()
            y = output(model, x)
        wanted = one_by_one(model, x, names)
        torch.testing.assert_close(y, wanted, **EXACT)
        assert (wanted[2] - wanted[3]).abs().max() > 1e-6


@torch.no_grad()
def test_tensors_that_are_given_for_a_call_are_used() -> None:
    model, x = two(small(), dtype=torch.float64), {"input_ids": ROWS}
    given = {key: 1.5 * tensor if "lora_B" in key else tensor for key, tensor in model.named_parameters()}
    wanted = torch.empty(4, 7, 96, dtype=torch.float64)
    for i, name in enumerate(NAMES):
        with alone(model, name):
            wanted[i] = functional_call(model, given, (), {"input_ids": ROWS[i : i + 1]}).logits[0]
    with ll.rows(model, NAMES):
        before = output(model, x)
        torch.testing.assert_close(functional_call(model, given, (), x).logits, wanted, **EXACT)
        assert torch.equal(output(model, x), before)
    assert (before - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_an_inner_block_counts_and_unloaded_adapters_have_no_part() -> None:
    model, x = two(small(), dtype=torch.float64), {"input_ids": ROWS}
    with ll.disabled(model):
        base = output(model, x)
    with ll.scaled(model, [1.0, 2.0, 3.0, 4.0]):
        with ll.disabled(model):
            assert torch.equal(output(model, x), base)
        with pytest.raises(ll.ConfigError, match="each row has a scale of its own"):
            ll.adapters(model)["a"].scale = 1.0
    model, x = on_kind("conv")
    ll.unload_to(model, "cpu", "a")
    wanted = output(model, x)
    with ll.scaled(model, [0.7] * 4, "b"):
        torch.testing.assert_close(output(model, x), wanted, **EXACT)


def test_learned_positions_are_no_rows() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(30, 16), nn.Embedding(10, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.tokens(x) + self.places(torch.arange(x.shape[1]))

    model = two(Positions().double(), target_names="places", kinds=("embedding",), dtype=torch.float64)
    with ll.rows(model, NAMES), pytest.raises(ll.TargetError, match=r"a tensor of \(4,\), in which rows can't be told"):
        model(ROWS[:, :4])


def test_labels_at_a_layer_that_sees_time_first_are_refused() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x.transpose(0, 1)).transpose(0, 1)

    model, labels = two(Turned().double(), target_names=(), dtype=torch.float64), torch.zeros(4, 7, dtype=torch.int64)
    match = r"wanted hidden states of 4 x 7 tokens, got \(7, 4\)"
    with ll.rows(model, ["a"], labels), pytest.raises(ll.TargetError, match=match):
        model(X)


@torch.no_grad()
def test_autocast_rounds_no_sum() -> None:
    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    model, x = two(Chain(Wide(16, 8)), target_names=()), {"x": X.float()}
    with torch.autocast("cpu", torch.bfloat16):
        with ll.disabled(model):
            base = output(model, x)
        with ll.rows(model, NAMES):
            assert torch.equal(output(model, x)[1], base[1])


@torch.no_grad()
def test_dropout_follows_the_mode_of_the_layer() -> None:
    model, x = two(small(), dtype=torch.float64, dropout=0.5), {"input_ids": ROWS}
    with ll.rows(model, NAMES):
        evaluated = output(model, x)
        model.train()
        assert (output(model, x) - evaluated).abs().max() > 1e-3
        model.eval()
        assert torch.equal(output(model, x), evaluated)


# ---- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_after_the_block(reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model = two(small(), dtype=torch.float64).train()
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with ll.rows(model, NAMES):
            loss = model(input_ids=ROWS, labels=ROWS).loss
        with ll.scaled(model, [0.0, 1.0]):
            pass
        loss.backward()
        return {key + name: t.grad for name, h in ll.adapters(model).items() for key, t in h.named_tensors()}

    wanted, got = gradients(False), gradients(True)
    assert all(torch.allclose(got[key], wanted[key], rtol=1e-9) for key in wanted)
    assert all(gradient.any() for gradient in wanted.values())


def test_a_checkpoint_through_a_weight_wants_its_backward_within_the_block() -> None:
    model, x = on_kind("mixtral")
    model.train().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with ll.rows(model, NAMES):
        output(model, x).sum().backward()
        loss = output(model, x).sum()
    with pytest.raises(ll.ConfigError, match="call backward inside of it"):
        loss.backward()


# ---- copies, threads, other blocks ------------------------------------------------------------------


def test_a_copy_that_is_made_within_a_block_is_in_none() -> None:
    for kind in ("bare", "block"):
        model, x = on_kind(kind)
        wanted = output(model, x)
        with ll.rows(model, NAMES):
            copies = [copy.deepcopy(model)]
            copies += [pickle.loads(pickle.dumps(model))] if kind == "bare" else []
        for other in copies:
            assert torch.equal(output(other, x), wanted)
            with torch.no_grad():
                alone_by_row = one_by_one(other, x)
                with ll.rows(other, NAMES):
                    torch.testing.assert_close(output(other, x), alone_by_row, **EXACT)
            if kind == "block":
                assert torch.equal(other.generate(ROWS, max_new_tokens=2), model.generate(ROWS, max_new_tokens=2))
            assert len(other._forward_pre_hooks) == len(model._forward_pre_hooks)
            assert len(other._forward_hooks) == len(model._forward_hooks)
            assert "generate" not in vars(other)
            assert "forward" not in vars(other)


def test_another_thread_may_call_the_model_within_the_block() -> None:
    model = two(tiny_llama(torch.float64), dtype=torch.float64)
    wanted, results = one_by_one(model, {"input_ids": ROWS}), []
    with torch.no_grad(), ll.rows(model, NAMES):

        def run() -> None:
            with torch.no_grad():
                results.append(output(model, {"input_ids": ROWS}))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 2
    for y in results:
        torch.testing.assert_close(y, wanted, **EXACT)


def test_an_error_in_the_block_ends_it() -> None:
    model, x = on_kind("mixtral")
    wanted = output(model, x)

    def places() -> dict[str, Any]:
        modules = model.named_modules()
        return {path: (list(m.__dict__), list(m._forward_hooks), list(m._forward_pre_hooks)) for path, m in modules}

    before = places()
    for runs in (False, True):
        with pytest.raises(KeyError), ll.rows(model, NAMES):
            if runs:
                output(model, x)
            raise KeyError
        assert torch.equal(output(model, x), wanted)
        assert places() == before


# ---- errors -----------------------------------------------------------------------------------------


def test_wrong_rows_are_refused() -> None:
    model = two(tiny_llama())
    with (
        pytest.raises(ll.TargetError, match=r"no adapter 'c' on this LlamaForCausalLM\n  attached: a, b"),
        ll.rows(model, ["c"]),
    ):
        pass
    for names in ([], "ab"):
        with (
            pytest.raises(ll.ConfigError, match="wanted an adapter's name, or None, for each row"),
            ll.rows(model, names),
        ):
            pass
    for n in (3, 8):
        with (
            ll.rows(model, NAMES),
            pytest.raises(ll.ConfigError, match=f"4 rows .* called with {n}\n  give one for each"),
        ):
            model(input_ids=torch.ones(n, 3, dtype=torch.int64))
        with (
            ll.scaled(model, [0.0, 0.5, 1.0, 2.0]),
            pytest.raises(ll.ConfigError, match=f"4 rows .* called with {n}\n  give one for each"),
        ):
            model(torch.ones(n, 3, dtype=torch.int64))
        with ll.rows(model, NAMES), pytest.raises(ll.TargetError, match="wanted hidden states of 4 rows"):
            model.model(input_ids=torch.ones(n, 3, dtype=torch.int64))
    with ll.rows(model, NAMES), pytest.raises(ll.ConfigError, match="called without a tensor"):
        model()
    with pytest.raises(ll.ConfigError, match="no scales: wanted one for each row"), ll.scaled(model, []):
        pass
    with (
        pytest.raises(ll.ConfigError, match="scale nan: wanted a finite number"),
        ll.scaled(model, [1.0, float("nan")]),
    ):
        pass
    for tokens in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), torch.full((2, 3), 2), torch.full((1, 1), -1)):
        with (
            pytest.raises(ll.ConfigError, match=r"wanted \(b, t\) indices of the 2 names"),
            ll.rows(model, ["a", "b"], tokens),
        ):
            pass
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with ll.rows(model, ["a"], labels), pytest.raises(ll.ConfigError, match="tokens= labels the tokens of one call"):
        model.generate(ROWS)


def test_blocks_within_blocks() -> None:
    model = two(tiny_llama())
    with ll.rows(model, NAMES):
        with pytest.raises(ll.ConfigError, match="a block of `rows` inside of another"), ll.rows(model, NAMES):
            pass
        with (
            pytest.raises(ll.ConfigError, match=r"2 rows .*, inside of a block of 4 rows"),
            ll.scaled(model, [1.0, 2.0]),
        ):
            pass
        with ll.scaled(model, 0.0):
            y = output(model, {"input_ids": ROWS})
        for action in (
            lambda: ll.attach(model, ll.LoRAConfig(r=2), "c"),
            lambda: ll.detach(model),
            lambda: ll.merge(model),
        ):
            with pytest.raises(ll.TargetError, match="each row has its own adapter or scale\n  leave the block"):
                action()
        with pytest.raises(ll.ConfigError, match="q_proj: each row has a scale of its own"):
            assert next(iter(ll.adapters(model)["a"].views().values())).scale
        assert ll.adapters(model)["b"].scale == 0.7
    with ll.disabled(model):
        assert torch.equal(y, output(model, {"input_ids": ROWS}))
    ll.merge(model)
    with pytest.raises(ll.TargetError, match="merged into the weights"), ll.rows(model, NAMES):
        pass


def test_rows_that_can_not_be_told_apart_are_refused() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:  # (b, t, 16), whose layer sees (t, b, 16)
            return self.proj(x.transpose(0, 1)).transpose(0, 1)

    model = two(Turned().double(), target_names=(), dtype=torch.float64)
    with (
        ll.rows(model, NAMES),
        pytest.raises(ll.TargetError, match=r"proj: wanted hidden states of 4 rows, got \(7, 4\)"),
    ):
        model(X)

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(8, 16, dtype=torch.float64))

        def forward(self, x: Tensor, others: Any) -> Tensor:
            y = nn.functional.linear(x, self.matrix)
            return y if others is not None else (y, y.sum())

    model = two(Reads(), target_names=(), kinds=("matrix",), dtype=torch.float64)
    with ll.rows(model, NAMES), pytest.raises(ll.TargetError, match="a Reads that gives one number for all rows"):
        model(X, None)
    for others, got in (((X,), "a tuple"), (X[:3], r"a tensor of \(3, 7, 16\)")):
        with ll.rows(model, NAMES), pytest.raises(ll.TargetError, match=f"whose argument 'others' is {got}"):
            model(X, others)


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_between_two_adapters_sees_the_rows_that_are_its_own(late: bool) -> None:
    """With one between them, or put there later, the rows aren't made in one product."""
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    perturb(ll.attach(model, ll.LoRAConfig(r=2, target_names="0"), "a"), 1.0)
    handle = None if late else model[0].register_forward_hook(lambda module, args, y: 1.5 * y)
    perturb(ll.attach(model, ll.LoRAConfig(r=2, target_names="0"), "b"), 1.0)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    with ll.rows(model, ["a", "b"]):
        with torch.no_grad():
            model(x)
        if handle is None:
            handle = model[0].register_forward_hook(lambda module, args, y: 1.5 * y)
            hooks = model[0]._forward_hooks
            hooks.move_to_end(next(key for key in reversed(hooks) if key != handle.id))  # b's after it
        with_gradients = model(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(model(x), with_gradients)
