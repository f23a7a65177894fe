"""Adapters that act at some positions of a sequence: the mask of each call, through prefill, decoding and training."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers as tf
from models import moe, perturb, tiny_llama
from test_laws import same_snapshot, snapshot
from torch import Tensor, nn

import lora_lite as ll

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # a checkpoint in no_grad

CALL = (7, 8)  # the invocation tokens
IDS = torch.tensor(
    [
        [11, 12, 7, 8, 13, 7, 8, 14],  # twice: the last one counts
        [15, 16, 17, 18, 19, 20, 21, 22],  # never
        [7, 8, 23, 24, 25, 26, 27, 7],  # from the first token on
    ]
)
STARTS = [5, 8, 0]
ALORA = ll.LoRAConfig(r=4, invocation_tokens=CALL)
REFT = ll.ReFTConfig(r=3, first=1, last=2)


def attached(cfg: Any = ALORA, **sizes: Any) -> tuple[Any, ll.Adapter]:
    model = tiny_llama(**sizes)
    adapter = ll.attach(model, cfg)
    perturb(adapter, 0.2)
    return model, adapter


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    return model(input_ids=ids, **more).logits


def padded(ids: Tensor, n: int, side: str) -> dict[str, Tensor]:
    """The batch with n tokens of padding in each row."""
    pads = torch.zeros(len(ids), n, dtype=torch.long)
    parts, on = ([pads, ids], [0, 1]) if side == "left" else ([ids, pads], [1, 0])
    mask = torch.cat([torch.full_like(part, value) for part, value in zip(parts, on, strict=True)], 1)
    return {"input_ids": torch.cat(parts, 1), "attention_mask": mask}


# ---- one call -----------------------------------------------------------------------------------


def test_off_its_positions_it_is_the_base_bit_for_bit() -> None:
    base, (model, _) = logits(tiny_llama()), attached()
    got = logits(model)
    for row, start in enumerate(STARTS):
        assert torch.equal(got[row, :start], base[row, :start])
        assert (got[row, start:] != base[row, start:]).all() or start == 8
    everywhere = logits(attached(ll.LoRAConfig(r=4))[0])
    torch.testing.assert_close(got[2], everywhere[2])
    with ll.scaled(model, 0.0):
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cfg", [ALORA, REFT], ids=["alora", "reft"])
def test_padding_is_no_part_of_a_row(cfg: Any, side: str) -> None:
    model, _ = attached(cfg)
    batch, n = padded(IDS, 3, side), IDS.shape[1]
    got = logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    own = got[:, 3:] if side == "left" else got[:, :n]
    torch.testing.assert_close(own, logits(model), rtol=1e-4, atol=1e-5)


def test_tokens_that_are_not_attended_start_nothing() -> None:
    model, _ = attached()
    ids = torch.cat([torch.tensor([[7, 8]] * 3), IDS[[1, 1, 1]]], 1)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    assert torch.equal(logits(model, ids, attention_mask=mask), logits(tiny_llama(), ids, attention_mask=mask))


def test_peft_gives_the_same_outputs_gradients_and_tokens() -> None:
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    theirs: Any = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(**settings, alora_invocation_tokens=list(CALL), task_type="CAUSAL_LM")
    )
    ours = tiny_llama()
    adapter = ll.attach(ours, ll.LoRAConfig(r=4, alpha=8.0, target_names="q_proj|down_proj", invocation_tokens=CALL))
    perturb(adapter, 0.3)
    parameters = {
        name.replace("base_model.model.", "").replace(".default.weight", ""): p
        for name, p in theirs.named_parameters()
        if "lora_" in name
    }
    with torch.no_grad():
        for key, tensor in adapter.named_tensors():
            parameters[key].copy_(tensor)
    theirs.eval()
    left = padded(IDS, 2, "left")
    for batch in ({"input_ids": IDS}, left):
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits)
        labels = batch["input_ids"]
        for model in (ours, theirs):
            model.zero_grad()
            model(**batch, labels=labels).loss.backward()
        for key, tensor in adapter.named_tensors():
            assert tensor.grad is not None
            assert tensor.grad.abs().max() > 0
            torch.testing.assert_close(tensor.grad, parameters[key].grad)
        how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        tokens = ours.generate(**batch, **how)
        assert torch.equal(tokens, theirs.generate(**batch, **how))
        assert not torch.equal(tokens, tiny_llama().generate(**batch, **how))


# ---- decoding -----------------------------------------------------------------------------------


def marked(ids: Tensor, prompt: int) -> Tensor:
    """Labels for all but the first tokens of each row."""
    labels = ids.clone()
    labels[:, :prompt] = -100
    return labels


@pytest.mark.parametrize("cfg", [ALORA, REFT], ids=["alora", "reft"])
@pytest.mark.parametrize("make", [tf.DynamicCache, lambda: None], ids=["given", "made"])
def test_decoding_with_a_cache_is_the_forward_without(cfg: Any, make: Callable[[], Any]) -> None:
    model, _ = attached(cfg)
    more = torch.randint(30, 90, (3, 5), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([IDS, more], 1)
    wanted = logits(model, ids, labels=marked(ids, 8))
    assert not torch.equal(wanted[:, 8:], logits(tiny_llama(), ids)[:, 8:])
    with torch.no_grad():
        out = model(input_ids=IDS, use_cache=True, past_key_values=make())
        parts = [out.logits]
        for column in more.unbind(1):
            out = model(input_ids=column[:, None], past_key_values=out.past_key_values)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_generated_starts_nothing() -> None:
    model, _ = attached()
    base = tiny_llama()
    with torch.no_grad():
        outs = [m(input_ids=IDS[1:2], use_cache=True) for m in (model, base)]
        for token in (*CALL, 30):
            outs = [
                m(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
                for m, out in zip((model, base), outs, strict=True)
            ]
            assert torch.equal(outs[0].logits, outs[1].logits)


def test_generations_side_by_side_do_not_mix() -> None:
    model, _ = attached()
    twin, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    alone = [logits(model, torch.cat([IDS[row : row + 1], IDS[:1, :3]], 1))[:, 8:] for row in range(3)]
    with torch.no_grad():
        outs = [model(input_ids=IDS[row : row + 1], use_cache=True) for row in range(3)]
        caches = [copy.deepcopy(out.past_key_values) for out in outs]  # what was decided goes with a copy
        for step, wanted in enumerate(IDS[0, :3]):
            for row in (2, 0, 1):
                for m, cache in ((model, outs[row].past_key_values), ((twin, unpickled)[row % 2], caches[row])):
                    got = m(input_ids=wanted[None, None], past_key_values=cache).logits[:, 0]
                    torch.testing.assert_close(got, alone[row][:, step], rtol=1e-4, atol=1e-5)


def test_beam_search_moves_rows_within_their_prompt() -> None:
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    got = attached()[0].generate(input_ids=IDS[1:], **how)
    assert torch.equal(got[:1], tiny_llama().generate(input_ids=IDS[1:2], **how))
    assert torch.equal(got[1:], attached(ll.LoRAConfig(r=4))[0].generate(input_ids=IDS[2:], **how))
    assert not torch.equal(got[1:], tiny_llama().generate(input_ids=IDS[2:], **how))


def test_a_cache_of_the_base_may_come_before_the_tokens() -> None:
    """As aLoRA is used: what comes before the invocation is computed once, for all."""
    model, _ = attached()
    whole = torch.cat([IDS[[1, 1, 1]], IDS], 1)
    wanted = logits(model, whole)[:, 8:]
    with torch.no_grad():
        with ll.disabled(model):
            cache = model(input_ids=IDS[[1, 1, 1]], use_cache=True).past_key_values
        torch.testing.assert_close(model(input_ids=IDS, past_key_values=cache).logits, wanted, rtol=1e-4, atol=1e-5)
        step = model(input_ids=IDS[:, :1], past_key_values=cache).logits
    torch.testing.assert_close(step, logits(model, torch.cat([whole, IDS[:, :1]], 1))[:, -1:], rtol=1e-4, atol=1e-5)
    cache = logits_and_cache(tiny_llama(), IDS)
    with pytest.raises(ll.ConfigError, match=r"8 tokens are in a cache that was made without the adapter.*\n.*whole"):
        attached(REFT)[0](input_ids=IDS, past_key_values=cache)


@torch.no_grad()
def logits_and_cache(model: Any, ids: Tensor = IDS) -> Any:
    return model(input_ids=ids, use_cache=True).past_key_values


# ---- calls whose positions aren't known ---------------------------------------------------------


def test_calls_that_do_not_say_where_a_prompt_is_are_refused() -> None:
    model, _ = attached()
    one, static = IDS[:, :1], {"cache_implementation": "static", "max_new_tokens": 2}
    refused: list[tuple[str, Callable[[], Any]]] = [
        (
            r"3 x 2 tokens come after a prompt.*\n.*no prefill_chunk_size",
            lambda: model(IDS[:, :2], past_key_values=logits_and_cache(model)),
        ),
        (
            r"3 x 3 tokens come after",
            lambda: model.generate(
                input_ids=IDS, prefill_chunk_size=3, max_new_tokens=2, past_key_values=tf.DynamicCache()
            ),
        ),
        (
            r"decoding after 8 tokens in a cache that the adapter hasn't seen.*\n.*default cache",
            lambda: model(one, past_key_values=logits_and_cache(tiny_llama())),
        ),
        (r"attention_mask is \(3, 9\) for \(3, 1\) tokens", lambda: model(one, torch.ones(3, 9))),
        (r"attention_mask is \(3, 1, 8, 8\) for", lambda: model(IDS, torch.ones(3, 1, 8, 8, dtype=torch.bool))),
        (r"attention_mask is .* for \(3, 10\) tokens", lambda: model.generate(**padded(IDS, 2, "left"), **static)),
        (r"a step of generate\(use_cache=False\)", lambda: model.generate(IDS, use_cache=False, max_new_tokens=2)),
        (r"several sequences", lambda: model(IDS, position_ids=torch.arange(8).remainder(4)[None])),
        (r"wants input_ids, and the model", lambda: model(inputs_embeds=torch.randn(3, 8, 64))),
        (r"called without a tensor", lambda: model()),
    ]
    for message, call in refused:
        with pytest.raises(ll.ConfigError, match=message):
            call()
    cropped = logits_and_cache(model)
    cropped.crop(-2)
    fewer = logits_and_cache(model)
    fewer.batch_select_indices(torch.tensor([0, 1]))
    for cache, rows in ((cropped, 3), (fewer, 2)):
        with pytest.raises(ll.ConfigError, match=r"the cache holds \d tokens of \d rows, and 8 of 3 when"):
            model(one[:rows], past_key_values=cache)
    for part in (model.model, model.model.layers[0].mlp):
        given = IDS if part is model.model else torch.randn(3, 8, 64)
        with pytest.raises(ll.TargetError, match=r"model\.layers\.0\..*isn't known in a call of a part of the model"):
            part(given)
    greedy = {"max_new_tokens": 6, "do_sample": False}  # without padding, a static cache's mask is None
    assert torch.equal(model.generate(input_ids=IDS, **static | greedy), model.generate(input_ids=IDS, **greedy))
    assert torch.equal(logits(model), logits(attached()[0]))  # no refusal leaves anything behind


class Around(nn.Module):
    """A layer in a model that gives it another view of the tokens."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.view, self.proj = view, nn.Linear(16, 16)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.proj(self.view(inputs_embeds))


