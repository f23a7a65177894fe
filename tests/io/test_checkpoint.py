"""Files: the format, wrappers' prefixes, other bases, atomic writes, and every way a file can be wrong."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import OneLinear, attach, config, perturb, quantized, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_laws import logits, same_snapshot, snapshot
from torch import nn

import lora_lite as ll


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora", r=2)))
    ll.save(model, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def meta_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        meta: dict[str, Any] = json.loads(file.metadata()["lora_lite"])
        return meta


def rewrite(
    path: Path, *, tensors: Callable[[dict], None] | None = None, meta: Callable[[dict], None] | None = None
) -> None:
    """Change a file's tensors or its metadata."""
    held, described = load_file(path), meta_of(path)
    if tensors:
        tensors(held)
    if meta:
        meta(described)
    save_file(held, path, metadata={"lora_lite": json.dumps(described)})


def test_the_file_is_what_the_design_says(saved: Path) -> None:
    meta = meta_of(saved)
    assert meta.keys() == {"format", "variant", "config", "scale", "targets", "base", "library"}
    assert meta["scale"] == 1.0
    assert (meta["format"], meta["variant"], meta["library"]) == (1, "lora", ll.__version__)
    assert meta["config"] == ll.LoRAConfig(r=2, target_names="_proj$").to_dict()
    assert meta["targets"]["model.layers.0.mlp.down_proj"] == [128, 64]
    assert meta["base"].keys() == {"class", "name_or_path", "dtype", "quantization", "fingerprint"}
    assert (meta["base"]["class"], meta["base"]["dtype"], meta["base"]["quantization"]) == (
        "LlamaForCausalLM",
        "float32",
        None,
    )
    keys = set(load_file(saved))
    assert keys == {f"{path}.lora_{x}" for path in meta["targets"] for x in "AB"}


def test_a_quantised_base_is_recorded(tiny: str, tmp_path: Path) -> None:
    records = {}
    for quantization in ("nf4", "int8"):
        model = quantized(tiny, quantization)
        ll.attach(model, config("lora", target_names="up_proj"))
        ll.save(model, tmp_path / "a.safetensors")
        records[quantization] = meta_of(tmp_path / "a.safetensors")["base"]
    nf4 = records["nf4"]["quantization"]
    assert len(nf4.pop("modules")) == 14
    assert nf4 == {
        "method": "bitsandbytes-4bit",
        "quant_type": "nf4",
        "blocksize": 64,
        "double_quant": True,
        "compute_dtype": "bfloat16",
        "weight_dtype": "bfloat16",
    }
    assert records["nf4"]["name_or_path"] == tiny
    assert records["int8"]["quantization"]["method"] == "bitsandbytes-8bit"


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def make_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"lora_A": [1.0]}))


def make_torch_save(path: Path) -> None:
    torch.save({"lora_A": torch.ones(2)}, path)


def no_metadata(path: Path) -> None:
    save_file(load_file(path), path, metadata={"format": "pt"})


def not_json(path: Path) -> None:
    save_file(load_file(path), path, metadata={"lora_lite": "{'format': 1"})


def no_file(path: Path) -> None:
    path.unlink()


def header_only_garbage(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 4) + b"{{{{")


def edit_meta(**changes: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, meta=lambda meta: meta.update(changes))


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, meta=lambda meta: meta["config"].update(changes))


def edit_base(**changes: Any) -> Callable[[Path], None]:
    return lambda path: rewrite(path, meta=lambda meta: meta["base"].update(changes))


