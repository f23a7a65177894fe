"""AGENTS.md is enough: each task's code, taken from it alone, runs on a tiny model and has the result that it says."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, perturb, tiny_llama
from pages import DOCS, ROOT, blocks

import lora_lite as ll

AGENTS = ROOT / "AGENTS.md"
TASKS = {block.heading: block for block in blocks(AGENTS, "python")}


def start() -> dict[str, Any]:
    """What the page says that there is before a task."""
    model, batches = tiny_llama(), [{"input_ids": IDS}]
    names = {"ll": ll, "torch": torch, "model": model, "batch": {"input_ids": IDS, "labels": IDS}, "batches": batches}
    return names | {"positive": batches, "negative": [{"input_ids": IDS.flip(0, 1) + 30}]}


def trained() -> dict[str, Any]:
    scope = start()
    scope["adapter"] = ll.attach(scope["model"], ll.LoRAConfig(r=4, dtype=torch.float32))
    perturb(scope["adapter"], 0.3)
    scope["wanted"] = scope["model"](input_ids=IDS).logits.detach()
    return scope


def logits(scope: dict[str, Any]) -> torch.Tensor:
    result: torch.Tensor = scope["model"](input_ids=IDS).logits.detach()
    return result


def close(scope: dict[str, Any], ours: torch.Tensor) -> bool:
    return bool(torch.allclose(ours, scope["wanted"], atol=1e-5))


def two_projections(scope: dict[str, Any]) -> bool:
    names = {path.rpartition(".")[2] for path in scope["adapter"].targets}
    return names == {"q_proj", "v_proj"} and scope["adapter"].config.scaling == 2.0


def trains(scope: dict[str, Any]) -> bool:
    return bool(scope["loss"] < scope["first"]) and all(p.any() for p in scope["adapter"].parameters())


def rows_are_their_own(scope: dict[str, Any]) -> bool:
    return torch.allclose(scope["each"][0], scope["wanted"][0], atol=1e-5) and list(ll.adapters(scope["model"])) == [
        "default"
    ]


def without_training(scope: dict[str, Any]) -> bool:
    moved = ll.kl_divergence(scope["model"], scope["batches"], "steer").mean()
    with ll.disabled(scope["model"]):
        was_ablated = not torch.equal(scope["ablated"], scope["model"](**scope["batch"]).logits)
    return was_ablated and scope["c"] > 0 and list(ll.adapters(scope["model"])) == ["steer"] and float(moved) > 0


def sweep(scope: dict[str, Any]) -> bool:
    with ll.disabled(scope["model"]), torch.no_grad():
        base = float(scope["model"](**scope["batch"]).loss)
    return list(scope["losses"]) == [0.0, 0.5, 1.0] and scope["losses"][0.0] == base != scope["losses"][1.0]


RESULTS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "Attach a LoRA to q_proj and v_proj": two_projections,
    "Train it": trains,
    "Save it, and load it on a fresh model": lambda scope: torch.equal(logits(scope), scope["wanted"]),
    "Load a PEFT folder, and write one": lambda scope: close(scope, logits(scope)) and Path("peft").is_dir(),
    "Merge into the weights, and back": lambda s: close(s, s["merged"]) and torch.equal(logits(s), s["wanted"]),
    "Merge a checkpoint on disk": lambda scope: close(scope, ll.load_base("merged")(input_ids=IDS).logits),
    "Compare with the base, without a second model": lambda s: close(s, s["adapted"]) and float(s["divergence"]) > 0,
    "Sweep a scale": sweep,
    "Two adapters, each row of a batch by its own": rows_are_their_own,
    "Take one direction out, add another": without_training,
    "Several methods in one adapter": lambda scope: scope["adapter"].variant == "lora + norm",
    "Write a variant": lambda scope: (
        scope["adapter"].variant == "gain" and len(list(scope["adapter"].parameters())) == 14
    ),
    "Find out why nothing matches": lambda scope: "q_proj" in scope["reason"],
}


def test_each_task_has_a_result() -> None:
    assert list(TASKS) == list(RESULTS)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_done_from_the_page_alone(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = start() if task.startswith("Attach") else trained()
    with torch.no_grad():
        scope["first"] = scope["model"](**scope["batch"]).loss
    if task == "Merge a checkpoint on disk":
        ll.save(scope["model"], "adapter.safetensors")
        tiny_llama().save_pretrained("base")
    TASKS[task].run(scope, {})
    assert RESULTS[task](scope)


def test_the_pages_calls_and_errors_are_there() -> None:
    names = set(re.findall(r"\bll\.([A-Za-z_]\w*)", AGENTS.read_text()))
    assert not sorted(name for name in names if not hasattr(ll, name))
    assert set(ll.errors.__all__) <= names


def test_llms_txt_has_its_form_and_its_links_lead_somewhere() -> None:
    """A title, a summary, then sections of links with a word on each (llmstxt.org)."""
    text = (ROOT / "llms.txt").read_text()
    title, _, summary, *_ = text.splitlines()
    assert title.startswith("# ")
    assert summary.startswith("> ")
    lists = [line for line in text.splitlines() if line.startswith("- ")]
    links = [re.fullmatch(r"- \[[^\]]+\]\(([^)]+)\): .+", line) for line in lists]
    assert all(link is not None and (ROOT / link[1]).is_file() for link in links)
    listed = {link[1] for link in links if link is not None}
    assert {f"docs/guides/{page.name}" for page in (DOCS / "guides").glob("*.md")} <= listed
