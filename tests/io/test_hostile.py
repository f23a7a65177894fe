"""Files from strangers: damaged, lying or malicious, from a seeded generator.

Each gives one clear error of ours, in bounded time and memory, and leaves model and disk as they were. What only looks
odd, or is damaged where nobody can tell, loads the same tensors.
"""

import atexit
import functools
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hostile_gguf
import pytest
import torch
from models import OneLinear, config, perturb, tiny_llama
from safetensors.torch import load_file, save_file
from test_laws import same_snapshot, snapshot

import lora_lite as ll

SECONDS, MEMORY, MESSAGE = 5.0, 64 << 20, 2000
"""At most, of one call: processor time, and again for each 16 MiB of files; memory above the start for small ones;
characters of its error."""
CFG = config("lora", r=2, target_names="q_proj|up_proj")
DEEP = 100_000
MARKER = "code-ran"


class Reader(NamedTuple):
    """One way in: how a whole and valid input is made, and the call that reads it."""

    write: Callable[[Path], Path]
    """Into an empty folder; gives the safetensors file that is to be damaged."""
    call: Callable[[Any, Path, Path], Any]
    """(model, that file, a folder for output)"""
    trained: Callable[[], Any] = lambda: trained()
    """The model with the adapter that is in it."""


@functools.cache
def trained() -> Any:
    model = tiny_llama()
    perturb(ll.attach(model, CFG))
    return model


def write_adapter(folder: Path) -> Path:
    ll.save(trained(), folder / "a.safetensors")
    return folder / "a.safetensors"


def write_raw(folder: Path) -> Path:
    save_file(state(), folder / "a.safetensors")
    return folder / "a.safetensors"


def write_shards(folder: Path) -> Path:
    names = {key: f"model-{1 + i % 2}.safetensors" for i, key in enumerate(state())}
    for name in set(names.values()):
        save_file({key: tensor for key, tensor in state().items() if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder / "model-1.safetensors"


def state() -> dict[str, torch.Tensor]:
    return {key: tensor.detach() for key, tensor in trained().state_dict().items()}


ADAPTER = Reader(write_adapter, lambda model, file, out: ll.load(model, file))
RAW = Reader(write_raw, lambda model, file, out: ll.load(model, file, cfg=CFG))
SHARDS = Reader(write_shards, lambda model, file, out: ll.load(model, file.parent, cfg=CFG))


def write_peft(folder: Path) -> Path:
    ll.save_peft(trained(), folder / "peft")
    return folder / "peft" / "adapter_model.safetensors"


def write_base(folder: Path) -> Path:
    """A checkpoint folder in two shards, with a config."""
    return write_folder(tiny_llama(), folder)


def write_labels(folder: Path) -> Path:
    """The same blocks under a head whose size is the number of labels."""
    from transformers import LlamaForSequenceClassification

    labels = tiny_llama().config
    labels.id2label = dict(enumerate("abc"))
    return write_folder(LlamaForSequenceClassification(labels), folder)


def write_folder(model: Any, folder: Path) -> Path:
    names = {key: f"model-{1 + i % 2}.safetensors" for i, key in enumerate(model.state_dict())}
    for name in set(names.values()):
        save_file({key: value for key, value in model.state_dict().items() if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder / "model-1.safetensors"


def write_diffusers(folder: Path) -> Path:
    """What a pipeline of diffusers would write, whose component is called unet."""
    ll.save_peft(trained(), folder / "peft")
    held = load_file(folder / "peft" / "adapter_model.safetensors")
    described = json.loads((folder / "peft" / "adapter_config.json").read_text())
    shutil.rmtree(folder / "peft")
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{field}": value for field, value in described.items()})}
    tensors = {key.replace("base_model.model.", "unet."): tensor for key, tensor in held.items()}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata)
    return folder / "pytorch_lora_weights.safetensors"


def write_kohya(folder: Path) -> Path:
    ll.save_as(trained(), folder / "a.safetensors", "kohya")
    return folder / "a.safetensors"


@functools.cache
def merge_source() -> tuple[Path, Path]:
    """A whole base and a whole adapter, outside of what a case damages."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "base").mkdir()
    write_base(folder / "base")
    return folder / "base", write_adapter(folder)


def merged(model: Any, base: Path, file: Path, out: Path) -> None:
    """The file merged on disk; attached afterwards, so that the law can look at what was read."""
    ll.merge_checkpoint(base, file, out)
    shutil.rmtree(out)
    ll.load(model, file)


PEFT = Reader(write_peft, lambda model, file, out: ll.load_peft(model, file.parent))
DIFFUSERS = Reader(write_diffusers, lambda model, file, out: ll.load(model, file))
KOHYA = Reader(write_kohya, lambda model, file, out: ll.load(model, file))
MERGE = Reader(write_adapter, lambda model, file, out: merged(model, merge_source()[0], file, out))
BASE = Reader(write_base, lambda model, file, out: merged(model, file.parent, merge_source()[1], out))
LABELS = BASE._replace(write=write_labels)
READERS = {"adapter": ADAPTER, "raw": RAW, "shards": SHARDS, "peft": PEFT, "diffusers": DIFFUSERS, "kohya": KOHYA}
READERS |= {"merge": MERGE, "base": BASE, "labels": LABELS}


def write_gguf(folder: Path) -> Path:
    ll.save_as(trained(), folder / "a.gguf", "gguf")
    return folder / "a.gguf"


@functools.cache
def steered() -> Any:
    """Of directions whose length is exact, so that what a file has, c v, is all of it."""
    model, cfg = tiny_llama(), ll.SteerConfig(kinds="block", layers=[1])
    ll.attach(model, cfg, calibration_data={"directions": torch.eye(64)[5] * 2})
    return model


def write_control_vector(folder: Path) -> Path:
    ll.save_as(steered(), folder / "a.gguf", "gguf-control-vector")
    return folder / "a.gguf"


READERS |= {"gguf": Reader(write_gguf, ADAPTER.call), "vector": Reader(write_control_vector, ADAPTER.call, steered)}


@functools.cache
def whole(reader: str) -> tuple[dict[Path, bytes], Path]:
    """The files that a reader's `write` makes, and which of them it gives: to write them takes longer than to read."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        folder = Path(name)
        file = READERS[reader].write(folder).relative_to(folder)
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}, file


def copied(reader: str, folder: Path) -> Path:
    """These files once more, in an empty folder."""
    contents, file = whole(reader)
    for path, data in contents.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    return folder / file


Damage = Callable[[Path, random.Random], Any]
"""Change the file (and what is beside it) in place."""
Case = tuple[str, Damage, str]
"""Name, damage, and what is right: "error"; "same", the tensors all the same; or "either"."""


# ---- damage to any safetensors file -------------------------------------------------------------


def parts(raw: bytes) -> tuple[bytes, bytes]:
    """The header, and the tensors' bytes."""
    n = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + n], raw[8 + n :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def truncated(file: Path, rng: random.Random) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: rng.randrange(len(raw))])


