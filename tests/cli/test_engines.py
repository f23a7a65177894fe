"""What servers refuse of an adapter: a case for each rule, and the command that is named, run."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import attach, config, moe, perturb, tiny_llama
from safetensors.torch import load_file
from test_cli import run
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import lora_lite as ll
from lora_lite.cli.engines import ENGINES, RULES, SGLANG_NAMES, Cure, verdict
from lora_lite.cli.served import read_served

SERVERS, FOLDER_READERS = ("vllm", "sglang", "llama.cpp"), ("vllm", "sglang", "peft")
READERS = (*SERVERS, "mlx")
EXPERTS = {"target_names": "experts", "kinds": "experts"}
Q_AND_V = {"target_names": ["q_proj", "v_proj"]}


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=64, n_positions=32)).eval()


def lora(**fields: Any) -> Any:
    return ll.LoRAConfig(**({"r": 4, "alpha": 8.0} | fields))


def mixed(**fields: Any) -> list[Any]:
    return [lora(**Q_AND_V), ll.FullConfig(target_names="lm_head")]


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "biased": lambda: tiny_llama(bias=True),
    "qwen3": lambda: moe("qwen3"),
    "mixtral": lambda: moe("mixtral"),
    "gpt2": gpt2,
}
# refused: model, config, settings that differ in a PEFT folder (None: a file of ours), engines, words
CASES: list[tuple[str, Any, dict[str, Any] | None, tuple[str, ...], str]] = [
    ("llama", lora(), None, FOLDER_READERS, r"it reads PEFT folders"),
    ("llama", lora(), {}, ("llama.cpp", "mlx"), r"it reads a format of its own"),
    ("llama", "scaled", None, ("llama.cpp", "mlx"), r"it reads a format of its own"),
    ("llama", lora(rslora=True, per_layer={"v_proj": {"r": 2}}), {}, ("llama.cpp", "mlx"), r"it reads a format of its"),
    ("llama", config("dora", **Q_AND_V), {}, ("mlx",), r"it reads a format of its own"),
    ("qwen3", lora(**EXPERTS), {}, ("mlx",), r"its experts aren't written here: model"),
    ("llama", config("dora", **Q_AND_V), {}, SERVERS, r"it has no DoRA: model.* and 3 more"),
    ("llama", config("dora", **Q_AND_V), None, SERVERS, r"it has no DoRA"),
    ("llama", config("pissa", r=4, **Q_AND_V), None, READERS, r"its start is no part of the base: model"),
    ("llama", config("pissa", r=4, **Q_AND_V), None, ("peft",), r"it has such a start by writing the base: model"),
    ("llama", lora(**Q_AND_V), {"init_lora_weights": "pissa"}, SERVERS, r"its start is no part of the base"),
    ("llama", config("ia3", target_names="k_proj"), {}, READERS, r"it has no such method: model.*k_proj"),
    ("llama", config("ssteer"), None, ("peft",), r"it has no such method: model"),
    ("llama", mixed(), {}, READERS, r"it takes no whole tensors: lm_head"),
    ("llama", mixed(), None, SERVERS, r"it takes no whole tensors: lm_head"),
    ("biased", lora(bias=True, **Q_AND_V), {}, READERS, r"it has no bias of a LoRA: model"),
    ("biased", lora(bias=True, **Q_AND_V), None, SERVERS, r"it has no bias of a LoRA: model"),
    ("llama", lora(rslora=True), {}, ("sglang",), r"it scales by alpha / r, not rsLoRA: model"),
    ("qwen3", lora(rslora=True, **EXPERTS), None, ("vllm",), r"it scaled experts by alpha / r, not rsLoRA: model"),
    ("llama", "scaled", None, FOLDER_READERS, r"it has no scale of ours"),
    (
        "llama",
        lora(per_layer={"v_proj": {"alpha": 4.0}}),
        {},
        ("vllm",),
        r"it has one alpha / r for all layers: model.*v_proj",
    ),
    (
        "llama",
        lora(per_layer={"v_proj": {"r": 2, "alpha": 4.0}}),
        {},
        ("sglang",),
        r"it has one r for all layers: model.*v_proj",
    ),
    (
        "llama",
        lora(per_layer={"v_proj": {"alpha": 4.0}}),
        {},
        ("sglang",),
        r"it has one alpha for all layers: model.*v_proj",
    ),
    ("llama", config("ia3", kinds=("norm",), target_names=()), None, READERS, r"it has no norms: model"),
    ("llama", lora(r=513, **Q_AND_V), {}, ("vllm",), r"its ranks end at 512: model"),
    ("qwen3", lora(**EXPERTS), {}, SERVERS, r"it reads experts one by one: model.layers.0.mlp.experts and 3 more"),
    ("mixtral", lora(**EXPERTS), None, SERVERS, r"it reads experts one by one: model"),
    ("llama", lora(), {"target_modules": r".*\.(q|k|v|o)_proj"}, ("sglang",), r"it takes no regex as target_modules"),
    (
        "llama",
        lora(),
        {"target_modules": ["q_proj"]},
        ("sglang",),
        r"target_modules must name them: model.* and 11 more",
    ),
    ("gpt2", lora(target_names="c_attn"), {}, ("sglang",), r"it doesn't know layers of that name: transformer.*c_attn"),
    (
        "llama",
        lora(target_names="q_proj"),
        {},
        ("sglang",),
        r"it wants q_proj and v_proj together: model.layers.0.self_attn and 1 more",
    ),
]
# the same of what no command helps
HOPELESS: list[tuple[Any, dict[str, Any] | None, tuple[str, ...], str]] = [
    (lora(invocation_tokens=[3, 4]), {}, ("vllm", "sglang", "mlx"), r"it acts on all tokens: model"),
    (lora(invocation_tokens=[3, 4]), None, ("vllm", "sglang", "mlx"), r"it acts on all tokens: model"),
    (config("reft"), None, (*SERVERS, "mlx", "peft"), r"it acts on all tokens: model"),
    (ll.SteerConfig(kinds="block"), None, (*SERVERS, "mlx", "peft"), r"no weight holds it: model"),
    (lora(), {"init_lora_weights": "corda"}, (*SERVERS, "mlx"), r"what its start took out of the base is in no file"),
]


def written(model: Any, cfg: Any, settings: dict[str, Any] | None, folder: Path) -> Path:
    """The adapter as a file of ours, or as a PEFT folder with these settings changed."""
    adapter = ll.attach(model, cfg) if isinstance(cfg, list) else attach(model, lora() if cfg == "scaled" else cfg)
    perturb(adapter, 0.1)
    adapter.scale = 0.5 if cfg == "scaled" else 1.0
    path = folder / ("a.safetensors" if settings is None else "peft")
    if settings is None:
        ll.save(model, path)
        return path
    ll.save_peft(model, path)
    old = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(old | settings))
    return path


def words(path: Path, engine: str) -> tuple[str, int]:
    """What is printed at 80 columns, as one line, and the exit code."""
    result = run("inspect", path, "--for", engine)
    assert all(len(line) <= 80 for line in result.stdout.splitlines()), result.stdout
    return re.sub(r"\s+", " ", result.stdout), result.exit_code


@pytest.mark.parametrize(("kind", "cfg", "settings", "engines", "match"), CASES, ids=lambda value: str(value)[:24])
def test_what_a_rule_refuses_and_the_command_that_helps(
    kind: str, cfg: Any, settings: dict[str, Any] | None, engines: tuple[str, ...], match: str, tmp_path: Path
) -> None:
    model, base = MODELS[kind](), tmp_path / "base"
    model.save_pretrained(base)
    path = written(model, cfg, settings, tmp_path)
    for engine in engines:
        text, code = words(path, engine)
        assert code == 1
        assert re.search(match, text.replace(str(tmp_path), "")), text
        answer = verdict(path, engine)  # type: ignore[arg-type]
        assert answer.commands
        for i, command in enumerate(answer.commands):
            if command.startswith("python"):  # llama.cpp's own script
                continue
            goal = tmp_path / f"{engine}{i}"
            places = {"BASE": str(base), **dict.fromkeys(("FOLDER", "MERGED", "adapter.gguf"), str(goal))}
            done = run(*(places.get(word, word) for word in shlex.split(command)[1:]))
            assert done.exit_code == 0, done.stderr
            if "convert" in command:
                assert words(goal, engine)[1] == 0 or "python" in answer.commands[-1]
                error = re.search(r"(?:error at most|adapter's by) (\S+) (?:at most )?in a layer", done.stdout)
                is_near = any(reason.cure is Cure.SOME_RANK for reason in answer.reasons)
                assert error is None or is_near or float(error[1]) < 1e-5, command
            else:
                assert (goal / "model.safetensors").is_file()


@pytest.mark.parametrize(("cfg", "settings", "engines", "match"), HOPELESS, ids=lambda value: str(value)[:24])
def test_what_no_command_helps(
    cfg: Any, settings: dict[str, Any] | None, engines: tuple[str, ...], match: str, tmp_path: Path
) -> None:
    path = written(tiny_llama(), cfg, settings, tmp_path)
    for engine in engines:
        text, code = words(path, engine)
        assert (code, verdict(path, engine).commands) == (1, [])  # type: ignore[arg-type]
        assert re.search(match, text)
        assert "nothing here helps" in text


def test_convolutions_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    ll.attach(model, lora(r=2, kinds="conv", target_names="0"))
    ll.save(model, tmp_path / "a.safetensors")
    ll.save_peft(model, tmp_path / "peft")
    for path in (tmp_path / "a.safetensors", tmp_path / "peft"):
        for engine in SERVERS:
            assert re.search(r"it has no convolutions: 0", words(path, engine)[0])


def test_every_rule_has_a_case() -> None:
    matches = [case[-1] for case in (*CASES, *HOPELESS)] + ["it has no convolutions"]
    assert all(any(re.match(match.split(":")[0], rule.says) for match in matches) for rule in RULES)


def test_a_folder_of_a_lora_as_of_smollm2_is_taken_or_converted(tmp_path: Path) -> None:
    """Its layers have SmolLM2's names; the head is tied, and has no adapter."""
    model = tiny_llama(tie_word_embeddings=True)
    path = written(model, lora(r=16), {}, tmp_path)
    lines = {engine: run("inspect", path, "--for", engine).stdout.splitlines() for engine in ENGINES}
    assert {engine: text[0].rpartition(": ")[2] for engine, text in lines.items()} == {
        "vllm": "vllm takes it",
        "sglang": "sglang takes it",
        "llama.cpp": "llama.cpp refuses it",
        "mlx": "mlx refuses it",
        "peft": "peft takes it",
    }
    assert lines["vllm"][1:] == ["  -  start it with --enable-lora --max-lora-rank 16"]
    for engine, command in (("llama.cpp", "adapter.gguf --to gguf"), ("mlx", "FOLDER --to mlx")):
        assert lines[engine][1] == "  -  it reads a format of its own"
        cure = "".join("".join(lines[engine][2:]).split())  # a long path is broken
        assert cure == f"thishelps:lora-lite convert {path} {command} --base BASE".replace(" ", "")


