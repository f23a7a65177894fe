"""lora-lite combine, and convert --energy: what they write is what the library makes, and what they print is true."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import config, perturb, tiny_llama, trained
from safetensors.torch import load_file
from test_cli import peft_folder, run, saved, shown
from torch import nn
from transformers import LlamaForSequenceClassification

import lora_lite as ll
from lora_lite.io.adapter_file import read_file

PARTS: tuple[dict[str, Any], ...] = ({"r": 3, "alpha": 5.0}, {"r": 2, "rslora": True, "target_names": "q_proj"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two files of LoRAs, of other ranks and layers."""
    return [saved(tmp_path, config("lora", **fields), seed=seed) for seed, fields in enumerate(PARTS)]


@pytest.mark.parametrize(
    "how", [{}, {"how": "svd", "rank": 2}, {"how": "svd", "energy": 0.9}, {"how": "dare", "density": 0.5, "seed": 3}]
)
@pytest.mark.parametrize("with_base", [False, True])
def test_files_are_combined_as_adapters_are(
    how: dict[str, Any], with_base: bool, two: list[Path], base: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "both.safetensors", [f"--{key}={value}" for key, value in how.items()]
    options += ["--base", str(base)] if with_base else []
    text = shown("combine", f"{two[0]}=1.0", f"{two[1]}=-0.5", "--out", out, *options, columns=None)
    model = tiny_llama()
    for name, path in zip("ab", two, strict=True):
        ll.load(model, path, name)
    combined = ll.combine(model, {"a": 1.0, "b": -0.5}, "both", **how)
    ll.save(model, tmp_path / "wanted.safetensors", "both")
    got, wanted = load_file(out), load_file(tmp_path / "wanted.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in got.items())
    assert text == f"{out}: lora-lite file, {combined}\n"
    recorded, live = read_file(out).base, combined.adapter.base_record
    assert (recorded.class_name, recorded.fingerprint) == (live.class_name, live.fingerprint)


def test_adapters_of_a_classifier_are_combined_on_it(base: Path, tmp_path: Path) -> None:
    """Its head, which an adapter is on, is in no language model."""
    parts = []
    for variant, names in (("lora", r"q_proj$|score$"), ("dora", r"q_proj$")):
        model = LlamaForSequenceClassification.from_pretrained(base)
        perturb(ll.attach(model, config(variant, r=2, target_names=names)), 0.2)
        parts.append(tmp_path / f"{variant}.safetensors")
        ll.save(model, parts[-1])
    out = tmp_path / "both.safetensors"
    shown("combine", f"{parts[0]}=1.0", f"{parts[1]}=0.5", "--out", out, "--base", base, columns=None)
    assert any("score" in key for key in load_file(out))


def test_adapters_of_a_trunk_and_of_the_whole_are_combined_in_any_order(base: Path, tmp_path: Path) -> None:
    parts, whole = [], tiny_llama()
    for i, (model, names) in enumerate(((whole.model, "q_proj"), (tiny_llama(), "q_proj|lm_head"))):
        perturb(ll.attach(model, config("lora", target_names=names)), 0.2, i)
        parts.append(f"{tmp_path / str(i)}.safetensors=1.0")
        ll.save(model, tmp_path / f"{i}.safetensors")
    for i, order in enumerate((parts, parts[::-1])):
        shown("combine", *order, "--out", tmp_path / f"both{i}.safetensors", "--base", base, columns=None)
        assert any("lm_head" in key for key in load_file(tmp_path / f"both{i}.safetensors"))


@pytest.mark.parametrize("variant", ["beft", "bias", "steer", "lora", "full"])
def test_a_shift_without_a_base_is_that_with_it(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's own bias is in no sum, whatever is in memory that nobody has written to."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        model, base = tiny_llama(bias=True), tmp_path / "base"
        model.save_pretrained(base)
        fields = {"target_roles": ("writer",), "target_names": ()} if variant == "steer" else {}
        fields |= {"bias": {"kinds": ("linear",)}, "full": {"kinds": ("linear",)}, "lora": {"bias": True}}.get(
            variant, {}
        )
        trained(model, variant, **fields)
        ll.save(model, tmp_path / "a.safetensors")
        outs = [tmp_path / "without.safetensors", tmp_path / "with.safetensors"]
        for out, options in zip(outs, ([], ["--base", str(base)]), strict=True):
            shown("combine", f"{tmp_path / 'a.safetensors'}=1.5", "--out", out, *options, columns=None)
    finally:
        torch.use_deterministic_algorithms(False)
    got, wanted = map(load_file, outs)
    assert got.keys() == wanted.keys()
    for key, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-5, atol=1e-7)
    assert any("bias" in key or variant == "full" for key in got)


def test_dare_draws_for_a_layer_what_it_draws_whatever_the_others_are(tmp_path: Path) -> None:
    files = [saved(tmp_path, config("lora", target_names=n), seed=i) for i, n in enumerate((r"1\..*q_proj", "q_proj"))]
    model, out = tiny_llama(), tmp_path / "out.safetensors"
    for name, path in zip("ab", files, strict=True):
        ll.load(model, path, name)
    ll.combine(model, {"a": 1.0, "b": -0.5}, "both", how="dare", density=0.5, seed=1)
    ll.save(model, tmp_path / "wanted.safetensors", "both")
    options = ["--how=dare", "--density=0.5", "--seed=1"]
    shown("combine", f"{files[0]}=1.0", f"{files[1]}=-0.5", "--out", out, *options, columns=None)
    got, wanted = load_file(out), load_file(tmp_path / "wanted.safetensors")
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in got.items())


def test_the_kinds_of_layers_without_a_base(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv1d(3, 8, 3))
    ll.attach(model, ll.LoRAConfig(r=2, kinds=("conv",), target_names=()))
    ll.save(model, tmp_path / "a.safetensors")
    shown("combine", f"{tmp_path / 'a.safetensors'}=2.0", "--out", tmp_path / "out.safetensors", columns=None)
    ll.detach(model)
    assert "conv" in ll.load(model, tmp_path / "out.safetensors").config.kinds


def test_a_peft_folder_and_a_method_that_depends_on_the_weight_want_the_base(
    two: list[Path], base: Path, tmp_path: Path
) -> None:
    import peft

    folder, _ = peft_folder(tmp_path / "theirs", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    ia3, out = saved(tmp_path, config("ia3", target_names="k_proj")), tmp_path / "out.safetensors"
    for part, what in ((folder, "a PEFT folder"), (ia3, r"'ia3' at model.layers.0.self_attn.k_proj")):
        result = run("combine", f"{two[0]}=1", f"{part}=2", "--out", out)
        assert result.exit_code == 2
        assert re.search(f"{what} can't be combined without the base", result.stderr)
        assert not out.exists()
    shown("combine", f"{two[0]}=1", f"{folder}=2", f"{ia3}=-1", "--out", out, "--base", base)
    model = tiny_llama()
    ll.load(model, two[0], "a")
    ll.load_peft(model, folder, "b")
    ll.load(model, ia3, "c")
    combined = ll.combine(model, {"a": 1.0, "b": 2.0, "c": -1.0}, "all")
    assert combined.adapter.variant == "lora + full"
    got = load_file(out)
    assert all(torch.equal(got[key], tensor) for key, tensor in combined.adapter.state_dict().items())


def test_what_combine_refuses(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    for args, reason in (
        ([two[0]], "wanted an adapter and its weight, such as a.safetensors=1.0"),
        ([f"{two[0]}=much"], "wanted an adapter and its weight"),
        ([f"{two[0]}=nan"], "finite weight"),
        ([f"{two[0]}=1", "--how", "svd"], "wanted one of them"),
        ([f"{tmp_path / 'none'}=1"], "none"),
    ):
        result = run("combine", *args, "--out", out)
        assert (result.exit_code, out.exists()) == (2, False)
        assert reason in result.stderr
    result = run("combine", f"{two[0]}=1", "--out", two[1])
    assert (result.exit_code, f"{two[1]} exists" in result.stderr) == (2, True)


def test_files_of_two_bases_are_refused(two: list[Path], tmp_path: Path) -> None:
    other = tiny_llama(seed=1)
    path = saved(tmp_path, config("lora", r=2), other, seed=9)
    result = run("combine", f"{two[0]}=1", f"{path}=1", "--out", tmp_path / "out.safetensors")
    assert result.exit_code == 2
    assert "belong to different bases" in result.stderr


def test_convert_by_energy(base: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, config("lora", r=8))
    text = shown("convert", path, tmp_path / "peft", "--base", base, "--energy", 0.8, columns=None)
    (error,) = re.findall(r"lora, 14 layers\nwith 0.8 of the energy: relative error at most (\S+) in a layer", text)
    assert 0 < float(error) ** 2 <= 0.2 * 1.01
    model, small = tiny_llama(), tiny_llama()
    (tensors,) = (dict(ll.load(model, path).named_tensors()),)
    ll.load_peft(small, tmp_path / "peft")
    worst = 0.0
    for site in ll.adapters(small)["default"].sites():
        wanted = (tensors[site.key("lora_B")] @ tensors[site.key("lora_A")]).detach()
        got = (site.tensor("lora_B") @ site.tensor("lora_A")).detach()
        s = torch.linalg.svdvals(wanted).square()
        assert s[: site.cfg.r].sum() >= 0.8 * s.sum() * (1 - 1e-6)
        assert s[: site.cfg.r - 1].sum() < 0.8 * s.sum()
        worst = max(worst, float((got - wanted).norm() / wanted.norm()))
    assert float(error) == pytest.approx(worst, rel=0.05)
    result = run("convert", path, tmp_path / "no", "--base", base, "--energy", 0.8, "--rank", 2)
    assert (result.exit_code, "without a rank" in result.stderr) == (2, True)


def test_energy_of_a_saved_folder(tmp_path: Path, log: list[str]) -> None:
    model = tiny_llama()
    trained(model, "lora", r=6)
    error = ll.save_peft(model, tmp_path, energy=0.9)
    assert error is not None
    assert 0 < error**2 <= 0.1
    assert any(re.search(r"rank \d to \d, with 0.9 of the energy at each layer: relative error", line) for line in log)
    for bad in ({"energy": 0}, {"energy": 1.1}, {"energy": 0.5, "rank": 2}, {"max_error": 0.1, "rank": None}):
        with pytest.raises(ll.ConfigError, match=r"(energy|max_error)=\S+ with rank="):
            ll.save_peft(model, tmp_path / "no", **bad)
    with pytest.raises(ll.CheckpointError, match=r"wanted at most max_error=0.01; .* a higher rank or energy"):
        ll.save_peft(model, tmp_path / "no", energy=0.9, max_error=0.01)
