"""benchmarks/gpu.py on the CPU, by the functions that measure a GPU: lines, floors, files, and too small a memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SIZES, quantized, tiny_llama
from test_capturable import recorded
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

import lora_lite as ll

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_contenders
from gpu import Bench, Cost, sections, write
from gpu_contenders import CONTENDERS, IN_A_GRAPH, Run, Training, check_follows, contender, row
from gpu_costs import Rates, Sizes, bytes_of
from gpu_decode import StaticDecoder
from gpu_table import cells

CPU = torch.device("cpu")
RATES = Rates(flops=3e14, bandwidth=2e12)

pytestmark = pytest.mark.slow  # its contenders train, and PEFT's import takes seconds


def capture(decoder: StaticDecoder) -> Callable[[], None]:
    return recorded(decoder)[0]


def lines(base: Any, **fields: Any) -> list[Cost]:
    bench = Bench(CPU, RATES, 3, capture, fields.pop("checkpointing", False))
    settings = {"bases": ["float32"], "tokens": [12], "batches": [1, 2], "ways": ["eager", "graph"]}
    return list(sections(bench, lambda name: base, **settings | {"only": ["training", "decoding"]} | fields))


@pytest.fixture
def base() -> Any:
    return tiny_llama(num_hidden_layers=1).requires_grad_(False)


# ---- lines and files --------------------------------------------------------------------------------


def test_lines_come_setting_by_setting_and_contender_by_contender(base: Any, tmp_path: Path, capsys: Any) -> None:
    costs = lines(base)
    wanted = [("training, float32, eager, 12 tokens", name) for name in CONTENDERS]
    wanted += [(f"decoding, float32, eager, {b} rows", name) for b in (1, 2) for name in CONTENDERS]
    wanted += [(f"decoding, float32, graph, {b} rows", name) for b in (1, 2) for name in IN_A_GRAPH]
    assert [(cost.setting, cost.contender) for cost in costs] == wanted
    for cost in costs:
        is_base = cost.contender == "frozen base"
        assert cost.tokens_per_second is not None
        assert cost.tokens_per_second > 0
        assert cost.ratio is not None
        assert (cost.ratio == 1) == is_base
        assert (cost.floor is None) == is_base
        assert (cost.traffic is not None) == (cost.work == "training" and not is_base)
        assert (cost.to_peft is not None) == (cost.way != "graph" and cost.contender in ("LoRA", "DoRA"))
        assert cost.peak_bytes is None  # of a GPU alone
    write(costs, Bench(CPU, RATES, 3), tmp_path, "tiny", 1.0)
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert [Cost(**line) for line in record["costs"]] == costs
    assert record["device"] == "cpu"
    assert record["rates"] == {"flops": 3e14, "bandwidth": 2e12}
    assert record["machine"]["torch"] == torch.__version__
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "cpu; 300.0 TFLOP/s, 2000 GB/s measured" in text
    assert text.index("training, float32") < text.index("PEFT DoRA") < text.index("decoding, float32, graph")


def test_checkpointed_steps_are_named_so(base: Any) -> None:
    costs = lines(base, only=["training"], checkpointing=True)
    assert {cost.setting for cost in costs} == {"training, float32, eager, checkpointed, 12 tokens"}
    assert not any(cost.is_out for cost in costs)
    floors = [cost.floor for cost in (costs[1], lines(base, only=["training"])[1])]
    assert None not in floors
    assert floors[0] < floors[1]  # type: ignore[operator]


COMPILED = """
import functools
import sys
sys.path[:0] = sys.argv[1:]
import torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # inductor's C++ takes four minutes
import gpu
from gpu import Bench, sections
from gpu_costs import Rates
from models import tiny_llama

gpu.CONTENDERS = "frozen base", "LoRA"  # each is compiled anew
base = tiny_llama(num_hidden_layers=1).requires_grad_(False)
bench = Bench(torch.device("cpu"), Rates(3e14, 2e12), 3)
for cost in sections(bench, lambda name: base, ["float32"], [12], [1], ["compiled"], ["training", "decoding"]):
    assert cost.tokens_per_second > 0
    print(cost.setting, cost.contender, sep=": ")