def cut(n: int) -> Damage:
    return lambda file, rng: file.write_bytes(file.read_bytes()[:n])


def flipped(file: Path, rng: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    raw[rng.randrange(8 + len(parts(raw)[0]))] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)


def lying_length(length: Callable[[int, int], int]) -> Damage:
    def damage(file: Path, rng: random.Random) -> None:
        raw = file.read_bytes()
        header, data = parts(raw)
        file.write_bytes(joined(header, data, length(len(header), len(raw)) % 2**64))

    return damage


def header(change: Callable[[dict], Any]) -> Damage:
    """Change the header as an object."""

    def damage(file: Path, rng: random.Random) -> None:
        text, data = parts(file.read_bytes())
        held = json.loads(text)
        change(held)
        file.write_bytes(joined(dumped(held), data))

    return damage


def dumped(value: Any) -> bytes:
    """JSON; the text "@x@" becomes x, so that a number can be what Python would not write."""
    text = json.dumps(value)
    while '"@' in text:
        before, _, rest = text.partition('"@')
        number, _, after = rest.partition('@"')
        text = before + number + after
    return text.encode()


def first(held: dict) -> str:
    """An adapter's tensor, as others come and go with the reader; of a base, one that is merged."""
    return min([key for key in held if ".lora_" in key] or [key for key in held if key.endswith("_proj.weight")])


def entry(**changes: Any) -> Damage:
    """Change the first tensor's entry."""

    def change(held: dict) -> None:
        held[first(held)].update(changes)

    return header(change)


def header_text(text: bytes) -> Damage:
    return lambda file, rng: file.write_bytes(joined(text, parts(file.read_bytes())[1]))


def renamed(key: str) -> Damage:
    """The first tensor by another name."""

    def change(held: dict) -> None:
        held[key] = held.pop(first(held))

    return header(change)


def replaced(make: Callable[[Path], Any]) -> Damage:
    """Something else under the file's name."""

    def damage(file: Path, rng: random.Random) -> None:
        file.unlink()
        make(file)

    return damage


