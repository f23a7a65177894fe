"""The contract: what register accepts, and that a variant can't do what it has not declared."""

from typing import Any

import pytest
import torch
from models import OneLinear, config, quantized, tiny_llama
from torch import Tensor

import lora_lite as ll

SPECS = {"lora_g": ll.ParamSpec((1,))}


def variant(**attributes: Any) -> Any:
    """Register a class with these attributes over a minimal variant."""
    body: dict[str, Any] = {
        "name": "made",
        "param_specs": staticmethod(lambda d_in, d_out, cfg: SPECS),
        "forward": staticmethod(lambda layer, x, y: y),
    }
    return ll.register(type("Made", (), {k: v for k, v in (body | attributes).items() if v is not None}))


def attach(cls: Any, model: Any = None, **kwargs: Any) -> ll.Adapter:
    return ll.attach(model or OneLinear(), ll.AdapterConfig(variant=cls.name, target_names="proj"), **kwargs)


def test_register_gives_defaults() -> None:
    cls = variant()
    assert ll.REGISTRY["made"] is cls
    assert cls.config is ll.AdapterConfig
    assert (cls.base_weight, cls.handles_scale, cls.forward_input) == ("unused", False, None)


def test_register_refuses_a_second_name_and_an_incomplete_class() -> None:
    variant()
    with pytest.raises(
        ll.VariantError, match=r"variant 'made' is registered already, by .*Made\n  give .*another name"
    ):
        variant()
    with pytest.raises(ll.VariantError, match="lacks param_specs, forward or forward_input"):
        variant(name="other", param_specs=None, forward=None)
    with pytest.raises(ll.VariantError, match="base_weight is 'unused', 'read' or 'dense', got 'maybe'"):
        variant(name="other", base_weight="maybe")


def test_register_refuses_what_the_runtime_could_not_keep() -> None:
    with pytest.raises(ll.VariantError, match="config is a subclass of BaseConfig, got <class 'dict'>"):
        variant(config=dict)
    with pytest.raises(
        ll.VariantError, match=r"with both forward and forward_input it must handle layer\.scale itself"
    ):
        variant(forward_input=staticmethod(lambda layer, x: x))


def test_values_that_would_be_lost_are_errors() -> None:
    specs = {"lora_g": ll.ParamSpec((1,), init=lambda t: torch.ones(1))}
    with pytest.raises(ll.VariantError, match="init made a new tensor, which would be lost"):
        attach(variant(param_specs=staticmethod(lambda *_: specs)))

    def init(layer: ll.Layer, cfg: Any) -> None:
        layer.lora_g = torch.ones(1)

    with pytest.raises(
        AttributeError, match=r"proj: a view holds nothing, so 'lora_g' would be lost\n  use layer.lora_g.copy_"
    ):
        attach(variant(name="other", init=staticmethod(init)))


def test_constants_are_kept_apart_by_name() -> None:
    def forward(layer: ll.Layer, x: Tensor, y: Tensor) -> Tensor:
        one = layer.constant("one", lambda g: g + 1, layer.lora_g)
        return y + layer.constant("two", lambda g: g + 2, layer.lora_g) - one

    model = OneLinear()
    base = model(torch.ones(1, 16))
    attach(variant(forward=staticmethod(forward)), model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model.eval()(torch.ones(1, 16)), base + 1)


