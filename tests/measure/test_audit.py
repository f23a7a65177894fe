"""Adapters that can't act are found: by `audit`, by a merge in memory and on disk. What runs passes."""

import copy
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import BUT_THREE, IDS, OneLinear, attach, config, keep, moe, perturb, quantized, tiny_llama
from safetensors import safe_open
from safetensors.torch import save_file
from test_laws import VARIANTS, logits
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    WavLMConfig,
    WavLMModel,
)
from typer.testing import CliRunner

import lora_lite as ll
from lora_lite.base.still import random_kept
from lora_lite.cli.commands import app
from lora_lite.core.effective import Affine
from lora_lite.core.ran import has_run
from lora_lite.core.state import sites_of
from lora_lite.io.adapter_file import read_file
from lora_lite.merging.audit import difference

TEXT = {"input_ids": IDS}
SOUND = {"input_values": torch.randn(1, 800, generator=torch.Generator().manual_seed(0))}
SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}
FEW = {**SMALL, "num_attention_heads": 4, "pad_token_id": 0}


def jamba() -> Any:
    small = {**FEW, "intermediate_size": 48, "num_key_value_heads": 2, "num_experts": 2, "mamba_dt_rank": 4}
    every = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    return JambaForCausalLM(JambaConfig(**small, **every, mamba_d_state=4, use_mamba_kernels=False))


def longcat() -> Any:
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 24}
    sizes = {**FEW, "num_hidden_layers": 2, "num_layers": 1, "ffn_hidden_size": 48}
    return LongcatFlashForCausalLM(LongcatFlashConfig(**sizes, **ranks, **experts, head_dim=4))


def wavlm() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    conv = {"conv_dim": (16, 16), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return WavLMModel(WavLMConfig(**sizes, **conv, **positions))


Case = tuple[Callable[[], Any], dict[str, torch.Tensor], str, str]
BYPASSED: dict[str, Case] = {
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=8)), TEXT, r"dt_proj$", "mixer.dt_proj (2)"),
    "falcon_mamba": (
        lambda: FalconMambaForCausalLM(FalconMambaConfig(**SMALL, state_size=8)),
        TEXT,
        r"dt_proj$",
        "mixer.dt_proj (2)",
    ),
    "jamba": (jamba, TEXT, r"dt_proj$", "mamba.dt_proj"),
    "longcat": (longcat, TEXT, r"router\.classifier$", "router.classifier"),
    "wavlm": (wavlm, SOUND, r"attention\.\w+_proj$", "attention.k_proj"),
}
"""Model, batch, the layers whose weights it reads without calling them, how a message names one."""
per_bypassed = pytest.mark.parametrize("kind", BYPASSED)


def bypassed(kind: str) -> tuple[Any, dict[str, torch.Tensor], str]:
    make, batch, _, name = BYPASSED[kind]
    return make().eval(), batch, name


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the code of these models didn't show that it reads weights: by way of a list, or in another function."""
    monkeypatch.setattr("lora_lite.base.layer.readers", lambda modules: {})


EVERYTHING = ll.LoRAConfig(r=4, target_names=r".", exclude_names="lm_head|embed")


# ---- audit --------------------------------------------------------------------------------------


def test_a_table_of_at_most_eighty_columns() -> None:
    model = tiny_llama()
    ll.attach(model, config("lora", target_names="q_proj|down_proj"))
    audit = ll.audit(model, {"input_ids": IDS, "labels": IDS})
    assert str(audit) == (
        "LlamaForCausalLM: 4 of 4 adapted layers ran\n"
        "layer                            n  ran  gradient\n"
        "model.layers.*.self_attn.q_proj  2    2    4 of 4\n"
        "model.layers.*.mlp.down_proj     2    2    4 of 4\n"
        "PEFT's all-linear would adapt 10 more: model.layers.*.mlp.gate_proj (2),\n"
        "  model.layers.*.mlp.up_proj (2), model.layers.*.self_attn.k_proj (2),\n"
        "  model.layers.*.self_attn.o_proj (2), model.layers.*.self_attn.v_proj (2)"
    )
    assert len(audit.unadapted) == 10
    assert [layer.path for layer in audit.layers][:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
    ]
    deep: nn.Module = OneLinear()
    for _ in range(30):
        deep = nn.Sequential(deep)
    ll.attach(deep, config("lora", target_names="proj"))
    table = str(ll.audit(deep, torch.randn(2, 16))).splitlines()
    assert max(map(len, table)) == 80
    assert "..." in table[2]


