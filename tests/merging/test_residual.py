"""Residual quantisation: Q + s B A from the files is the papers' alternation, nearer to W than the quantiser alone; the
folder opens everywhere, and there is a whole one or none."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from models import IDS, SIZES, moe, quantized, tiny_folder, tiny_llama
from safetensors.torch import load_file, save_file
from test_fused_keys import nomic_bert
from test_on_disk import edited, folder_of, opened
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

import lora_lite as ll
from lora_lite.base.layer import layer_of, quantization_of
from lora_lite.merging.base_folder import BaseFolder
from lora_lite.merging.residual_plan import check_location

CONFIGS: dict[str, Any] = {"pissa": ll.PiSSAConfig, "loftq": ll.LoftQConfig}
both = pytest.mark.parametrize("variant", CONFIGS)
in_each_way = pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])


def written(base: str | Path, out: Path, variant: str, how: str = "nf4", **options: Any) -> ll.Quantized:
    fields = {name: options.pop(name) for name in ("iterations", "skip_modules", "double_quant") if name in options}
    return ll.quantize_residual(base, CONFIGS[variant](**{"r": 8, **options}), out, how, **fields)


def weights(folder: Path | str) -> dict[str, Tensor]:
    return {key: tensor for file in Path(folder).glob("model*.safetensors") for key, tensor in load_file(file).items()}


def decoded(residual: Tensor, how: str) -> Tensor:
    """The numbers in float64 of a residual that is loaded in bfloat16 and quantised by bitsandbytes itself."""
    if how == "int8":
        codes, scales, _ = int8_vectorwise_quant(residual.bfloat16().half())
        return codes.double() * scales.double()[:, None] / 127
    codes, state = quantize_4bit(residual.bfloat16(), compress_statistics=True, quant_type=how)
    return dequantize_4bit(codes, state).double()


def top(matrix: Tensor, r: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :r] * s[:r] @ vt[:r]


def oracle(w: Tensor, r: int, variant: str, iterations: int, how: str) -> Tensor:
    """The papers' algorithms on explicit float64 matrices: W' = Q + A B."""
    if variant == "loftq":  # algorithm 1 of arXiv:2310.08659
        product = torch.zeros_like(w)
        for _ in range(iterations):
            q = decoded(w - product, how)
            product = top(w - q, r)
        return q + product
    product = top(w, r)  # QPiSSA with T iterations of arXiv:2404.02948
    q = decoded(w - product, how)
    for _ in range(1, iterations):
        q = decoded(w - product, how)
        product = top(w - q, r)
    return q + product


@both
@in_each_way
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_files_hold_the_papers_rounds(
    variant: str, quantization: str, iterations: int, tiny: str, tmp_path: Path
) -> None:
    """Codes at a tie of two roundings may differ, so W' is compared by what it lacks."""
    fields = {"target_names": "q_proj|down_proj", "alpha": 20.0}
    result = written(tiny, tmp_path / "out", variant, quantization, iterations=iterations, **fields)
    model = opened(tmp_path / "out")
    adapter = ll.load(model, result.adapter)
    stored, dense = adapter.state_dict(), weights(tiny)
    assert len(adapter.targets) == 4
    for path in adapter.targets:
        w = dense[f"{path}.weight"].double()
        a, b = (stored[f"{path}.lora_{name}"].double() for name in "AB")
        ours = layer_of(model.get_submodule(path), path).dense_weight().double() + 20 / 8 * b @ a
        wanted = oracle(w, 8, variant, iterations, quantization)
        assert (ours - wanted).norm() < 0.2 * (w - wanted).norm()  # a round more or less is above 0.35
        lacking, plain = float((w - ours).norm() / w.norm()), float((w - decoded(w, quantization)).norm() / w.norm())
        assert lacking == pytest.approx(float((w - wanted).norm() / w.norm()), rel=2e-3)
        assert result.errors[path].residual == pytest.approx(lacking, rel=1e-4)
        assert result.errors[path].plain == pytest.approx(plain, rel=1e-4)
        assert lacking < plain


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_the_order_of_the_papers(norm: str, tiny: str) -> None:
    errors = {
        (variant, t): ll.residual_errors(tiny, CONFIGS[variant](r=16), iterations=t, norm=norm)
        for variant in CONFIGS
        for t in (1, 5)
    }
    for path in errors["pissa", 5]:
        qpissa, loftq, once = (errors[way][path] for way in (("pissa", 5), ("loftq", 5), ("loftq", 1)))
        assert qpissa.residual < loftq.residual < once.residual < once.plain
        assert qpissa.plain == once.plain


