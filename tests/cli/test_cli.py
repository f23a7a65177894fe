"""The command line: what it prints, how far it can be trusted, and how it fails."""

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import (
    BUT_THREE,
    acts_everywhere,
    attach,
    config,
    covering,
    mechanisms,
    moe,
    perturb,
    quantized,
    tiny_folder,
    tiny_llama,
)
from oracles import NOT_AFFINE
from safetensors.torch import load_file, save_file
from test_checkpoint import rewrite
from test_diffusers import output, unet
from test_verify import TEXT, with_tokenizer
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    LlamaModel,
)
from typer.testing import CliRunner

import lora_lite as ll
from lora_lite.cli.bases import class_of
from lora_lite.cli.commands import app
from lora_lite.cli.compare import compare
from lora_lite.cli.reason import reason as reason_of
from lora_lite.cli.report import inspect
from lora_lite.cli.tables import shortened
from lora_lite.core.effective import delta_weight
from lora_lite.core.state import sites_of
from lora_lite.io.formats.table import FORMATS

needs_base = pytest.mark.parametrize("variant", ["abliteration", "dora", "ia3", "ia3_ff"])
needs_none = pytest.mark.parametrize("variant", ["lora", "pissa"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def saved(folder: Path, cfg: Any, model: Any = None, seed: int = 1) -> Path:
    """An adapter file with values of its own, for the tiny Llama."""
    model = tiny_llama() if model is None else model
    perturb(attach(model, cfg), seed=seed)
    path = folder / f"{cfg.variant}{seed}.safetensors"
    ll.save(model, path)
    return path


def run(*args: Any, columns: int | None = 80) -> Any:
    """A command in this process; its output is no terminal, as in a pipe."""
    width = {"COLUMNS": None if columns is None else str(columns)}
    return CliRunner().invoke(app, [str(arg) for arg in args], env=width)


def shown(*args: Any, columns: int | None = 80) -> str:
    """The output of a command that works."""
    result = run(*args, columns=columns)
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


def process(*args: Any, code: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    start = ["-m", "lora_lite"] if code is None else ["-c", code]
    outside = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, *start, *map(str, args)], capture_output=True, text=True, env=outside | env, check=False
    )


def moved(model: Any) -> dict[str, float]:
    """‖W' - W‖ at each adapted layer, from what its hooks make of the unit vectors."""
    norms = {}
    for site in ll.adapters(model)["default"].sites():
        module = site.module
        with torch.no_grad():
            e = torch.eye(site.target.d_in)
            with ll.disabled(model):
                before = module(e) - module(torch.zeros_like(e))
            norms[site.path] = float((module(e) - module(torch.zeros_like(e)) - before).norm())
    return norms


# ---- inspect ------------------------------------------------------------------------------------


def test_inspect_shows_what_an_adapter_is(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = attach(model, config("lora", r=4, alpha=8.0, exclude_names="gate"))
    perturb(adapter)
    adapter.scale = 0.5
    ll.save(model, tmp_path / "a.safetensors")
    lines = [re.split(r"\s{2,}", line.rstrip()) for line in shown("inspect", tmp_path / "a.safetensors").splitlines()]
    facts = {line[0]: line[1] for line in lines if len(line) == 2}
    assert facts["variant"] == "lora"
    assert facts["config"] == "target_names=['_proj$'], exclude_names=['gate'], r=4, alpha=8"
    assert facts["scale"] == "0.5"
    assert facts["base"] == "LlamaForCausalLM float32"
    assert facts["quantised"] == "no"
    numbers = sum(tensor.numel() for tensor in adapter.parameters())
    assert facts["tensors"] == f"24, of {numbers:,} numbers in float32"
    norms = moved(model)
    down = [norms[f"model.layers.{i}.mlp.down_proj"] for i in range(2)]
    at = str(down.index(max(down)))
    row = ["model.layers.*.mlp.down_proj", "128 -> 64", "2", f"{sum(down) / 2:.4g}", f"{max(down):.4g}", at]
    assert row in lines
    assert sum(line[0].startswith("model.layers.*") for line in lines) == 6


@pytest.mark.parametrize(("variant", "tensor"), [("norm", "lora_weight"), ("tokens", "lora_delta")])
def test_the_norms_of_vectors_and_of_rows(variant: str, tensor: str, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    adapter = attach(model, config(variant))
    perturb(adapter)
    adapter.scale = 0.5
    ll.save(model, tmp_path / "a.safetensors")
    for extra in ([], ["--base", tmp_path / "base"]):
        report = json.loads(shown("inspect", tmp_path / "a.safetensors", *extra, "--json"))
        assert len(report["layers"]) == len(adapter.targets)
        for layer in report["layers"]:
            change = dict(adapter.named_tensors())[f"{layer['path']}.{tensor}"]
            assert layer["norm"] == pytest.approx(0.5 * float(change.detach().norm()), rel=1e-4)


NAMED = [v for v in sorted(ll.REGISTRY) if acts_everywhere(v) and v not in ("norm", "tokens")]


SCALED = [(v, 0.5) for v in NAMED] + [(v, 1.0) for v in covering() if v in NAMED]


@pytest.mark.parametrize(("variant", "scale"), SCALED)
def test_the_norms_are_those_of_the_model(variant: str, scale: float, base: Path, tmp_path: Path) -> None:
    model = tiny_llama(bias=True, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base")
    perturb(attach(model, config(variant, exclude_names=BUT_THREE)), 0.1)
    ll.adapters(model)["default"].scale = scale
    ll.save(model, tmp_path / "a.safetensors")
    report = json.loads(shown("inspect", tmp_path / "a.safetensors", "--base", tmp_path / "base", "--json"))
    norms = moved(model)
    assert [layer["path"] for layer in report["layers"]] == list(norms)
    if "a constant" in mechanisms(variant):  # which is no change of the weight
        assert max(norms.values()) < 1e-5
        assert all(layer["norm"] == 0 for layer in report["layers"])
        return
    assert min(norms.values()) > 0.01
    for layer in report["layers"]:
        assert layer["norm"] == pytest.approx(norms[layer["path"]], rel=2e-4)


@needs_none
def test_a_delta_without_the_base_weight_is_known_without_it(variant: str, base: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, config(variant))
    alone, beside = inspect(path), inspect(path, base)
    assert all(layer.norm for layer in alone.layers)
    assert alone.layers == beside.layers


@needs_base
def test_a_delta_of_the_base_weight_asks_for_it(variant: str, tmp_path: Path) -> None:
    path = saved(tmp_path, config(variant))
    assert all(layer.norm is None for layer in inspect(path).layers)
    text = shown("inspect", path)
    assert "it depends on the base weight" in text
    assert "--base FOLDER" in text
    assert "mean norm" not in text
    result = run("inspect", path, "--plot", tmp_path / "norms.png")
    assert (result.exit_code, (tmp_path / "norms.png").exists()) == (2, False)
    assert "no norm is known to plot" in result.stderr


def test_a_fresh_adapter_moves_nothing(base: Path, tmp_path: Path) -> None:
    for variant in ("lora", "pissa", "dora", "ia3"):
        model = tiny_llama()
        attach(model, config(variant))
        ll.save(model, tmp_path / "a.safetensors")
        assert all(
            layer.norm == pytest.approx(0, abs=1e-5) for layer in inspect(tmp_path / "a.safetensors", base).layers
        )


def test_a_base_that_stores_its_weights_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64, n_positions=32)).eval()
    model.save_pretrained(tmp_path / "base")
    perturb(ll.attach(model, ll.DoRAConfig(target_names=r"attn\.c_proj$")))  # square: its shape doesn't tell
    ll.save(model, tmp_path / "a.safetensors")
    report = inspect(tmp_path / "a.safetensors", tmp_path / "base")
    norms = moved(model)
    for layer in report.layers:
        assert layer.norm == pytest.approx(norms[layer.path], rel=2e-4)


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3"])  # fused on disk and transposed, one by one on disk
@pytest.mark.parametrize("normalization", ["none", "pre"])  # one direction for all experts, tensors for each
def test_fused_experts_are_all_counted(kind: str, normalization: str, tmp_path: Path) -> None:
    model = moe(kind)
    model.save_pretrained(tmp_path / "base")
    attach(model, ll.AbliterationConfig(normalization=normalization))
    ll.save(model, tmp_path / "a.safetensors")
    assert all(layer.norm is None for layer in inspect(tmp_path / "a.safetensors").layers)
    experts = model.model.layers[1].mlp.experts
    before = experts.down_proj.clone()
    ll.merge(model)
    norms = {layer.path: layer.norm for layer in inspect(tmp_path / "a.safetensors", tmp_path / "base").layers}
    moved = float((experts.down_proj - before).norm())
    assert norms["model.layers.1.mlp.experts"] == pytest.approx(moved, rel=1e-4)
    assert moved > 0.1


def test_another_number_of_experts_is_another_base(tmp_path: Path) -> None:
    model = moe("qwen3")
    model.save_pretrained(tmp_path / "base")
    attach(model, ll.AbliterationConfig(normalization="pre", target_names="experts"))
    ll.save(model, tmp_path / "a.safetensors")
    rewrite(
        tmp_path / "a.safetensors",
        tensors=lambda tensors: tensors.update({key: tensor[:3].clone() for key, tensor in tensors.items()}),
    )
    with pytest.raises(ll.CheckpointError, match=r"48 -> 64 for 4 experts, and .*experts is 48 -> 64 for 3 experts"):
        inspect(tmp_path / "a.safetensors", tmp_path / "base")


def test_a_base_that_is_4_bit_on_disk_is_dequantised(tiny: str, tmp_path: Path) -> None:
    model = quantized(tiny, "nf4")
    model.save_pretrained(tmp_path / "base")
    path = saved(tmp_path, config("dora"), model)
    for layer in inspect(path, tmp_path / "base").layers:
        module = model.get_submodule(layer.path)
        delta = delta_weight([sites_of(module)["default"]])[0]
        assert layer.norm == pytest.approx(float(delta.norm()), rel=1e-4)  # bitsandbytes multiplies in bfloat16


def test_quantisation_is_told(tiny: str, tmp_path: Path) -> None:
    model = quantized(tiny, "nf4")
    path = saved(tmp_path, config("lora"), model)
    text = shown("inspect", path, columns=None)
    how = "nf4, bitsandbytes-4bit, double quantisation, blocks of 64, computing in bfloat16, 14 modules"
    assert f"quantised  {how}\n" in text
    assert inspect(path).base["quantization"]["modules"][0] == "model.layers.0.mlp.down_proj"


def test_tensors_without_a_config_are_listed(base: Path, tmp_path: Path) -> None:
    adapter = saved(tmp_path, config("lora"))
    save_file(load_file(adapter), tmp_path / "raw.safetensors")
    text = shown("inspect", tmp_path / "raw.safetensors")
    assert re.search(r"model\.layers\.\*\.mlp\.down_proj\.lora_A +8 x 128 +F32 +2\n", text)
    assert "none: to load them give one" in text
    text = shown("inspect", base)
    assert re.search(r"model\.layers\.\*\.self_attn\.k_proj\.weight +32 x 64 +F32 +2\n", text)
    assert json.loads(shown("inspect", base, "--json"))["tensors"] == 21


def test_a_folder_with_one_adapter_is_that_adapter(tmp_path: Path) -> None:
    assert inspect(saved(tmp_path, config("lora")).parent).variant == "lora"


def test_json_is_json_and_nothing_else(tmp_path: Path) -> None:
    report = json.loads(shown("inspect", saved(tmp_path, config("lora", r=2)), "--json"))
    assert (report["variant"], report["config"]["r"], report["tensors"], len(report["layers"])) == ("lora", 2, 28, 14)


def test_the_plot_is_a_picture(base: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, config("dora", target_names=("_proj$", "lm_head")))
    shown("inspect", path, "--base", base, "--plot", tmp_path / "norms.png")
    picture = (tmp_path / "norms.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (1200, 675)
    assert 10_000 < len(picture) < 200_000


# ---- diff ---------------------------------------------------------------------------------------


def test_diff_of_equal_adapters_is_0(tmp_path: Path) -> None:
    for variant in ll.REGISTRY:
        path = saved(tmp_path, config(variant, exclude_names=BUT_THREE), tiny_llama(bias=True, num_hidden_layers=1))
        result = run("diff", path, path)
        if variant in NOT_AFFINE:  # it compares changes of weights
            assert (result.exit_code, "no weight stands for it" in result.stderr) == (2, True)
        else:
            assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "equal")


def test_diff_tells_config_base_targets_and_values(tmp_path: Path) -> None:
    a = saved(tmp_path, config("lora", r=4))
    b = saved(tmp_path, config("lora", r=4, alpha=8.0, exclude_names=("up", r"0\.mlp\.down")), tiny_llama(seed=5), 2)
    found = compare(a, b)
    assert not found.equal
    assert found.config == {"exclude_names": ([], ["up", r"0\.mlp\.down"]), "alpha": (None, 8.0)}
    assert found.base == {"weights": ("11 layers", "11 of them differ")}
    assert found.only_a == ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    assert found.only_b == []
    text = run("diff", a, b)
    assert text.exit_code == 1
    assert re.search(r"alpha +None +8 *\n", text.stdout)
    assert re.search(r"only in A: 3 layers *\n.*\nmodel\.layers\.\*\.mlp\.up_proj +2\n", text.stdout)


def test_diff_is_of_tensors_and_of_deltas(tmp_path: Path) -> None:
    paths = [saved(tmp_path, config("lora", r=4, target_names="q_proj"), seed=seed) for seed in (1, 2)]
    held = [load_file(path) for path in paths]
    flat, deltas = [], []
    for tensors in held:
        flat.append(torch.cat([tensors[key].flatten() for key in sorted(tensors)]).double())
        at = [f"model.layers.{i}.self_attn.q_proj.lora_" for i in range(2)]
        deltas.append(torch.cat([(tensors[f"{p}B"].double() @ tensors[f"{p}A"].double()).flatten() for p in at]))
    (group,) = compare(*paths).groups
    assert (group.path, group.layers) == ("model.layers.*.self_attn.q_proj", 2)
    assert group.tensors == pytest.approx(float((flat[0] - flat[1]).norm() / flat[0].norm()))
    assert group.delta == pytest.approx(float((deltas[0] - deltas[1]).norm() / deltas[0].norm()))
    assert group.cosine == pytest.approx(float(torch.cosine_similarity(*deltas, dim=0)), abs=1e-6)


def test_diff_sees_one_bit(tmp_path: Path) -> None:
    path = saved(tmp_path, config("lora", r=2))
    other = tmp_path / "other.safetensors"
    other.write_bytes(path.read_bytes())

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        first = tensors["model.layers.0.self_attn.q_proj.lora_A"]
        first.view(torch.int32)[0, 0] ^= 1

    rewrite(other, tensors=nudge)
    assert run("diff", path, other).exit_code == 1


def test_diff_across_methods_compares_what_they_do(tmp_path: Path) -> None:
    found = compare(saved(tmp_path, config("lora", r=4)), saved(tmp_path, config("pissa", r=4)))
    assert found.config["variant"] == ("lora", "pissa")
    assert found.config["svd"] == ("-", "exact")
    assert all(group.tensors is None and group.delta is not None and group.delta > 0 for group in found.groups)
    found = compare(saved(tmp_path, config("dora")), saved(tmp_path, config("dora"), seed=2))
    assert all(group.tensors and group.delta is None and group.cosine is None for group in found.groups)


def test_diff_finds_the_layers_where_a_setting_differs(tmp_path: Path) -> None:
    a = saved(tmp_path, config("lora", r=4))
    b = saved(tmp_path, config("lora", r=4, per_layer={"1.mlp": {"r": 2}}), seed=2)
    found = compare(a, b)
    assert found.config == {"r at 3 layers": (4, 2)}
    assert {group.path: group.tensors is None for group in found.groups}["model.layers.*.mlp.up_proj"]


def test_diff_compares_all_methods_of_a_layer(tmp_path: Path) -> None:
    def pair(**changes: Any) -> list[Any]:
        first = config("lora", r=2, alpha=changes.get("alpha"), target_names=changes.get("first", ["q_proj"]))
        return [first, config("ia3", target_names=["q_proj", *changes.get("second", [])])]

    def saved(configs: list[Any], name: str) -> Path:
        model = tiny_llama()
        perturb(ll.attach(model, configs))
        ll.save(model, tmp_path / name)
        return tmp_path / name

    a = saved(pair(), "a.safetensors")
    other = tmp_path / "other.safetensors"
    other.write_bytes(a.read_bytes())

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.lora_B"] += 1

    rewrite(other, tensors=nudge)
    found = compare(a, other)
    assert {group.path: bool(group.tensors) for group in found.groups} == {
        "model.layers.*.self_attn.q_proj": True,
        "model.layers.*.self_attn.q_proj (2)": False,
    }
    assert not found.equal
    assert compare(a, a).equal
    found = compare(a, saved(pair(second=["k_proj"], alpha=4.0), "b.safetensors"))
    assert found.config == {
        "2 ia3 target_names": (["q_proj"], ["q_proj", "k_proj"]),
        "alpha at 2 layers": (None, 4.0),
    }
    assert found.only_b == [f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)]
    found = compare(a, saved(pair()[:1], "c.safetensors"))
    assert found.config == {"methods": (["lora", "ia3"], ["lora"])}
    assert found.only_a == [f"model.layers.{i}.self_attn.q_proj (2)" for i in (0, 1)]


@pytest.mark.parametrize("field", ["scale", "alpha"])
def test_numbers_that_no_product_holds_are_refused(field: str, tmp_path: Path) -> None:
    path = saved(tmp_path, config("lora", r=2, alpha=2.0))

    def spoil(meta: dict[str, Any]) -> None:
        (meta if field == "scale" else meta["config"])[field] = 1e308

    rewrite(path, meta=spoil)
    for command in (["inspect", path], ["diff", path, path]):
        result = run(*command)
        assert result.exit_code == 2
        assert f"{field}" in result.stderr
    with pytest.raises(ll.ConfigError, match="alpha=1e\\+308"):
        ll.LoRAConfig(alpha=1e308)
    with pytest.raises(ll.ConfigError, match="scale 1e\\+308: wanted a finite number"):
        ll.attach(tiny_llama(), ll.LoRAConfig()).scale = 1e308


def test_diff_reads_through_wrappers_prefixes(tmp_path: Path) -> None:
    cfg = config("lora", r=2)
    a, wrapped = saved(tmp_path, cfg), nn.ModuleDict({"module": tiny_llama()})
    b = saved(tmp_path, cfg, wrapped, seed=3)
    assert len(compare(a, b).groups) == 7
    assert compare(a, b).only_a == compare(a, b).only_b == []


# ---- how it looks -------------------------------------------------------------------------------


class Long(nn.Module):
    """A model with a path that no 80 columns hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a_model_with_a_name_that_is_longer_than_it_should_be = tiny_llama()


@pytest.fixture
def long(tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "/".join(["a-folder-with-a-long-name"] * 4)
    folder.mkdir(parents=True)
    return saved(folder, config("lora", r=2), Long()), saved(folder, config("lora", r=3), Long(), seed=2)


def test_80_columns_are_enough(long: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    a, b = long
    dora = saved(a.parent, config("dora"), Long())
    for args in (["inspect", a], ["inspect", dora], ["inspect", base], ["diff", a, b], ["diff", a, dora], ["--help"]):
        lines = run(*args).stdout.splitlines()
        assert len(lines) > 5
        assert max(map(len, lines)) <= 80, args
    for command in ("inspect", "diff", "merge", "convert"):
        assert max(map(len, run(command, "--help").stdout.splitlines())) <= 80
    text = run("inspect", a).stdout
    assert re.search(r"^a_model_wit\S*\.\.\.\S*ers\.\*\.mlp\.down_proj  ", text, re.M)
    assert "lora1.safetensors: lora-lite file" in text


def test_a_pipe_gets_whole_paths_and_no_escape_codes(long: tuple[Path, Path]) -> None:
    done = process("inspect", long[0])
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert str(long[0]) in done.stdout
    path = r"a_model_with_a_name_that_is_longer_than_it_should_be\.model\.layers\.\*\.mlp\.down_proj +128 -> 64 "
    assert re.search(path, done.stdout)


def test_paths_are_shortened_in_the_middle() -> None:
    assert shortened("model.layers.*.mlp", 18) == "model.layers.*.mlp"
    assert shortened("model.language_model.layers.*.self_attn.q_proj", 32) == "model.lan...s.*.self_attn.q_proj"
    assert all(len(shortened("x" * 100, width)) == width for width in range(4, 100))


# ---- how it fails -------------------------------------------------------------------------------


def no_file(path: Path) -> None:
    path.unlink()


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"lora_A": [1.0]}))


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_variant(path: Path) -> None:
    rewrite(path, meta=lambda meta: meta.update(variant="nothing"))


def absurdly_wide(path: Path) -> None:
    rewrite(path, meta=lambda meta: meta["targets"].update({"model.layers.0.self_attn.k_proj": [2**30, 32]}))


def a_nan(path: Path) -> None:
    rewrite(path, tensors=lambda tensors: tensors["model.layers.0.self_attn.k_proj.lora_l"].fill_(torch.nan))


def one_tensor_less(path: Path) -> None:
    rewrite(path, tensors=lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.lora_l"))


def an_empty_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_file, "is not a file"),
        (a_pickle, "looks like a pickle, which is never opened"),
        (damaged, "is no safetensors file; it is cut short or damaged"),
        (other_variant, "no variant is registered as 'nothing'"),
        (absurdly_wide, "would be 1073741824 -> 32; wanted 1 to 1048576 features"),
        (a_nan, "1 tensors hold NaN"),
        (one_tensor_less, "1 missing keys"),
        (an_empty_folder, "0 indexes and 0 safetensors files"),
    ],
)
def test_bad_input_is_a_reason_and_exit_code_2(spoil: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    good, path = saved(tmp_path, config("ia3"), seed=2), saved(tmp_path, config("ia3"))
    spoil(path)
    for args in (["inspect", path], ["diff", good, path], ["diff", path, good]):
        result = run(*args)
        assert (result.exit_code, result.stdout) == (2, "")
        first, *cure = result.stderr.splitlines()
        assert first.startswith("lora-lite: ")
        assert reason in first
        assert all(line.startswith("  ") for line in cure)


def test_a_base_that_is_none_or_another(base: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, config("dora"))
    for folder, reason in (
        (tmp_path / "nowhere", "nowhere is not a folder"),
        (other_sizes(tmp_path), "q_proj is 48 -> 48, and the adapter's model.layers.0.self_attn.q_proj is 64 -> 64"),
        (other_layers(tmp_path), "7 of its 14 target layers are not in this LlamaForCausalLM"),
    ):
        result = run("inspect", path, "--base", folder)
        assert result.exit_code == 2
        assert reason in result.stderr.splitlines()[0]


def other_sizes(folder: Path) -> Path:
    tiny_llama(hidden_size=48).save_pretrained(folder / "sizes")
    return folder / "sizes"


def other_layers(folder: Path) -> Path:
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "layers")
    return folder / "layers"


def test_debug_shows_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("nothing of the kind")
    plain, debug = run("inspect", path), process("--debug", "inspect", path)
    assert plain.exit_code == debug.returncode == 2
    assert "Traceback" in debug.stderr
    first, *cure = plain.stderr.splitlines()
    assert first == f"lora-lite: {path} is no safetensors file; it is cut short or damaged"
    assert any("copy or save it again" in line for line in cure)


def test_the_reason_is_all_lines_of_our_errors_and_one_of_others() -> None:
    assert reason_of(ll.ConfigError("a\n  b\n  c\n")) == "a\n  b\n  c"
    assert reason_of(ll.ConfigError()) == "no reason given"
    assert reason_of(ValueError("a\nb")) == "ValueError: a"
    assert reason_of(ValueError()) == "ValueError: no reason given"


def test_wrong_usage_is_exit_code_2() -> None:
    for args in (
        ["inspect"],
        ["nothing"],
        ["diff", "a"],
        ["convert", "a", "b"],
        ["merge", "a", "b", "c", "--base-weights", "x"],
    ):
        result = run(*args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "Error: " in result.stderr


def test_without_the_extra_it_says_which() -> None:
    code = """
import sys
from lora_lite.cli import main
for name in ("typer", "rich"):
    sys.modules[name] = None
    try:
        main()
    except SystemExit as left:
        print(left.code)
    del sys.modules[name]
"""
    done = process(code=code)
    says = "lora-lite: {} is not installed; pip install 'lora-lite[cli]'\n"
    assert (done.stdout, done.stderr) == ("2\n2\n", says.format("typer") + says.format("rich"))


def test_without_matplotlib_it_says_which_extra(tmp_path: Path) -> None:
    path = saved(tmp_path, config("lora", r=2))
    code = "import sys; sys.modules['matplotlib.figure'] = None; from lora_lite.cli import main; main()"
    done = process("inspect", path, "--plot", tmp_path / "a.png", code=code)
    assert done.returncode == 2
    assert done.stderr == "lora-lite: matplotlib is not installed; pip install 'lora-lite[demo]'\n"


# ---- PEFT's folders -----------------------------------------------------------------------------


def peft_folder(folder: Path, made: Any) -> tuple[Path, Any]:
    """A folder that PEFT wrote, with values of its own, and our model with it loaded."""
    theirs = peft.get_peft_model(tiny_llama(), made)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    model = tiny_llama()
    ll.load_peft(model, folder)
    return folder, model


ALL = ["q_proj", "k_proj", "down_proj"]
PEFTS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, rank_pattern={"down_proj": 2}),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, use_dora=True),
    "pissa": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, init_lora_weights="olora"),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "ia3_ff": lambda: peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", PEFTS)
def test_the_norms_of_a_peft_folder_are_those_of_the_model(kind: str, base: Path, tmp_path: Path) -> None:
    folder, model = peft_folder(tmp_path / "peft", PEFTS[kind]())
    report, norms = inspect(folder, base), moved(model)
    assert (report.variant, report.format) == (kind, "PEFT folder")
    assert {layer.path for layer in report.layers} == set(norms)
    for layer in report.layers:
        assert layer.norm == pytest.approx(norms[layer.path], rel=2e-4)
    alone = [layer.norm for layer in inspect(folder).layers]
    assert all(alone) if kind == "lora" else not any(alone)


def test_a_peft_folder_is_told_as_an_adapter_of_ours(tmp_path: Path) -> None:
    folder, _ = peft_folder(tmp_path / "peft", PEFTS["lora"]())
    text = shown("inspect", folder)
    assert re.search(r"config +r=4, alpha=6, per_layer=\{'model\.layers\.0\.mlp\.down_proj': \{'r':", text)
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj +64 -> 64 +2 ", text)
    both = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    folder, _ = peft_folder(tmp_path / "both", both)
    text = shown("inspect", folder)
    assert re.search(r"variant +ia3 \+ ia3_ff", text)
    assert re.search(r"k_proj +\? -> 32 ", text)
    assert re.search(r"down_proj +128 -> \? ", text)


# ---- convert ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3", "ia3_ff"])
def test_convert_goes_both_ways_and_loses_nothing(variant: str, base: Path, tmp_path: Path) -> None:
    cfg = config(variant, **({"r": 4, "alpha": 8.0} if variant in ("lora", "dora") else {}))
    path = saved(tmp_path, cfg)
    done = shown("convert", path, tmp_path / "peft", "--base", base, columns=None)
    assert done.startswith(f"{tmp_path / 'peft'}: PEFT folder, {variant}, 14 layers\n")
    found = compare(path, tmp_path / "peft")
    assert found.equal, found
    shown("convert", tmp_path / "peft", tmp_path / "back.safetensors", "--base", base)
    assert run("diff", tmp_path / "peft", tmp_path / "back.safetensors").exit_code == 0
    before, after = load_file(path), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_any_method_becomes_a_lora(base: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, config("ia3", target_names="k_proj"))
    shown("convert", path, tmp_path / "peft", "--base", base, "--rank", 32, "--max-error", 1e-5)
    found = inspect(tmp_path / "peft")
    assert (found.variant, found.config["r"]) == ("lora", 32)
    assert [layer.norm for layer in found.layers] == pytest.approx([layer.norm for layer in inspect(path, base).layers])
    result = run("convert", path, tmp_path / "small", "--base", base, "--rank", 2, "--max-error", 0.01)
    assert (result.exit_code, (tmp_path / "small").exists()) == (2, False)
    assert "lora-lite: as a LoRA of rank 2: relative error" in result.stderr


@pytest.mark.slow
def test_convert_prints_the_error_of_a_lora_and_no_noise(base: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, config("ia3", target_names="k_proj"))
    done = process("convert", path, tmp_path / "peft", "--base", base, "--rank", 4)
    assert (done.returncode, done.stderr) == (0, "")
    (error,) = re.findall(
        r"PEFT folder, lora, 2 layers\nof rank 4: relative error at most (\S+) in a layer", done.stdout
    )
    worst = []
    for site in ll.load(tiny_llama(), path).sites():
        module = site.module
        delta = ((module.lora_l - 1)[:, None] * module.weight).detach()
        rest = torch.linalg.svdvals(delta)[4:]
        worst.append(float(rest.norm() / delta.norm()))
    assert float(error) == pytest.approx(max(worst), rel=0.1)


def test_ia3_on_both_sides_becomes_one_file(base: Path, tmp_path: Path) -> None:
    both = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    folder, model = peft_folder(tmp_path / "both", both)
    shown("convert", folder, tmp_path / "a.safetensors", "--base", base)
    again = tiny_llama()
    loaded, theirs = ll.load(again, tmp_path / "a.safetensors"), ll.adapters(model)["default"].state_dict()
    assert loaded.variant == "ia3 + ia3_ff"
    assert loaded.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in loaded.state_dict().items())


def test_a_folder_with_a_head_is_shown_without_a_wrong_number(base: Path, tmp_path: Path) -> None:
    whole = ["lm_head", "norm", "embed_tokens"]
    cfg = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole)
    folder, model = peft_folder(tmp_path / "a", cfg)
    report = inspect(folder)
    assert report.variant == "lora + full"
    alone = {layer.path: layer.norm for layer in report.layers}
    assert alone["lm_head"] is None
    assert alone["model.norm"] is None
    with_base = {layer.path: layer.norm for layer in inspect(folder, base).layers}
    assert with_base["lm_head"] == pytest.approx(float(model.lm_head.lora_weight.detach().norm()), rel=1e-5)
    assert with_base["model.norm"] is None
    embedding: Any = model.model.embed_tokens
    assert with_base["model.embed_tokens"] == pytest.approx(float(embedding.lora_weight.detach().norm()), rel=1e-5)
    assert with_base["model.layers.0.self_attn.q_proj"] == pytest.approx(alone["model.layers.0.self_attn.q_proj"])
    rows, _ = peft_folder(tmp_path / "rows", peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]))
    norms = {layer.path: layer.norm for layer in inspect(rows, base).layers}
    assert norms.pop("model.embed_tokens") is None
    assert all(norms.values())
    other, _ = peft_folder(tmp_path / "b", cfg)
    groups = {group.path: group for group in compare(folder, other).groups}
    assert groups["lm_head"].delta is None
    shown("convert", folder, tmp_path / "a.safetensors", "--base", base)
    ours = {group.path: group for group in compare(folder, tmp_path / "a.safetensors").groups}
    assert ours["lm_head"].tensors is None  # a whole weight here, a difference there


@pytest.mark.parametrize("format", [name for name, known in FORMATS.items() if "lora" in known.variants])
def test_convert_to_another_programs_format_and_back(format: str, base: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, config("lora", r=4))  # with another alpha than r, the scale goes into B for diffusers
    there = tmp_path / "there.gguf"  # a file or a folder: the name is the user's
    done = shown("convert", path, there, "--base", base, "--to", format, columns=None)
    assert re.fullmatch(
        rf"{re.escape(str(there))}: {FORMATS[format].says}, lora, 14 layers\n"
        r"read back: its ΔW differs from the adapter's by \S+ at most in a layer\n",
        done,
    )
    shown("convert", there, tmp_path / "back.safetensors", "--base", base)
    before, after = load_file(path), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_convert_opens_a_base_of_diffusers(tmp_path: Path) -> None:
    model = unet()
    model.save_pretrained(tmp_path / "unet")
    perturb(ll.attach(model, config("lora", target_names="to_q")))
    ll.save(model, tmp_path / "a.safetensors")
    shown("convert", tmp_path / "a.safetensors", tmp_path / "peft", "--base", tmp_path / "unet")
    other = unet()
    ll.load(other, tmp_path / "peft")
    assert torch.equal(output(other), output(model))
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "logging"}')
    for folder, reason in ((tmp_path, "is a pipeline"), (tmp_path / "unet", "'logging' is no model of this diffusers")):
        result = run("convert", tmp_path / "a.safetensors", tmp_path / "new", "--base", folder)
        assert result.exit_code == 2
        assert reason in result.stderr


def test_convert_asks_no_tensor_for_the_size_of_its_layer(tmp_path: Path) -> None:
    """LoKr's tensors at a convolution don't tell it: the base does."""
    model = unet()
    model.save_pretrained(tmp_path / "unet")
    perturb(ll.attach(model, config("lokr", r=3, kinds="conv", target_names=r"conv1$")), 0.2)
    ll.save(model, tmp_path / "a.safetensors")
    for source, target, options in (("a", "k", ["--to", "kohya"]), ("k", "b", [])):
        places = [tmp_path / f"{name}.safetensors" for name in (source, target)]
        shown("convert", *places, *options, "--base", tmp_path / "unet")
    other = unet()
    ll.load(other, tmp_path / "b.safetensors")
    torch.testing.assert_close(output(other), output(model))


def text_encoder() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(vocab_size=50, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, **sizes)
    ).eval()


def test_convert_opens_a_text_encoder(tmp_path: Path) -> None:
    """AutoModelForCausalLM knows none: its folder says which class wrote it."""
    model = text_encoder()
    model.save_pretrained(tmp_path / "te")
    perturb(ll.attach(model, config("lora", target_names=r"(q|v)_proj$")), 0.2)
    ll.save_as(model, tmp_path / "k.safetensors", "kohya")
    shown("convert", tmp_path / "k.safetensors", tmp_path / "a.safetensors", "--base", tmp_path / "te")
    shown("convert", tmp_path / "a.safetensors", tmp_path / "peft", "--base", tmp_path / "te")
    live = ll.adapters(model)["default"].state_dict()
    for path in (tmp_path / "a.safetensors", tmp_path / "peft"):
        adapter = ll.load(text_encoder(), path)
        assert all(torch.equal(tensor, live[key]) for key, tensor in adapter.state_dict().items())


def test_convert_opens_the_class_that_the_adapter_was_on(base: Path, tmp_path: Path) -> None:
    """A classifier's head is in no language model, whatever the folder was written from."""
    model = LlamaForSequenceClassification(tiny_llama().config).eval()
    perturb(ll.attach(model, config("lora", target_names=r"q_proj$|score$")), 0.2)
    ll.save(model, tmp_path / "a.safetensors")
    shown("convert", tmp_path / "a.safetensors", tmp_path / "peft", "--base", base)
    assert any("score" in key for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    config_of = {"architectures": ["LlamaModel", "path", 3], "model_type": "llama"}
    assert class_of(config_of, None) is LlamaModel
    assert class_of(config_of | {"model_type": "qwen2"}, None) is None
    assert class_of({"architectures": "LlamaModel", "model_type": "llama"}, None) is None


def test_convert_checks_its_wishes_before_it_opens_the_base(tmp_path: Path) -> None:
    ours, kohya, nowhere = tmp_path / "a.safetensors", tmp_path / "k.safetensors", tmp_path / "nowhere"
    model = tiny_llama()
    ll.attach(model, config("lora", r=2))
    ll.save(model, ours)
    ll.save_as(model, kohya, "kohya")
    new = tmp_path / "new"
    for args, expected in (
        ([ours, new], "nowhere"),  # which is not there
        ([ours, new, "--to", "onnx"], r"format='onnx': wanted one of lora-lite, peft, "),
        ([ours, new, "--rank", 0], "rank=0: wanted an integer of at least 1"),
        ([ours, new, "--max-error", 0.1], "max_error=0.1 with rank=None: wanted a number beside a rank or an energy"),
        ([ours, new, "--rank", 2, "--to", "lora-lite"], "a file of ours holds every method as it is"),
        ([ours, new, "--rank", 2, "--to", "gguf-control-vector"], "rank and energy make a LoRA, and it holds none"),
        ([ours, new, "--to", "mlx", "--per-expert"], "format='mlx' has no option 'per_expert': wanted one of none"),
        ([ours, new, "--to", "mlx", "--set", "prefix=a"], "--set prefix: format='mlx' has no such option: wanted one"),
        ([ours, new, "--to", "kohya", "--set", "prefix=a"], "prefix='a': wanted one of lora_unet"),
        ([ours, new, "--to", "kohya", "--set", "names=a"], "names='a': wanted 'diffusers' or 'original'"),
        ([ours, new, "--to", "diffusers", "--set", "prefix=a b"], "prefix='a b': wanted a component's name"),
        ([ours, new, "--to", "gguf", "--set", "modelfile="], "modelfile='': wanted the name of Ollama's base model"),
        ([ours, new, "--set", "prefix=a"], "--set prefix: format='peft' has no such option: wanted one of none"),
        (
            [ours, new, "--set", "per_expert=false"],
            "--set per_expert: format='peft' has no .*\n  say it as --per-expert",
        ),
        (
            [kohya, tmp_path / "new.safetensors", "--rank", 2],
            "would be a folder of PEFT's\n  say what .* --to lora-lite",
        ),
        ([ours, tmp_path / "new.safetensors"], "would be a folder of PEFT's\n  say what it is to be"),
        ([kohya, tmp_path / "new.gguf"], "would be a file of ours\n  say what it is to be"),
    ):
        result = run("convert", *args, "--base", nowhere)
        assert result.exit_code == 2
        assert re.search(expected, result.stderr), result.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "k.safetensors"]


def test_convert_writes_over_nothing_and_takes_no_tensors(base: Path, tmp_path: Path) -> None:
    path = saved(tmp_path, config("lora", r=2))
    (tmp_path / "there").mkdir()
    save_file(load_file(path), tmp_path / "raw.safetensors")
    for args, reason in (
        ([path, tmp_path / "there"], "there exists"),
        ([tmp_path / "raw.safetensors", tmp_path / "new"], "holds tensors, and no config"),
        ([path, tmp_path / "new", "--to", "mlx", "--set", "prefix"], "--set prefix: wanted an option and its value"),
    ):
        result = run("convert", *args, "--base", base)
        assert result.exit_code == 2
        assert reason in result.stderr
        assert not (tmp_path / "new").exists()


# ---- merge --------------------------------------------------------------------------------------


def test_merge_writes_and_verifies_a_checkpoint(base: Path, tmp_path: Path) -> None:
    shutil.copytree(with_tokenizer(base), tmp_path / "base")
    path = saved(tmp_path, config("dora"))
    (tmp_path / "text.txt").write_text(TEXT)
    done = shown("merge", tmp_path / "base", path, tmp_path / "out", "--verify", tmp_path / "text.txt")
    assert "14 layers" in done
    kl = re.search(r"KL\(base \+ adapter \|\| merged\): mean (\S+), max (\S+) nats a token, over 180 tokens", done)
    assert kl is not None
    assert abs(float(kl[1])) < 1e-6
    result = run("merge", tmp_path / "base", path, tmp_path / "other", "--verify", tmp_path / "none.txt")
    assert (result.exit_code, result.stderr.count("\n"), (tmp_path / "other").exists()) == (2, 1, False)


def test_merge_into_other_weights_than_the_methods_own_wants_a_word(tmp_path: Path) -> None:
    tiny_llama(torch.bfloat16, seed=5).save_pretrained(tmp_path / "base")
    path = saved(tmp_path, config("dora"))
    result = run("merge", tmp_path / "base", path, tmp_path / "out")
    assert (result.exit_code, "was trained on another weight" in result.stderr) == (2, True)
    shown("merge", tmp_path / "base", path, tmp_path / "out", "--any-base")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_quantize_writes_a_base_with_its_adapter(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    options = ["--variant", "loftq", "--r", 4, "--iterations", 2, "--target", "_proj$", "--skip", "k_proj"]
    result = run("quantize", base, tmp_path / "none", *options)
    assert result.exit_code == 2
    assert "self_attn.k_proj: transformers leaves it in 16 bits" in result.stderr
    options[-3] = "(up|down)_proj$"
    lines = shown("quantize", base, tmp_path / "out", *options).splitlines()
    assert lines[0].startswith("quantised 12 layers to nf4 in ")
    assert "loftq on 4 of them, mean error " in lines[1]
    assert re.fullmatch(r"model.layers.\*.mlp.up_proj +2 +9\.\d\d% +\d\.\d\d% +\d+%", lines[4])
    assert all(len(line) <= 80 for line in lines[3:])
    model = ll.load_base(str(tmp_path / "out"))
    assert len(ll.load(model, tmp_path / "out" / "adapter.safetensors").targets) == 4
    assert "is there already" in run("quantize", base, tmp_path / "out").stderr
    assert shown("inspect", tmp_path / "out" / "adapter.safetensors").count("model.layers.") == 2