def test_what_peft_would_adapt_is_every_linear_layer_but_the_head() -> None:
    """PEFT's own choice on the same model, less what has an adapter."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules="all-linear"))
    theirs = {path for path, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A")}
    model = tiny_llama()
    ll.attach(model, config("lora", target_names=r"\.0\..*_proj"))
    audit = ll.audit(model, {"input_ids": IDS, "labels": IDS})
    assert set(audit.unadapted) == {path for path in theirs if ".1." in path}
    whole = tiny_llama()
    ll.attach(whole, config("lora"))
    audit = ll.audit(whole, {"input_ids": IDS, "labels": IDS})
    assert audit.unadapted == ()
    assert "PEFT" not in str(audit)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes_and_the_model_is_as_it_was(variant: str) -> None:
    model = tiny_llama(bias=variant == "bias", num_hidden_layers=1)
    adapter = attach(model, config(variant, exclude_names=BUT_THREE))
    model.model.layers[0].train()
    parameter = next(adapter.parameters(), None)
    if parameter is not None:
        parameter.grad = torch.ones_like(parameter)
    before, modes = logits(model), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    audit = ll.audit(model, TEXT)
    assert len(audit.layers) == len(adapter.targets)
    assert all(layer.ran and layer.gradients == layer.parameters for layer in audit.layers)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == (parameter is not None)
    assert all(bool((grad == 1).all()) for grad in grads)
    assert torch.equal(logits(model), before)
    if parameter is None:
        assert str(audit).endswith(" -")


@pytest.mark.usefixtures("unseen")
@per_bypassed
def test_audit_names_layers_whose_weights_are_read_without_a_call(kind: str) -> None:
    model, batch, name = bypassed(kind)
    ll.attach(model, EVERYTHING)
    with pytest.raises(ll.TargetError, match="never called, while the model reads the weight itself: ") as error:
        ll.audit(model, batch)
    assert name in str(error.value)
    assert "although the module around it was" not in str(error.value)
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig(r=4, target_names=".", exclude_names=("lm_head|embed", BYPASSED[kind][2])))
    ll.audit(model, batch)


@per_bypassed
def test_a_weight_that_is_read_has_its_adapter_all_the_same(kind: str) -> None:
    """Every target takes part, has a gradient and an effect, and a merge makes of it what it was attached."""
    model, batch, _ = bypassed(kind)
    read = ll.LoRAConfig(r=4, target_names=BYPASSED[kind][2])
    base = model(**batch)[0].detach()
    adapter = ll.attach(model, read)
    perturb(adapter, size=1.0)
    audit = ll.audit(model, batch)
    assert len(audit.layers) == len(adapter.targets)
    with torch.no_grad():
        attached = model(**batch)[0]
        assert not torch.allclose(attached, base, rtol=1e-7, atol=1e-9)
        ll.merge(model)
        torch.testing.assert_close(model(**batch)[0], attached, rtol=1e-4, atol=1e-5)


def test_audit_finds_a_bypassed_weight_of_a_quantised_layer(tiny: str) -> None:
    model = quantized(tiny, "nf4")

    class Reader(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor) -> Any:
            import bitsandbytes as bnb

            hidden = self.inner.model(input_ids=input_ids).last_hidden_state
            layer = self.inner.model.layers[0].self_attn.q_proj
            return hidden, bnb.matmul_4bit(hidden, layer.weight.t(), quant_state=layer.weight.quant_state)

    reader = Reader(model)
    ll.attach(reader, config("lora"))
    ll.audit(reader, TEXT)
    model.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ll.TargetError, match=r"reads the weight itself: inner\.model\.layers\.\*\.self_attn\.q_proj\n"):
        ll.audit(reader, TEXT)


class Experts(nn.Module):
    """Four experts as modules of their own, of which a batch takes some; `unused` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList(OneLinear(16, 16) for _ in range(4))})])
        self.unused = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor, takes: tuple[int, ...] = (0, 1)) -> torch.Tensor:
        experts: Any = self.layers[0]
        for i in takes:
            x = experts["experts"][i](x)
        out: torch.Tensor = self.norm(x + torch.from_numpy(np.random.rand(16)).to(x))
        return out


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def test_what_a_batch_does_not_reach_is_told_apart_from_what_is_never_called() -> None:
    model = Experts()
    ll.attach(model, config("lora", target_names="proj|unused"))
    with pytest.raises(ll.TargetError) as error:
        ll.audit(model, {"x": X})
    assert str(error.value) == (
        "Experts: not every adapter takes part in this forward\n"
        "  not called in this forward, although the module around it was: unused\n"
        "    leave them out with exclude_names, or give a batch that calls them (an image, another expert)\n"
        "  not reached by this batch: layers.*.experts.2.proj, layers.*.experts.3.proj\n"
        "    give a batch that takes every path (an image, another expert), or leave them out with exclude_names"
    )