class RunsCode:
    """What a pickle would do when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.marker = str(folder / MARKER)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def torch_saved(folder: Path, **options: Any) -> bytes:
    into = io.BytesIO()
    torch.save(RunsCode(folder), into, **options)
    return into.getvalue()


def loop(file: Path) -> None:
    file.with_name("loop").symlink_to(file)
    file.symlink_to(file.with_name("loop"))


def twice(file: Path, rng: random.Random) -> None:
    text, data = parts(file.read_bytes())
    held = json.loads(text)
    key = first(held)
    again = f"{{{json.dumps(key)}: {json.dumps(held[key])}, ".encode()
    file.write_bytes(joined(again + text.strip()[1:], data))


LENGTHS: dict[str, Callable[[int, int], int]] = {
    "0": lambda n, size: 0,
    "1": lambda n, size: 1,
    "one-less": lambda n, size: n - 1,
    "one-more": lambda n, size: n + 1,
    "all": lambda n, size: size - 8,
    "past-the-end": lambda n, size: size - 7,
    "size": lambda n, size: size,
    "2^31": lambda n, size: 2**31,
    "2^40": lambda n, size: 2**40,
    "2^63": lambda n, size: 2**63,
    "2^64-1": lambda n, size: -1,
}
OFFSETS = [
    *([0, 2**62], [0, 2**64], [-8, 504], [512, 0], [0, 0], [1, 513], [4, 516], [2**31, 2**31 + 512], [0.0, 512.0]),
    *([False, 512], ["0", "512"], [0], [0, 512, 512], [], None, "0-512", {"0": 512}, [[0], [512]], [None, 512]),
    *("@[0, 1e400]@", "@[0, -Infinity]@", f"@[0, 1{'0' * 4200}]@", f"@{'[' * 200}{']' * 200}@"),
]
SHAPES = [
    *([2**62], [2**31, 2**31, 2**31], [-1, -128], [2.0, 64.0], [True, 128], ["2", "64"], "2x64", None, 128, {}),
    *([[2], [64]], [128] + [1] * 70, [], [0], [0, 2**62], [2, 63], [2**20] * 64, "@[NaN]@", f"@[1{'0' * 5000}]@"),
]
DTYPES = ["F33", "", "f32", "torch.float32", "F16", "F8_E4M3", "U64", "I32", "os.system", "F" * 10**6, None, 3, [], {}]
ODD_KEYS = ["", ".", "..", "../../etc/passwd", "/etc/passwd", "__class__", "model", "\x1b[2J", "a\nb", "\ud800", "\0"]
ODD_KEYS += [
    "k" * 10**6,
    "model." * 10**5,
    "model..lora_A",
    "model.layers.99999999999.mlp.up_proj.lora_A",
    "__metadata",
]
HEADERS = {
    "list": b"[]",
    "null": b"null",
    "number": b"1",
    "text": b'"x"',
    "nothing": b"",
    "spaces": b" " * 1000,
    "empty": b"{}",
    "deep-lists": b"[" * DEEP,
    "deep-objects": b'{"a":' * DEEP,
    "deep-and-closed": b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "20-deep": b'{"a":' + b"[" * 20 + b"]" * 20 + b"}",
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "5000-digits": b'{"a": 1' + b"0" * 5000 + b"}",
    "4000-digits": b'{"a": 1' + b"0" * 4000 + b"}",
    "not-utf-8": b'{"\xff\xfe": 1}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "a-mark": b"\xef\xbb\xbf{}",
    "single-quotes": b"{'a': 1}",
    "half": b'{"a": {"dtype"',
    "many-lists": b'{"a": [' + b"[]," * 200_000 + b"[]]}",
    "metadata-list": b'{"__metadata__": []}',
    "metadata-null": b'{"__metadata__": null}',
    "metadata-number": b'{"__metadata__": {"lora_lite": 1}}',
    "metadata-nested": b'{"__metadata__": {"lora_lite": {"format": 1}}}',
    "metadata-twice": b'{"__metadata__": {}, "__metadata__": {}}',
}
FILES: dict[str, Callable[[Path], Any]] = {
    "pickle": lambda file: file.write_bytes(pickle.dumps(RunsCode(file.parent))),
    "pickle-0": lambda file: file.write_bytes(pickle.dumps(RunsCode(file.parent), protocol=0)),
    "torch-zip": lambda file: file.write_bytes(torch_saved(file.parent)),
    "torch-old": lambda file: file.write_bytes(torch_saved(file.parent, _use_new_zipfile_serialization=False)),
    "text": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "gguf": lambda file: file.write_bytes(b"GGUF" + bytes(1000)),
    "folder": lambda file: file.mkdir(),
    "fifo": lambda file: os.mkfifo(file),
    "device": lambda file: file.symlink_to("/dev/zero"),
    "loop": loop,
    "dangling": lambda file: file.symlink_to(file.parent / "nowhere"),
    "nothing": lambda file: None,
    "bin-beside": lambda file: file.with_suffix(".bin").write_bytes(pickle.dumps(RunsCode(file.parent))),
}

ANY: list[Case] = [
    *((f"truncated-{i}", truncated, "error") for i in range(20)),
    *((f"cut-{n}", cut(n), "error") for n in (0, 1, 7, 8, 9)),
    *((f"flip-{i}", flipped, "either") for i in range(40)),
    *((f"length-{name}", lying_length(length), "error") for name, length in LENGTHS.items()),
    *((f"offsets-{i}", entry(data_offsets=value), "error") for i, value in enumerate(OFFSETS)),
    *((f"shape-{i}", entry(shape=value), "error") for i, value in enumerate(SHAPES)),
    *((f"dtype-{i}", entry(dtype=value), "error") for i, value in enumerate(DTYPES)),
    *((f"key-{i}", renamed(key), "error") for i, key in enumerate(ODD_KEYS)),
    *((f"header-{name}", header_text(text), "error") for name, text in HEADERS.items()),
    *((f"file-{name}", replaced(make), "error") for name, make in FILES.items()),
    ("zeros", lambda file, rng: file.write_bytes(bytes(1000)), "error"),
    ("noise", lambda file, rng: file.write_bytes(rng.randbytes(5000)), "error"),
    ("key-twice", twice, "error"),
    ("entry-unknown", entry(extra=1), "error"),
    ("longer", lambda file, rng: file.write_bytes(file.read_bytes() + b"\0"), "error"),
]


# ---- metadata of an adapter file ----------------------------------------------------------------


def text_of_metadata(text: str) -> Damage:
    return header(lambda held: held["__metadata__"].update(lora_lite=text))


def meta(change: Callable[[dict], Any]) -> Damage:
    """Change our metadata as an object."""

    def edit(held: dict) -> None:
        value = json.loads(held["__metadata__"]["lora_lite"])
        change(value)
        held["__metadata__"]["lora_lite"] = dumped(value).decode()

    return header(edit)


def in_meta(*path: str, value: Any) -> Damage:
    def change(held: dict) -> None:
        for step in path[:-1]:
            held = held[step]
        held[path[-1]] = value

    return meta(change)


def without(*path: str) -> Damage:
    def change(held: dict) -> None:
        for step in path[:-1]:
            held = held[step]
        del held[path[-1]]

    return meta(change)


def target(value: Any) -> Damage:
    """The first target's sizes."""
    return meta(lambda held: held["targets"].update({min(held["targets"]): value}))