def test_layers_may_see_all_tokens_in_one_row_and_nothing_else() -> None:
    x = torch.randn(2, 5, 16)
    cfg = ll.ReFTConfig(kinds="linear", target_names="proj", r=2, first=1, last=1)
    models = {name: Around(view) for name, view in VIEWS.items()}
    for model in models.values():
        model.proj.load_state_dict({name: getattr(models["whole"].proj, name) for name in ("weight", "bias")})
        torch.manual_seed(0)
        ll.attach(model, cfg)
    wanted = models["whole"](x)
    base = nn.functional.linear(x, models["whole"].proj.weight, models["whole"].proj.bias)
    assert (wanted != base).any(-1).tolist() == [[True, False, False, False, True]] * 2
    for name in ("flat", "row"):
        torch.testing.assert_close(models[name](x).reshape(2, 5, 16), wanted)
    for name, got in (("first", r"\(2, 16\)"), ("heads", r"\(2, 5, 1, 16\)")):
        with pytest.raises(ll.TargetError, match=rf"proj: wanted hidden states of the call's 2 x 5 tokens, got {got}"):
            models[name](x)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x,
    "flat": lambda x: x.flatten(0, 1),
    "row": lambda x: x.flatten(0, 1)[None],
    "first": lambda x: x[:, 0],
    "heads": lambda x: x[:, :, None],
}