def test_a_server_reads_r_and_lora_alpha_alone(tmp_path: Path) -> None:
    """Where no layer has what the settings say, patterns that agree with each other are no help."""
    path = written(tiny_llama(), lora(r=8, alpha=16.0, **Q_AND_V), {}, tmp_path)
    settings = json.loads((path / "adapter_config.json").read_text())
    for field, value, pattern in (("lora_alpha", 8, "alpha_pattern"), ("r", 16, "rank_pattern")):
        changed = settings | {field: value, pattern: {"q_proj": settings[field], "v_proj": settings[field]}}
        (path / "adapter_config.json").write_text(json.dumps(changed))
        for engine in ("vllm", "sglang"):
            text, code = words(path, engine)
            assert code == 1, text
            assert "for all layers: model" in text
    (path / "adapter_config.json").write_text(json.dumps(settings))
    assert words(path, "vllm")[1] == 0


@pytest.mark.parametrize(
    ("kind", "cfg", "commands"),
    [
        ("llama", lora(r=40, per_layer={"v_proj": {"r": 4}}, **Q_AND_V), ["--rank 40"]),  # more than a side of v_proj
        ("llama", config("pissa", r=24, **Q_AND_V), ["--rank 48"]),
        ("qwen3", config("orthogonal", r=4, **EXPERTS), ["--rank 4 --per-expert"]),
    ],
    ids=lambda value: str(value)[:24],
)
def test_the_command_is_exact_where_a_rank_is(kind: str, cfg: Any, commands: list[str], tmp_path: Path) -> None:
    model, base = MODELS[kind](), tmp_path / "base"
    model.save_pretrained(base)
    path = written(model, cfg, None, tmp_path)
    ll.adapters(model)["default"].scale = 0.5  # a scale of ours, so that a rank is asked for
    ll.save(model, path)
    for engine in ("vllm", "sglang"):
        answer = verdict(path, engine)  # type: ignore[arg-type]
        assert [c.partition("BASE ")[2] or c.partition("BASE")[2] for c in answer.commands] == commands
        goal = tmp_path / engine
        places = {"BASE": str(base), "FOLDER": str(goal)}
        done = run(*(places.get(word, word) for word in shlex.split(answer.commands[0])[1:]))
        assert float(re.search(r"at most (\S+) in a layer", done.stdout)[1]) < 1e-5  # type: ignore[index]
        assert words(goal, engine)[1] == 0


