"""Headers, JSON, shards and atomic writes; layer paths between files and models. The hostile side: test_hostile.py."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_lite as ll
from lora_lite.errors import brief
from lora_lite.io.keys import core, resolve
from lora_lite.io.safetensors import (
    DEEPEST,
    DTYPES,
    parse_json,
    read_any,
    read_header,
    read_shards,
    replacing,
    shard_names,
    write_json,
    write_tensors,
)


def test_every_dtype_comes_back_bit_equal(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for name, dtype in sorted(DTYPES.items())
    }
    tensors |= {"scalar": torch.tensor(1.5), "none": torch.empty(0, 4)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"who": "me"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"who": "me"}
    assert {key: entry.shape for key, entry in header.entries.items()} == {
        key: tuple(t.shape) for key, t in tensors.items()
    }
    assert {key: entry.dtype for key, entry in header.entries.items() if key in DTYPES} == {key: key for key in DTYPES}
    for held in (header.read(), load_file(tmp_path / "a.safetensors")):
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[key], t) and held[key].dtype == t.dtype for key, t in tensors.items())
    assert list(header.read(["BF16"])) == ["BF16"]


def test_a_file_that_became_shorter_since_its_header_was_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(100)}, {})
    header = read_header(tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", 200)
    with pytest.raises(ll.CheckpointError, match="became shorter while it was read"):
        header.read()


def test_a_name_that_the_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(ll.CheckpointError, match="can't be read: File name too long"):
        read_header(tmp_path / ("n" * 300))


def test_a_failure_while_writing_leaves_the_old_file_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.json") as handle:
        handle.write(b"new")
        raise ZeroDivisionError
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]
    with replacing(tmp_path / "sub" / "b") as handle:
        handle.write(b"new")
    assert (tmp_path / "sub" / "b").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "x is not JSON: a key is there twice"),
        ('{"a": {"b": [{"c": 1, "c": 2}]}}', "a key is there twice"),
        ("[]", "x: wanted a JSON object, got list"),
        (b'{"\xff": 1}', "x is not JSON: .*utf-8"),
        ('{"a": ' + "[" * DEEPEST + "]" * DEEPEST + "}", f"x has lists or objects nested more than {DEEPEST} deep"),
    ],
)
def test_json_that_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ll.CheckpointError, match=message):
        parse_json(text, "x")


def test_json_may_be_as_deep_as_the_limit() -> None:
    assert parse_json('{"a": ' + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1) + "}", "x").keys() == {"a"}


def test_shards_and_one_file_are_read_alike(tmp_path: Path) -> None:
    one, two = {"a": torch.ones(2), "b": torch.ones(3)}, {"c": torch.ones(4)}
    save_file({**one, **two}, tmp_path / "model.safetensors")
    assert shard_names(tmp_path) is None
    assert {key: header.path.name for key, header in read_shards(tmp_path).items()} == dict.fromkeys(
        "abc", "model.safetensors"
    )
    save_file(one, tmp_path / "1.safetensors")
    save_file(two, tmp_path / "2.safetensors")
    names = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": names})
    assert {key: header.path.name for key, header in read_shards(tmp_path).items()} == names
    assert [header.path.name for header in read_any(tmp_path)] == ["1.safetensors", "2.safetensors"]  # by the index
    assert [header.path.name for header in read_any(tmp_path / "2.safetensors")] == ["2.safetensors"]
    for change, message in (
        ({"d": "1.safetensors"}, "1 keys are not where it says, 0 are in two files, 0 are in a file and not"),
        ({"c": "1.safetensors"}, "1 keys are not where it says"),
        ({"a": "model.safetensors"}, r"3 are in two files"),
    ):
        write_json(tmp_path / "model.safetensors.index.json", {"weight_map": names | change})
        with pytest.raises(ll.CheckpointError, match=message):
            read_shards(tmp_path)


def test_text_from_elsewhere_in_a_message() -> None:
    assert brief("as it is") == "as it is"
    assert brief([1, "a"]) == "[1, 'a']"
    assert brief("\x1b[2J\n\ud800") == "?[2J??"
    assert brief("a" * 500 + "b" * 500, 10) == "aaaaa ... bbbbb"


# ---- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "layers.0.up",
        "model.layers.0.up",
        "module.model.layers.0.up",
        "base_model.model.model.layers.0.up",
        "_orig_mod.module.layers.0.up",
        "model.layers.0._checkpoint_wrapped_module.up",
        "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module._orig_mod.up",
        "layers.0.up._orig_mod",
    ],
)
def test_what_wrappers_add_is_looked_through(path: str) -> None:
    assert core(path) == "layers.0.up"
    assert resolve("f", [path], {"model.layers.0.up", "model.layers.1.up"}, "M") == {path: "model.layers.0.up"}


def test_parts_of_other_names_are_not_wrappers() -> None:
    for path in ("models.x", "my_model.x", "a.model.x", "a._orig_mod_2.b", "base_model.x", ""):
        assert core(path) == path


def test_paths_that_lead_to_no_one_layer() -> None:
    assert resolve("f", ["a", "model.a"], {"a", "model.a"}, "M") == {"a": "a", "model.a": "model.a"}
    for wanted, paths, message in (
        (["b"], {"a", "x.b"}, r"f: 1 of its 1 layers are not in this M\n  file:  b\n  model: x.b\n  prefixes that"),
        (["b"], {"a"}, "model: no layer of such a name"),
        (["a"], {"model.a", "module.a"}, "1 of its 1 layers match more than one layer in this M"),
        (["module.a", "model.a"], {"a"}, "2 of its 2 layers match more than one layer"),
    ):
        with pytest.raises(ll.CheckpointError, match=message):
            resolve("f", wanted, paths, "M", "layers")