class ByInput:
    """A method on the input alone."""

    name = "by_input"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        return {"lora_l": ll.ParamSpec((d_in,), init="ones")}

    @staticmethod
    def positions(cfg: Any) -> Any:
        return lambda prompt: nn.functional.pad(prompt.attended & (prompt.tokens == 7), (0, 1))

    @staticmethod
    def forward_input(layer: Any, x: Tensor) -> Tensor:
        return x * layer.lora_l


def test_a_method_of_ones_own_may_act_on_inputs_at_positions() -> None:
    ll.register(ByInput)
    model = tiny_llama()
    adapter = ll.attach(model, ll.AdapterConfig(variant="by_input", target_names="layers.1.mlp.down_proj"))
    base = logits(model)
    perturb(adapter, 0.5)
    assert torch.equal((logits(model) != base).any(-1), IDS == 7)


@dataclass(frozen=True, kw_only=True)
class OnNormsConfig(ll.BaseConfig):
    variant: str = "on_norms"
    WITHOUT_MATRIX: ClassVar[tuple[str, ...]] = ("norm",)


class OnNorms(ByInput):
    """A method that reads what a norm makes of its input."""

    name, config, forward_input = "on_norms", OnNormsConfig, None

    @staticmethod
    def forward(layer: Any, x: Tensor, y: Tensor) -> Tensor:
        return y + (layer.lora_l - 1) * x