def moved_target(path: str) -> Damage:
    """The first target, its fingerprint and its tensors at another path."""

    def change(held: dict) -> None:
        value = json.loads(held["__metadata__"]["lora_lite"])
        old = min(value["targets"])
        for each in (value["targets"], value["base"]["fingerprint"]):
            each[path] = each.pop(old)
        held["__metadata__"]["lora_lite"] = json.dumps(value)
        for key in [key for key in held if key.startswith(old)]:
            held[path + key[len(old) :]] = held.pop(key)

    return header(change)


def fingerprint(value: Any) -> Damage:
    return meta(lambda held: held["base"]["fingerprint"].update({min(held["targets"]): value}))


def many_targets(file: Path, rng: random.Random) -> None:
    """A hundred thousand layers, each with its tensors, all consistent."""
    text, _ = parts(file.read_bytes())
    made = json.loads(json.loads(text)["__metadata__"]["lora_lite"])
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(30_000)]
    made["targets"] = {path: [64, 64] for path in paths}
    made["base"]["fingerprint"] = {path: ["float32", 0.0, 0.0, 0.0, 0.0] for path in paths}
    keys = [f"{path}.lora_{tensor}" for path in paths for tensor in "AB"]
    entry = '"{}":{{"dtype":"F16","shape":[1],"data_offsets":[{},{}]}}'
    entries = ",".join(entry.format(key, 2 * i, 2 * i + 2) for i, key in enumerate(keys))
    described = json.dumps({"lora_lite": json.dumps(made)})
    file.write_bytes(joined(f'{{"__metadata__":{described},{entries}}}'.encode(), bytes(2 * len(keys))))


def abliteration(**fields: Any) -> Damage:
    values = ll.AbliterationConfig().to_dict() | fields
    return meta(lambda held: held.update(variant="abliteration", config=values))


HUGE, DIGITS, NESTED = 10**400, "@1" + "0" * 5000 + "@", "@" + "[" * 930 + "]" * 930 + "@"
CATASTROPHE = r"(a+)+$|(([a-z_.0-9]+)+)+\Z!"
SLOW_TO_COMPILE = r"(?i:[\x00-\U0010ffff])" * 20_000
WRONG: dict[str, list[Any]] = {
    "variant": ["dora", "pissa", None, 3, [], "lora\0", "os.system"],
    "target_names": [None, "q_proj", 3, {}, [3], [None], [["q_proj"]]],
    "exclude_names": [None, "q_proj", 3, {}, [3]],
    "target_roles": [None, 3, {}, ["head"], [3], [[]]],
    "layers": [3, {}, [], ["0"], [1.5], [True], [None]],
    "layer_range": [3, {}, [], [0.5], [0.8, 0.2], ["0", "1"], [0, HUGE], [0, "@1e400@"]],
    "dtype": ["float8", "int8", "os.system", None, 3, [], {}, "torch.float32"],
    "r": [0, -1, 1.5, True, "2", None, [], {}, 3, 2**31, 2**62, HUGE, "@1e400@", DIGITS, NESTED],
    "alpha": [0.0, -1.0, True, "2", [], {}, HUGE, "@1e400@", "@-1e400@", "@NaN@", DIGITS, NESTED],
    "rslora": [0, 1, None, "true", [], {}],
    "dropout": [-0.1, 1.0, True, None, "0", [], {}, HUGE, "@1e400@"],
}
VARIANT_NAMES = [
    *("os.system", "lora_lite.variants.lora", "../lora", "__class__", "LoRA", "", "lora\0", "\x1b[2J", "v" * 10**6),
    *(None, 3, ["lora"], {"lora": 1}, True, "\ud800"),
]
PATHS = [
    *(
        "../..",
        "__class__",
        "",
        ".",
        "..",
        "model",
        "model.layers",
        "/etc/passwd",
        "model..layers.0",
        "\x1b[2J",
        "\ud800",
    ),
    *("t" * 10**6, "model." * 10**5, "model.norm", "lm_head.weight", "model.layers.-1.self_attn.q_proj"),
]
SIZES = [
    *(
        [0, 0],
        [-64, 64],
        [2**62, 64],
        [HUGE, HUGE],
        ["64", "64"],
        "64",
        [64.0, 64.0],
        [True, 64],
        [64],
        [64, 64, 64],
        64,
    ),
    *(None, {}, [[64], [64]], "@[1e400, 64]@", f"@[64, 1{'0' * 4200}]@"),
]
PRINTS = [
    *(5, None, "float32", {}, [], [5], ["float99", 0.0], ["os", 0.0], ["_inductor", 0.0], ["load", 0.0], ["nn"]),
    *([["float32"], 0.0], ["float32", "0"], ["float32", 0], ["float32", True], ["float32", None], ["float32", [0.0]]),
]
QUANTIZED = {
    "method": "bitsandbytes-4bit",
    "quant_type": "nf4",
    "blocksize": 64,
    "double_quant": True,
    "compute_dtype": "bfloat16",
    "modules": [],
}
BASES: dict[str, list[Any]] = {
    "class": [None, 3, [], {}, "C" * 10**6, "\x1b[2J"],
    "name_or_path": [3, [], {}, True],
    "dtype": [None, 3, [], {}, "d" * 10**6, "ops", "_inductor"],
    "quantization": [
        "nf4",
        [],
        3,
        {},
        {"quant_type": "nf4"},
        *({**QUANTIZED, key: {}} for key in QUANTIZED),
        {**QUANTIZED, "compute_dtype": "ops"},
    ],
    "fingerprint": [None, [], 3, {}, {"proj": ["float32", 0.0]}],
}

