"""The site's pages: their Python runs, their commands are known, their figures have a command, their tests exist."""

import ast
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, calibration, tiny_llama
from pages import DOCS, MODEL, ROOT, Block, blocks, pages
from typer.main import get_command

import lora_lite as ll
from lora_lite.cli.commands import app
from lora_lite.core.variant import needs_data

WITH_PYTHON = [page for page in pages() if any(blocks(page, "python"))]
OTHERS = {"distributed.md", "formats.md", "found_wrong.md"}
"""Pages of parts: tests of their own say what is around each."""
COMMAND = re.compile(r"`(make [a-z-]+|(OMP_NUM_THREADS=1 )?python [\w/.]+\.py|pytest [^`]+)")
FIGURES = re.compile(r"\d+\.\d+|\b\d{2,}\b")
"""Of a table's cell: numbers that somebody measured. One digit may be a count of anything."""
NOT_MEASURED = {"formats.md", "serving.md", "developer.md"}
"""Pages whose tables have keys, shapes and settings; that of ranks is of the servers' own sources."""


@pytest.fixture(scope="session")
def small(real_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As many blocks as the model of the pages, and its tokenizer; each is 64 wide."""
    folder = tmp_path_factory.mktemp("small")
    real_tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(real_tokenizer), "max_position_embeddings": 512, "num_hidden_layers": 30}
    tiny_llama(torch.bfloat16, **sizes, tie_word_embeddings=True).save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # torch's, on a machine without an accelerator
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's use of that name
@pytest.mark.parametrize("page", [p for p in WITH_PYTHON if p.name not in OTHERS], ids=lambda page: page.stem)
def test_the_pages_code_runs(
    page: Path, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And prints what the page shows, where that isn't of the real model."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in blocks(page, "python"):
        block.run(scope, {MODEL: small})
    if MODEL not in page.read_text():
        printed = capsys.readouterr().out.splitlines()
        assert all(line in printed for block in blocks(page, "text") for line in block.text.splitlines())


def test_the_page_of_processes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's checkpoints in one process, and Accelerate's loop; AdaLoRA has a penalty and a schedule."""
    from accelerate import Accelerator

    monkeypatch.chdir(tmp_path)
    checkpoint, loop, _ = blocks(DOCS / "distributed.md", "python")
    model = tiny_llama()
    adapter = ll.attach(model, ll.AdaLoRAConfig(init_r=2, target_r=1, total_step=10))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    scope = {
        "model": model,
        "adapter": adapter,
        "optimizer": optimizer,
        "folder": "dcp",
        "accelerator": Accelerator(cpu=True),
    }
    scope["loss"] = model(input_ids=IDS, labels=IDS).loss
    loop.run(scope, {})
    assert adapter.steps == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is one process
        checkpoint.run(scope, {})
    assert any(Path("dcp").iterdir())


@pytest.mark.filterwarnings("ignore")  # Lightning's, of a loader without workers and of torch's names that it uses
def test_the_page_of_lightning_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama().train()
            ll.attach(self.model, ll.LoRAConfig(r=2))

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    monkeypatch.chdir(tmp_path)
    *_, block = blocks(DOCS / "distributed.md", "python")
    block.run({"module": Module(), "data": torch.utils.data.DataLoader(IDS, batch_size=1), "ll": ll}, {})
    assert [file.name for file in Path("adapters").iterdir()] == ["default.safetensors"]


def test_the_page_of_formats_runs(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ll.load_base(small)
    ll.attach(model, ll.LoRAConfig(r=2, layers=[0]))
    for block in blocks(DOCS / "formats.md", "python"):
        write, read = ast.parse(block.text).body
        for statement in (write, read):
            exec(ast.unparse(statement), {"ll": ll, "model": model})
            if statement is write:
                ll.detach(model)
    assert ll.adapters(model)["default"].variant == "lora"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_the_pages_blocks_are_of_known_languages(page: Path) -> None:
    """So that no code slips past the tests under another name."""
    known = ("python", "sh", "bash", "text", "{toctree}", "{eval-rst}", "{note}")
    every = re.findall(r"^\s*```+(\S+)", page.read_text(), re.M)
    assert not set(every) - set(known)


@pytest.mark.parametrize("name", sorted(ll.REGISTRY))
def test_the_line_of_a_methods_page_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    from method_pages import attach_line, code, split

    document = sys.modules[ll.REGISTRY[name].__module__].__doc__ or ""
    equation, labels = split(document)
    assert equation
    assert {"Identity", "Base", "Departs", "Checked"} == set(labels)
    ast.parse(code(Path(sys.modules[ll.REGISTRY[name].__module__].__file__ or "")))
    line = attach_line(name)
    assert line or name in {"history", "tokens"}
    if line:
        cfg: Any = ll.config_for(name)()
        model = tiny_llama(bias=True, hidden_size=128, intermediate_size=256)
        exec(line, {"ll": ll, "model": model, "data": calibration(model, cfg) if needs_data(cfg) else None})
        assert ll.adapters(model)["default"].variant == name


def commands() -> list[tuple[Block, str]]:
    lines = [
        (block, line.partition(" #")[0].strip())
        for page in [*pages(), *(ROOT / name for name in ("AGENTS.md", "CONTRIBUTING.md", "README.md"))]
        for block in blocks(page, "sh", "bash")
        for line in block.text.splitlines()
    ]
    return [(block, line) for block, line in lines if line]


@pytest.mark.parametrize(
    ("block", "line"), commands(), ids=lambda value: value if isinstance(value, str) else value.page.stem
)
def test_a_command_of_a_page_is_one(block: Block, line: str) -> None:
    """Its program, subcommand and options are known, and the files of this repository that it names exist."""
    program, *words = shlex.split(line)
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    if program == "lora-lite":
        command: Any = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
        assert options <= {option for parameter in command.params for option in parameter.opts} | {"--help"}
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif "python" in program:
        assert words[0] == "-m" or (ROOT / words[0]).is_file()
    else:
        assert program in {"pip", "OMP_NUM_THREADS=1", "git"}


@pytest.mark.parametrize("page", [p for p in pages() if p.name not in NOT_MEASURED], ids=lambda page: page.stem)
def test_a_table_of_figures_has_its_command(page: Path) -> None:
    """In the section of the table, in backticks, or in a block of the page above it."""
    for section in re.split(r"^#+ ", page.read_text(), flags=re.M)[1:]:
        cells = [cell for line in section.splitlines() if line.startswith("|") for cell in line.split("|")[2:]]
        if len([cell for cell in cells if FIGURES.search(re.sub(r"\[.*?\]\(.*?\)|`[^`]*`", "", cell))]) >= 3:
            assert COMMAND.search(section), section.splitlines()[0]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_a_test_that_a_page_names_exists(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?[`\[]", page.read_text()):
        names = {
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert not name or name in names


def test_a_command_that_is_none_is_found() -> None:
    """The checks above can fail."""
    block = Block(ROOT / "README.md", "sh", 1, "", "")
    for line in ("lora-lite inspect a --nothing", "make nothing", "python examples/nothing.py", "nothing"):
        with pytest.raises(AssertionError):
            test_a_command_of_a_page_is_one(block, line)


BEGINNING, *FAULTS = blocks(DOCS / "found_wrong.md", "python")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own, some of which are part of the fault
@pytest.mark.parametrize("block", FAULTS, ids=lambda block: block.heading)
def test_what_is_wrong_elsewhere_still_is(block: Block) -> None:
    """Each reproduction asserts its fault on the pinned versions: one that is mended goes from the page."""
    scope: dict[str, Any] = {}
    BEGINNING.run(scope, {})
    block.run(scope, {})


def test_each_fault_names_its_law() -> None:
    sections = re.split(r"^## ", (DOCS / "found_wrong.md").read_text(), flags=re.M)[1:]
    assert len(sections) == len(FAULTS) >= 8
    assert all(re.search(r"`tests/[\w/]+\.py::\w+`", section) for section in sections)
    assert all(re.search(r"^ *assert ", block.text, re.M) for block in FAULTS)


@pytest.mark.slow
def test_the_start_shows_what_the_model_says(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the real model, by the first words of each line: up to there the likeliest tokens lead by far."""
    monkeypatch.chdir(tmp_path)
    start = DOCS / "start.md"
    scope: dict[str, Any] = {}
    for block in blocks(start, "python"):
        block.run(scope, {MODEL: smollm2})
    printed = [line.split()[:7] for line in capsys.readouterr().out.splitlines()]
    shown = [line for block in blocks(start, "text") for line in block.text.splitlines()]
    assert len(shown) == 5
    assert all(line.split()[:7] in printed for line in shown)