def test_a_rank_that_a_server_has_not_and_norms_are_merged(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=512, num_attention_heads=8)
    path = written(model, config("pissa", r=300, target_names="q_proj"), None, tmp_path)
    assert [c.split()[1] for c in verdict(path, "vllm").commands] == ["merge"]
    (tmp_path / "norms").mkdir()
    path = written(tiny_llama(), config("ia3", kinds=("norm",), target_names=()), None, tmp_path / "norms")
    assert [c.split()[1] for c in verdict(path, "vllm").commands] == ["merge"]


def test_what_is_not_refused(tmp_path: Path) -> None:
    for number, (cfg, engine) in enumerate(
        [
            (lora(rslora=True), "vllm"),
            (lora(per_layer={"v_proj": {"r": 2, "alpha": 4.0}}), "vllm"),  # the same alpha / r
            (config("dora", **Q_AND_V), "peft"),
            (mixed(), "peft"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        path = written(tiny_llama(), cfg, {}, tmp_path / str(number))
        assert words(path, engine)[1] == 0


@pytest.mark.parametrize("settings", [None, {}])
def test_llama_cpps_own_script_has_alora(settings: dict[str, Any] | None, tmp_path: Path) -> None:
    path = written(tiny_llama(), lora(invocation_tokens=[3, 4]), settings, tmp_path)
    *first, last = verdict(path, "llama.cpp").commands
    folder = path if settings is not None else "FOLDER"
    assert last == f"python convert_lora_to_gguf.py {folder} --base BASE"
    assert [command.split()[1] for command in first] == ([] if settings is not None else ["convert"])


def test_heads_and_embeddings_are_noted(tmp_path: Path) -> None:
    path = written(tiny_llama(), lora(target_names="lm_head"), {}, tmp_path)
    assert "models with embedding_modules alone" in words(path, "vllm")[0]


def test_json_has_every_layer(tmp_path: Path) -> None:
    path = written(tiny_llama(), config("dora", **Q_AND_V), {}, tmp_path)
    result = run("inspect", path, "--for", "vllm", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["taken"], report["engine"]) == (1, False, "vllm")
    assert len(report["reasons"][0]["layers"]) == 4
    assert [command.split()[1] for command in report["commands"]] == ["merge", "convert"]


def test_it_asks_the_adapter_alone(tmp_path: Path) -> None:
    path = written(tiny_llama(), lora(), None, tmp_path)
    result = run("inspect", path, "--for", "vllm", "--base", tmp_path)
    assert result.exit_code == 2
    assert "--for looks at the adapter alone" in result.stderr
    assert run("inspect", path, "--for", "ollama").exit_code == 2


def test_a_file_and_its_folder_are_seen_alike(tmp_path: Path) -> None:
    cfg = lora(rslora=True, per_layer={"v_proj": {"r": 2, "alpha": 3.0}})
    model = tiny_llama()
    ours = read_served(written(model, cfg, None, tmp_path))
    ll.save_peft(model, tmp_path / "peft")
    theirs = read_served(tmp_path / "peft")
    a, b = ({layer.path: layer for layer in adapter.layers} for adapter in (ours, theirs))
    assert a.keys() == b.keys()
    for path, layer in a.items():
        assert (layer.rank, layer.rslora, layer.method) == (b[path].rank, b[path].rslora, b[path].method)
        assert (layer.alpha, layer.scaling) == pytest.approx((b[path].alpha, b[path].scaling))


def test_a_converted_expert_has_names_that_sglang_knows(tmp_path: Path) -> None:
    model = moe("mixtral")
    perturb(ll.attach(model, lora(**EXPERTS)))
    ll.save_peft(model, tmp_path / "a", per_expert=True)
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in keys} == {"w1", "w2", "w3"} <= SGLANG_NAMES