METADATA: list[Case] = [
    *(
        (f"text-{name}", text_of_metadata(HEADERS[name].decode()), "error")
        for name in HEADERS
        if name not in ("not-utf-8", "utf-16", "nothing") and not name.startswith("metadata")
    ),
    ("text-gone", header(lambda held: held.update(__metadata__={"k" * 10**6: "x", "\x1b": "y"})), "error"),
    *((f"lacks-{key}", without(key), "error") for key in ("format", "variant", "config", "targets", "base")),
    *((f"format-{i}", in_meta("format", value=v), "error") for i, v in enumerate([3, "1", None, True, 1.0, [], HUGE])),
    ("library", meta(lambda held: held.update(format=3, library="9" * 10**6)), "error"),
    *((f"variant-{i}", in_meta("variant", value=value), "error") for i, value in enumerate(VARIANT_NAMES)),
    *((f"scale-{i}", in_meta("scale", value=v), "error") for i, v in enumerate(["1", None, True, [], HUGE, "@1e400@"])),
    *((f"config-{i}", in_meta("config", value=v), "error") for i, v in enumerate([None, 3, [], "r=2", {}, [["r", 2]]])),
    *((f"config-lacks-{field}", without("config", field), "error") for field in WRONG),
    ("config-extra", in_meta("config", "__class__", value="os.system"), "error"),
    ("config-extras", meta(lambda held: held["config"].update({f"x{i}": i for i in range(20_000)})), "error"),
    *(
        (f"config-{field}-{i}", in_meta("config", field, value=value), "error")
        for field, values in WRONG.items()
        for i, value in enumerate(values)
    ),
    *((f"targets-{i}", in_meta("targets", value=v), "error") for i, v in enumerate([None, 3, [], "x", {}, [["a", 1]]])),
    *((f"size-{i}", target(value), "error") for i, value in enumerate(SIZES)),
    *((f"path-{i}", moved_target(path), "error") for i, path in enumerate(PATHS)),
    *((f"base-{i}", in_meta("base", value=value), "error") for i, value in enumerate([None, 3, [], "x", {}])),
    *((f"base-lacks-{field}", without("base", field), "error") for field in BASES),
    *(
        (f"base-{field}-{i}", in_meta("base", field, value=value), "error")
        for field, values in BASES.items()
        for i, value in enumerate(values)
    ),
    *((f"print-{i}", fingerprint(value), "error") for i, value in enumerate(PRINTS)),
    ("print-gone", meta(lambda held: held["base"]["fingerprint"].popitem()), "error"),
    ("targets-30k", many_targets, "error"),
    # Regexes of a file are neither run nor compiled: its layers are named.
    ("regex-target", in_meta("config", "target_names", value=[CATASTROPHE]), "same"),
    ("regex-exclude", in_meta("config", "exclude_names", value=[CATASTROPHE, "("]), "same"),
    ("regex-compile", in_meta("config", "target_names", value=[SLOW_TO_COMPILE]), "same"),
    ("regex-many", in_meta("config", "target_names", value=["x"] * 100_000), "same"),
    # Kernels would be, when the adapter's strength changes: only such as end in no time.
    *(
        (f"kernel-{i}", abliteration(kernels=[[pattern, [1.0, 0.0, 1.0, 1.0]]]), "error")
        for i, pattern in enumerate(
            [CATASTROPHE, SLOW_TO_COMPILE, "(a|a)+", "a?" * 60, "(?i)x", "x" * 10**6, "(", 3, None]
        )
    ),
    ("kernels-many", abliteration(kernels=[[f"x{i}", [1.0, 0.0, 1.0, 1.0]] for i in range(50_000)]), "error"),
    ("name-of-base", in_meta("base", "name_or_path", value="/" * 10**6), "same"),
]


# ---- an index beside shards, and raw keys -------------------------------------------------------


def index(change: Callable[[dict], Any]) -> Damage:
    def damage(file: Path, rng: random.Random) -> None:
        at = file.with_name("model.safetensors.index.json")
        held = json.loads(at.read_text())
        change(held)
        at.write_bytes(dumped(held))

    return damage


def index_text(text: bytes) -> Damage:
    return lambda file, rng: file.with_name("model.safetensors.index.json").write_bytes(text)


def index_file(make: Callable[[Path], Any]) -> Damage:
    return lambda file, rng: replaced(make)(file.with_name("model.safetensors.index.json"), rng)


def shard(name: Any) -> Damage:
    """The first key is said to be in this file."""
    return index(lambda held: held["weight_map"].update({min(held["weight_map"]): name}))


def outside(file: Path, rng: random.Random) -> None:
    """Every shard's name leads to a valid file, one folder up."""
    other = file.parent.parent / f"{file.parent.name}-outside"
    other.mkdir()
    for each in sorted(file.parent.glob("*.safetensors")):
        each.rename(other / each.name)
    index(lambda held: held.update(weight_map={k: f"../{other.name}/{n}" for k, n in held["weight_map"].items()}))(
        file, rng
    )


def shard_is(make: Callable[[Path], Any]) -> Damage:
    return lambda file, rng: replaced(make)(file.with_name("model-2.safetensors"), rng)