def not_numbers(tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda path: rewrite(path, tensors=lambda t: t.update({"model.layers.1.mlp.up_proj.lora_B": tensor}))


def drop_key(path: Path) -> None:
    rewrite(path, tensors=lambda t: t.pop("model.layers.1.mlp.up_proj.lora_B"))


def add_key(path: Path) -> None:
    rewrite(path, tensors=lambda t: t.update({"model.layers.1.mlp.up_proj.lora_C": torch.ones(1)}))


def wrong_shape(path: Path) -> None:
    rewrite(path, tensors=lambda t: t.update({"model.layers.1.mlp.up_proj.lora_B": torch.ones(128, 3)}))


def other_layer(path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if "layers.1" in k]:
            tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)

    def retarget(meta: dict[str, Any]) -> None:
        for held in (meta, meta["base"]):
            key = "targets" if "targets" in held else "fingerprint"
            held[key] = {k.replace("layers.1", "layers.7"): v for k, v in held[key].items()}

    rewrite(path, tensors=rename, meta=retarget)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut_short, ll.CheckpointError, "no safetensors file; it is cut short or damaged"),
        (header_only_garbage, ll.CheckpointError, "no safetensors file; it is cut short or damaged"),
        (make_pickle, ll.CheckpointError, "looks like a pickle, which is never opened: it can run code"),
        (make_torch_save, ll.CheckpointError, "looks like a pickle, which is never opened"),
        (no_metadata, ll.CheckpointError, r"no lora_lite metadata: raw tensors(?s:.*)28 tensors at 14 layers"),
        (not_json, ll.CheckpointError, "lora_lite metadata is not JSON"),
        (no_file, ll.CheckpointError, "is not a file\n  an adapter is one file"),
        (
            edit_meta(format=3, library="9.9"),
            ll.CheckpointError,
            r"format 3.*\n  read it with the version that wrote it: 9.9",
        ),
        (edit_meta(variant="lorra"), ll.VariantError, "no variant is registered as 'lorra'"),
        (edit_config(beta=1), ll.CheckpointError, r"(?s)bad config or targets: .*unknown: \['beta'\]"),
        (edit_config(r=0), ll.CheckpointError, r"bad config or targets: LoRAConfig\(r=0\)"),
        (
            edit_config(r=3),
            ll.CheckpointError,
            r"28 wrong shapes.*\n  such as model.layers.0.*\(2, 64\), wanted \(3, 64\)",
        ),
        (edit_meta(targets=[1]), ll.CheckpointError, "bad config or targets"),
        (edit_meta(base={}), ll.CheckpointError, "no targets, or a bad base record"),
        (edit_meta(targets={}), ll.CheckpointError, "no targets, or a bad base record"),
        *(
            (edit_meta(scale=scale), ll.CheckpointError, r"names the scale .*; wanted a finite number")
            for scale in ("1", None, True, [1.0], float("nan"), float("inf"), 10**400)
        ),
        (edit_meta(variant=["lora"]), ll.CheckpointError, r"names the variant \['lora'\]; wanted a string"),
        (edit_base(quantization="nf4"), ll.CheckpointError, "bad base record"),
        (edit_base(fingerprint={"proj": 5}), ll.CheckpointError, "bad base record"),
        (
            not_numbers(torch.ones(128, 2, dtype=torch.int64)),
            ll.CheckpointError,
            r"1 tensors hold NaN.*\(torch.int64\)",
        ),
        (not_numbers(torch.full((128, 2), float("nan"))), ll.CheckpointError, "1 tensors hold NaN, infinities"),
        (
            drop_key,
            ll.CheckpointError,
            r"1 missing keys; 27 tensors where 28 are wanted\n  such as .*1.mlp.up_proj.lora_B",
        ),
        (add_key, ll.CheckpointError, r"1 unexpected keys; 29 tensors where 28.*\n  such as .*1.mlp.up_proj.lora_C"),
        (wrong_shape, ll.CheckpointError, r"up_proj.lora_B \(128, 3\), wanted \(128, 2\)"),
        (
            other_layer,
            ll.CheckpointError,
            r"7 of its 14 target layers are not in this LlamaForCausalLM\n  file:  model.layers.7",
        ),
    ],
)
def test_a_bad_file_is_a_clear_error_and_changes_nothing(saved: Path, damage: Any, error: Any, message: str) -> None:
    damage(saved)
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        ll.load(model, saved)
    assert same_snapshot(before, snapshot(model))