def test_statistics_and_random_states_stay_as_they_were() -> None:
    model = Experts().train()
    ll.attach(model, config("lora", target_names="proj"))
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, str(np.random.get_state())
    assert ll.audit(model, {"x": X, "takes": (0, 1, 2, 3)}).layers[3].gradients == 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.norm.num_batches_tracked == 0
    assert str(np.random.get_state()) == state


def test_what_is_drawn_while_a_model_is_looked_at_was_not_drawn() -> None:
    model = OneLinear()
    draws = (random.random, np.random.rand, lambda: torch.rand(()).item())
    with random_kept(model):
        first = [draw() for draw in draws]
    assert [draw() for draw in draws] == first


def test_a_parameter_that_the_loss_does_not_depend_on() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.b(self.a(x).detach())
            return out

    model = Cut()
    ll.attach(model, config("lora", target_names="a|b"))
    with pytest.raises(ll.TargetError, match=r"no gradient, although the layer ran: a\.lora_A, a\.lora_B\n"):
        ll.audit(model, X)

    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = OneLinear()

        def forward(self, x: torch.Tensor) -> Any:
            return {"y": checkpoint(self.inner, x, use_reentrant=True)}

    reentrant = Reentrant()
    ll.attach(reentrant, config("lora", target_names="proj"))
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(ll.TargetError, match=r"no gradient.*\n.*are the inputs of a reentrant checkpoint without"),
    ):
        ll.audit(reentrant, X)
    ll.audit(reentrant, X.clone().requires_grad_())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_passes(use_reentrant: bool) -> None:
    model = tiny_llama().train()
    ll.attach(model, config("lora"))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert all(layer.gradients == 2 for layer in ll.audit(model, {"input_ids": IDS, "labels": IDS}).layers)


@pytest.mark.parametrize("variant", ["abliteration", "lora"])
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_fused_experts_pass(name: str, variant: str) -> None:
    model = moe(name)
    cfg = ll.AbliterationConfig(normalization="full") if variant == "abliteration" else ll.LoRAConfig(r=2)
    attach(model, cfg)
    assert all(layer.ran for layer in ll.audit(model, TEXT).layers)