@in_each_way
@both
def test_it_opens_and_its_outputs_are_nearer(variant: str, quantization: str, tmp_path: Path, log: list[str]) -> None:
    base = tiny_folder(tmp_path / "base", bias=True)
    result = written(base, tmp_path / "out", variant, quantization, r=16)
    dense = opened(Path(base))
    assert not any(part.name.startswith(".") for part in tmp_path.iterdir())
    with torch.no_grad():
        wanted = dense(IDS).logits.float()
        plain = (quantized(base, quantization)(IDS).logits.float() - wanted).norm()
        for model in (opened(result.folder), ll.load_base(str(result.folder), torch.bfloat16)):
            adapter = ll.load(model, result.adapter)
            error = (model(IDS).logits.float() - wanted).norm()
            assert error < (1.05 if quantization == "int8" else 0.8) * plain  # int8's forward rounds x, too
            record = quantization_of(model)
            assert record is not None
            assert record.quant_type == quantization
            assert record.modules == sorted(adapter.targets)
            assert adapter.base["quantization"]["modules"] == record.modules
    assert not [line for line in log if line.startswith("WARNING")]
    for key, tensor in weights(base).items():
        if not key.endswith("_proj.weight"):
            assert torch.equal(weights(result.folder)[key], tensor)


def test_a_saved_adapter_is_that_of_the_folder(tiny: str, tmp_path: Path) -> None:
    result = written(
        tiny, tmp_path / "out", "pissa", per_layer={"q_proj": {"r": 4, "svd": "fast"}, "up_": {"niter": None}}
    )
    model = opened(result.folder)
    adapter = ll.load(model, result.adapter)
    assert adapter.config.variant == "loftq"
    assert adapter.state_dict()["model.layers.0.self_attn.q_proj.lora_A"].shape == (4, 128)
    ll.save(model, tmp_path / "again.safetensors")
    first, second = load_file(result.adapter), load_file(tmp_path / "again.safetensors")
    assert [*first] == [*second]
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_loftq_of_one_round_is_the_live_model_and_its_start(tiny: str, tmp_path: Path) -> None:
    """`quantize_residual` of one round, and `attach` on a model that was quantised as it was loaded, are one method."""
    result = written(tiny, tmp_path / "out", "loftq", iterations=1)
    ours, live = opened(result.folder), quantized(tiny, "nf4")
    adapter = ll.load(ours, result.adapter)
    dense = {f"{path}": weights(tiny)[f"{path}.weight"] for path in adapter.targets}
    attached = ll.attach(live, ll.LoftQConfig(r=8), calibration_data=dense)
    assert adapter.targets == attached.targets
    for path in adapter.targets:
        pair = [layer_of(model.get_submodule(path), path).dense_weight() for model in (ours, live)]
        assert torch.equal(*pair)
    for key, tensor in attached.state_dict().items():
        torch.testing.assert_close(adapter.state_dict()[key], tensor)


def test_it_merges_back(tiny: str, tmp_path: Path) -> None:
    result = written(tiny, tmp_path / "out", "pissa")
    ll.merge_checkpoint(result.folder, result.adapter, tmp_path / "merged")
    dense, merged = weights(tiny), weights(tmp_path / "merged")
    for path, errors in result.errors.items():
        w = dense[f"{path}.weight"].float()
        assert float((merged[f"{path}.weight"].float() - w).norm() / w.norm()) == pytest.approx(
            errors.residual, rel=2e-3
        )


