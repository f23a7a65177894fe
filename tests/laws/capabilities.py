"""What each registered method can do, found by doing it on small layers, and the tables that the documents show of it.

`make table` writes them into docs/methods.md and README.md; tests/test_project.py compares. No row is written by hand:
the name, the paper and the sentence are the head of the method's docstring, "Name: what it is (Authors, arXiv:id).".
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1]))  # of a script, which has its own folder alone
from models import (
    OneLinear,
    attach,
    config,
    is_trained,
    moe,
    once,
    one_layer,
    perturb,
    quantized_llama,
    tiny_llama,
)

import lora_lite as ll
from lora_lite.core.variant import needs_data, weight_use

ROOT = Path(__file__).parents[2]
Call = Callable[[Any], Tensor]
DOCUMENTS = {"docs/methods.md": "matrix", "README.md": "list"}
FENCES = "<!-- methods: written by make table -->", "<!-- end of methods -->"
READS = {
    "unused": "On any base, whatever library quantised it (the weight isn't read)",
    "read": "On dense and quantised bases (the weight is read, dequantised if need be)",
    "dense": "On dense bases (the weight is read as it is)",
}


SOURCES = {  # of a paper, in a docstring's head: its address
    r"arXiv:(\d{4}\.\d{5})": "https://arxiv.org/abs/",
    r"openreview(?:\.net/forum\?id=| )(\w+)": "https://openreview.net/forum?id=",
    r"([\w.-]+\.\w+/[^\s,)]+)": "https://",
}


def head(variant: str) -> tuple[str, str, str]:
    """Name, sentence and the paper's address ("" for none) from the docstring of the method's file."""
    document = sys.modules[ll.REGISTRY[variant].__module__].__doc__ or ""
    text = " ".join(document.partition("\n\n")[0].split())
    match = re.fullmatch(r"([^:]+): (.+?)(?: \((?=[^()]*(?:\b20\d\d\b|arXiv))([^()]*)\))?\.", text)
    assert match is not None, (
        f"{variant}: its docstring begins {text!r}; wanted 'Name: what it is (Authors, arXiv:id).'"
    )
    sources = ((re.search(pattern, match[3] or ""), site) for pattern, site in SOURCES.items())
    return match[1], match[2], next((f"{site}{paper[1]}" for paper, site in sources if paper), "")


@cache
def smollm2() -> Any:
    """SmolLM2-135M without its numbers."""
    sizes = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, **sizes)
        ).bfloat16()


def parameters(variant: str) -> str:
    """What is trained in SmolLM2-135M by the config's defaults."""
    given: Any = {"token_ids": (0,)} if variant == "tokens" else {}
    try:
        return f"{ll.plan(smollm2(), ll.config_for(variant)(**given)).parameters:,}"
    except ll.TargetError:
        return "no layer"
    except ll.ConfigError:
        return "its default fits no side"


def _conv() -> tuple[nn.Module, Call]:
    model, x = OneLinear(), torch.randn(2, 4, 3, 3)
    model.proj = nn.Conv2d(4, 24, 2)  # type: ignore[assignment]  # a patch is (16,)
    return model, lambda m: m(x)


def _bits(quantization: str) -> tuple[nn.Module, Call]:
    """A layer with a bias on a bitsandbytes base."""

    def build() -> Any:
        model = OneLinear()
        model.proj = quantized_llama(quantization).model.layers[0].mlp.up_proj
        return model

    x = torch.randn(5, 128, dtype=torch.bfloat16)
    return once(build, "one", quantization), lambda m: m(x)


def _tokens(model: Any) -> Tensor:
    ids = torch.arange(8).reshape(2, 4)
    logits: Tensor = model(input_ids=ids).logits
    return logits


def _one(variant: str) -> tuple[nn.Module, Call]:
    model, x = one_layer(variant)
    return model, lambda m: m(x)


KINDS: dict[str, Callable[[], tuple[nn.Module, Call]]] = {
    "linear": lambda: _one("lora"),
    "conv": _conv,
    "embedding": lambda: _one("tokens"),
    "experts": lambda: (
        moe("mixtral", num_hidden_layers=1, intermediate_size=64, experts_implementation="eager"),
        _tokens,
    ),
    "norm": lambda: _one("norm"),
    "block": lambda: (tiny_llama(num_hidden_layers=1), _tokens),
}
NAMES = {"experts": r"experts\.", "block": ""}


def runs(variant: str, model: nn.Module, call: Call, cfg: Any) -> str:
    """How the method does on this model: "" if it is refused, "attached" if it can't be merged, else "merged".

    The model as it was after detach and equal outputs when merged are laws: AssertionError.
    """
    base = outputs(model.eval(), call)
    try:
        adapter = attach(model, cfg)
    except ll.LoraLiteError:
        assert torch.equal(outputs(model, call), base), f"{variant} was refused and left something behind"
        return ""
    perturb(adapter, 0.2)
    attached, result = outputs(model, call), "merged"
    assert not torch.allclose(attached, base, atol=1e-4), f"{variant} changes nothing on {cfg.kinds}"
    try:
        ll.merge(model, quantized="dequantize")
    except (ll.TargetError, ll.VariantError):
        result = "attached"
    else:
        error = (outputs(model, call) - attached).norm() / attached.norm()
        assert error < (1e-4 if base.dtype == torch.float32 else 0.02), f"{variant} merged is off by {error:.1e}"
        ll.unmerge(model)
    ll.detach(model)
    assert torch.equal(outputs(model, call), base), f"{variant} left something behind"
    return result


