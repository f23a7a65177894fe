"""The README's example and table, the layout, and what importing the library brings in."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from capabilities import is_identity, listed, row, rows, section
from jaxtyping import TypeCheckError
from models import IDS, OneLinear, config, tiny_llama
from pages import pages, python_blocks
from transformers import AutoModelForCausalLM

import lora_lite as ll

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIRST, EXAMPLE, OWN_VARIANT = python_blocks(ROOT / "README.md")


def test_the_readmes_first_screen_is_what_the_model_says(smollm2: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By its first six words: up to there, the likeliest token of the three leads by 0.13 in the logit or more."""
    exec(FIRST.replace("HuggingFaceTB/SmolLM2-135M-Instruct", smollm2), {})
    shown = re.search(r"```\n(c = -1.*?)```", README, re.S)
    assert shown is not None
    pattern = r"c = ( ?-?\d), KL (\d\.\d\d): ((?:\S+ ){6})"
    said, told = (re.findall(pattern, text) for text in (capsys.readouterr().out, shown[1]))
    assert [(c, words) for c, _, words in said] == [(c, words) for c, _, words in told]
    assert [float(kl) for _, kl, _ in said] == pytest.approx([float(kl) for _, kl, _ in told], abs=0.02)
    assert len({words for *_, words in said}) == 3


def test_the_readmes_training_runs(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny)
    exec(EXAMPLE.replace("HuggingFaceTB/SmolLM2-135M-Instruct", tiny), {"batch": {"input_ids": IDS, "labels": IDS}})
    alone = AutoModelForCausalLM.from_pretrained("merged")
    assert alone.dtype == torch.bfloat16
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter.safetensors", "peft", "merged"}


def test_the_readmes_method_is_one() -> None:
    scope = {"ll": ll, "model": tiny_llama()}
    exec(OWN_VARIANT, scope)
    assert ll.adapters(scope["model"])["default"].variant == "gain"  # type: ignore[arg-type]


def test_the_readmes_three_numbers_are_those_of_the_page_on_costs() -> None:
    table = (ROOT / "docs/guides/cost.md").read_text()
    kept, load, token = re.findall(r"^\| .* \| (0\.\d\d) \|$", README, re.M)
    rows = {row[0]: row for row in (line.strip("| ").split(" | ") for line in table.splitlines() if " | " in line)}
    assert rows["kept for the backward, above the base / PEFT's"][1] == kept
    assert rows["attach; load / PEFT's"][1].split("; ")[1] == load
    cached = rows["token / PEFT's with its `DoraCaching`, batch 1; 8 (on one core)"]
    assert cached[-2].split("; ")[0] == token


def test_the_version_is_in_the_citation() -> None:
    assert f"\nversion: {ll.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_readme_is_one_screen_of_words_with_links_that_lead_somewhere() -> None:
    assert len(README.split()) <= 900
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert len(links) > 5
    assert not [link for link in links if not (ROOT / link.partition("#")[0]).exists()]
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{name}:" in targets for name in re.findall(r"`?make (\w+)", README))


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
