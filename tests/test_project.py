"""The README's example and table, the layout, and what importing the library brings in."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from capabilities import is_identity, listed, row, rows, section, smollm2
from contrasts import FITTED, NEUTRAL, chats
from jaxtyping import TypeCheckError
from models import IDS, OneLinear, config, moe, perturb, tiny_llama
from pages import pages, python_blocks
from test_ecosystem import Tokens, arguments
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_lite as ll

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = python_blocks(ROOT / "README.md")
FIRST, EXAMPLE, SEVERAL, STARTS, OWN_VARIANT, ABLITERATION, STEERING, POLES, *REST = BLOCKS
HISTORY, MANY, MERGING, TRAINER, OTHER_KINDS = REST


def test_the_readmes_other_kinds_of_layer() -> None:
    experts, convolutions, embeddings, norms = OTHER_KINDS.strip().splitlines()
    model = moe("mixtral")
    exec(experts, {"ll": ll, "model": model})
    assert any(".experts.gate_up_proj" in path for path in ll.adapters(model)["default"].targets)
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(3, 8, 3))
    model.add_module("conv2", nn.Conv2d(8, 8, 3))
    exec(convolutions, {"ll": ll, "model": model})
    assert set(ll.adapters(model)["default"].targets) == {"conv2"}
    model = tiny_llama(tie_word_embeddings=True)
    exec(embeddings, {"ll": ll, "model": model})
    perturb(ll.adapters(model)["default"], 0.3)
    assert (ll.audit(model, {"input_ids": IDS}, merged=True).merged or 1) < 1e-4
    model = moe("mixtral")
    exec(norms, {"ll": ll, "model": model})
    assert len(ll.adapters(model)["default"].targets) == 4


def test_the_readmes_first_screen_is_what_the_model_says(smollm2: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By its first six words: up to there, the likeliest token of the three leads by 0.13 in the logit or more."""
    exec(FIRST.replace("HuggingFaceTB/SmolLM2-135M-Instruct", smollm2), {})
    shown = re.search(r"```\n(-1 .*?)```", README, re.S)
    assert shown is not None
    said, told = (text.splitlines() for text in (capsys.readouterr().out, shown[1]))
    assert [line.split()[:7] for line in said] == [line.split()[:7] for line in told]
    assert len({line.partition(" ")[2] for line in said}) == 3


def test_the_readmes_code_runs(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"batch": {"input_ids": IDS, "labels": IDS}}
    exec(EXAMPLE.replace("HuggingFaceTB/SmolLM2-135M-Instruct", tiny), scope)
    assert (tmp_path / "adapter.safetensors").is_file()
    scope = {"ll": ll, "model": tiny_llama()}
    exec(SEVERAL, scope)
    assert ll.adapters(scope["model"])["default"].variant == "lora + full + norm"  # type: ignore[arg-type]
    scope = {"ll": ll, "torch": torch, "model": tiny_llama(), "batches": [{"input_ids": IDS}]}
    exec(STARTS, scope)
    groups = scope["optimizer"].param_groups  # type: ignore[attr-defined]
    assert groups[1]["lr"] == 16 * groups[0]["lr"] == 16 * scope["rule"].lr  # type: ignore[attr-defined]
    scope = {"ll": ll, "model": tiny_llama()}
    exec(OWN_VARIANT, scope)
    assert ll.adapters(scope["model"])["default"].variant == "gain"  # type: ignore[arg-type]


def test_the_readmes_merging_runs(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny)
    model = ll.load_base(tiny)
    perturb(ll.attach(model, ll.LoRAConfig()))
    ll.save(model, "adapter.safetensors")
    merge, *rest = MERGING.splitlines(keepends=True)
    scope = {"ll": ll, "model": model}
    exec(merge, scope)
    ll.unmerge(model)
    exec("".join(rest), scope)
    assert list(ll.adapters(model)) == ["default", "other"]
    assert AutoModelForCausalLM.from_pretrained("merged").dtype == torch.bfloat16


def test_the_readmes_many_adapters_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    perturb(ll.attach(model, ll.IA3Config(), "other"))
    ll.save(model, "other.safetensors", "other")
    ll.detach(model)
    for name in ("fr", "en", "steer"):
        perturb(ll.attach(model, ll.LoRAConfig(r=2), name))
    blocks = MANY.split("with ")
    batch = {"input_ids": IDS.reshape(-1, 6)[:4], "max_new_tokens": 2}
    exec(f"with {blocks[1]}", {"ll": ll, "model": model, "batch": batch})
    exec(f"with {blocks[2]}", {"ll": ll, "model": model, "batch": {"input_ids": IDS.reshape(-1, 6)[:3]}})
    assert ll.adapters(model)["fr"].variant == "ia3"
    ll.bring_back(model, "en")


def test_the_readmes_history_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    exec(HISTORY, {"ll": ll, "model": model, "batches": [IDS], "train": perturb})
    assert "default: lora, c 0.8, 14 layers, rank 8\nformal: pissa, c 1, 14 layers, rank 8\n" in capsys.readouterr().out
    assert [round_.label for round_ in ll.history(model)] == ["formal"]
    fresh = tiny_llama()
    ll.load(fresh, tmp_path / "history.safetensors", "history")
    assert len(ll.history(fresh)) == 2


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # torch's, on a machine without an accelerator
def test_the_readmes_trainer_trains_and_goes_on(tmp_path: Path) -> None:
    for last in (3, 6):
        model = tiny_llama()
        adapter = ll.attach(model, ll.LoRAConfig())
        scope = {"model": model, "args": arguments(tmp_path, max_steps=last), "data": Tokens()}
        code = TRAINER if last == 3 else TRAINER.replace(".train()", ".train(resume_from_checkpoint=True)")
        exec(code, scope)
        assert all(tensor.any() for tensor in adapter.parameters())
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    assert scope["trainer"].state.log_history[0]["step"] == 1  # the history of the first run
    assert "train(resume_from_checkpoint=True)" in TRAINER


