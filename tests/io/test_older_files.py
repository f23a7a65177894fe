"""Files that an older version has written are read as they were meant: bit for bit, and with the same outputs.

`fixtures/make_9ff721c.py` has made them, at that commit, which is in their folder's name.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lora_lite as ll

OLD = Path(__file__).parents[1] / "fixtures" / "9ff721c"
METHODS = ["lora", "dora", "pissa", "ia3", "ia3_ff", "abliteration", "steer", "ssteer", "antipasto", "history"]
OTHERS = ["per_layer", "half", "bfloat16", "named", "on_top"]
NAMES = {"history": "history", "named": "style"}
MARKER = "lora_lite_merge.json"


def old_file(stem: str) -> Path:
    return OLD / "adapters" / f"{stem}.safetensors"


def base() -> Any:
    model = AutoModelForCausalLM.from_pretrained(OLD / "base", dtype=torch.float32).eval()
    model.config._name_or_path = "tiny"  # as it was called when the files were made, and not by where it lies now
    return model


def meta_of(path: Path) -> dict[str, Any]:
    """What the file says of its adapter, but for the version that wrote it."""
    with safe_open(path, "pt") as file:
        meta: dict[str, Any] = json.loads(file.metadata()["lora_lite"])
    del meta["library"]
    return meta


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal bit for bit, so that -0.0 is not 0.0."""
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        bits = [each[key].contiguous().view(-1).view(torch.uint8) for each in (a, b)]
        assert torch.equal(*bits), key


@torch.no_grad()
def assert_outputs(model: Any, stem: str) -> None:
    """Last in a test, for it leaves the model in float64, in which machines agree."""
    expected = load_file(OLD / "expected.safetensors")
    outputs = model.double()(input_ids=expected["ids"]).logits.float()
    torch.testing.assert_close(outputs, expected[stem], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stem", METHODS + OTHERS)
def test_an_adapter_is_what_it_was(stem: str, tmp_path: Path, log: list[str]) -> None:
    model, name, held, meta = base(), NAMES.get(stem, "default"), load_file(old_file(stem)), meta_of(old_file(stem))
    if "on" in meta:
        ll.load(model, old_file("history"), "history")
    adapter = ll.load(model, old_file(stem), name)
    assert [line for line in log if line.startswith("WARNING")] == []  # of another base or history
    assert_same(adapter.state_dict(), held)
    assert (adapter.variant, adapter.scale) == (meta["variant"], meta["scale"])
    assert json.loads(json.dumps(adapter.config.to_dict())) == meta["config"]  # a tuple is a list there
    assert adapter.per_layer == meta.get("per_layer", {})
    ll.save(model, tmp_path / "again.safetensors", name)
    assert_same(load_file(tmp_path / "again.safetensors"), held)
    assert meta_of(tmp_path / "again.safetensors") == meta
    assert_outputs(model, stem)


def test_every_kind_of_file_is_among_them() -> None:
    metas = {stem: meta_of(old_file(stem)) for stem in METHODS + OTHERS}
    assert [metas[stem]["variant"] for stem in METHODS] == METHODS
    assert metas["per_layer"]["per_layer"]
    assert metas["half"]["scale"] == 0.5
    assert metas["bfloat16"]["config"]["dtype"] == "bfloat16"
    assert len(metas["on_top"]["on"]) == 1
    assert {path.stem for path in (OLD / "adapters").iterdir()} == metas.keys()


def test_a_historys_rounds_are_what_they_were() -> None:
    model = base()
    ll.load(model, old_file("history"), "history")
    kept = [(each.label, each.c, each.config.variant) for each in ll.history(model)]
    assert kept == [("default", 0.75, "lora"), ("default-2", -1.0, "lora"), ("default-3", 0.5, "ia3")]


@pytest.mark.parametrize("stem", ["lora", "dora"])
def test_a_peft_folder_is_what_it_was(stem: str, tmp_path: Path) -> None:
    model, folder = base(), OLD / "peft" / stem
    assert_same(ll.load_peft(model, folder).state_dict(), load_file(old_file(stem)))
    ll.save_peft(model, tmp_path)
    assert_same(*(load_file(at / "adapter_model.safetensors") for at in (tmp_path, folder)))
    settings = [json.loads((at / "adapter_config.json").read_text()) for at in (tmp_path, folder)]
    assert settings[0] == settings[1]
    assert_outputs(model, stem)


def test_a_killed_merge_goes_on(tmp_path: Path) -> None:
    """Its numbers have no rounding in any order of summing, so that its shards are those of every machine."""
    shutil.copytree(OLD / "base", tmp_path / "base")
    partial = shutil.copytree(OLD / "merged.partial", tmp_path / "out.partial")
    record = json.loads((partial / MARKER).read_text())
    for name, (_, written) in record["job"]["base"].items():
        os.utime(tmp_path / "base" / name, ns=(written, written))  # a checkout has its own, and then it starts over
    if record["job"]["library"] != ll.__version__:  # another version starts over, too, and this is about the record
        record["job"]["library"] = ll.__version__
        (partial / MARKER).write_text(json.dumps(record))
    there = sum(path.stat().st_size for path in partial.glob("model-*"))
    done, whole = (ll.merge_checkpoint(tmp_path / "base", old_file("half"), tmp_path / out) for out in ("out", "whole"))
    assert (done.resumed, whole.resumed) == (there, 0)
    assert there > 0
    names = {path.name for path in whole.folder.iterdir()} - {MARKER}  # which has the time when each file was written
    assert {path.name for path in done.folder.iterdir()} - {MARKER} == names
    assert [each for each in names if (done.folder / each).read_bytes() != (whole.folder / each).read_bytes()] == []
    assert not partial.exists()