@pytest.mark.parametrize("c", [0.0, -0.5, 2.0])
def test_the_scale_is_a_part_of_the_adapter(c: float, tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = ll.attach(model, config("lora"))
    perturb(adapter)
    adapter.scale = c
    wanted = logits(model)
    ll.save(model, tmp_path / "a.safetensors")
    assert meta_of(tmp_path / "a.safetensors")["scale"] == c
    fresh = tiny_llama()
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert loaded.scale == c
    assert repr(loaded).endswith(f"(float32), scale {c:g}")
    assert torch.equal(logits(fresh), wanted)
    other = tiny_llama()
    ll.attach(other, config("lora"))
    assert ll.restore(other, tmp_path / "a.safetensors").scale == c
    assert torch.equal(logits(other), wanted)


def test_a_file_without_a_scale_has_1(saved: Path) -> None:
    rewrite(saved, meta=lambda meta: meta.update(scale=2))
    assert ll.load(tiny_llama(), saved).scale == 2.0
    rewrite(saved, meta=lambda meta: meta.pop("scale"))
    model = tiny_llama()
    adapter = ll.load(model, saved)
    assert adapter.scale == 1.0
    adapter.scale = 0.5
    assert ll.restore(model, saved).scale == 1.0


def test_metadata_that_lacks_a_part(saved: Path) -> None:
    rewrite(saved, meta=lambda meta: meta.pop("base"))
    with pytest.raises(ll.CheckpointError, match=r"its lora_lite metadata lacks \['base'\]"):
        ll.load(tiny_llama(), saved)


def test_a_base_of_other_shapes(saved: Path) -> None:
    model = tiny_llama(intermediate_size=256)
    before = snapshot(model)
    message = r"mlp.gate_proj was saved from a layer with \(d_in, d_out\) = \(64, 128\), and .* has \(64, 256\)"
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load(model, saved)
    assert same_snapshot(before, snapshot(model))


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_a_method_that_depends_on_the_base_refuses_another(variant: str, tmp_path: Path, log: list[str]) -> None:
    model = tiny_llama()
    ll.attach(model, config(variant))
    ll.save(model, tmp_path / "a.safetensors")
    other = tiny_llama(seed=1)
    before = snapshot(other)
    message = (
        rf"trained on another base(?s:.)*'{variant}' depends on the values of its base weight: .*verify_base=False"
    )
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load(other, tmp_path / "a.safetensors")
    assert same_snapshot(before, snapshot(other))
    ll.load(other, tmp_path / "a.safetensors", verify_base=False)
    assert sum(line.startswith("WARNING") and "trained on another base" in line for line in log) == 1


def test_other_methods_warn_on_another_base(saved: Path, log: list[str]) -> None:
    ll.load(tiny_llama(), saved)
    assert not any(line.startswith("WARNING") for line in log)
    ll.load(tiny_llama(seed=1), saved)
    assert sum(line.startswith("WARNING") and "trained on another base" in line for line in log) == 1


def test_the_same_base_in_another_dtype_is_the_same_base(tmp_path: Path, log: list[str]) -> None:
    model = tiny_llama(torch.bfloat16)
    ll.attach(model, config("dora"))
    ll.save(model, tmp_path / "a.safetensors")
    for dtype in (torch.float32, torch.float16):
        ll.load(tiny_llama(torch.bfloat16).to(dtype), tmp_path / "a.safetensors")
    ll.load(tiny_llama(torch.float32).to(torch.float16), tmp_path / "a.safetensors", name="other")
    assert not any(line.startswith("WARNING") for line in log)


def test_a_quantised_base_is_another_base_than_its_dense_original(tiny: str, tmp_path: Path) -> None:
    model = quantized(tiny, "nf4")
    ll.attach(model, config("dora"))
    ll.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ll.CheckpointError, match=r"(?s)file:  .* nf4\n  model: .* bfloat16"):
        ll.load(ll.load_base(tiny, torch.bfloat16), tmp_path / "a.safetensors")
    with pytest.raises(ll.CheckpointError, match=r"(?s)file:  .* nf4\n  model: .* int8"):
        ll.load(quantized(tiny, "int8"), tmp_path / "a.safetensors")


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        setattr(self, name, inner)