def test_a_model_inside_of_wrappers_is_audited() -> None:
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=1)
    ll.attach(model, config("lora"))
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    model.model.layers[0].self_attn.compile(backend="eager")
    assert len(ll.audit(torch.compile(model, backend="eager"), TEXT).layers) == 7
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "ia3_ff"])
def test_merged_against_attached(variant: str, log: list[str]) -> None:
    model = tiny_llama().train()
    perturb(ll.attach(model, ll.config_for(variant)()), 0.3)
    before, batch = model(input_ids=IDS).logits, {"input_ids": IDS}
    log.clear()
    audit = ll.audit(model, batch, merged=True)
    assert audit.merged is not None
    assert 0 < audit.merged < 1e-4  # float32's rounding
    assert str(audit).splitlines()[-1].startswith("merged, the outputs differ by ")
    assert not log
    assert model.training
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert ll.audit(model, batch).merged is None
    ll.detach(model)
    ll.attach(model, ll.LoRAConfig())
    assert ll.audit(model, batch, merged=True).merged == 0  # a fresh one changes nothing


def test_a_merge_that_is_off_is_seen_beside_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.proj(x)
            return y.masked_fill(torch.arange(8) > 4, -torch.inf), y.mean()

    model, x = Masked(), torch.randn(3, 8)
    perturb(ll.attach(model, ll.LoRAConfig(r=2, target_names="proj")), 0.3)
    assert difference(model, x) < 1e-5
    write = Affine.write
    monkeypatch.setattr(Affine, "write", lambda self, weight, out: write(self, weight, out).mul_(1.5))
    assert difference(model, x) > 0.1


def test_a_quantised_base_is_compared_with_its_dense_numbers(tiny: str) -> None:
    model = ll.load_base(tiny, quantization="nf4", dtype="float32")
    perturb(ll.attach(model, ll.LoRAConfig(r=2)), 0.1)
    before = model(input_ids=IDS).logits
    assert 0 < (ll.audit(model, {"input_ids": IDS}, merged=True).merged or 0) < 1e-2
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_what_can_not_be_merged_raises_in_the_audit_that_asks() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    ll.attach(model, ll.LoRAConfig(target_names=["lm_head"]))
    ll.audit(model, {"input_ids": IDS})
    with pytest.raises(ll.TargetError, match="shares its weight"):
        ll.audit(model, {"input_ids": IDS}, merged=True)
    ll.audit(model, {"input_ids": IDS})  # the adapter is as it was


@pytest.mark.slow  # processes
def test_audit_stays_a_function_whatever_is_imported_first() -> None:
    code = "import lora_lite.trainer as t, lora_lite as ll; assert callable(ll.audit) and ll.audit.__name__ == 'audit'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_nothing_to_audit() -> None:
    model = tiny_llama()
    with pytest.raises(ll.TargetError, match=r"nothing to audit on this LlamaForCausalLM: no adapter\n  attach one"):
        ll.audit(model, TEXT)
    ll.attach(model, config("lora")).scale = 0.0
    with pytest.raises(ll.TargetError, match=r"every adapter is at scale 0\n  set a scale first"):
        ll.audit(model, TEXT)
    ll.adapters(model)["default"].scale = 0.5
    ll.merge(model)
    with pytest.raises(ll.TargetError, match="can't audit: default is merged"):
        ll.audit(model, TEXT)


def test_an_output_without_numbers_can_not_be_differentiated() -> None:
    class Nothing(OneLinear):
        def forward(self, x: torch.Tensor) -> Any:
            super().forward(x)
            return "done"

    model = Nothing()
    ll.attach(model, config("lora", target_names="proj"))
    with pytest.raises(ll.TargetError, match="the model gave str, without a floating-point tensor"):
        ll.audit(model, X)


# ---- merge --------------------------------------------------------------------------------------


def ran(model: nn.Module) -> dict[str, bool]:
    return {site.path: has_run(site.base) for module in model.modules() for site in sites_of(module).values()}