"""


def test_compiled_contenders_run(tmp_path: Path) -> None:
    """In a process of its own, where the library's annotations aren't checked: a check breaks a graph."""
    folders = [str(Path(__file__).parent), str(Path(gpu.__file__).parent)]
    done = subprocess.run([sys.executable, "-c", COMPILED, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = ["training, float32, compiled, 12 tokens", "decoding, float32, compiled, 1 rows"]
    assert done.stdout.splitlines()[-4:] == [f"{setting}: {name}" for setting in settings for name in CONTENDERS[:2]]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(gpu.app, [])
    assert result.exit_code == 1
    assert result.stderr == "benchmarks/gpu.py measures a CUDA device, and this PyTorch finds none\n"


# ---- out of memory ----------------------------------------------------------------------------------


class TooLarge(nn.Module):
    """In the place of a model whose forwards need more memory than there is, from some call on."""

    def __init__(self, model: Any, calls: int) -> None:
        super().__init__()
        self.model, self.calls = model, calls

    def forward(self, **options: Any) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB")
        return self.model(**options)


@pytest.mark.parametrize(("name", "calls"), [("DoRA", 0), ("PEFT LoRA", 3), ("frozen base", 0)])
def test_out_of_memory_is_a_line(base: Any, monkeypatch: pytest.MonkeyPatch, name: str, calls: int) -> None:
    """Of the contender alone, in warming up or in a later round; the others go on."""

    def make(base: Any, n: str) -> Any:
        return TooLarge(contender(base, n), calls) if n == name else contender(base, n)

    monkeypatch.setattr(gpu_contenders, "contender", make)
    costs = {cost.contender: cost for cost in lines(base, ways=["eager"], only=["training"])}
    assert list(costs) == list(CONTENDERS)
    assert {n for n, cost in costs.items() if cost.is_out} == {name}
    assert cells(costs[name]) == ["out of memory"]
    others = [cost for n, cost in costs.items() if n != name]
    assert all(cost.tokens_per_second for cost in others)
    assert all((cost.ratio is None) == (name == "frozen base") for cost in others)
    assert (costs["LoRA"].to_peft is None) == (name == "PEFT LoRA")


def test_a_base_that_is_too_large_is_a_line_and_any_other_error_is_raised(base: Any, tmp_path: Path) -> None:
    def load(name: str) -> Any:
        if name == "bf16":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return base

    bench = Bench(CPU, RATES, 3)
    costs = list(sections(bench, load, ["bf16", "nf4"], [12], [], ["eager"], ["training"]))
    assert [cost.is_out for cost in costs] == [True] + [False] * len(CONTENDERS)
    write(costs[:1], bench, tmp_path, "tiny", 1.0)  # a table and a picture without a ratio

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Run(lambda: fail, CPU)()


# ---- contenders -------------------------------------------------------------------------------------


def test_contenders_share_the_weights_and_nothing_else(base: Any) -> None:
    weights = {p.data_ptr() for p in base.parameters()}
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    steps = {name: Training(base, name, row(base, 1, 12, CPU), False, False) for name in CONTENDERS}
    for name, step in steps.items():
        step.make()()
        trained = {n for n, p in step.model.named_parameters() if p.requires_grad}
        assert {p.data_ptr() for n, p in step.model.named_parameters() if n not in trained} == weights
        assert bool(trained) == (name != "frozen base")
    assert not ll.adapters(base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_contenders_of_a_4_bit_base_share_it_too(tiny: str) -> None:
    base = quantized(tiny, "nf4").requires_grad_(False)
    weights = bytes_of(base.parameters())
    for name in CONTENDERS:
        model = contender(base, name)
        shared = {p.data_ptr() for p in base.parameters()} & {p.data_ptr() for p in model.parameters()}
        assert len(shared) == len(list(base.parameters()))
        assert bytes_of(p for p in model.parameters() if p.data_ptr() in shared) == weights
    costs = lines(base, ways=["eager"], batches=[1])
    assert not any(cost.is_out for cost in costs)


def test_a_graph_that_keeps_its_first_scale_or_values_is_found_out(base: Any) -> None:
    model = contender(base, "LoRA").eval()
    decoder = StaticDecoder(model, row(base, 1, 4, CPU), 8)
    stale = capture(decoder)  # out of the block: the scale is a number in it
    with ll.capturable(model):
        check_follows(model, decoder, capture(decoder))
        assert ll.adapters(model)["default"].scale == 1.0
        with pytest.raises(RuntimeError, match="a captured step doesn't follow a change of its scale"):
            check_follows(model, decoder, stale)


def test_a_static_decoder_makes_what_generate_makes(base: Any) -> None:
    ids = row(base, 2, 5, CPU)
    wanted = base.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[:, 5:]
    decoder = StaticDecoder(base, ids, 9)
    for _ in range(2):
        tokens = [decoder.first]
        for _ in range(3):
            decoder.step()
            tokens.append(decoder.token.clone())
        assert torch.equal(torch.cat(tokens, 1), wanted)
        decoder.rewind()


def test_a_sliding_window_is_refused(base: Any) -> None:
    config = MistralConfig(**SIZES, intermediate_size=64, sliding_window=4)
    with pytest.raises(ValueError, match=r"such as a sliding window\n  measure it with --only training"):
        StaticDecoder(MistralForCausalLM(config), row(base, 1, 4, CPU), 8)


# ---- floors -----------------------------------------------------------------------------------------


def test_the_floors_of_one_layer_are_those_of_the_formula() -> None:
    r, i, o = 16, 4096, 4096
    sizes = Sizes([(i, o)], [(i, o)], 2 * i * o, r)
    assert sizes.flop_floor() == pytest.approx(1 + 1.5 * r * (i + o) / (i * o))
    assert sizes.flop_floor() == pytest.approx(1.012, abs=5e-4)
    assert sizes.flop_floor(checkpointing=True) == pytest.approx(1 + 8 / 6 * r * (i + o) / (i * o))
    h100 = Rates(flops=989e12, bandwidth=3.35e12)
    assert sizes.traffic(h100) == pytest.approx(1.29, abs=0.01)
    assert sizes.decode_floor() == pytest.approx(1 + 4 * r * (i + o) / (2 * i * o))
    assert sizes.decode_floor(reads_weights_again=True) == pytest.approx(sizes.decode_floor() + 1)


def test_the_flop_floor_is_what_a_step_counts() -> None:
    """By PyTorch's own count of a linear stack's products, where there is nothing beside them."""

    def count(model: Any, checkpointing: bool) -> int:
        x = torch.randn(32, 64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            y = checkpoint(model, x, use_reentrant=False, early_stop=False) if checkpointing else model(x)
            y.sum().backward()
        return int(counter.get_total_flops())

    base = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).requires_grad_(False)
    sizes = Sizes.of(base, 16)
    assert sizes.every == sizes.adapted == [(64, 96), (96, 64)]
    assert sizes.weight_bytes == 4 * 2 * 64 * 96
    for checkpointing in (False, True):
        frozen = count(base, checkpointing)
        ll.attach(base, ll.LoRAConfig(r=16))
        assert count(base, checkpointing) / frozen == pytest.approx(sizes.flop_floor(checkpointing))
        ll.detach(base)


def test_the_head_is_a_layer_without_an_adapter(base: Any) -> None:
    sizes = Sizes.of(base, 16)
    assert len(sizes.every) == len(sizes.adapted) + 1
    assert sizes.flop_floor() < Sizes(sizes.adapted, sizes.adapted, sizes.weight_bytes, 16).flop_floor()


def test_rates_are_measured() -> None:
    rates = Rates.measured(CPU, torch.float32, n=64, megabytes=1, rounds=3)
    assert rates.flops > 1e6
    assert rates.bandwidth > 1e6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the memory of a CUDA device")
def test_the_peak_of_a_step_is_that_of_a_process_without_others() -> None:
    base, peaks = tiny_llama().cuda().requires_grad_(False), []
    for others in (0, 1):
        steps = [
            Training(base, "LoRA", row(base, 1, 32, torch.device("cuda")), False, False) for _ in range(others + 1)
        ]
        runs = [Run(step.make, torch.device("cuda")) for step in steps]
        for run in runs:
            run()
        peaks.append(steps[0].peak(runs[0]))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.05)