def test_on_the_original_weights_it_is_refused(tiny: str, tmp_path: Path) -> None:
    result = written(tiny, tmp_path / "out", "pissa")
    for model in (opened(Path(tiny)), quantized(tiny, "nf4")):  # another base, and the same one quantised plainly
        with pytest.raises(ll.CheckpointError, match=r"trained on another base(.|\n)*depends on the values"):
            ll.load(model, result.adapter)
    with pytest.raises(ll.CheckpointError, match="was trained on another weight than that in"):
        ll.merge_checkpoint(tiny, result.adapter, tmp_path / "merged")


def test_shards_stay_and_the_index_has_every_part(tmp_path: Path) -> None:
    tiny_llama(torch.bfloat16, tie_word_embeddings=True).save_pretrained(tmp_path / "base", max_shard_size="30KB")
    result = written(tmp_path / "base", tmp_path / "out", "loftq", double_quant=False)
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in result.folder.iterdir()} == names | {"adapter.safetensors"}
    index = json.loads((result.folder / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in result.folder.glob("model-*.safetensors")}
    assert {key: name for name, tensors in files.items() for key in tensors} == index["weight_map"]
    assert "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4" in index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in files.values() for t in tensors.values())
    before = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == before["metadata"]["total_parameters"]
    model = opened(result.folder)
    ll.load(model, result.adapter)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@both