SHARD_NAMES = [
    *("../a.safetensors", "/etc/passwd", "/etc/x.safetensors", "sub/a.safetensors", "..\\a.safetensors", "", ".", ".."),
    *("C:\\a.safetensors", "C:a.safetensors", "a\0.safetensors", "\x1b.safetensors", "\ud800.safetensors", "model.bin"),
    *("~/a.safetensors", "gone.safetensors", "n" * 250 + ".safetensors", "n" * 10**6 + ".safetensors"),
    *(None, 3, ["model-1.safetensors"], {}, True, "http://localhost/a.safetensors", ".safetensors"),
]
INDEXED: list[Case] = [
    *((f"shard-{i}", shard(name), "error") for i, name in enumerate(SHARD_NAMES)),
    ("shards-outside", outside, "error"),
    *((f"shard-is-{name}", shard_is(FILES[name]), "error") for name in FILES if name != "bin-beside"),
    *(
        (f"index-is-{name}", index_file(FILES[name]), "error")
        for name in FILES
        if name not in ("nothing", "bin-beside")
    ),
    *((f"index-text-{name}", index_text(text), "error") for name, text in HEADERS.items()),
    *(
        (f"weight-map-{i}", index(lambda held, v=value: held.update(weight_map=v)), "error")  # type: ignore[misc]
        for i, value in enumerate([None, 3, [], "x", {}, [["a", "b"]], NESTED, DIGITS])
    ),
    ("index-gone", index_file(FILES["nothing"]), "error"),
    ("index-huge", index_text(b" " * 17_000_000), "error"),
    ("index-two", lambda file, rng: file.with_name("b.safetensors.index.json").write_text("{}"), "error"),
    ("index-lacks", index(lambda held: held["weight_map"].popitem()), "error"),
    *(
        (f"index-key-{i}", index(lambda held, k=k: held["weight_map"].update({k: "model-1.safetensors"})), "error")  # type: ignore[misc]
        for i, k in enumerate(ODD_KEYS)
    ),
    (
        "index-swapped",
        index(lambda held: held.update(weight_map=dict.fromkeys(held["weight_map"], "model-1.safetensors"))),
        "error",
    ),
    (
        "index-100k",
        index(lambda held: held["weight_map"].update({f"k{i}": f"{i}.safetensors" for i in range(100_000)})),
        "error",
    ),
]
RAW_KEYS = [
    *("lora_", "lora_A", ".lora_A", "..lora_A", "__class__.lora_A", "model.lora_A", "lora_A__", "lora___x"),
    *("model.norm.lora_A", "x.lora_A.default.weight", "base_model.model.x.lora_A.weight", "lora_A.weight.lora_A"),
    *(
        ".base_layer.",
        "base_layer",
        "lora_magnitude_vector",
        "a.lora_embedding_A",
        "model.layers.0.mlp.up_proj.lora_A__x__y",
    ),
]
FOREIGN: list[Case] = [
    *((f"raw-key-{i}", renamed(key), "error") for i, key in enumerate(RAW_KEYS)),
    *(
        (f"raw-meta-{i}", header(lambda held, v=v: held.update(__metadata__={"lora_lite": v})), "error")  # type: ignore[misc]
        for i, v in enumerate(["", "{}", "null"])
    ),
]


