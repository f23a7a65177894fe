"""The example of combining: a whole run of it on a tiny model, and its ways of combining."""

import json
import re
from pathlib import Path

import combine
import pytest
import torch
from pairs import INSTRUCTION
from test_example_finetune import TinyLetters

import lora_lite as ll


def jsonl(file: Path, sign: str) -> Path:
    lines = (json.dumps({"prompt": f"{i} {sign} one?", "completion": f"{sign}{i}"}) + "\n" for i in range(20))
    file.write_text("".join(lines))
    return file


def test_a_run_on_a_tiny_model(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(combine, "set_up", torch.manual_seed)
    monkeypatch.setattr(combine.transformers.AutoTokenizer, "from_pretrained", lambda *_: TinyLetters())
    data = {name: jsonl(tmp_path / f"{name}.jsonl", sign) for name, sign in (("first", "and"), ("second", "less"))}
    sizes = {"steps": 2, "batch_size": 2, "rows": 2, "max_length": 64}
    combine.main(**data, **sizes, model=tiny, r=2, lr=1e-2, dtype="float32", seed=0, out=tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= combine.WIDTH
    cells = [line.split("│", 2) for line in lines if "│" in line]
    figures = {name.strip(): re.findall(r"\d+\.\d{3}", rest) for _, name, rest in cells}
    assert set(figures) == {"base", "first alone", "second alone", *combine.ways(2, 0)}
    assert all(len(losses) == 2 for losses in figures.values())
    assert figures["first alone"] != figures["base"] != figures["second alone"]
    for name in combine.NAMES:
        loaded = ll.load(combine.load(tiny, None, "float32"), tmp_path / "out" / f"{name}.safetensors")
        assert loaded.config.r == 2


def test_the_second_skill_is_the_first_the_other_way_round() -> None:
    pairs = combine.signatures()
    assert len(pairs) > 1000
    assert all(pair.prompt.startswith(combine.SIGNATURE) and INSTRUCTION not in pair.completion for pair in pairs)
    assert sum(pair.completion.endswith(")") for pair in pairs) == len(pairs)
