"""The core stays small to read and to run: what a trip of one LoRA enters, and the calls that one token costs."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import lora_lite as ll

PACKAGE = str(Path(ll.__file__).parent)
MOST_LINES, MOST_FILES = 884, 27


def trip(folder: Path) -> None:
    """Attach, forward, backward, save, detach, load, detach."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    ll.attach(model, ll.LoRAConfig(r=2, target_names="0"))
    model(torch.randn(64, 8)).sum().backward()
    ll.save(model, folder / "a.safetensors")
    ll.detach(model)
    ll.load(model, folder / "a.safetensors")
    ll.detach(model)


def python_calls(run: Callable[[], Any]) -> list[str]:
    """The functions of the library that a call enters, each as often as it does."""
    entered: list[str] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            entered.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


def test_a_lora_from_attach_to_detach_can_be_read_in_one_evening(tmp_path: Path) -> None:
    trip(tmp_path)  # imports happen once
    lines: set[tuple[str, int]] = set()

    def in_the_library(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return in_the_library

    def entered(frame: FrameType, event: str, arg: Any) -> Any:
        return in_the_library if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(entered)
    threading.settrace(entered)  # a backward may run in a thread of its own
    try:
        trip(tmp_path)
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    files = {file for file, _ in lines}
    assert len(lines) > 300, "the trace sees nothing"
    assert len(lines) <= MOST_LINES
    assert len(files) <= MOST_FILES, sorted(files)


def test_a_forward_of_a_lora_without_gradients_takes_few_calls() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(8, 8)).to(dtype)
        ll.attach(model, ll.LoRAConfig(r=2, target_names="0"))
        for tokens in (1, 64):
            x = torch.randn(tokens, 8, dtype=dtype)
            with torch.no_grad():
                calls = python_calls(lambda model=model, x=x: model(x))
            assert 5 < len(calls) <= 12, calls


def test_a_training_step_of_a_lora_and_a_dora_takes_few_calls() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    ll.attach(model, ll.LoRAConfig(r=2, target_names="0"))
    ll.attach(model, ll.DoRAConfig(r=2, target_names="0"), "dora")
    x = torch.randn(64, 8)
    calls = python_calls(lambda: model(x).sum().backward())
    assert 10 < len(calls) <= 50, calls


def test_idle_adapters_of_rows_take_few_calls() -> None:
    """The first adapter's hook makes the update of all rows, and the others see that it has."""
    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    for i in range(8):
        ll.attach(model, ll.LoRAConfig(r=2, target_names="0"), f"a{i}")
    x = torch.randn(8, 1, 8)
    with torch.no_grad(), ll.rows(model, [f"a{i}" for i in range(8)]):
        model[0](x)
        calls = python_calls(lambda: model[0](x))
    assert calls.count("mixed.py:mixed") == 1
    assert len(calls) <= 8 * 5 + 8, calls