def test_other_dtypes(dtype: torch.dtype, variant: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", dtype)
    result = written(base, tmp_path / "out", variant, dtype=torch.bfloat16)
    model = opened(result.folder)
    assert model.dtype == dtype
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.dtype == dtype
    assert ll.load(model, result.adapter).state_dict()["model.layers.0.mlp.up_proj.lora_A"].dtype == torch.bfloat16
    assert all(errors.residual < errors.plain for errors in result.errors.values())


def test_the_dtype_is_that_of_the_config(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    edited(Path(base), lambda config: config.pop("dtype"))
    assert opened(written(base, tmp_path / "out", "loftq", iterations=1).folder).dtype == torch.bfloat16
    edited(Path(base), lambda config: config.update(dtype="float16"))
    with pytest.raises(
        ll.QuantizedWeightError, match=r"weight is stored as BF16, and the config says float16\n  load the"
    ):
        written(base, tmp_path / "again", "loftq")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gpt2_whose_weights_lie_transposed(quantization: str, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64)).bfloat16()
    base = folder_of(model, tmp_path / "base")
    result = written(base, tmp_path / "out", "loftq", quantization, iterations=1)
    ours, dense = opened(result.folder), opened(base)
    assert len(ll.load(ours, result.adapter).targets) == 4
    for path, errors in result.errors.items():
        w = dense.get_submodule(path).weight.detach().mT.float()
        q = layer_of(ours.get_submodule(path), path).dense_weight()
        assert float((w - q).norm() / w.norm()) == pytest.approx(errors.plain, rel=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt_oss"])
def test_experts_stay_in_16_bits(name: str, tmp_path: Path) -> None:
    moe(name, torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    result = written(tmp_path / "base", tmp_path / "out", "pissa", target_names="(q|v)_proj")
    ours, dense = opened(result.folder), opened(tmp_path / "base")
    assert len(ll.load(ours, result.adapter).targets) == 4
    for key, tensor in dense.state_dict().items():
        if "experts" in key and "router" not in key:
            assert torch.equal(ours.state_dict()[key], tensor)


def test_what_transformers_skips_stays(tiny: str, tmp_path: Path) -> None:
    result = written(tiny, tmp_path / "out", "pissa", skip_modules=["down_proj"], exclude_names="down_proj")
    assert result.layers == len(result.errors) == 12
    model = opened(result.folder)
    plain = {path for path, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert plain == {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    ll.load(model, result.adapter)


def test_layers_without_an_adapter_are_quantised_plainly(tiny: str, tmp_path: Path) -> None:
    result = written(tiny, tmp_path / "out", "pissa", layers=[1])
    assert (result.layers, len(result.errors)) == (14, 7)
    ours, live = opened(result.folder), quantized(tiny, "nf4")
    for path in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"):
        assert torch.equal(*(layer_of(m.get_submodule(path)).dense_weight() for m in (ours, live)))


@both
def test_nothing_lacking_starts_as_a_lora_does(variant: str, tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16, hidden_size=128)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    model.save_pretrained(tmp_path / "base")
    result = written(tmp_path / "base", tmp_path / "out", variant, target_names="0.self_attn.q_proj")
    tensors = load_file(result.adapter)
    assert tensors["model.layers.0.self_attn.q_proj.lora_A"].any()
    assert not tensors["model.layers.0.self_attn.q_proj.lora_B"].any()
    assert result.errors == {"model.layers.0.self_attn.q_proj": ll.LayerErrors(0.0, 0.0)}


# ---- whole or not at all, and what is refused -----------------------------------------------------


def interrupt(done: int, total: int) -> None:
    assert 0 < done <= total
    if done > total / 2:
        raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ll.quantize_residual(tiny, ll.LoftQConfig(), tmp_path / "out", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_nan_leaves_nothing(tiny: str, tmp_path: Path) -> None:
    model = opened(Path(tiny))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "base")
    for fields in ({}, {"layers": [0]}):
        with pytest.raises(
            ll.BaseModelError, match=r"layers.1.mlp.down_proj: base weights are NaN or infinite\n  check"
        ):
            written(tmp_path / "base", tmp_path / "out", "loftq", **fields)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_folder_that_is_there_is_refused(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ll.CheckpointError, match=r"out is there already\n  nothing is written over it"):
        written(tiny, tmp_path / "out", "loftq")
    (tmp_path / "file").touch()
    with pytest.raises(ll.CheckpointError, match=r"can't be made: Not a directory\n  choose another folder"):
        written(tiny, tmp_path / "file" / "out", "loftq")

    def other_process(done: int, total: int) -> None:
        (tmp_path / "late").mkdir(exist_ok=True)

    with pytest.raises(ll.CheckpointError, match=r"late has come meanwhile\n  nothing is written over it"):
        ll.quantize_residual(tiny, ll.LoftQConfig(), tmp_path / "late", progress=other_process)
    assert not list((tmp_path / "late").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"out", "file", "late"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda b, o: ll.quantize_residual(b, ll.LoRAConfig(), o),
            ll.ConfigError,
            r"'lora' is no start .*\n  use lora_lite.P",
        ),
        (
            lambda b, o: written(b, o, "pissa", "int4"),
            ll.ConfigError,
            r"quantization='int4': wanted one of \('nf4'(.|\n)*  b",
        ),
        (
            lambda b, o: written(b, o, "pissa", iterations=0),
            ll.ConfigError,
            r"iterations=0: wanted 1 or more\n  the papers",
        ),
        (
            lambda b, o: written(b, o, "pissa", svd_of="history"),
            ll.ConfigError,
            r'svd_of="history": .*\n  merge it first',
        ),
        (
            lambda b, o: written(b, o, "pissa", target_names="lm_head"),
            ll.TargetError,
            r"lm_head: .*in 16 bits.*\n  leave it",
        ),
        (
            lambda b, o: written(b, o, "loftq", r=65, target_names="[kv]_proj"),
            ll.ConfigError,
            r"k_proj: r=65 is more than the 64 directions there\n  use a smaller r",
        ),
        (lambda b, o: written(b, o, "pissa", r=65), ll.ConfigError, r"k_proj: .*65"),
        (lambda b, o: written(b, o, "pissa", target_names="nothing"), ll.TargetError, "no layer matched"),
        (
            lambda b, o: ll.residual_errors(b, ll.LoftQConfig(), norm="max"),
            ll.ConfigError,
            r"norm='max': wanted one of \('fro', 'nuc'\)\n  they are",
        ),
    ],
)
def test_what_is_refused(call: Callable[..., Any], error: Any, message: str, tiny: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        call(tiny, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_quantised_base_is_refused(tiny: str, tmp_path: Path) -> None:
    written(tiny, tmp_path / "out", "loftq", iterations=1)
    with pytest.raises(ll.QuantizedWeightError, match=r"out is quantised already.*\n  use the folder of the original"):
        written(tmp_path / "out", tmp_path / "again", "loftq")
    base = tiny_folder(tmp_path / "base")
    edited(Path(base), lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    with pytest.raises(ll.QuantizedWeightError, match="base is quantised already"):
        written(base, tmp_path / "again", "loftq")
    model = quantized(tiny, "nf4")
    with pytest.raises(
        ll.QuantizedWeightError, match=r"'pissa' needs a dense weight(.|\n)*lora_lite.quantize_residual\(base"
    ):
        ll.attach(model, ll.PiSSAConfig())


def test_a_folder_without_a_config_and_another_dtype(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(weights(tiny), tmp_path / "base" / "model.safetensors")
    with pytest.raises(ll.CheckpointError, match=r"has no config.json.*\n  save the model with save_pretrained"):
        written(tmp_path / "base", tmp_path / "out", "loftq")
    tiny_llama(torch.float64).save_pretrained(tmp_path / "double")
    with pytest.raises(ll.QuantizedWeightError, match=r"is in torch.float64; wanted bfloat16, .*\n  bitsandbytes"):
        written(tmp_path / "double", tmp_path / "out", "loftq")


def test_a_weight_that_lies_with_others_is_refused(tmp_path: Path) -> None:
    base = folder_of(nomic_bert().bfloat16(), tmp_path / "base")
    message = (
        r"self_attn.q_proj lies in parts, or in other tensors, such as .*Wqkv.weight\n  load the model and save it"
    )
    with pytest.raises(ll.CheckpointError, match=message):
        written(base, tmp_path / "out", "loftq")
    # No linear layer of transformers is stored so today: only experts and routers are.
    tiny = BaseFolder(Path(tiny_folder(tmp_path / "tiny")))
    location = tiny.find(tiny.path, ["model.layers.0.mlp.up_proj"])["model.layers.0.mlp.up_proj"]
    turned = replace(location, weight=[replace(location.weight[0], transposed=True)])
    with pytest.raises(
        ll.CheckpointError, match=r"up_proj lies in parts, or in other tensors, such as model\.layers\.0"
    ):
        check_location(tiny, turned, torch.bfloat16)


def peak_of(run: Callable[[], object]) -> float:
    """Bytes of all tensors at the highest point, in MiB: exact, where resident memory has what others have freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in changes)) / 2**20


@pytest.mark.slow
def test_one_tensor_is_in_memory_and_no_shard(tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8}
    tiny_llama(torch.bfloat16, **sizes).save_pretrained(tmp_path / "base")
    layers = {"layers": [0], "target_names": "mlp"}
    peak = peak_of(lambda: written(tmp_path / "base", tmp_path / "out", "loftq", iterations=2, **layers))
    size = sum(t.nbytes for t in weights(tmp_path / "base").values()) / 2**20
    largest = 4 * 1024 * 2048 / 2**20  # in float32
    assert size > 16 * largest
    assert peak < 6 * largest


def test_the_order_of_the_papers_on_a_real_model(smollm2: str) -> None:
    """In the PiSSA paper's norm, the mean over some layers; on k each by itself."""
    ways = [("pissa", ll.PiSSAConfig), ("loftq", ll.LoftQConfig)]
    errors = {
        name: ll.residual_errors(smollm2, make(r=16, layers=[0, 15, 29], target_names="[kv]_proj"), norm="nuc")
        for name, make in ways
    }
    means = {name: sum(e.residual for e in by_path.values()) / 6 for name, by_path in errors.items()}
    assert means["pissa"] < means["loftq"] < 0.8 * sum(e.plain for e in errors["loftq"].values()) / 6
    for path in (path for path in errors["pissa"] if path.endswith("k_proj")):
        assert errors["pissa"][path].residual < errors["loftq"][path].residual < errors["loftq"][path].plain