def test_a_layer_that_gives_no_tensor_is_named() -> None:
    """What holds a linear layer isn't asked at attach what it gives."""

    class Pair(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return super().forward(x), None

    model = torch.nn.ModuleDict({"proj": Pair()})
    attach(variant(), model)
    with pytest.raises(ll.TargetError, match="proj: wanted a tensor from this layer, got tuple"):
        model["proj"](torch.ones(1, 4))


def test_unknown_variant_lists_the_known_ones() -> None:
    with pytest.raises(
        ll.VariantError,
        match=r"no variant is registered as 'lorra'\n  registered: abliteration, ",
    ):
        ll.attach(OneLinear(), ll.AdapterConfig(variant="lorra"))


def test_a_config_of_another_class_is_refused() -> None:
    with pytest.raises(ll.ConfigError, match="'dora' is configured by DoRAConfig, got AdapterConfig"):
        ll.attach(OneLinear(), ll.AdapterConfig(variant="dora"))


@pytest.mark.parametrize("names", [["A"], ["lora_a__b"], ["lora_"], [], ["lora_2_x"]])
def test_tensor_names_start_with_lora(names: list[str]) -> None:
    cls = variant(param_specs=staticmethod(lambda d_in, d_out, cfg: {name: ll.ParamSpec((1,)) for name in names}))
    with pytest.raises(ll.VariantError, match="wanted one name or more, each like lora_xyz"):
        attach(cls)


def test_bad_init_is_refused() -> None:
    with pytest.raises(
        ll.VariantError, match=r"ParamSpec\(init='xavier'\): wanted \['kaiming', 'normal', 'ones', 'zeros'\]"
    ):
        ll.ParamSpec((1,), init="xavier")


def test_init_by_name_and_by_callable() -> None:
    specs = {
        "lora_o": ll.ParamSpec((3,), init="ones"),
        "lora_k": ll.ParamSpec((4, 16), init="kaiming"),
        "lora_n": ll.ParamSpec((1000,), init="normal"),
        "lora_c": ll.ParamSpec((2,), init=lambda t: t.fill_(7)),
        "lora_f": ll.ParamSpec((2,), trainable=False),
    }
    adapter = attach(variant(param_specs=staticmethod(lambda d_in, d_out, cfg: specs)))
    t = {key.removeprefix("proj."): value for key, value in adapter.state_dict().items()}
    assert t["lora_o"].tolist() == [1, 1, 1]
    assert t["lora_c"].tolist() == [7, 7]
    assert 0 < t["lora_k"].abs().max() <= 16**-0.5
    assert 0.018 < t["lora_n"].std() < 0.022
    assert len(list(adapter.parameters())) == 4


def test_a_weight_that_was_not_declared_cannot_be_read() -> None:
    def init(layer: ll.Layer, cfg: Any) -> None:
        layer.dense_weight()

    model = OneLinear()
    with pytest.raises(
        ll.VariantError, match=r"proj: dense_weight\(\) was used by a variant whose base_weight is 'unused'"
    ):
        attach(variant(init=staticmethod(init)), model)
    assert "proj.lora_g" not in model.state_dict()


def test_codes_cannot_be_read_as_numbers(tiny: str) -> None:
    def forward(layer: ll.Layer, x: Tensor, y: Tensor) -> Tensor:
        return y + layer.weight.sum()

    model = quantized(tiny, "int8")
    attach(variant(forward=staticmethod(forward), base_weight="read"), model)
    message = r"q_proj: \.weight of a layer that is int8, 8-bit bitsandbytes holds codes, not numbers"
    with pytest.raises(ll.QuantizedWeightError, match=message):
        model(input_ids=torch.ones(1, 1, dtype=torch.long))


def test_a_view_names_what_the_adapter_has() -> None:
    cls = variant(forward=staticmethod(lambda layer, x, y: y + layer.lora_h))
    model = OneLinear()
    attach(cls, model)
    with pytest.raises(AttributeError, match="proj: this adapter has no 'lora_h', only lora_g"):
        model(torch.ones(1, 16))


def test_views_cast_to_the_activation_and_keep_dtype_opts_out() -> None:
    seen = []

    def forward(layer: ll.Layer, x: Tensor, y: Tensor) -> Tensor:
        seen.append((layer.lora_a.dtype, layer.lora_b.dtype, x.dtype, y.dtype, layer.bias.dtype))  # type: ignore[union-attr]
        seen.append((layer.in_features, layer.out_features, tuple(layer.weight.shape)))
        return y

    specs = {"lora_a": ll.ParamSpec((1,)), "lora_b": ll.ParamSpec((1,), keep_dtype=True)}
    cls = variant(
        param_specs=staticmethod(lambda *_: specs),
        forward=staticmethod(forward),
        base_weight="dense",
        handles_scale=True,
    )
    model = OneLinear(dtype=torch.bfloat16)
    attach(cls, model)
    model(torch.ones(1, 16, dtype=torch.bfloat16))
    half = torch.bfloat16
    assert seen == [(half, torch.float32, half, half, half), (16, 24, (24, 16))]


def test_group_init_gets_every_view_and_the_data() -> None:
    seen: dict[str, Any] = {}

    def group_init(model: Any, targets: Any, cfg: Any, data: Any) -> None:
        seen.update(paths=list(targets), data=data)
        for layer in targets.values():
            layer.lora_g.fill_(3)

    cls = variant(group_init=staticmethod(group_init), needs_calibration=True)
    model = OneLinear()
    with pytest.raises(ll.ConfigError, match="'made' is computed from data: use attach"):
        attach(cls, model)
    adapter = attach(cls, model, calibration_data=[1, 2])
    assert seen == {"paths": ["proj"], "data": [1, 2]}
    assert adapter.state_dict()["proj.lora_g"].tolist() == [3]
    with pytest.raises(ll.ConfigError, match="variant 'lora' takes no calibration_data"):
        ll.attach(model, config("lora", target_names="proj"), name="b", calibration_data=[1])


def test_the_runtime_blends_for_a_variant_that_does_not_handle_scale() -> None:
    for side in ("forward", "forward_input"):
        double = {
            "forward": staticmethod(lambda layer, x, y: 2 * y),
            "forward_input": staticmethod(lambda layer, x: 2 * x),
        }
        cls = variant(name=side.replace("_", ""), **{"forward": None, side: double[side]})
        model = OneLinear(bias=False)
        x = torch.randn(3, 16)
        base = model(x)
        attach(cls, model).scale = 0.25
        torch.testing.assert_close(model(x), 1.25 * base)
        torch.testing.assert_close(model.proj(input=x), 1.25 * base)


def test_the_design_snippet(smollm2: str) -> None:
    @ll.register
    class MyVariant:
        name = "myvariant"

        @staticmethod
        def param_specs(d_in, d_out, cfg) -> dict[str, ll.ParamSpec]:  # type: ignore[no-untyped-def]
            return {
                "lora_A": ll.ParamSpec((cfg.r, d_in), init="kaiming"),
                "lora_B": ll.ParamSpec((d_out, cfg.r), init="zeros"),
            }

        @staticmethod
        def init(layer, cfg) -> None: ...  # type: ignore[no-untyped-def]

        @staticmethod
        def forward(layer, x, y):  # type: ignore[no-untyped-def]
            return y + (x @ layer.lora_A.mT) @ layer.lora_B.mT

    model = ll.load_base(smollm2)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        base = model(input_ids=ids).logits
        adapter = ll.attach(model, ll.AdapterConfig(variant="myvariant", r=4))
        assert torch.equal(model(input_ids=ids).logits, base)
    assert len(adapter.targets) == 210
    assert sum(p.numel() for p in adapter.parameters()) == 4 * sum(i + o for i, o in adapter.targets.values())


def test_two_variants_stack_in_order() -> None:
    model, x = OneLinear(bias=False), torch.randn(3, 16)
    base = model(x)
    first = variant(name="first", forward=staticmethod(lambda layer, x, y: y + 1))
    second = variant(name="second", forward=staticmethod(lambda layer, x, y: 3 * y))
    attach(first, model, name="a")
    attach(second, model, name="b")
    torch.testing.assert_close(model(x), 3 * (base + 1))
    ll.detach(model, "a")
    torch.testing.assert_close(model(x), 3 * base)


def test_tiny_llama_has_the_shapes_that_other_tests_rely_on() -> None:
    assert {t.path.split(".")[-1]: (t.d_in, t.d_out) for t in ll.plan(tiny_llama(), config("lora"))} == {
        "q_proj": (64, 64),
        "k_proj": (64, 32),
        "v_proj": (64, 32),
        "o_proj": (64, 64),
        "gate_proj": (64, 128),
        "up_proj": (64, 128),
        "down_proj": (128, 64),
    }