@pytest.mark.usefixtures("unseen")
@per_bypassed
def test_a_merge_refuses_what_never_ran_while_others_did(kind: str, tmp_path: Path) -> None:
    model, batch, name = bypassed(kind)
    adapter = ll.attach(model, EVERYTHING)
    perturb(adapter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        attached = model(**batch)[0]
    with pytest.raises(
        ll.TargetError, match=rf"of {len(adapter.targets)} adapted layers were never called, so"
    ) as error:
        ll.merge(model)
    assert name in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    ll.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["lora_lite"])
    assert meta["never_ran"] == sorted(path for path, flag in ran(model).items() if not flag)
    if kind == "wavlm":  # all of its attention
        own = [path for path in adapter.targets if ".attention." in path and path.endswith("_proj")]
        assert meta["never_ran"] == sorted(own)
        assert len(own) == 4
    else:
        assert all(name.partition(" ")[0] in path for path in meta["never_ran"])
    ll.merge(model, never_ran="merge")
    with torch.no_grad():
        assert not torch.allclose(model(**batch)[0], attached, rtol=1e-7, atol=1e-9)  # the fault that is refused


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba", "longcat"])
def test_a_merge_after_a_load_finds_out_by_itself(kind: str, tmp_path: Path, log: list[str]) -> None:
    model, _, name = bypassed(kind)
    perturb(ll.attach(model, EVERYTHING))
    ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    ll.load(model, tmp_path / "a.safetensors")
    model.train()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    with pytest.raises(ll.TargetError, match="were never called") as error:
        ll.merge(model)
    assert name in str(error.value)
    assert not any(ran(model).values())
    assert all(module.training for module in model.modules())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("WARNING" in line for line in log)


@pytest.mark.usefixtures("unseen")
def test_what_a_file_says_never_ran_is_known_after_a_load(tmp_path: Path, log: list[str]) -> None:
    """WavLM's own dummy inputs don't suit it, so that a merge could find nothing out by itself."""
    model, batch, _ = bypassed("wavlm")
    perturb(ll.attach(model, EVERYTHING))
    model(**batch)
    ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    ll.load(model, tmp_path / "a.safetensors")
    with pytest.raises(ll.TargetError, match=r"were never called, .*attention\.k_proj"):
        ll.merge(model)
    ll.save(model, tmp_path / "b.safetensors")
    first, second = (read_file(tmp_path / name).never_ran for name in ("a.safetensors", "b.safetensors"))
    assert first == second != []


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
@pytest.mark.parametrize("runs", [True, False])
def test_models_that_call_their_layers_merge_without_a_word(make: Any, runs: bool, log: list[str]) -> None:
    model = make()
    perturb(ll.attach(model, ll.LoRAConfig(r=4, dtype=torch.float32)))
    if runs:
        logits(model)
    for _ in range(2):
        ll.merge(model)
        ll.unmerge(model)
    assert any(ran(model).values()) == runs
    assert not any("WARNING" in line for line in log)


def test_a_warning_where_nothing_has_run_and_nothing_can(log: list[str]) -> None:
    model = OneLinear()
    ll.attach(model, config("lora", target_names="proj"))
    ll.merge(model)
    warned = "\n".join(line for line in log if "WARNING" in line)
    assert (
        "1 of 1 layers have not been called since attach: proj\n  this OneLinear has no dummy_inputs to run" in warned
    )
    assert "lora_lite.audit(model, batch) before the merge tells" in warned
    log.clear()
    sound = wavlm().eval()
    ll.attach(sound, EVERYTHING)
    ll.merge(sound)
    assert "its dummy_inputs don't run (TypeError: " in "\n".join(log)


