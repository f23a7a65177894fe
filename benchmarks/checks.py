"""The checks of an adapter on one model: that it attaches, acts, trains, saves, merges, and leaves.

A case is a folder of two files:

    config.json   as save_pretrained writes it
    inputs.json   {"module": "transformers", "class": "LlamaForCausalLM", "config_module": ..., "config": "LlamaConfig",
                  "inputs": {"input_ids": {"t": "int", "shape": [2, 7], "high": 96}}}; module and config can be left out

An input is one of {"t": "tensor", "dtype", "shape", "data"}, {"t": "float", "shape", "low", "high"} (uniform),
{"t": "int", "shape", "low", "high"}, {"t": "full", "dtype", "shape", "value"} and {"t": "plain", "value"}.
The model has random weights, in float32 and eval mode, on a CPU; it is frozen before anything else.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import lora_lite as ll
from lora_lite.core.ran import adapted, has_run

CHECKS = ("plan", "attach", "ran", "identity", "gradients", "effect", "load", "merge", "peft", "disk", "detach")
OK, WRONG, SILENT, RAW, REFUSAL, SKIPPED = "ok", "wrong number", "silent", "raw exception", "refusal", "skipped"
OUTCOMES = (OK, WRONG, SILENT, RAW, REFUSAL, SKIPPED)
TOLERANCE = 1e-4
"""The greatest difference of outputs, relative to the largest, where another order of sums is right."""
LONGEST = 400  # characters of a message


class Result(NamedTuple):
    check: str
    outcome: str
    message: str = ""


class Verdict(Exception):  # noqa: N818
    """An outcome that isn't an error of the library's: (outcome, message)."""


class Trial:
    """One model with one adapter on it, and the outputs of its base."""

    def __init__(self, case: Path, variant: str, folder: Path) -> None:
        self.case, self.variant, self.folder = case, variant, folder  # folder: an empty one to write to
        self.spec = json.loads((case / "inputs.json").read_text())
        self.cls = getattr(import_module(self.spec.get("module", "transformers")), self.spec["class"])
        self.model = self.build()
        self.tensors = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        self.base = self.outputs(self.model)
        if apart(self.outputs(self.model), self.base) != 0:
            raise Verdict(SKIPPED, "the base gives other outputs each time")
        self.paths: list[str] = []
        self.can_run = False

    def build(self, tensors: Mapping[str, Tensor] | None = None) -> Any:
        cls = self.cls.config_class
        if "config" in self.spec:  # some classes of models take another config than the one that they name
            cls = getattr(import_module(self.spec["config_module"]), self.spec["config"])
        torch.manual_seed(0)
        model = self.cls(cls.from_json_file(self.case / "config.json")).float().eval().requires_grad_(False)
        if tensors is not None:  # a seed isn't enough: some modules leave memory as it was
            model.load_state_dict(tensors)
        return model

    def twin(self) -> Any:
        """The same base once more."""
        return self.build(self.tensors)

    def inputs(self) -> dict[str, Any]:
        """Made anew for each forward: some change theirs."""
        inputs = {name: as_input(spec) for name, spec in self.spec["inputs"].items()}
        for name, value in inputs.items():
            if name.endswith("attention_mask") and isinstance(value, Tensor) and not value.any():
                inputs[name] = torch.ones_like(value)  # a random mask of a test can hide every token
        return inputs

    def outputs(self, model: Any, with_graph: bool = False) -> list[Tensor]:
        """Every floating-point tensor of one forward."""
        torch.manual_seed(0)  # for models that draw noise
        with torch.set_grad_enabled(with_graph):
            output = model(**self.inputs())
        leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]

    @cached_property
    def perturbed(self) -> list[Tensor]:
        """The outputs once every parameter of the adapter is moved away from its start."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.adapter.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return self.outputs(self.model)

    def config(self, exclude: Iterable[str] = ()) -> Any:
        cls: Any = ll.config_for(self.variant)
        rank = {"r": 4} if "r" in cls.__dataclass_fields__ else {}
        names = [] if self.variant == "lora" else exactly(self.paths)  # IA3's own defaults know few of these models
        return cls(variant=self.variant, target_names=names, exclude_names=exactly(exclude), **rank)

    def plan(self) -> None:
        try:
            self.paths = [target.path for target in ll.plan(self.model, ll.LoRAConfig(r=4))]
        except ll.TargetError:
            head = getattr(self.model, "get_output_embeddings", lambda: None)()
            if any(isinstance(module, nn.Linear | Conv1D) and module is not head for module in self.model.modules()):
                raise
            raise Verdict(SKIPPED, "nothing linear, for PEFT neither") from None

    def attach(self) -> None:
        self.adapter = ll.attach(self.model, self.config())

    def ran(self) -> None:
        """Layers that aren't called must be told by merge and by audit; the other checks go on without them."""
        self.fresh = self.outputs(self.model)
        uncalled = [path for path, layer in adapted(self.model).items() if not has_run(layer)]
        self.can_run = len(uncalled) < len(self.paths)
        if not self.can_run:
            raise Verdict(SKIPPED, "these inputs reach none of the targets")
        if uncalled:
            merged = outcome_of("merge", lambda: ll.merge(self.model))
            audited = outcome_of("audit", lambda: ll.audit(self.model, self.inputs()))
            ll.detach(self.model)
            self.adapter = ll.attach(self.model, self.config(uncalled))
            self.fresh = self.outputs(self.model)
            if OK in (merged.outcome, audited.outcome):
                raise Verdict(SILENT, f"never called: {', '.join(uncalled)}")
            raise Verdict(audited.outcome, audited.message)

    def identity(self) -> None:
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(self.fresh, self.base, strict=True)):
            raise Verdict(WRONG, f"a fresh adapter moves the outputs by {apart(self.fresh, self.base):.1e}")

    def gradients(self) -> None:
        try:
            self.backward(self.model)
        except RuntimeError as error:
            try:
                self.backward(self.twin().requires_grad_(True))
            except RuntimeError:
                raise Verdict(SKIPPED, f"the base has no backward either: {described(error)}") from error
            raise
        # A gradient of 0 is one: A's is 0 as long as B is.
        without = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        self.model.zero_grad()
        if without:
            self.backward(twin := self.twin().requires_grad_(True))
            unused = {name.rpartition(".")[0] for name, p in twin.named_parameters() if p.grad is None}
            without = [name for name in without if name.rpartition(".")[0] not in unused]  # as a last layer's may be
        if without:
            raise Verdict(WRONG, f"no gradient: {', '.join(without)}")

    def backward(self, model: Any) -> None:
        outputs = self.outputs(model, with_graph=True)
        torch.stack([output.square().mean() for output in outputs]).sum().backward()

    def effect(self) -> None:
        if apart(self.perturbed, self.base) == 0:
            ll.merge(self.model)
            merged = self.outputs(self.model)
            ll.unmerge(self.model)
            if apart(merged, self.base) == 0:
                raise Verdict(SKIPPED, "nor have the merged weights: the outputs don't see such a change")
            raise Verdict(WRONG, "a perturbation has no effect")

    def load(self) -> None:
        expected, twin = self.perturbed, self.twin()
        ll.save(self.model, self.folder / "adapter.safetensors")
        ll.load(twin, self.folder / "adapter.safetensors")
        expect(self.outputs(twin), expected, "loaded and saved", 0)

    def merge(self) -> None:
        expected = self.perturbed
        ll.merge(self.model)
        merged = self.outputs(self.model)
        ll.unmerge(self.model)
        expect(merged, expected, "merged and attached")
        expect(self.outputs(self.model), expected, "unmerged and attached", 0)

    def peft(self) -> None:
        expected, twin = self.perturbed, self.twin()
        ll.save_peft(self.model, self.folder / "peft")
        expect(self.outputs(peft.PeftModel.from_pretrained(twin, self.folder / "peft")), expected, "PEFT's and ours")

    def disk(self) -> None:
        expected, base, merged = self.perturbed, self.folder / "base", self.folder / "merged"
        try:
            self.twin().save_pretrained(base)
        except Exception as error:
            raise Verdict(SKIPPED, f"save_pretrained: {described(error)}") from error
        ll.save(self.model, self.folder / "adapter.safetensors")
        ll.merge_checkpoint(base, self.folder / "adapter.safetensors", merged)
        difference = apart(self.read(merged), expected)
        if difference > TOLERANCE and apart(self.read(base), self.base) > TOLERANCE:
            raise Verdict(SKIPPED, "from_pretrained doesn't give what save_pretrained has written")
        if difference > TOLERANCE:
            raise Verdict(WRONG, f"merged on disk and attached are {difference:.1e} apart")

    def read(self, folder: Path) -> list[Tensor]:
        return self.outputs(self.cls.from_pretrained(folder).float().eval())

    def detach(self) -> None:
        ll.detach(self.model)
        expect(self.outputs(self.model), self.base, "detached and base", 0)
        tensors = self.model.state_dict()
        if tensors.keys() != self.tensors.keys() or any(p.requires_grad for p in self.model.parameters()):
            raise Verdict(WRONG, "detached, the model has other keys or flags")
        if not all(torch.equal(tensors[key].nan_to_num(), tensor.nan_to_num()) for key, tensor in self.tensors.items()):
            raise Verdict(WRONG, "detached, the model has other weights")