def settings(name: str, edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """A JSON file beside the tensors, changed."""

    def damage(file: Path, rng: random.Random) -> None:
        path = file.with_name(name)
        held = json.loads(path.read_text())
        edit(held)
        path.write_text(json.dumps(held))

    return damage


def beside(name: str, text: bytes) -> Damage:
    return lambda file, rng: file.with_name(name).write_bytes(text)


WRONG: list[Any] = [None, -1, 0.5, "x", [], {}, True, 10**30, NESTED]
PEFT_SETTINGS: list[Case] = [
    *((f"peft-text-{name}", beside("adapter_config.json", text), "error") for name, text in HEADERS.items()),
    *(
        (f"peft-{field}-{i}", settings("adapter_config.json", lambda h, f=field, v=v: h.update({f: v})), right)  # type: ignore[misc]
        for field, right in (("peft_type", "error"), ("r", "error"), ("lora_alpha", "either"), ("bias", "either"))
        for i, v in enumerate(WRONG)
    ),
    *(
        (f"peft-pattern-{i}", settings("adapter_config.json", lambda h, k=k: h.update(alpha_pattern={k: 4})), "error")  # type: ignore[misc]
        for i, k in enumerate(["(a+)+$", "(" * 10_000, "[", ".*", "x" * 10**6])
    ),
    *(
        (f"peft-asks-{name}", settings("adapter_config.json", lambda h, n=name, v=value: h.update({n: v})), "error")  # type: ignore[misc]
        for name, value in {"modules_to_save": ["lm_head"], "use_dora": True}.items()
    ),
    ("peft-gone", lambda file, rng: file.with_name("adapter_config.json").unlink(), "error"),
    ("peft-pickle", lambda file, rng: file.rename(file.with_name("adapter_model.bin")), "error"),
]


def described(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change what diffusers' metadata says, as an object."""

    def edit(held: dict) -> None:
        value = json.loads(held["__metadata__"]["lora_adapter_metadata"])
        change(value)
        held["__metadata__"]["lora_adapter_metadata"] = dumped(value).decode()

    return header(edit)


DESCRIBED: list[Case] = [
    *(
        (
            f"diffusers-text-{name}",
            header(lambda h, t=text: h["__metadata__"].update(lora_adapter_metadata=t.decode())),  # type: ignore[misc]
            "error",
        )
        for name, text in HEADERS.items()
        if name not in ("not-utf-8", "utf-16", "nothing") and not name.startswith("metadata")
    ),
    *(
        (f"diffusers-{field}-{i}", described(lambda h, f=field, v=v: h.update({f"unet.{f}": v})), right)  # type: ignore[misc]
        for field, right in (("peft_type", "error"), ("r", "error"), ("lora_alpha", "either"), ("bias", "either"))
        for i, v in enumerate(WRONG)
    ),
    *(
        (f"diffusers-field-{i}", described(lambda h, k=k: h.update({k: 1})), "error")  # type: ignore[misc]
        for i, k in enumerate(["r", "", "unet.", "unet..r", "x" * 10**6])
    ),
    *(  # settings of another model, which has no tensors
        (f"diffusers-other-{i}", described(lambda h, k=k: h.update({k: 1})), "same")  # type: ignore[misc]
        for i, k in enumerate([".", ".r", "text_encoder.r", "\x1b.r", "\ud800.r"])
    ),
    ("diffusers-components", described(lambda h: h.update({f"c{i}.r": 1 for i in range(100_000)})), "error"),
    ("diffusers-nothing", described(lambda h: h.clear()), "error"),
]
BASE_CONFIG: list[Case] = [
    *((f"config-text-{name}", beside("config.json", text), "error") for name, text in HEADERS.items()),
    *(
        (f"config-{field}-{i}", settings("config.json", lambda h, f=field, v=v: h.update({f: v})), "error")  # type: ignore[misc]
        for field in ("architectures", "num_hidden_layers", "hidden_size", "intermediate_size")
        for i, v in enumerate([-1, "x", 10**9, 10**30, NESTED, ["os.system"], [{}], {"a": 1}])
    ),
    ("config-digits", settings("config.json", lambda h: h.update(num_hidden_layers=10**4000)), "error"),
]
FLOATS = [{"__float__": value} for value in ("Infinity", "-Infinity", "NaN", "x", 3, None, [], {}, "1" * 10**6)]
LABELS_CONFIG: list[Case] = [
    *(
        (f"labels-{i}", settings("config.json", lambda h, v=v: h.update(id2label=v)), "error")  # type: ignore[misc]
        for i, v in enumerate([{"x": "a"}, [], "x", 3, True, NESTED])
    ),
    ("labels-lists", settings("config.json", lambda h: h.update(id2label={"0": {}})), "either"),
    ("labels-digits", settings("config.json", lambda h: h.update(id2label={"9" * 4000: "a"})), "either"),
    ("labels-many", settings("config.json", lambda h: h.update(id2label=dict.fromkeys(range(10**5), "a"))), "either"),
    *(
        (
            f"number-of-labels-{i}",
            settings("config.json", lambda h, v=v: h.update(id2label=None, num_labels=v)),  # type: ignore[misc]
            "either",
        )
        for i, v in enumerate([*WRONG, 10**5, 10**6, 10**9, 10**12, 1e300])
    ),
    *(
        (f"{name}-{i}", settings("config.json", lambda h, n=name, v=v: h.update({n: v})), "either")  # type: ignore[misc]
        for name in ("backbone", "backbone_config", "architecture", "label2id", "num_experts", "depths")
        for i, v in enumerate([*WRONG, 10**9, ["x"], [10**9] * 3, {"model_type": "x"}, "hf-hub:evil/model", "a/b"])
    ),
    *(
        (f"float-{i}", settings("config.json", lambda h, v=v: h.update(rms_norm_eps=v)), "either")
        for i, v in enumerate(FLOATS)
    ),  # type: ignore[misc]
]

REPLACED: list[Case] = [
    *((f"file-{name}", replaced(make), "error") for name, make in FILES.items()),
    ("zeros", lambda file, rng: file.write_bytes(bytes(1000)), "error"),
    ("noise", lambda file, rng: file.write_bytes(b"GGUF" + rng.randbytes(5000)), "error"),
]
LAYER = "lora_te_model_layers_0_mlp_up_proj"
KOHYA_KEYS = [
    *(
        LAYER,
        f"{LAYER}.",
        f".{LAYER}.alpha",
        "lora_te_.alpha",
        "lora_te_",
        "lora_unet_.lora_up.weight",
        "lora_down.weight",
    ),
    *(f"{LAYER}{'_' * 380}.alpha", "lora_te_model.layers.0.mlp.up_proj.lora_down.weight", "lora_te9_x.lora_up.weight"),
    *(
        f"{LAYER}.{end}"
        for end in ("lora_up", "lora_mid.weight", "hada_w1_a", "lokr_w1", "dora_scale", "diff", "alpha.x")
    ),
    *(f"lora_te_model_layers_{i}_mlp_up_proj.lora_down.weight" for i in (-1, 2, "00", 10**99, "\u0660")),
    *("lora_te_lm_head.lora_down.weight", "lora_te_model_norm.lora_down.weight", "lora_te_model.lora_down.weight"),
]
KOHYA_SHAPES = [[128], [1, 128], [64, 2], [2, 64, 1, 1, 1, 1, 1], [2, 8, 8], [1, 2, 64], [2, 32, 2], [2, 64, 1, 1]]
KOHYAS: list[Case] = [
    *((f"kohya-key-{i}", renamed(key), "error") for i, key in enumerate(KOHYA_KEYS)),
    *((f"kohya-shape-{i}", entry(shape=value), "either") for i, value in enumerate(KOHYA_SHAPES)),
    (
        "kohya-many",
        header(lambda held: held.update({f"lora_te_{i}.alpha": held[first(held)] for i in range(9999)})),
        "error",
    ),
]

CASES: dict[str, list[Case]] = {
    "adapter": [*ANY, *METADATA],
    "raw": [*ANY, *FOREIGN],
    "shards": [*ANY[::6], *INDEXED],
    "peft": [*ANY[::6], *PEFT_SETTINGS],
    "diffusers": [*ANY[::6], *DESCRIBED],
    "kohya": [*(case for case in ANY if case[0] != "offsets-6"), *KOHYAS],  # which is its place, after an alpha
    "merge": [*ANY[::12], *METADATA[::6]],
    "base": [*ANY[::12], *INDEXED[::4], *BASE_CONFIG],
    "labels": LABELS_CONFIG,
    "gguf": [*hostile_gguf.cases((b"general.architecture", b"general.type", b"adapter.type"), "error"), *REPLACED],
    "vector": [*hostile_gguf.cases((b"general.architecture",), "same"), *REPLACED],
}


# ---- the law ------------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("without_type_checks")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def untouched(model: Any) -> dict[str, Any]:
    """The model before the first case: each leaves it so."""
    return snapshot(model)


def disk(folder: Path) -> dict[str, Any]:
    """Every file's content, every link's goal and all else's kind, by its place."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            held: Any = os.readlink(path)
        else:
            held = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else path.lstat().st_mode
        out[str(path)] = (path.lstat().st_mtime_ns, held)
    return out


def memory() -> dict[str, int]:
    """VmHWM, the peak, and VmRSS in bytes."""
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) << 10 for name, value in lines if name in ("VmHWM", "VmRSS")}


def problem_with(message: str) -> str | None:
    if not 20 < len(message) < MESSAGE:
        return f"{len(message)} characters"
    odd = sorted({c for c in message if not (c.isprintable() or c == "\n")})
    return f"unprintable {odd}" if odd else None


@pytest.mark.slow  # a thousand of them
@pytest.mark.parametrize(
    ("reader", "damage", "right"),
    [
        pytest.param(reader, damage, right, id=f"{reader}-{name}")
        for reader in READERS
        for name, damage, right in CASES[reader]
    ],
)
def test_a_hostile_file(
    reader: str, damage: Damage, right: str, model: Any, untouched: Any, tmp_path: Path, request: Any
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    file = copied(reader, folder)
    damage(file, random.Random(request.node.callspec.id))
    held = disk(tmp_path)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start, clock = memory()["VmRSS"], time.process_time()
    try:
        READERS[reader].call(model, file, out)
        caught = None
    except ll.LoraLiteError as error:
        caught = error
    assert time.process_time() - clock < SECONDS * (1 + size / (16 << 20))
    assert size > 1 << 20 or memory()["VmHWM"] - start < MEMORY
    if caught is not None:
        assert right != "same", caught
        assert problem_with(str(caught)) is None, str(caught)[:5000]
    else:
        assert right != "error"
        loaded = ll.adapters(model)["default"].state_dict()
        written = ll.adapters(READERS[reader].trained())["default"].state_dict()
        assert loaded.keys() == written.keys()
        assert all(torch.equal(loaded[key], value) for key, value in written.items())
    if ll.adapters(model):
        ll.detach(model)
    assert same_snapshot(untouched, snapshot(model))
    assert disk(tmp_path) == held
    assert not (folder / MARKER).exists()


def test_the_set_is_large_and_its_sources_are_valid(model: Any, tmp_path: Path) -> None:
    assert sum(len(cases) for cases in CASES.values()) >= 200
    for name, reader in READERS.items():
        (tmp_path / name).mkdir()
        reader.call(model, copied(name, tmp_path / name), tmp_path / "out")
        ll.detach(model)


P = "base_model.model.proj."
PLACES = {"base_model.frod_s_indices.proj": torch.tensor([[0, 1], [1, 0]])}
LIES: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "boft without R": ({"peft_type": "BOFT"}, {f"{P}boft_s": torch.ones(24, 1)}, "lacks a tensor"),
    "oft of a number": ({"peft_type": "OFT"}, {f"{P}oft_R.weight": torch.zeros(())}, "another shape"),
    "waveft of a number": (
        {"peft_type": "WAVEFT", "proportional_parameters": True},
        {f"{P}waveft_spectrum": torch.zeros(())},
        "another shape",
    ),
    "frod without an inverse": (
        {"peft_type": "FROD", "sparse_rate": 0.01},
        {f"{P}frod_lambda_l": torch.ones(16), f"{P}frod_lambda_s_values": torch.zeros(2)}
        | {"base_model.frod_V.proj": torch.zeros(16, 16), **PLACES},
        "frod_V.proj has no inverse",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_peft_folders_whose_tensors_dont_tell_a_config(name: str, tmp_path: Path) -> None:
    settings, tensors, message = LIES[name]
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": ["proj"], **settings}))
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load_peft(OneLinear(), tmp_path)


def test_a_rank_above_all_directions_takes_no_memory(tmp_path: Path) -> None:
    tensors = {f"{P}adamss_A.0": torch.zeros(1, 4), f"{P}adamss_B.0": torch.zeros(24, 1)}
    save_file(tensors | {f"{P}adamss_newB": torch.zeros(4, 17)}, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "ADAMSS", "r": 4, "num_subspaces": 1, "subspace_rank": 10**12, "target_modules": ["proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    adapter = ll.load_peft(OneLinear(), tmp_path)
    assert adapter.state_dict()["proj.lora_As"].shape == (1, 4, 4)