@pytest.mark.parametrize("prefix", ["module", "_orig_mod", "base_model.model", "model"])
def test_a_wrappers_prefix_is_resolved_both_ways(prefix: str, tmp_path: Path) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        for name in reversed(prefix.split(".")):
            model = Wrapped(model, name)
        return model

    plain, wrapped = OneLinear(), wrap(OneLinear())
    lead = "" if prefix == "_orig_mod" else f"{prefix}."  # what torch.compile wraps is adapted itself
    perturb(ll.attach(plain, config("lora", target_names="proj")))
    ll.save(plain, tmp_path / "plain.safetensors")
    assert list(ll.load(wrapped, tmp_path / "plain.safetensors").targets) == [f"{lead}proj"]
    ll.save(wrapped, tmp_path / "wrapped.safetensors")
    ll.detach(plain)
    ll.load(plain, tmp_path / "wrapped.safetensors")
    a, b = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "wrapped.safetensors")
    assert all(torch.equal(a[key], b[f"{lead}{key}"]) for key in a)


def test_two_places_for_one_key_are_an_error_that_shows_both_sides(tmp_path: Path) -> None:
    plain = OneLinear()
    ll.attach(plain, config("lora", target_names="proj"))
    ll.save(plain, tmp_path / "a.safetensors")
    both = Wrapped(OneLinear(), "module")
    both.model = OneLinear()
    with pytest.raises(ll.CheckpointError, match=r"(?s)match more than one layer.*file:  proj\n  model: .*module.proj"):
        ll.load(both, tmp_path / "a.safetensors")


def test_an_adapter_saved_from_a_compiled_model_has_plain_keys(tmp_path: Path) -> None:
    model = tiny_llama()
    compiled = torch.compile(model)
    perturb(ll.attach(compiled, config("lora")))  # type: ignore[arg-type]
    ll.save(compiled, tmp_path / "a.safetensors")  # type: ignore[arg-type]
    assert all(key.startswith("model.layers.") for key in load_file(tmp_path / "a.safetensors"))
    fresh = tiny_llama()
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), logits(model))


def test_restore_keeps_the_parameters_that_an_optimiser_holds(saved: Path) -> None:
    model = tiny_llama()
    adapter = ll.attach(model, config("lora", r=2), name="fr")
    before = list(adapter.parameters())
    ll.restore(model, saved, name="fr")
    assert all(a is b for a, b in zip(before, adapter.parameters(), strict=True))
    held = load_file(saved)
    assert all(torch.equal(value, held[key]) for key, value in adapter.state_dict().items())
    dora = tiny_llama()
    ll.attach(dora, config("dora"))
    with pytest.raises(
        ll.CheckpointError, match=r"not of one config\n  \(file, adapter\): \{'variant': \('lora', 'dora'\)"
    ):
        ll.restore(dora, saved)


@pytest.mark.parametrize("variant", sorted(ll.REGISTRY))
def test_restore_refuses_another_base_for_every_method(variant: str, tmp_path: Path) -> None:
    first, other = tiny_llama(bias=True), tiny_llama(seed=1, bias=True)
    for module in other.modules():
        if "Norm" in type(module).__name__:
            nn.init.normal_(module.weight)
    perturb(attach(first, config(variant)))
    ll.save(first, tmp_path / "a.safetensors")
    adapter = attach(other, config(variant))
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    message = (
        r"(?s)trained on another base.*training goes on on its own base: load that, or detach and use lora_lite.load"
    )
    with pytest.raises(ll.CheckpointError, match=message):
        ll.restore(other, tmp_path / "a.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


def test_restore_refuses_another_scaling_or_base(saved: Path) -> None:
    model = tiny_llama()
    adapter = ll.attach(model, config("lora", r=2, alpha=4.0))
    with pytest.raises(ll.CheckpointError, match=r"not of one config\n  \(file, adapter\): \{'alpha': \(None, 4.0\)\}"):
        ll.restore(model, saved)
    other = tiny_llama(seed=1)
    second = ll.attach(other, config("dora"))
    first = tiny_llama()
    perturb(ll.attach(first, config("dora")))
    ll.save(first, saved)
    with pytest.raises(ll.CheckpointError, match="trained on another base"):
        ll.restore(other, saved)
    for each in (adapter, second):
        assert not any(tensor.any() for key, tensor in each.state_dict().items() if key.endswith("B"))


def test_a_failure_in_the_middle_of_a_load_changes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before, register, calls = snapshot(model), nn.Module.register_parameter, []

    def fail_late(self: nn.Module, name: str, value: Any) -> None:
        calls.append(name)
        if len(calls) == 9:
            raise KeyboardInterrupt
        register(self, name, value)

    monkeypatch.setattr(nn.Module, "register_parameter", fail_late)
    with pytest.raises(KeyboardInterrupt):
        ll.load(model, saved)
    monkeypatch.undo()
    assert same_snapshot(before, snapshot(model))


def test_a_file_keeps_the_base_that_its_values_belong_to(tmp_path: Path, log: list[str]) -> None:
    """A DoRA that was put on another base all the same doesn't claim that base when it is saved again."""
    first, second = tiny_llama(), tiny_llama(seed=1)
    ll.attach(first, config("dora"))
    ll.save(first, tmp_path / "a.safetensors")
    ll.load(second, tmp_path / "a.safetensors", verify_base=False)
    ll.save(second, tmp_path / "b.safetensors")
    with pytest.raises(ll.CheckpointError, match="trained on another base"):
        ll.load(tiny_llama(seed=1), tmp_path / "b.safetensors")
    ll.load(tiny_llama(), tmp_path / "b.safetensors")


def test_a_layer_that_was_replaced_is_missed_by_save(tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, config("lora"))
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 128)
    with pytest.raises(
        ll.CheckpointError, match=r"in memory: 2 missing keys; .*\n  such as model.layers.1.mlp.up_proj.lora_A"
    ):
        ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    assert not any("lora_" in key for key in model.state_dict())


