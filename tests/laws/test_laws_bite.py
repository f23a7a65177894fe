"""The laws fail when one is broken: each broken variant below breaks one, and its law must notice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_in_memory
import test_laws
import test_scale
import torch
from torch import Tensor

import lora_lite as ll


def plain(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    return y + (x @ layer.lora_A.mT) @ layer.lora_B.mT


def broken(**attributes: Any) -> str:
    """Register a LoRA with something wrong."""

    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        return {"lora_A": ll.ParamSpec((cfg.r, d_in), init="kaiming"), "lora_B": ll.ParamSpec((d_out, cfg.r))}

    body = {"name": "broken", "param_specs": staticmethod(param_specs), "forward": staticmethod(plain)}
    ll.register(type("Broken", (), body | attributes))
    return "broken"


def writes_the_base(layer: Any, cfg: Any) -> None:
    layer.weight.mul_(1)


def leaves_something_behind(layer: Any, cfg: Any) -> None:
    layer._module.left_behind = True


def remembers_too_long(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    held = layer._site.memo
    if "kept" not in held or layer.training:
        held["kept"] = ([], layer.lora_B @ layer.lora_A)
    return y + x @ held["kept"][1].mT


def keeps_state_elsewhere() -> Callable[[Any, Tensor, Tensor], Tensor]:
    seen: dict[int, float] = {}

    def forward(layer: Any, x: Tensor, y: Tensor) -> Tensor:
        return plain(layer, x, y) + seen.setdefault(id(layer._module), 0.1 * len(seen))

    return forward


def casts_up(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    return plain(layer, x, y).float()


def only_b(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    return y + (x @ layer.lora_A.detach().mT) @ layer.lora_B.mT


def rounds_first(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    return (y + 64 + (x @ layer.lora_A.mT) @ layer.lora_B.mT) - 64


class WithoutTransforms(torch.autograd.Function):
    """In the old style, which torch.func has no way through."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def draws(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    return plain(layer, x, y) * (1 + 0.1 * torch.rand_like(y))


def bends(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    return y + (x @ layer.lora_A.mT).relu() @ layer.lora_B.mT


CASES: list[tuple[str, dict[str, Any], Callable[..., Any], tuple[Any, ...]]] = [
    ("base written", {"init": writes_the_base, "base_weight": "dense"}, test_laws.test_the_base_is_read_only, ()),
    (
        "no identity",
        {"forward": lambda layer, x, y: y * 1.001 + 0 * layer.lora_A.sum() + 0 * layer.lora_B.sum()},
        test_laws.test_a_fresh_adapter_is_the_identity_bit_for_bit,
        (torch.float32,),
    ),
    ("something left", {"init": leaves_something_behind}, test_laws.test_detach_restores_everything, (False,)),
    ("no gradient", {"forward": only_b}, test_laws.test_only_adapter_parameters_get_gradients_and_each_moves, ()),
    ("stale", {"forward": remembers_too_long}, test_laws.test_eval_outputs_follow_every_way_to_change_a_parameter, ()),
    ("scale", {"handles_scale": True}, test_laws.test_scale_c_blends_base_and_method_at_each_layer, (0.5,)),
    (
        "dtype",
        {"forward": casts_up},
        test_laws.test_low_precision_bases_keep_their_dtype_and_float32_masters,
        (torch.bfloat16,),
    ),
    (
        "state elsewhere",
        {"forward": keeps_state_elsewhere()},
        test_laws.test_deepcopy_and_pickle_are_independent_copies,
        (),
    ),
    (
        "not the identity in 16 bits",
        {"forward": rounds_first},
        test_laws.test_to_dtype_keeps_a_fresh_adapter_the_identity,
        (),
    ),
    (
        "rounded",
        {
            "param_specs": lambda d_in, d_out, cfg: {"lora_g": ll.ParamSpec((d_out,), init="ones")},
            "forward": lambda layer, x, y: layer.lora_g * y,  # 16 bits have steps of 2^-7 above 1
        },
        test_laws.test_a_small_trained_change_survives_low_precision,
        (torch.bfloat16,),
    ),
    ("of its own tensors", {"forward": remembers_too_long}, test_laws.test_functional_call_uses_the_given_tensors, ()),
    (
        "no transforms",
        {"forward": lambda layer, x, y: WithoutTransforms.apply(plain(layer, x, y))},
        test_laws.test_function_transforms_and_inference_mode_mix_with_what_is_remembered,
        (),
    ),
    ("draws", {"forward": draws}, test_scale.test_both_poles_in_one_step_give_the_gradients_of_two_models, ()),
    ("draws again", {"forward": draws}, test_scale.test_a_sweep_needs_no_new_attach, ()),
    (
        "not affine",
        {"forward": bends},
        test_in_memory.test_merged_equals_attached_for_every_method,
        ({"variant": "broken"}, False),
    ),
]


@pytest.mark.parametrize(("attributes", "law", "args"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_broken_variant_fails_its_law(
    attributes: dict[str, Any], law: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    functions = {k: staticmethod(v) if callable(v) else v for k, v in attributes.items()}
    name = broken(**functions)
    with pytest.raises((AssertionError, RuntimeError, ll.VariantError)):
        law(*given(name, args))


def given(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A law's arguments: the variant's name comes first, unless a mode says it."""
    return args if args and isinstance(args[0], dict) else (name, *args)


@pytest.mark.parametrize(
    ("law", "args"),
    [
        (test_laws.test_quantised_bases_are_right_or_refused, ("nf4",)),
        (test_laws.test_an_adapter_that_was_cast_is_saved_as_it_is, ()),
        (test_laws.test_a_bare_layer_can_be_the_model, ()),
    ],
)
def test_what_is_kept_elsewhere_fails_where_another_model_loads(
    law: Callable[..., Any], args: tuple[Any, ...], tmp_path: Path
) -> None:
    name = broken(forward=staticmethod(keeps_state_elsewhere()))
    with pytest.raises((AssertionError, RuntimeError)):
        law(name, *args, tmp_path)
    del ll.REGISTRY["broken"]
    law(broken(), *args, tmp_path)


def test_what_is_kept_outside_the_tensors_is_lost_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = broken(forward=staticmethod(keeps_state_elsewhere()))
    with pytest.raises(AssertionError):
        test_laws.test_save_and_load_are_bit_equal_and_run_no_init(name, "default", tmp_path, monkeypatch)


def test_an_oracle_notices_one_per_cent(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(layer: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + 1.01 * (x @ layer.lora_A.mT) @ layer.lora_B.mT

    monkeypatch.setattr(ll.REGISTRY["lora"], "forward", staticmethod(off))
    with pytest.raises(AssertionError):
        test_laws.test_output_is_the_papers_formula("lora", True, {})


def test_a_rotation_is_not_taken_for_a_blend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ll.REGISTRY["antipasto"], "handles_scale", False)
    with pytest.raises(AssertionError):
        test_laws.test_scale_c_blends_base_and_method_at_each_layer("antipasto", 0.5)


@pytest.mark.parametrize(("law", "args"), [case[2:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_unbroken_one_passes_each(law: Callable[..., Any], args: tuple[Any, ...]) -> None:
    law(*given(broken(), args))
