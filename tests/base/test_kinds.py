"""Kinds of layer are told apart by identity, so each is one object, also in a model from a copy or a pickle."""

import copy
import pickle
from typing import Any

import pytest
from models import tiny_llama

import lora_lite as ll
from lora_lite.base import kinds, matrices

ONLY = [*kinds.KINDS, kinds.BLOCK, matrices.CONVOLUTION, matrices.ALL_CHANNELS, matrices.EMBEDDING, matrices.NORM]


@pytest.mark.parametrize("kind", ONLY, ids=lambda kind: type(kind).__name__)
def test_a_kind_is_one_object(kind: kinds.Kind) -> None:
    assert len({type(other) for other in ONLY}) == len(ONLY)
    assert copy.deepcopy(kind) is copy.copy(kind) is kind
    assert all(pickle.loads(pickle.dumps(kind, p)) is kind for p in range(pickle.HIGHEST_PROTOCOL + 1))


def test_a_parameter_is_of_a_kind_with_its_name() -> None:
    kind = pickle.loads(pickle.dumps(matrices.Parameter("down_proj", "experts")))
    assert (type(kind), kind.weight, kind.prefix) == (matrices.Parameter, "down_proj", "down_proj")
    assert (kind.bias, kind.category) == ("down_proj_bias", "experts")


def test_a_model_from_a_pickle_knows_its_kinds() -> None:
    model = tiny_llama()
    cfg: Any = ll.SteerConfig(kinds="block")
    directions = {t.path: model.lm_head.weight[0].detach() for t in ll.plan(model, cfg)}
    ll.attach(model, cfg, calibration_data={"directions": directions})
    ll.attach(model, ll.LoRAConfig(kinds=["linear", "embedding"], target_names="q_proj|embed"), "lora")
    ll.attach(model, ll.IA3Config(kinds="norm"), "norms")
    twin = pickle.loads(pickle.dumps(model))
    for name, adapter in ll.adapters(twin).items():
        wanted = [site.base.kind for site in ll.adapters(model)[name].sites()]
        assert all(site.base.kind is kind for site, kind in zip(adapter.sites(), wanted, strict=True))
    sites = list(ll.adapters(twin)["default"].sites())
    assert all(site.base.is_block and site.base.describe() == "no weight" for site in sites)