def test_restore_resolves_a_wrappers_prefix(saved: Path) -> None:
    wrapped = Wrapped(tiny_llama(), "module")
    adapter = ll.attach(wrapped, config("lora", r=2))
    ll.restore(wrapped, saved)
    held = load_file(saved)
    assert all(torch.equal(t, held[key.removeprefix("module.")]) for key, t in adapter.state_dict().items())


def test_an_emptied_tensor_is_never_saved(tmp_path: Path) -> None:
    """As ZeRO-3 leaves parameters outside a gather."""
    model = OneLinear()
    adapter = ll.attach(model, config("lora", target_names="proj"))
    for parameter in adapter.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(
        ll.CheckpointError, match=r"in memory: 2 wrong shapes.*\n  such as proj.lora_A \(0,\), wanted \(8, 16\)"
    ):
        ll.save(model, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_an_adapter_that_holds_no_numbers_is_not_saved(value: float, saved: Path) -> None:
    old, model = saved.read_bytes(), tiny_llama()
    adapter = ll.attach(model, config("lora"))
    with torch.no_grad():
        dict(adapter.named_tensors())["model.layers.1.mlp.up_proj.lora_B"][3, 1] = value
    message = (
        r"adapter 'default' in memory: 1 tensors hold NaN, .* such as model.layers.1.mlp.up_proj.lora_B "
        r"\(torch.float32\)\n  nothing was written; go back to an earlier file, with a lower learning rate"
    )
    with pytest.raises(ll.CheckpointError, match=message):
        ll.save(model, saved)
    with pytest.raises(ll.CheckpointError, match=r"up_proj\.lora_B"):
        ll.save(model, saved.parent / "new" / "a.safetensors")
    assert saved.read_bytes() == old
    assert os.listdir(saved.parent) == [saved.name]


def test_a_crash_while_writing_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, model = saved.read_bytes(), tiny_llama()
    ll.attach(model, config("lora"))

    def crash(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="the disk is gone"):
        ll.save(model, saved)
    assert saved.read_bytes() == old
    assert os.listdir(saved.parent) == [saved.name]


def test_save_makes_the_folder_and_refuses_to_be_one(tmp_path: Path) -> None:
    model = OneLinear()
    ll.attach(model, config("lora", target_names="proj"))
    ll.save(model, tmp_path / "new" / "a.safetensors")
    assert oct((tmp_path / "new" / "a.safetensors").stat().st_mode & 0o777) == oct(0o666 & ~_umask())
    with pytest.raises(
        ll.CheckpointError, match=r"new is a folder; an adapter is one file, such as .*adapter.safetensors"
    ):
        ll.save(model, tmp_path / "new")
    with pytest.raises(ll.TargetError, match="no adapter 'fr'"):
        ll.save(model, tmp_path / "b.safetensors", name="fr")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
