"""The GGUF container, with the package gguf on the other end. The hostile side: test_hostile.py."""

import os
from pathlib import Path
from typing import Any

import hostile_gguf
import pytest
import torch

import lora_lite as ll
from lora_lite.io.gguf import is_gguf, read_gguf, write_gguf

gguf: Any = pytest.importorskip("gguf")

FIELDS: dict[str, str | int | float] = {"general.architecture": "llama", "a.count": 3, "a.number": 0.1, "a.text": "é\n"}
TENSORS = {
    "blk.0.attn_q.weight.lora_a": torch.arange(30.0).reshape(5, 6),
    "x": torch.arange(7.0).to(torch.bfloat16),
    "y": torch.arange(8.0).to(torch.float16).reshape(2, 4).mT,
    "z": torch.ones(1, 2, 3),
}


def written(path: Path, **tensors: torch.Tensor) -> Path:
    with path.open("wb") as file:
        write_gguf(file, FIELDS, TENSORS | tensors)
    return path


def test_what_we_write_the_package_reads(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(written(tmp_path / "a.gguf"))
    values = {key: reader.get_field(key).contents() for key in FIELDS}
    assert values == FIELDS | {"a.number": pytest.approx(0.1)}
    assert [tensor.name for tensor in reader.tensors] == list(TENSORS)
    for tensor in reader.tensors:
        whole = TENSORS[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == whole.shape
        raw = whole.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert tensor.data.tobytes() == raw
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert list(kinds.values()) == ["F32", "BF16", "F16", "F32"]


def test_what_we_write_comes_back(tmp_path: Path) -> None:
    file = read_gguf(written(tmp_path / "a.gguf"))
    assert file.fields == FIELDS | {"a.number": pytest.approx(0.1)}
    assert list(file.header.entries) == list(TENSORS)
    for key, tensor in TENSORS.items():
        assert torch.equal(file.matrix_or_vector(key), tensor)
        assert file.matrix_or_vector(key).dtype == tensor.dtype


def test_what_the_package_writes_we_read(tmp_path: Path) -> None:
    """Fields of all types, lists among them, another alignment, and 8-bit blocks."""
    values = torch.randn(4, 64)
    blocks = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_array("general.tags", ["a", "b"])
    writer.add_array("a.numbers", [1, 2, 3])
    for name, value in {
        "uint8": 1,
        "int8": -1,
        "uint16": 2,
        "int16": -2,
        "int32": -3,
        "uint64": 4,
        "int64": -4,
    }.items():
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_tensor("q", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("d", values.double().numpy())
    writer.add_tensor("f", values[0].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "a.gguf")
    assert file.fields["general.tags"] is file.fields["a.numbers"] is None
    assert (file.fields["a.int64"], file.fields["a.float64"], file.fields["a.bool"]) == (-4, 0.1, True)
    q = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(file.matrix_or_vector("q"), q)
    assert torch.equal(file.matrix_or_vector("d"), values.double())
    assert torch.equal(file.matrix_or_vector("f"), values[0])


def test_another_file_is_none(tmp_path: Path) -> None:
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "nothing")
    (tmp_path / "a").write_bytes(b"GGU")
    assert not is_gguf(tmp_path / "a")
    with pytest.raises(ll.CheckpointError, match=r"is no GGUF file, or is damaged: its first bytes would be 4 bytes"):
        read_gguf(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ll.CheckpointError, match=r"doesn't begin with GGUF\n  copy or convert it again"):
        read_gguf(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"GGUF\0\0\0\3" + bytes(100))
    with pytest.raises(ll.CheckpointError, match=r"version is 50331648, .* big-endian machines isn't read"):
        read_gguf(tmp_path / "a")


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("model")
    q4 = gguf.quants.quantize(torch.randn(4, 64).numpy(), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.attn_q.weight", q4, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ll.CheckpointError, match=r"GGML's type 2 in a file of the type 'model'; .* is no adapter"):
        read_gguf(tmp_path / "a.gguf")


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    file = read_gguf(written(tmp_path / "a.gguf"))
    os.truncate(tmp_path / "a.gguf", file.header.start + 4)
    with pytest.raises(ll.CheckpointError, match="became shorter while it was read"):
        file.matrix_or_vector("z")


def test_a_name_that_ggml_has_no_room_for(tmp_path: Path) -> None:
    with pytest.raises(ll.CheckpointError, match="is longer than the 63 bytes of a tensor's name in GGML"):
        written(tmp_path / "a.gguf", **{"x" * 64: torch.ones(1)})


def test_names_that_are_there_twice(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf")
    whole = hostile_gguf.parted(path.read_bytes())
    path.write_bytes(hostile_gguf.joined(hostile_gguf.twice(whole)))
    with pytest.raises(ll.CheckpointError, match=r"the tensor 'blk.0.attn_q.weight.lora_a' is there twice"):
        read_gguf(path)
    path.write_bytes(hostile_gguf.joined(whole._replace(fields=[*whole.fields, whole.fields[0]])))
    with pytest.raises(ll.CheckpointError, match=r"the field 'general.architecture' is there twice"):
        read_gguf(path)