@torch.no_grad()
def outputs(model: nn.Module, call: Call) -> Tensor:
    return call(model)


def on_kind(variant: str, kind: str) -> str:
    """As `runs`, on a layer of this kind."""
    torch.manual_seed(0)
    model, call = KINDS[kind]()
    try:
        cfg = config(variant, kinds=(kind,), target_names=NAMES.get(kind, "proj"))
    except ll.ConfigError:
        return ""
    return runs(variant, model, call, cfg)


def quantisations(variant: str) -> list[str]:
    """The bases of bitsandbytes that the method runs on: on a layer of theirs, or beside such layers."""
    if "linear" in config(variant).kinds:
        return [q for q in ("nf4", "int8") if runs(variant, *_bits(q), config(variant, target_names="proj"))]
    return [q for q in ("nf4", "int8") if runs(variant, quantized_llama(q), _tokens, config(variant))]


def is_identity(variant: str) -> bool:
    model = tiny_llama(bias=True, num_hidden_layers=1)
    base = outputs(model, _tokens)
    attach(model, config(variant))
    return torch.equal(outputs(model, _tokens), base)


def to_peft(variant: str) -> str:
    """How an adapter goes into a folder of PEFT's, and comes back from it with its outputs."""
    cfg = config(variant, target_names="proj")
    alone = attempts(variant, lambda model: attach(model, cfg))
    if alone or needs_data(cfg):
        return alone or "no"
    beside = [ll.LoRAConfig(r=2, target_names="other"), cfg]
    return "beside another" if attempts(variant, lambda model: ll.attach(model, beside)) == "LoRA" else "no"


def attempts(variant: str, adapt: Callable[[nn.Module], ll.Adapter]) -> str:
    """ "both ways", or the kind of adapter that PEFT has of it, or "" where it takes none."""
    (model, x), fresh = one_layer(variant), one_layer(variant)[0]
    for one in (model, fresh):
        one.add_module("other", nn.Linear(16, 24))
    fresh.load_state_dict(model.state_dict())
    adapter = adapt(model)
    perturb(adapter)
    wanted = outputs(model.eval(), lambda m: m(x))
    with tempfile.TemporaryDirectory() as folder:
        for rank in (None, 24):
            try:
                ll.save_peft(model, folder, rank=rank)
            except (ll.CheckpointError, ll.TargetError, ll.VariantError):
                continue
            settings = json.loads((Path(folder) / "adapter_config.json").read_text())
            loaded = ll.load_peft(fresh, folder)
            torch.testing.assert_close(outputs(fresh.eval(), lambda m: m(x)), wanted, rtol=1e-3, atol=1e-4)
            return "both ways" if loaded.variant == variant else settings["peft_type"].replace("LORA", "LoRA")
    return ""


def row(variant: str) -> str:
    """Its line in docs/methods.md."""
    name, sentence, paper = head(variant)
    title = f"[{name}]({paper})" if paper else name
    on = {kind: result for kind in KINDS if (result := on_kind(variant, kind))}
    unmerged = [kind for kind, result in on.items() if result == "attached"]
    merges = "no" if len(unmerged) == len(on) else "yes" + f", but on {', '.join(unmerged)}" * bool(unmerged)
    bases = ", ".join(["dense", *quantisations(variant)])
    base = "any" if weight_use(config(variant)) == "unused" and bases == "dense, nf4, int8" else bases
    fresh = "the base" if is_identity(variant) else "random" if is_trained(variant) else "computed"
    cells = [f"`{variant}`", f"{title}: {sentence}", parameters(variant), base, ", ".join(on), fresh, merges]
    peft = to_peft(variant)
    return f"| {' | '.join([*cells, f'as a {peft}' if peft == 'LoRA' else peft])} |"


def matrix() -> str:
    titles = ("variant", "method", "trained", "base", "layers", "fresh", "merges", "PEFT folder")
    return "\n".join([f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *map(row, sorted(ll.REGISTRY))])


def listed() -> str:
    """The README's list: the methods by what they read of the base."""
    groups: dict[str, list[str]] = {use: [] for use in READS}
    for variant in sorted(ll.REGISTRY):
        paper = head(variant)[2]
        groups[weight_use(config(variant))].append(f"[`{variant}`]({paper})" if paper else f"`{variant}`")
    return "\n".join(f"- {READS[use]}: {', '.join(names)}." for use, names in groups.items())


def rows(document: str = "docs/methods.md") -> dict[str, str]:
    """The lines of the document's table by variant."""
    return dict(re.findall(r"(?m)^(?=\| `(\w+)` \|)(.*)$", section(document)))


def section(document: str) -> str:
    """What stands between the fences of a document."""
    text = (ROOT / document).read_text()
    return text.partition(FENCES[0])[2].partition(FENCES[1])[0].strip()


def write() -> None:
    for document, kind in DOCUMENTS.items():
        path = ROOT / document
        before, _, rest = path.read_text().partition(FENCES[0])
        after = rest.partition(FENCES[1])[2]
        path.write_text(f"{before}{FENCES[0]}\n{matrix() if kind == 'matrix' else listed()}\n{FENCES[1]}{after}")


if __name__ == "__main__":
    from loguru import logger

    logger.disable("lora_lite")
    write()