def test_the_readmes_abliteration_runs(smollm2: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = {
        "positive": chats("French", FITTED[:8]),
        "negative": chats("English", FITTED[:8]),
        "neutral": NEUTRAL[:8],
    }
    scope: dict[str, object] = {"ll": ll, "prompts": prompts}
    scope |= {"tokenizer": AutoTokenizer.from_pretrained(smollm2), "model": ll.load_base(smollm2)}
    exec(ABLITERATION, scope)
    assert "tensor(0." in capsys.readouterr().out
    assert scope["adapter"].config.strength == 0.8  # type: ignore[attr-defined]


def test_the_readmes_steering_runs(smollm2: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = {
        "positive": chats("French", FITTED[:4]),
        "negative": chats("English", FITTED[:4]),
        "neutral": NEUTRAL[:4],
    }
    scope: dict[str, object] = {"ll": ll, "prompts": prompts}
    scope |= {"tokenizer": AutoTokenizer.from_pretrained(smollm2), "model": ll.load_base(smollm2)}
    exec(STEERING, scope)
    printed = re.search(r"tensor\((0\.\d+)", capsys.readouterr().out)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(0.1, rel=0.05)


def test_the_readmes_two_poles_train() -> None:
    model = tiny_llama()
    adapter = ll.attach(model, ll.LoRAConfig())
    batch = {"input_ids": IDS, "labels": IDS}
    exec(POLES, {"ll": ll, "model": model, "positive": batch, "negative": {**batch, "labels": IDS.flip(1)}})
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(ll.REGISTRY))
def test_the_row_of_a_method_is_what_it_does(variant: str) -> None:
    assert rows().get(variant) == row(variant), "the table is not what the methods do: run `make table`"


def test_the_tables_have_each_method_once() -> None:
    assert list(rows()) == sorted(ll.REGISTRY), "run `make table`"
    assert section("README.md") == listed(), "run `make table`"


def test_a_false_cell_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a method that is no identity any more, and of one that is suddenly refused on 4 bits."""
    twice = staticmethod(lambda layer, x, y: y + layer.lora_l.to(y.dtype) * y)
    monkeypatch.setattr(ll.REGISTRY["ia3"], "forward", twice)
    assert not is_identity("ia3")
    monkeypatch.setattr(ll.REGISTRY["lora"], "base_weight", "dense")
    assert rows()["lora"] != row("lora")
    monkeypatch.setattr(ll.REGISTRY["dora"], "forward", staticmethod(lambda layer, x, y: y))
    with pytest.raises(AssertionError, match="dora changes nothing"):
        row("dora")


def test_the_readmes_plan_is_what_plan_says() -> None:
    shown = re.search(r"```\n(lora on .*?)```", README, re.S)
    assert shown is not None
    assert shown[1].strip() == str(ll.plan(smollm2(), ll.LoRAConfig()))


def test_importing_the_library_imports_no_extra() -> None:
    code = "import sys, lora_lite; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {
        "transformers",
        "bitsandbytes",
        "accelerate",
        "peft",
        "typer",
        "rich",
        "matplotlib",
        "sklearn",
        "beartype",
    }


def test_what_is_imported_later_is_all_there() -> None:
    """In a process of its own: the runtime alone comes with the import, all else when it is asked for."""
    code = """
        import sys, lora_lite as ll
        later = ("base.load", "io.checkpoint", "io.raw", "io.peft", "measure.answers", "measure.calibrate_scale",
                 "measure.evaluate", "measure.prompts", "merging.on_disk")
        assert not [name for name in later if f"lora_lite.{name}" in sys.modules]
        assert all(getattr(ll, name) is not None for name in ll.__all__)
        assert callable(ll.merge) and callable(ll.history)
        try:
            ll.mrege
        except AttributeError as error:
            assert "has no attribute 'mrege'" in str(error)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)


def test_a_variant_is_at_most_100_lines() -> None:
    for file in (ROOT / "lora_lite" / "variants").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 100, file.name


def test_the_files_that_the_documents_name_exist() -> None:
    documents = [ROOT / name for name in ("README.md", "DEVELOPER.md", "CHANGELOG.md", "AGENTS.md")] + pages()
    named = {
        (document.name, path)
        for document in documents
        for path in re.findall(r"(?<![\w./-])(?:lora_lite|tests)/[\w./-]+\.py\b", document.read_text())
    }
    assert named
    assert not sorted((document, path) for document, path in named if not (ROOT / path).is_file())


def test_the_link_at_the_top_leads_to_the_variants() -> None:
    assert (ROOT / "variants").resolve() == ROOT / "lora_lite" / "variants"


def test_shapes_are_checked_while_the_tests_run() -> None:
    model = OneLinear()
    adapter = ll.attach(model, config("ia3", target_names="proj"))
    site = next(adapter.sites())
    layer = ll.Layer(site.module, site)
    with pytest.raises(TypeCheckError, match=r"BaseLayer\.linear"):
        site.base.linear(torch.ones(()))
    with pytest.raises(TypeCheckError, match=r"IA3\.forward"):
        ll.REGISTRY["ia3"].forward(layer, torch.ones(3, 16), torch.ones(4, 24))  # type: ignore[misc]


def test_every_config_and_error_is_public() -> None:
    for name in ll.REGISTRY:
        assert getattr(ll, ll.config_for(name).__name__) is ll.config_for(name)
    assert all(hasattr(ll, name) for name in ll.__all__)