def test_a_method_that_reads_a_norms_input_acts_at_positions() -> None:
    ll.register(OnNorms)
    model = tiny_llama()
    adapter = ll.attach(model, OnNormsConfig(kinds="norm", target_names=r"^model\.norm$"))
    base = logits(model)
    perturb(adapter, 0.5)
    assert torch.equal((logits(model) != base).any(-1), IDS == 7)


def test_where_it_can_not_act_attach_refuses_and_leaves_no_trace() -> None:
    model = tiny_llama()
    before = snapshot(model)
    t5 = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2))
    embeddings = ll.LoRAConfig(r=2, invocation_tokens=CALL, kinds="embedding", target_names="embed_tokens")
    experts = ll.LoRAConfig(r=2, invocation_tokens=CALL, kinds="experts")
    listed = nn.ModuleDict({"experts": nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))])})
    for root, cfg, message in (
        (model, embeddings, r"embed_tokens: its weight is multiplied where no call shows the tokens: what acts at"),
        (moe("qwen3"), experts, r"experts.*: its weight is multiplied where no call shows"),
        (listed, ll.LoRAConfig(r=2, invocation_tokens=CALL, target_names="0"), r"an expert sees the tokens that are"),
        (t5, ll.ReFTConfig(r=2), r"T5ForConditionalGeneration is an encoder-decoder"),
    ):
        for function in (ll.attach, ll.plan):
            with pytest.raises(ll.TargetError, match=message):
                function(root, cfg)
    assert same_snapshot(snapshot(model), before)


def test_others_cost_nothing_and_detach_takes_the_hooks_off() -> None:
    model = tiny_llama()
    before = snapshot(model)
    ll.attach(model, ll.LoRAConfig(r=2))
    assert not [*model._forward_pre_hooks, *model._forward_hooks]
    ll.attach(model, ALORA, "second")
    perturb(ll.adapters(model)["second"], 0.2)
    alone = logits(model)
    ll.attach(model, REFT, "third")
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (2, 2)
    assert not torch.equal(logits(model), alone)
    ll.detach(model, "third")
    assert torch.equal(logits(model), alone)
    ll.detach(model)
    assert same_snapshot(snapshot(model), before)


# ---- training -----------------------------------------------------------------------------------


def gradients(cfg: Any, reentrant: bool | None) -> dict[str, Tensor]:
    """Those of one loss over two forwards whose masks differ, and a third of the base in between, as DPO has it."""
    model, adapter = attached(cfg)
    model.train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    chosen, rejected = IDS, IDS.roll(3, 1)
    loss = model(input_ids=chosen, labels=marked(chosen, 5)).loss
    with torch.no_grad(), ll.disabled(model):
        model(input_ids=IDS.flip(0))
    loss = loss - model(input_ids=rejected, labels=marked(rejected, 3)).loss
    with torch.no_grad():
        model(input_ids=IDS.flip(1))
    loss.backward()
    return {key: tensor.grad for key, tensor in adapter.named_tensors() if tensor.grad is not None}


