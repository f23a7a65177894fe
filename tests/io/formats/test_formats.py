"""Laws over the formats of other programs: a file holds the adapter, gives it back, and drops nothing in silence."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, attach, config, perturb, tiny_llama
from test_laws import logits, same_snapshot, snapshot

import lora_lite as ll
from lora_lite.cli.report import inspect
from lora_lite.core.effective import delta_weight
from lora_lite.io.factors import adapted_layers
from lora_lite.io.formats.save import difference
from lora_lite.io.formats.table import FORMATS

OF_LORA = [name for name, known in FORMATS.items() if "lora" in known.variants]
per_format = pytest.mark.parametrize("format", OF_LORA)
PLAIN: dict[str, dict[str, Any]] = {
    "square": {"target_names": r"(q|o)_proj$"},  # a transposed factor has the same shape there
    "all": {},
    "ranks": {"per_layer": {r"0\.mlp\.up": {"r": 2, "alpha": 5.0}, "v_proj": {"r": 7}}},
    "rslora": {"rslora": True, "alpha": 3.0},
    "some blocks": {"layers": [1], "target_names": "q_proj|down_proj"},
    "first block": {"layers": [0], "target_names": "v_proj"},
}


def place(folder: Path, format: str) -> Path:
    return folder / ("adapter.gguf" if format.startswith("gguf") else "adapter")


def saved(model: Any, folder: Path, format: str, **options: Any) -> tuple[Path, float]:
    path = place(folder, format)
    return path, ll.save_as(model, path, format, **options)


@per_format
@pytest.mark.parametrize("kind", PLAIN)
def test_a_file_gives_the_adapter_back(format: str, kind: str, tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora", **PLAIN[kind])), 0.2)
    path, worst = saved(model, tmp_path, format)
    assert worst < 1e-6
    other = tiny_llama()
    before = logits(other)
    adapter = ll.load(other, path, "other")
    assert set(adapter.targets) == set(ll.adapters(model)["default"].targets)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(other) - before).abs().max() > 1e-2
    ll.detach(other)
    assert torch.equal(logits(other), before)


@per_format
def test_tensors_of_one_rank_and_alpha_are_bit_equal(format: str, tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora")), 0.2)
    other = tiny_llama()
    ll.load(other, saved(model, tmp_path, format)[0])
    a, b = (ll.adapters(one)["default"].state_dict() for one in (model, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@per_format
@pytest.mark.parametrize("c", [0.5, -2.0])
def test_the_scale_is_in_the_file(format: str, c: float, tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora")), 0.2)
    ll.adapters(model)["default"].scale = c
    path, worst = saved(model, tmp_path, format)
    assert worst < 1e-6
    other = tiny_llama()
    ll.load(other, path)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)


@per_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_16_bits(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora", dtype=dtype)), 0.2)
    path, worst = saved(model, tmp_path, format)
    assert worst < 1e-6
    other = tiny_llama()
    adapter = ll.load(other, path)
    assert {tensor.dtype for _, tensor in adapter.named_tensors()} == {dtype}
    assert torch.equal(logits(other), logits(model))


@per_format
def test_any_method_goes_as_a_plain_lora(format: str, tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(attach(model, config("pissa", r=3)), 0.2)
    with pytest.raises(ll.CheckpointError, match=r"can't hold 'pissa'.*\n.*rank="):
        saved(model, tmp_path, format)
    assert not place(tmp_path, format).exists()
    path, worst = saved(model, tmp_path, format, rank=6)
    assert worst < 1e-5
    other = tiny_llama()
    ll.load(other, path)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)
    assert saved(model, tmp_path, format, rank=1)[1] > 0.1  # and says what a rank cuts off


@per_format
def test_what_it_cannot_say_is_named(format: str, tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora", bias=True)))
    with pytest.raises(ll.CheckpointError, match=r"can't hold lora_bias, which adds a constant\n.*merge it"):
        saved(model, tmp_path, format)
    ll.detach(model)
    ll.attach(model, [config("lora", target_names="q_proj"), ll.FullConfig(target_names="v_proj")])
    with pytest.raises(ll.CheckpointError, match=r"v_proj: a .* can't hold 'full', only"):
        saved(model, tmp_path, format)
    ll.detach(model)
    ll.attach(model, config("lora")).scale = 0.0
    with pytest.raises(ll.CheckpointError, match=r"scale 0, which does nothing\n  set its scale"):
        saved(model, tmp_path, format)
    with pytest.raises(ll.CheckpointError, match=r"scale 0, which does nothing\n  set its scale"):
        saved(model, tmp_path, format, rank=2)
    assert not place(tmp_path, format).exists()


@per_format
def test_another_model_is_refused(format: str, tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora")))
    path, _ = saved(model, tmp_path, format)
    for other in (tiny_llama(num_hidden_layers=1), tiny_llama(hidden_size=32)):
        before = snapshot(other)
        with pytest.raises(ll.LoraLiteError, match=r"not in this|shapes|another"):
            ll.load(other, path)
        assert same_snapshot(before, snapshot(other))


@per_format
def test_a_config_beside_a_file_that_has_one_is_an_error(format: str, tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, config("lora"))
    path, _ = saved(model, tmp_path, format)
    with pytest.raises(
        ll.ConfigError,
        match=r"(adapter|adapter\.gguf|weights\.safetensors) says how its adapter was made\n  leave cfg= out",
    ):
        ll.load(tiny_llama(), path, cfg=config("lora"))


def test_arguments_are_checked(tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, config("lora"))
    with pytest.raises(ll.ConfigError, match=r"format='onnx': wanted one of lora-lite, peft, "):
        ll.save_as(model, tmp_path / "a", "onnx")
    with pytest.raises(ll.ConfigError, match=r"format='mlx' has no option 'colour'"):
        ll.save_as(model, tmp_path / "a", "mlx", colour="red")
    with pytest.raises(ll.ConfigError, match="a file of ours holds every method as it is"):
        ll.save_as(model, tmp_path / "a", "lora-lite", rank=3)
    with pytest.raises(ll.ConfigError, match="wanted a share"):
        ll.save_as(model, tmp_path / "a", "mlx", rank=3, energy=0.5)


@pytest.mark.parametrize("format", ["lora-lite", "peft"])
def test_our_own_and_pefts_formats_by_name(format: str, tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora")), 0.2)
    assert ll.save_as(model, tmp_path / "a", format) == 0
    other = tiny_llama()
    ll.load(other, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)


@per_format
def test_what_reads_files_without_a_model_names_the_conversion(format: str, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    ll.attach(model, config("lora"))
    path, _ = saved(model, tmp_path, format)
    command = f"lora-lite convert {path} adapter.safetensors --base BASE"
    match = rf"is another program's adapter\n  make a file of ours of it: {re.escape(command)}"
    for read in (inspect, partial(ll.merge_checkpoint, tmp_path / "base", out_dir=tmp_path / "out")):
        if format == "diffusers":  # a folder that says all, as PEFT's does
            read(path)
            continue
        with pytest.raises(ll.CheckpointError, match=match):
            read(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", ["gguf", "mlx", "diffusers"])  # those that put a scale into B
def test_what_is_not_proved_takes_no_place(format: str, tmp_path: Path) -> None:
    model, other = tiny_llama(), tiny_llama()
    perturb(ll.attach(other, config("lora", target_names="q_proj")), 0.2)
    saved(other, tmp_path, format)
    fields = {"target_names": "(q|k|o)_proj", "alpha": 4.0, "per_layer": {"q_proj": {"alpha": 4e6}}}
    perturb(ll.attach(model, config("lora", dtype=torch.float16, **fields)), 0.2)
    before = contents(tmp_path)
    with pytest.raises(ll.CheckpointError, match=r"NaN, infinities or no float(.|\n)*nothing was written"):
        saved(model, tmp_path, format)
    with pytest.raises(ll.CheckpointError, match=r"nothing was written"):
        ll.save_as(model, tmp_path / "new" / "a.safetensors", format)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [("peft", "mlx"), ("mlx", "peft"), ("peft", "diffusers"), ("mlx", "diffusers"), ("diffusers", "mlx")],
)
def test_another_formats_folder_is_refused(first: str, second: str, tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora", target_names="q_proj")), 0.2)
    ll.save_as(model, tmp_path / "a", first)
    before = contents(tmp_path)
    perturb(ll.adapters(model)["default"], 0.2)
    with pytest.raises(ll.CheckpointError, match=r"a (has|is an MLX|is no adapter folder of PEFT).*"):
        ll.save_as(model, tmp_path / "a", second)
    assert contents(tmp_path) == before
    ll.save_as(model, tmp_path / "a", first)
    other = tiny_llama()
    ll.load(other, tmp_path / "a")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)


def test_a_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, config("lora"))
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "b").write_text("b")
    with pytest.raises(ll.CheckpointError, match=r"a\.safetensors is a folder"):
        ll.save_as(model, tmp_path / "a.safetensors", "diffusers")
    for format in ("diffusers", "mlx"):
        with pytest.raises(ll.CheckpointError, match=r"b is a file"):
            ll.save_as(model, tmp_path / "b", format)


def test_a_tied_embedding_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    ll.attach(model, config("lora", kinds="embedding", target_names="embed_tokens", tied_weights="together"))
    with pytest.raises(ll.CheckpointError, match=r"embed_tokens: .*tied to another layer.*\n  .*lora_lite.save"):
        ll.save_as(model, tmp_path / "a", "diffusers")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("format", [name for name, known in FORMATS.items() if "dora" in known.variants])
def test_the_difference_is_of_what_the_weights_become(format: str, tmp_path: Path) -> None:
    model, known = tiny_llama(), FORMATS[format]
    perturb(ll.attach(model, config("dora", target_names=r"(q|up)_proj")), 0.05)
    path, worst = saved(model, tmp_path, format)
    assert worst < 1e-5
    layers = adapted_layers(model, [ll.adapters(model)["default"]])
    pieces = known.read(model, path)
    site = layers["model.layers.1.self_attn.q_proj"][0]
    for name, wrong in (("lora_m", 1.1), ("lora_B", 2.0)):
        piece = pieces[site.path]
        tensors = piece.tensors | {name: piece.tensors[name] * wrong}
        other = tiny_llama()
        moved = dict(ll.load(other, path).named_tensors())
        with torch.no_grad():
            next(t for key, t in moved.items() if key == f"{site.path}.{name}").mul_(wrong)
        (before, _), (after, _) = (
            delta_weight(adapted_layers(m, [ll.adapters(m)["default"]])[site.path]) for m in (model, other)
        )
        wanted = float((after - before).norm() / before.norm())
        assert difference(layers, pieces | {site.path: replace(piece, tensors=tensors)}, path) == pytest.approx(
            wanted, 1e-3
        )
        assert wanted > 0.1


@pytest.mark.parametrize("format", ["mlx", "peft", "gguf"])
def test_a_format_is_known_whatever_the_name_ends_in(format: str, tmp_path: Path) -> None:
    model, other = tiny_llama(), tiny_llama()
    perturb(ll.attach(model, config("lora")), 0.2)
    path = tmp_path / "a.safetensors"
    ll.save_as(model, path, format)
    if format == "gguf":
        with pytest.raises(ll.CheckpointError, match=r"no safetensors file; it is a GGUF file\n.*\n  name it a\.gguf"):
            ll.load(other, path)
        path = path.rename(path.with_suffix(".gguf"))
    ll.load(other, path)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