def test_layers_that_other_inputs_reach_merge_when_told() -> None:
    model = Experts()
    adapter = ll.attach(model, config("lora", target_names="proj"))
    perturb(adapter)
    model.eval()
    takes = (0, 1, 2, 3)
    wanted = experts_output(copy.deepcopy(model), takes)
    model(X)
    cure = r'merge with never_ran="merge" \(--never-ran merge\) if other inputs'
    with pytest.raises(ll.TargetError, match=rf"experts\.3\.proj\n.*\n.*{cure}"):
        ll.merge(model)
    ll.merge(model, never_ran="merge")
    torch.testing.assert_close(experts_output(model, takes), wanted)
    ll.unmerge(model)
    model(X, takes)
    ll.merge(model)
    with pytest.raises(ll.ConfigError, match="never_ran='fold': wanted one of"):
        ll.merge(model, never_ran="fold")


def experts_output(model: Any, takes: tuple[int, ...]) -> torch.Tensor:
    np.random.seed(0)
    with torch.no_grad():
        out: torch.Tensor = model(X, takes)
    return out


def test_a_layer_has_run_at_any_scale_and_its_flag_travels() -> None:
    model = tiny_llama()
    adapter = ll.attach(model, config("lora", target_names="q_proj"))
    adapter.scale = 0.0
    assert not any(ran(model).values())
    logits(model)
    assert all(ran(model).values())
    assert all(ran(copy.deepcopy(model)).values())
    assert all(ran(pickle.loads(pickle.dumps(model))).values())
    ll.attach(model, config("ia3", target_names="q_proj|k_proj"), name="later")
    assert {path.rpartition(".")[2] for path, flag in ran(model).items() if flag} == {"q_proj"}
    ll.detach(model)
    ll.attach(model, config("lora", target_names="q_proj"))
    assert not any(ran(model).values())


def test_a_round_that_is_kept_keeps_what_is_known_of_its_layers(log: list[str]) -> None:
    model = tiny_llama()
    keep(model, target_names="q_proj")
    perturb(ll.attach(model, config("lora", target_names="q_proj|down_proj")))
    logits(model)
    ll.freeze_into(model)
    assert all(ran(model).values())
    ll.merge(model)
    assert not any("WARNING" in line for line in log)


# ---- the file -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unseen")
def test_a_merge_on_disk_refuses_what_the_file_says_never_ran(tmp_path: Path) -> None:
    model = MambaForCausalLM(MambaConfig(**SMALL, state_size=8)).eval()
    model.save_pretrained(tmp_path / "base")
    perturb(ll.attach(model, EVERYTHING))
    file = tmp_path / "a.safetensors"
    logits(model)
    ll.save(model, file)
    with pytest.raises(
        ll.TargetError, match=r"a\.safetensors: 2 of 8 adapted layers were never called.*dt_proj \(2\)\n"
    ):
        ll.merge_checkpoint(tmp_path / "base", file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    command = ["merge", str(tmp_path / "base"), str(file), str(tmp_path / "out")]
    refused = CliRunner().invoke(app, ["--debug", *command])
    assert refused.exit_code == 2, refused.output
    assert "(--never-ran merge) if other inputs reach them" in refused.stderr
    assert CliRunner().invoke(app, [*command, "--never-ran", "merge"]).exit_code == 0
    with pytest.raises(ll.ConfigError, match="never_ran='fold': wanted one of"):
        ll.merge_checkpoint(tmp_path / "base", file, tmp_path / "out", never_ran="fold")

    again = MambaForCausalLM.from_pretrained(tmp_path / "base").eval()
    ll.load(again, file)
    assert not any(ran(again).values())


@pytest.mark.parametrize("bad", ["dt_proj", [3], ["elsewhere"], [["a"]]])
def test_a_file_with_another_never_ran_is_refused(bad: Any, tmp_path: Path) -> None:
    model = OneLinear()
    ll.attach(model, config("lora", target_names="proj"))
    ll.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["lora_lite"]) | {"never_ran": bad}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "b.safetensors", {"lora_lite": json.dumps(meta)})
    with pytest.raises(ll.CheckpointError, match=r'its metadata has "never_ran": .*; wanted some of its targets'):
        ll.load(model, tmp_path / "b.safetensors", name="b")