def as_input(spec: Mapping[str, Any]) -> Any:
    kind, dtype = spec["t"], getattr(torch, spec.get("dtype", "float32"))
    generator = torch.Generator().manual_seed(0)
    if kind == "plain":
        return spec["value"]
    if kind == "full":
        return torch.full(spec["shape"], spec["value"], dtype=dtype)
    if kind == "tensor" and spec["data"] is not None:  # one that was too long to write down is drawn
        return torch.tensor(spec["data"], dtype=dtype).reshape(spec["shape"])
    if kind == "int":
        return torch.randint(spec.get("low", 0), spec["high"], spec["shape"], generator=generator)
    low, high = spec.get("low", 0.0), spec.get("high", 1.0)
    return torch.rand(spec["shape"], generator=generator, dtype=dtype) * (high - low) + low


def exactly(paths: Iterable[str]) -> list[str]:
    return [f"^{re.escape(path)}$" for path in paths]


def apart(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """The greatest difference relative to the largest of its tensor; infinite where only one is a number."""
    worst = 0.0
    for one, other in zip(outputs, expected, strict=True):
        if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
            return float("inf")
        one, other = (x.detach().double().nan_to_num(0.0, 0.0, 0.0) for x in (one, other))
        worst = max(worst, ((one - other).abs().max() / other.abs().max().clamp(min=1e-30)).item())
    return worst


def expect(outputs: list[Tensor], expected: list[Tensor], what: str, tolerance: float = TOLERANCE) -> None:
    if (difference := apart(outputs, expected)) > tolerance:
        raise Verdict(WRONG, f"{what} are {difference:.1e} apart")


def described(error: BaseException) -> str:
    """The error's first lines, and the package that raised it."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_globals.get("__name__", "").partition(".")[0])
        trace = trace.tb_next
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__} in {frames[-1]}: {' | '.join(lines[:2])}"[:LONGEST]


def outcome_of(check: str, run: Callable[[], Any]) -> Result:
    try:
        run()
    except Verdict as verdict:
        return Result(check, verdict.args[0], verdict.args[1][:LONGEST])
    except ll.LoraLiteError as error:
        return Result(check, REFUSAL, described(error))
    except Exception as error:
        return Result(check, RAW, described(error))
    return Result(check, OK)


def results_of(case: Path, variant: str, checks: Iterable[str] = CHECKS) -> Iterator[Result]:
    """The outcome of each check, in their order; none after a failure that leaves nothing to check."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = Trial(case, variant, Path(folder))
        except Exception as error:
            yield Result("plan", SKIPPED, error.args[1] if isinstance(error, Verdict) else described(error))
            return
        for check in CHECKS:
            if check in ("plan", "attach", "ran") or check in checks:
                yield (result := outcome_of(check, getattr(trial, check)))
                if (check in ("plan", "attach") and result.outcome != OK) or (check == "ran" and not trial.can_run):
                    return
