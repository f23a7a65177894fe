"""Raw tensors: whole state dicts as consolidation writes them, with every key accounted for."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import attach, config, perturb, quantized, tiny_llama
from safetensors.torch import save_file
from test_laws import VARIANTS, logits, same_snapshot, snapshot
from torch import nn

import lora_lite as ll

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj"


def source(variant: str = "lora", *, name: str = "default", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """(model with an adapter that has moved, its config, its state dict as a consolidation gathers it)."""
    model = tiny_llama(dtype, bias=variant == "bias")
    cfg = config(variant, **fields)
    adapter = attach(model, cfg, name)
    perturb(adapter)
    return model, adapter.config, whole(model)


def whole(model: nn.Module, prefix: str = "") -> Tensors:
    return {f"{prefix}{key}": value.detach().clone() for key, value in model.state_dict().items()}


def write(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def write_shards(folder: Path, tensors: Tensors, n: int = 3) -> Path:
    keys, total = list(tensors), sum(t.nbytes for t in tensors.values())
    names = {key: f"model-{1 + i % n:05}-of-{n:05}.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        write(folder / name, {key: tensors[key] for key in keys if names[key] == name})
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_bit_equal_and_without_init(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cfg, tensors = source(variant)

    def forbidden(*_: Any) -> None:
        raise AssertionError("a load ran an init")

    for function in ("init", "group_init"):
        monkeypatch.setattr(ll.REGISTRY[variant], function, staticmethod(forbidden))
    monkeypatch.setattr(ll.ParamSpec, "fill", forbidden)
    monkeypatch.setattr(torch.linalg, "svd", forbidden)
    fresh = tiny_llama(bias=variant == "bias")
    adapter = ll.load(fresh, write(tmp_path / "raw.safetensors", tensors), cfg=cfg)
    assert torch.equal(logits(fresh), logits(model))
    assert adapter.config == cfg
    assert list(adapter.targets) == list(ll.adapters(model)["default"].targets)


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
@pytest.mark.parametrize("put", [write, lambda path, tensors: write_shards(path.parent, tensors)])
def test_a_wrappers_prefix_in_one_file_or_in_shards(prefix: str, put: Any, tmp_path: Path, log: list[str]) -> None:
    model, cfg, _ = source()
    path = put(tmp_path / "raw.safetensors", whole(model, prefix))
    fresh = tiny_llama()
    ll.load(fresh, path, cfg=cfg)
    assert torch.equal(logits(fresh), logits(model))
    assert f"from {path}: 28 tensors of adapter 'default', 21 base tensors equal to this model's, 0 diff" in log[-1]
    assert not any(line.startswith("WARNING") for line in log)


def test_a_folder_with_one_file_of_any_name(tmp_path: Path) -> None:
    model, cfg, tensors = source()
    write(tmp_path / "consolidated.safetensors", tensors)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    fresh = tiny_llama()
    ll.load(fresh, tmp_path, cfg=cfg)
    assert torch.equal(logits(fresh), logits(model))


def test_a_folder_with_one_file_of_ours(tmp_path: Path) -> None:
    model, cfg, _ = source()
    ll.save(model, tmp_path / "adapter.safetensors")
    fresh = tiny_llama()
    ll.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(ll.ConfigError, match=r"holds the config of its adapter\n  leave cfg= out"):
        ll.load(tiny_llama(), tmp_path / "adapter.safetensors", cfg=cfg)


def test_a_folder_that_does_not_say_which_file(tmp_path: Path) -> None:
    with pytest.raises(ll.CheckpointError, match=r"0 indexes and 0 safetensors files: -\n  wanted one file"):
        ll.load(tiny_llama(), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ll.CheckpointError, match=r"pytorch_model.bin looks like a pickle, which is never opened"):
        ll.load(tiny_llama(), tmp_path)
    for name in "ab":
        write(tmp_path / f"{name}.safetensors", {"x": torch.ones(1)})
    with pytest.raises(ll.CheckpointError, match=r"0 indexes and 2 safetensors files: a.safetensors, b.safetensors"):
        ll.load(tiny_llama(), tmp_path)


@pytest.mark.parametrize("use_dora", [False, True])
def test_pefts_own_names(use_dora: bool, tmp_path: Path) -> None:
    made = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_dora=use_dora)
    wrapped = peft.get_peft_model(tiny_llama(), made)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    path = write(tmp_path / "raw.safetensors", whole(wrapped))
    fresh = tiny_llama()
    if use_dora:
        before = snapshot(fresh)
        message = r"4 of its buffers are missing, such as .*q_proj.lora_n0\n.*lora_lite.load_peft\(model, folder\)"
        with pytest.raises(ll.CheckpointError, match=message):
            ll.load(fresh, path, cfg=ll.DoRAConfig(r=4, alpha=8.0))
        assert same_snapshot(before, snapshot(fresh))
        with pytest.raises(
            ll.CheckpointError, match=r"fit lora_lite.config_for\('dora'\)\(r=4, ...\), but for lora_n0"
        ):
            ll.load(fresh, path)
        return
    adapter = ll.load(fresh, path, cfg=ll.LoRAConfig(r=4, alpha=8.0))
    torch.testing.assert_close(logits(fresh), logits(wrapped), rtol=1e-5, atol=1e-6)
    live = dict(wrapped.named_parameters())
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, live[f"base_model.model.{key}.default.weight"])


# ---- what the tensors are -----------------------------------------------------------------------


def test_without_a_config_the_error_says_what_the_tensors_look_like(tmp_path: Path, double: Any) -> None:
    fits = {
        "lora": r"28 tensors at 14 layers, such as model.layers.0.*: lora_A \(2, 128\), lora_B \(64, 2\)\n"
        r"  their names and shapes fit .*lora_lite.config_for\('lora'\)\(r=2, ...\).*\n"
        r"  give the config .*: lora_lite.load\(model, path, cfg=...\)",
        "pissa": r"fit .*lora_lite.config_for\('pissa'\)\(r=2, ...\).*\n",
        "dora": r"fit .*lora_lite.config_for\('dora'\)\(r=2, ...\).*\n",
        "ia3": r"fit .*lora_lite.config_for\('ia3'\)\(...\).*\n",
        "double": r"fit .*lora_lite.config_for\('double'\)\(r=(1|64), ...\)",
        "abliteration": r"fit .*lora_lite.config_for\('abliteration'\)\(...\).*\n",
    }
    for variant, message in fits.items():
        model = tiny_llama()
        ranked = {"r": 2} if "r" in ll.config_for(variant).__dataclass_fields__ else {}
        fields: dict[str, Any] = {"variant": variant, "target_names": "_proj$", "target_roles": (), **ranked}
        attach(model, ll.config_for(variant)(**fields))
        fresh = tiny_llama()
        before = snapshot(fresh)
        with pytest.raises(ll.CheckpointError, match=rf"has no lora_lite metadata: raw tensors say (?s:.*){message}"):
            ll.load(fresh, write(tmp_path / "raw.safetensors", whole(model)))
        assert same_snapshot(before, snapshot(fresh))


def test_several_adapters_in_one_file(tmp_path: Path, log: list[str]) -> None:
    model = source()[0]
    perturb(ll.attach(model, config("lora", r=2), name="fr"), seed=2)
    perturb(ll.attach(model, config("lora", r=3), name="de"), seed=3)
    path = write(tmp_path / "raw.safetensors", whole(model))
    wanted = {name: adapter.state_dict() for name, adapter in ll.adapters(model).items()}

    def loaded(name: str, file: Path, r: int) -> Tensors:
        return ll.load(tiny_llama(), file, name=name, cfg=config("lora", r=r)).state_dict()

    def same(a: Tensors, b: Tensors) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    assert same(loaded("default", path, 8), wanted["default"])
    assert "28 tensors of adapter 'default'" in log[-1]
    assert log[-1].endswith("; left there: adapter 'de' (28), adapter 'fr' (28)")
    assert same(loaded("fr", path, 2), wanted["fr"])
    assert same(loaded("mine", path, 8), wanted["default"])

    suffixed = {key: tensor for key, tensor in whole(model).items() if not key.endswith((".lora_A", ".lora_B"))}
    write(path, suffixed)
    with pytest.raises(
        ll.CheckpointError, match=r"tensors of 2 adapters: .*(fr|de).*\n.*by its name: .*name='(fr|de)'"
    ):
        loaded("default", path, 2)
    assert same(loaded("de", path, 3), wanted["de"])
    write(path, {key: tensor for key, tensor in suffixed.items() if "__de" not in key})
    assert same(loaded("default", path, 2), wanted["fr"])

    twin = tiny_llama()  # one after the other, from one file
    write(path, whole(model))
    for name, r in (("default", 8), ("fr", 2), ("de", 3)):
        ll.load(twin, path, name=name, cfg=config("lora", r=r))
    assert torch.equal(logits(twin), logits(model))


def drop(key: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(key)


def put(key: str, *shape: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({key: torch.ones(*shape)})


def move_layer(tensors: Tensors) -> None:
    for key in [key for key in tensors if "layers.1" in key and "lora" in key]:
        tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)


def no_adapter(tensors: Tensors) -> None:
    for key in [key for key in tensors if "lora" in key]:
        del tensors[key]


def not_a_number(tensors: Tensors) -> None:
    tensors[f"{UP}.lora_B"][3, 1] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{UP}.lora_B"), r"1 missing keys; 27 tensors where 28 are wanted\n  such as .*1.mlp.up_proj.lora_B"),
        (put(f"{UP}.lora_C", 2), r"1 unexpected keys; 29 tensors where 28.*\n  such as .*1.mlp.up_proj.lora_C"),
        (put(f"{UP}.lora_B", 128, 3), r"1 wrong shapes.*\n  such as .*up_proj.lora_B \(128, 3\), wanted \(128, 8\)"),
        (put(f"{UP}.lora_B", 0), r"1 adapter tensors are empty, such as .*lora_B, as ZeRO-3 leaves them outside of a"),
        (put("model.norm.lora_A", 2), r"model.norm is no linear layer of this LlamaForCausalLM but LlamaRMSNorm"),
        (put("model.layers.1.extra", 2), r"1 of its 50 keys are neither an adapter's nor this model's\n.*1.extra"),
        (
            put("module.model.norm.weight", 64),
            r"2 of its 22 base tensors match more than one .*\n  file:  .*norm.weight",
        ),
        (put(f"{UP}.lora_A.weight", 8, 64), r"2 of its 50 keys are one tensor twice\n  such as .*up_proj.lora_A; "),
        (move_layer, r"7 of its 14 target layers are not in this LlamaForCausalLM\n  file:  model.layers.7"),
        (no_adapter, r"has no adapter tensors: none of its 21 keys ends in lora_\*\n  such as .*\n  ZeRO-3 and FSDP"),
        (not_a_number, r"1 tensors hold NaN, infinities or no floating numbers, such as .*up_proj.lora_B"),
    ],
)
def test_a_key_that_does_not_fit_is_an_error_that_changes_nothing(change: Any, message: str, tmp_path: Path) -> None:
    _, cfg, tensors = source()
    change(tensors)
    fresh = tiny_llama()
    before = snapshot(fresh)
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load(fresh, write(tmp_path / "raw.safetensors", tensors), cfg=cfg)
    assert same_snapshot(before, snapshot(fresh))


def test_a_config_of_another_rank_or_method(tmp_path: Path) -> None:
    path = write(tmp_path / "raw.safetensors", source()[2])
    with pytest.raises(ll.CheckpointError, match=r"28 wrong shapes.*\n  such as .*\(8, 64\), wanted \(4, 64\)"):
        ll.load(tiny_llama(), path, cfg=ll.LoRAConfig(r=4))
    with pytest.raises(ll.CheckpointError, match=r"28 missing keys; 28 tensors where 56 are wanted"):
        ll.load(tiny_llama(), path, cfg=ll.DoRAConfig())
    with pytest.raises(ll.ConfigError, match=r"variant 'dora' is configured by DoRAConfig, got LoRAConfig"):
        ll.load(tiny_llama(), path, cfg=ll.LoRAConfig(variant="dora"))
    with pytest.raises(ll.CheckpointError, match=r"no lora_lite metadata, so it was not written by lora_lite.save"):
        model = tiny_llama()
        ll.attach(model, config("lora"))
        ll.restore(model, path)


# ---- the base weights in between ----------------------------------------------------------------


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_equal(
    here: torch.dtype, there: torch.dtype, tmp_path: Path, log: list[str]
) -> None:
    _, cfg, tensors = source("dora")
    stored = {key: t if "lora" in key else t.to(there) for key, t in tensors.items()}
    ll.load(tiny_llama().to(here), write(tmp_path / "raw.safetensors", stored), cfg=cfg)
    assert "21 base tensors equal to this model's, 0 different, 0 that can't be compared" in log[-1]


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16])
def test_one_other_number_in_the_base_is_seen(there: torch.dtype, tmp_path: Path, log: list[str]) -> None:
    _, cfg, tensors = source()
    stored = {key: t if "lora" in key else t.to(there) for key, t in tensors.items()}
    stored["model.norm.weight"][7] *= 1 + 3 * torch.finfo(there).eps
    path = write(tmp_path / "raw.safetensors", stored)
    ll.load(tiny_llama(), path, cfg=cfg)
    assert "20 base tensors equal to this model's, 1 different" in log[-1]
    assert log[-2].startswith("WARNING")
    assert "holds another base than this LlamaForCausalLM" in log[-2]
    assert "such as model.norm.weight" in log[-2]


def test_a_method_that_reads_its_base_refuses_another(tmp_path: Path, log: list[str]) -> None:
    first, cfg, tensors = source("dora")
    path = write(tmp_path / "raw.safetensors", tensors)
    other = tiny_llama(seed=1)
    before = snapshot(other)
    message = (
        r"another base than this LlamaForCausalLM: 5 base .*, 16 different(?s:.*)'dora' depends .*verify_base=False"
    )
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load(other, path, cfg=cfg)
    assert same_snapshot(before, snapshot(other))
    ll.load(other, path, cfg=cfg, verify_base=False)
    assert sum(line.startswith("WARNING") and "another base" in line for line in log) == 1
    ll.save(other, tmp_path / "again.safetensors")  # its values belong to the file's base, not to this one
    with pytest.raises(ll.CheckpointError, match="trained on another base"):
        ll.load(tiny_llama(seed=1), tmp_path / "again.safetensors")
    fresh = tiny_llama()
    ll.load(fresh, tmp_path / "again.safetensors")
    assert torch.equal(logits(fresh), logits(first))


def test_a_base_of_another_shape_is_different_and_never_read(
    tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cfg, tensors = source(target_names="q_proj")
    tensors["model.embed_tokens.weight"] = torch.ones(7, 64)
    ll.load(tiny_llama(), write(tmp_path / "raw.safetensors", tensors), cfg=cfg)
    assert "20 base tensors equal to this model's, 1 different" in log[-1]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base(quantization: str, tiny: str, tmp_path: Path, log: list[str]) -> None:
    trained = quantized(tiny, quantization)
    cfgs = {variant: config(variant) for variant in ("lora", "dora")}
    for variant, cfg in cfgs.items():
        perturb(ll.attach(trained, cfg))
        tensors = whole(trained)
        path = write(tmp_path / f"{variant}.safetensors", tensors)  # its codes, as they are
        fresh = quantized(tiny, quantization)
        ll.load(fresh, path, cfg=cfg)
        base = len(fresh.state_dict()) - len(ll.adapters(fresh)["default"].state_dict())
        assert f"{base} base tensors equal to this model's, 0 different, 0 that can't be compared" in log[-1]
        assert torch.equal(logits(fresh), logits(trained))
        dense = ll.load_base(tiny).state_dict()
        mixed = {key: t for key, t in tensors.items() if "lora" in key} | {k: t.clone() for k, t in dense.items()}
        write(path, mixed)  # as merged or as loaded without quantisation: numbers against codes
        fresh = quantized(tiny, quantization)
        if variant == "lora":
            ll.load(fresh, path, cfg=cfg)
            assert "7 base tensors equal to this model's, 0 different, 14 that can't be compared" in log[-1]
        else:
            with pytest.raises(ll.CheckpointError, match=r"14 that can't be compared\n  such as .*\n  'dora' depends"):
                ll.load(fresh, path, cfg=cfg)
        ll.detach(trained)


def test_one_base_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_lite.io.safetensors import Header

    _, cfg, tensors = source()
    path, reads, read = write(tmp_path / "raw.safetensors", tensors), [], Header.read

    def counted(self: Header, keys: Any = None) -> Tensors:
        held = read(self, keys)
        reads.append(len(held))
        return held

    monkeypatch.setattr(Header, "read", counted)
    ll.load(tiny_llama(), path, cfg=cfg)
    assert set(reads) == {1}
    assert len(reads) == len(tensors)


def test_tied_weights_that_the_state_dict_names_twice(tmp_path: Path, log: list[str]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    cfg = config("lora")
    perturb(ll.attach(model, cfg))
    assert "lm_head.weight" in whole(model)
    fresh = tiny_llama(tie_word_embeddings=True)
    ll.load(fresh, write(tmp_path / "raw.safetensors", whole(model)), cfg=cfg)
    assert torch.equal(logits(fresh), logits(model))
    assert "21 base tensors equal" in log[-1]


def test_several_configs_are_refused(tmp_path: Path) -> None:
    """In a process of its own: the types that tests check would stop the call before it is made."""
    path = write(tmp_path / "raw.safetensors", {"0.lora_A": torch.zeros(2, 4)})
    script = f"""
import torch, lora_lite as ll
try:
    ll.load(torch.nn.Sequential(torch.nn.Linear(4, 4)), {str(path)!r}, cfg=[ll.LoRAConfig(r=2), ll.NormConfig()])
except ll.ConfigError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert "is not a config" in result.stdout, result.stderr[-2000:]