# On a layer: transformers checkpoints a block's forward, and its hooks are outside of that.
@pytest.mark.parametrize("cfg", [ALORA, replace(REFT, kinds="linear", target_names="down_proj")], ids=["alora", "reft"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_a_backward_runs_again_has_its_own_mask(cfg: Any, reentrant: bool) -> None:
    plain, again = gradients(cfg, None), gradients(cfg, reentrant)
    assert plain.keys() == again.keys()
    assert len(plain) > 4
    assert all(gradient.any() for gradient in plain.values())
    for key, wanted in plain.items():
        torch.testing.assert_close(again[key], wanted, msg=key)


def test_masks_are_forgotten_in_the_end_and_then_it_says_so() -> None:
    model, _ = attached()
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    early = model(input_ids=IDS, labels=IDS).loss
    for _ in range(70):
        model(input_ids=IDS[:1, :4])
    with pytest.raises(ll.ConfigError, match=r"more than 32 changes of the positions ago: .*\n.*before other forwards"):
        early.backward()


PROCESS = """
from dataclasses import replace
import torch
from test_positions import ALORA, IDS, REFT, attached, marked
for cfg in (replace(ALORA, exclude_names="(k|o|gate|up)_proj"), REFT):
    model, adapter = attached(cfg, num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ids in (IDS, IDS.roll(2, 1)):
        for c in (1.0, 0.0, -0.5):
            adapter.scale = c
            more = {"attention_mask": torch.ones_like(ids), "labels": marked(ids, 5)}
            torch.testing.assert_close(
                compiled(input_ids=ids, **more).logits, model(input_ids=ids, **more).logits, rtol=1e-4, atol=1e-5
            )
    model, adapter = attached(cfg)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    for ids in (IDS, IDS.roll(2, 1)):
        plain = attached(cfg)[0](input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    """In a process of its own: the check of shapes that the tests run with breaks graphs."""
    tests = Path(__file__).parents[1]
    paths = [tests, tests / "core", tests / "laws", tests.parent]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", PROCESS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


# ---- weights that can't hold it, and files -------------------------------------------------------


@pytest.mark.parametrize(
    "cfg", [ALORA, ll.ReFTConfig(r=2, kinds="linear", target_names="down_proj")], ids=["alora", "reft"]
)
def test_no_weight_holds_it(cfg: Any, tmp_path: Path) -> None:
    base, file = tmp_path / "base", tmp_path / "a.safetensors"
    tiny_llama().save_pretrained(base)
    model, _ = attached(cfg)
    ll.save(model, file)
    reason = r"acts at some positions of a sequence, and no weight holds that\n  keep it attached"
    with pytest.raises(ll.TargetError, match=rf"_proj: the adapter {reason}"):
        ll.merge(model)
    with pytest.raises(ll.TargetError, match=rf"_proj: the adapter {reason}"):
        ll.audit(model, {"input_ids": IDS, "labels": IDS}, merged=True)
    with pytest.raises(ll.CheckpointError, match=rf"a.safetensors: the adapter {reason}"):
        ll.merge_checkpoint(base, file, tmp_path / "merged")
    for rank in (4,) if cfg is ALORA else (None, 4):  # PEFT has aLoRA
        with pytest.raises(
            ll.CheckpointError, match=r"_proj: it acts at some positions.*\n.*our file .lora_lite.save.$"
        ):
            ll.save_peft(model, tmp_path / "peft", rank=rank)
    with pytest.raises(ll.TargetError, match=r"'default' acts at some positions of a sequence, and a history at all"):
        ll.freeze_into(model)
    fresh = tiny_llama()
    ll.load(fresh, file)
    assert torch.equal(logits(fresh), logits(model))
    if cfg is ALORA:  # one that adds doesn't mind what is merged beside it
        perturb(ll.attach(model, ll.LoRAConfig(r=2), "everywhere"), 0.2, seed=4)
        wanted = logits(model)
        ll.merge(model, "everywhere")
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


def test_the_field_is_checked_and_older_files_lack_it() -> None:
    for tokens in ((), (True,), "", (-1,)):
        with pytest.raises(ll.ConfigError, match=r"invocation_tokens=.*: wanted one or more ids of tokens, or None"):
            ll.LoRAConfig(invocation_tokens=tokens)  # type: ignore[arg-type]
    assert ll.LoRAConfig(invocation_tokens=[7, 8]) == ll.LoRAConfig(invocation_tokens=CALL)
    assert ll.LoRAConfig.from_dict(ALORA.to_dict()) == ALORA
    older = {name: value for name, value in ll.DoRAConfig().to_dict().items() if name != "invocation_tokens"}
    assert ll.DoRAConfig.from_dict(older) == ll.DoRAConfig()
    with pytest.raises(ll.ConfigError, match="can't differ by layer"):
        ll.LoRAConfig(per_layer={"q_proj": {"invocation_tokens": [1]}})


def test_a_dora_acts_at_positions_too() -> None:
    base, model = logits(tiny_llama()), tiny_llama()
    perturb(ll.attach(model, ll.DoRAConfig(r=4, invocation_tokens=CALL)), 0.2)
    assert torch.equal((logits(model) == base).all(-1), torch.arange(8) < torch.tensor(STARTS)[:, None])


def test_a_state_space_model_has_a_cache_of_another_kind() -> None:
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8)
    model = tf.MambaForCausalLM(config).eval()
    perturb(ll.attach(model, ll.LoRAConfig(r=4, invocation_tokens=CALL, target_names="in_proj")), 0.2)
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    for length in range(8, 12):  # nothing that it makes here is an invocation
        assert torch.equal(logits(model, tokens[:, :length])[:, -1].argmax(-1), tokens[:, length])
