"""Every reader of foreign files as a function of bytes, for a fuzzer, and for the corpus that it leaves.

An input is the parts of a reader's files, with MARK between them. A safetensors file has two or three: its header's
JSON, the tensors' bytes, and the text of one entry of its metadata, so that a change of the text leaves a whole file.
"""

import functools
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from transformers import LlamaConfig, LlamaForCausalLM

import lora_lite as ll
from lora_lite.core.state import sites_of

MARK = b"\n--8<--\n"
MOST = 1 << 16  # bytes of an input


@functools.cache
def model() -> Any:
    """Names and sizes of a Llama, all of them small."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


@dataclass(frozen=True)
class Reader:
    """One way in: which files its parts are, whole inputs to start from, and the call."""

    files: tuple[tuple[str, str], ...]  # (name, entry of the metadata that is a part of its own, or "")
    seeds: Callable[[Path], Iterator[Path]]  # folders with such files
    call: Callable[[Any, Path], Any] = lambda target, folder: ll.load(target, folder)


def adapters_for(cfgs: list[Any], write: Callable[[Any, Path], Any]) -> Callable[[Path], Iterator[Path]]:
    def seeds(folder: Path) -> Iterator[Path]:
        for number, cfg in enumerate(cfgs):
            torch.manual_seed(number)
            data = {"directions": torch.eye(8)[0]} if isinstance(cfg, ll.SteerConfig) else None
            ll.attach(model(), cfg, calibration_data=data)
            write(model(), folder / str(number))
            ll.detach(model())
            yield folder / str(number)

    return seeds


NAMES = r"q_proj|down_proj"
LORAS = [ll.LoRAConfig(r=2, target_names=NAMES), ll.LoRAConfig(r=1, alpha=3.0, target_names="q_proj", layers=[1])]
ANY = [
    *LORAS,
    ll.DoRAConfig(r=1, target_names=NAMES),
    ll.IA3Config(target_names=NAMES),
    ll.VeRAConfig(r=2, target_names="q_proj"),
]
ANY += [ll.LoKrConfig(r=1, target_names="q_proj"), ll.FourierFTConfig(n_frequency=3, target_names="q_proj")]


def saved(target: Any, folder: Path) -> None:
    ll.save(target, folder / "a.safetensors")


def raw(target: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(dict(target.state_dict()), folder / "a.safetensors")


ONE = (("a.safetensors", ""),)
FOLDER = (("adapter_model.safetensors", ""), ("adapter_config.json", ""))
READERS = {
    "lora-lite": Reader((("a.safetensors", "lora_lite"),), adapters_for(ANY, saved)),
    "raw": Reader(ONE, adapters_for(LORAS[:1], raw), lambda target, folder: ll.load(target, folder, cfg=LORAS[0])),
    "peft": Reader(FOLDER, adapters_for(ANY, ll.save_peft)),
    "mlx": Reader((("adapters.safetensors", ""), FOLDER[1]), adapters_for(LORAS, partial(ll.save_as, format="mlx"))),
}

DIFFUSERS = (("pytorch_lora_weights.safetensors", "lora_adapter_metadata"),)
READERS["diffusers"] = Reader(DIFFUSERS, adapters_for([*LORAS, ANY[2]], partial(ll.save_as, format="diffusers")))


def kohya(target: Any, folder: Path) -> None:
    folder.mkdir()
    ll.save_as(target, folder / "a.safetensors", "kohya")


def gguf(target: Any, folder: Path, format: str = "gguf") -> None:
    folder.mkdir()
    ll.save_as(target, folder / "a.gguf", format)


STEER = ll.SteerConfig(kinds="block", layers=[1])
vectors = adapters_for([STEER], partial(gguf, format="gguf-control-vector"))
READERS["gguf"] = Reader((("a.gguf", ""),), adapters_for(LORAS, gguf), lambda m, folder: ll.load(m, folder / "a.gguf"))
READERS["gguf-control-vector"] = replace(READERS["gguf"], seeds=vectors)
LYCORIS = [cls(r=r, target_names=NAMES) for cls in (ll.LoHaConfig, ll.LoKrConfig) for r in (1, 9)]
READERS["kohya"] = Reader(ONE, adapters_for([*LORAS, ANY[2], *LYCORIS], kohya))


def packed(reader: Reader, folder: Path) -> bytes:
    """The input of a folder's files."""
    parts = []
    for name, entry in reader.files:
        whole = (folder / name).read_bytes()
        if not name.endswith(".safetensors"):
            parts.append(whole)
            continue
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        parts += [json.dumps(header).encode(), whole[8 + length :]]
        parts += [metadata[entry].encode()] if entry else []
    return MARK.join(parts)


def unpacked(reader: Reader, data: bytes, folder: Path) -> None:
    """The files of an input, whatever its parts hold."""
    parts = iter(data.split(MARK))
    for name, entry in reader.files:
        part = next(parts, b"")
        if name.endswith(".safetensors"):
            payload = next(parts, b"")
            if entry:
                text = json.dumps({entry: next(parts, b"").decode(errors="replace")}).encode()
                part = part.rstrip().removesuffix(b"}") + b', "__metadata__": ' + text + b"}"
            part = struct.pack("<Q", len(part)) + part + payload
        (folder / name).write_bytes(part)


def read(reader: Reader, data: bytes) -> bool:
    """Is there an adapter in this input? It must be read, or refused by an error of ours; the model stays as it was.

    Raises:
        Exception: of any other kind, as the library raised it.
        AssertionError: where something stays on the model, or an adapter can't be taken off.
    """
    target, folder = model(), Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        unpacked(reader, data, folder)
        reader.call(target, folder)
        assert ll.adapters(target)
        ll.detach(target)
    except ll.LoraLiteError as error:
        message = str(error)
    else:
        return True
    finally:
        left = [path for path, module in target.named_modules() if sites_of(module)]
        assert not left, f"left on the model: {left}"
        assert not any("lora_" in key for key in target.state_dict())
        shutil.rmtree(folder)
    assert len(message) < 4000, "a message of any length"
    return False


def starts(name: str) -> Iterator[bytes]:
    """The whole inputs of a reader."""
    logger.disable("lora_lite")
    with tempfile.TemporaryDirectory() as folder:
        for path in READERS[name].seeds(Path(folder)):
            yield packed(READERS[name], path)
