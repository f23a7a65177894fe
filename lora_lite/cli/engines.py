"""The rules by which engines that serve adapters refuse one, each a row with its source, and the command that helps.

A row stands for an error of the engine, or for a wrong result without one. Sources are of October 2026; versions that a
row isn't true of are named.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal, get_args

from ..io.formats.table import FORMATS
from ..io.peft.beside import VARIANTS as WHOLE
from ..io.peft.save import is_written
from .served import PLAIN, Served, ServedLayer, read_served

Engine = Literal["vllm", "sglang", "llama.cpp", "mlx", "peft"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank (vllm/config/lora.py), 16 by default
STARTS = ("pissa", "olora", "corda", "lora_ga", "milora")  # a LoRA less its start: exact at twice the rank
APPROXIMATE = 64  # a rank to try, of what no rank holds
# What SGLang's LoRA knows, by the names of checkpoints: python/sglang/srt/lora/utils.py, get_normalized_target_modules
# and _KNOWN_LORA_TARGET_MODULES; w1, w2, w3 of experts: lora.py, _rename_expert_w_to_proj.
# fmt: off
SGLANG_NAMES = {
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "gate_up_proj",
    "down_proj", "w1", "w2", "w3", "embed_tokens", "vocab_emb", "embeddings", "word_embeddings", "lm_head", "output",
    "unembed_tokens", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "fused_qkv_a_proj_with_mqa",
    "in_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z", "wq_b", "wk",
    "weights_proj", "fc1_latent_proj", "fc2_latent_proj", "qkvr", "wo_ud",
}
# fmt: on


class Cure(Enum):
    """The conversion after which an engine takes an adapter."""

    FOLDER = "a PEFT folder"
    OWN_FORMAT = "a file of its own format"
    PER_EXPERT = "a PEFT folder by the names of checkpoints"
    SAME_RANK = "a plain LoRA of its own rank"
    TWICE_THE_RANK = "a plain LoRA of twice its rank"
    SOME_RANK = "merge it, or a plain LoRA that is near it"
    MERGE = "merge it"
    NONE = "nothing"


Finds = Callable[[Served], list[str]]  # the layers that the rule is about, or "all of it"
ALL = ["all of it"]


@dataclass(frozen=True)
class Rule:
    engines: tuple[Engine, ...]
    says: str
    finds: Finds
    cure: Cure


def _layers(test: Callable[[ServedLayer], bool]) -> Finds:
    return lambda adapter: [layer.path for layer in adapter.layers if test(layer)]


def _other_than_most(value: Callable[[ServedLayer], float]) -> Finds:
    """The layers with another value than the folder's settings say, which is all that a server reads; of a file of
    ours, than the first LoRA."""

    def finds(adapter: Served) -> list[str]:
        loras = [layer for layer in adapter.layers if layer.method in PLAIN]
        one = [value(adapter.stated or layer) for layer in loras[:1]]
        return [layer.path for layer in loras if abs(value(layer) - one[0]) > 1e-9 * abs(one[0])]

    return finds


def _is_other_method(layer: ServedLayer) -> bool:
    known = (*PLAIN, *STARTS, *WHOLE, "dora", "whole")
    return layer.method not in known and layer.in_weight and not (layer.is_start_lost or layer.is_norm)


def _is_of_experts(layer: ServedLayer) -> bool:
    return layer.is_fused or ".experts." in layer.path


def _without_partners(adapter: Served) -> list[str]:
    """The attentions of which q_proj, or v_proj beside it, is missing."""
    blocks: dict[str, set[str]] = {}
    for layer in adapter.layers:
        blocks.setdefault(layer.path.rpartition(".")[0], set()).add(layer.name)
    sets = {block: names & {"q_proj", "k_proj", "v_proj"} for block, names in blocks.items()}
    return [block for block, names in sets.items() if names and not {"q_proj", "v_proj"} <= names]


def _ranks_above(adapter: Served) -> list[str]:
    stated = ALL if adapter.stated and adapter.stated.rank > VLLM_RANKS[-1] else []
    return [layer.path for layer in adapter.layers if layer.rank > VLLM_RANKS[-1]] or stated


def _unnamed(adapter: Served) -> list[str]:
    """The layers of a folder that target_modules doesn't name by their last names."""
    if not isinstance(adapter.target_modules, list):
        return []
    names = {str(name).rpartition(".")[2] for name in adapter.target_modules}
    return [layer.path for layer in adapter.layers if layer.method in PLAIN and layer.name not in names]


def _is_regex(adapter: Served) -> list[str]:
    text = adapter.target_modules
    return ALL if isinstance(text, str) and text not in ("all", "all-linear") else []


OWN_FORMATS: Mapping[Engine, str] = {"llama.cpp": "gguf", "mlx": "mlx"}  # to what `convert --to` is given
OWN_READERS = tuple(OWN_FORMATS)
FOLDER_READERS: tuple[Engine, ...] = ("vllm", "sglang", "peft")
LORA_SERVERS: tuple[Engine, ...] = ("vllm", "sglang", "llama.cpp")
LORA_READERS: tuple[Engine, ...] = (*LORA_SERVERS, "mlx")
RULES = (
    # vllm/lora/lora_model.py; sglang/srt/lora/lora_config.py; llama.cpp's convert_lora_to_gguf.py; peft/config.py
    Rule(FOLDER_READERS, "it reads PEFT folders", lambda a: [] if a.is_folder else ALL, Cure.FOLDER),
    # src/llama-adapter.cpp; mlx_lm/tuner/utils.py, load_adapters: io/formats/gguf.py and mlx.py have these formats
    Rule(OWN_READERS, "it reads a format of its own", lambda a: ALL, Cure.OWN_FORMAT),
    # vllm/lora/peft_helper.py ("DoRA"); sglang's lora.py has no magnitude; convert_lora_to_gguf.py: "Unexpected name"
    Rule(LORA_SERVERS, "it has no DoRA", _layers(lambda x: x.method == "dora"), Cure.SOME_RANK),
    # A and B are relative to a base that the start wrote (peft/tuners/lora/layer.py, pissa_init), and no server looks
    Rule(LORA_READERS, "its start is no part of the base", _layers(lambda x: x.method in STARTS), Cure.TWICE_THE_RANK),
    # the same, of a start that only a base in PEFT's memory went with (docs/limits.md)
    Rule(
        LORA_READERS,
        "what its start took out of the base is in no file",
        _layers(lambda x: x.is_start_lost),
        Cure.NONE,
    ),
    # peft_helper.py wants r and lora_alpha; lora.py asserts peft_type; convert_lora_to_gguf.py: "Unexpected name"
    Rule(LORA_READERS, "it has no such method", _layers(_is_other_method), Cure.SOME_RANK),
    # no LoRA is a change of a norm's vector
    Rule(LORA_READERS, "it has no norms", _layers(lambda x: x.is_norm and x.method not in WHOLE), Cure.MERGE),
    # peft/mapping.py has no such peft_type
    Rule(
        ("peft",),
        "it has no such method",
        lambda a: [x.path for x in a.layers if not (a.is_folder or is_written(x.method) or x.method in STARTS)],
        Cure.SOME_RANK,
    ),
    Rule(
        ("peft",),
        "it has such a start by writing the base",
        lambda a: [x.path for x in a.layers if x.method in STARTS and not a.is_folder],
        Cure.TWICE_THE_RANK,
    ),
    # peft_helper.py: "modules_to_save being None", vllm #9280; llama.cpp #11554; sglang's lora.py knows no such key
    Rule(LORA_READERS, "it takes no whole tensors", _layers(lambda x: x.method in (*WHOLE, "whole")), Cure.MERGE),
    # peft_helper.py: "Adapter bias is not supported"; convert_lora_to_gguf.py: "Unexpected name"; none in sglang
    Rule(LORA_READERS, "it has no bias of a LoRA", _layers(lambda x: x.has_bias), Cure.MERGE),
    # vllm #19710 was closed, sglang #16942 is open: the setting is dropped, and the adapter on everywhere
    Rule(("vllm", "sglang", "mlx"), "it acts on all tokens", _layers(lambda x: x.at_positions), Cure.NONE),
    # convert_lora_to_gguf.py writes alora_invocation_tokens of a LoRA, llama.cpp #15327; PEFT has aLoRA
    Rule(
        ("llama.cpp", "peft"),
        "it acts on all tokens",
        _layers(lambda x: x.at_positions and x.method != "lora"),
        Cure.NONE,
    ),
    # an update of the residual stream or a vector is in no weight, and so in no LoRA
    Rule(
        ("vllm", "sglang", "llama.cpp", "peft", "mlx"),
        "no weight holds it",
        _layers(lambda x: not (x.in_weight or x.at_positions)),
        Cure.NONE,
    ),
    # sglang #40835 (open): alpha / r whatever use_rslora says
    Rule(("sglang",), "it scales by alpha / r, not rsLoRA", _layers(lambda x: x.rslora), Cure.SAME_RANK),
    # vllm #55545: rsLoRA of experts was scaled by alpha / r up to September 2026
    Rule(
        ("vllm",),
        "it scaled experts by alpha / r, not rsLoRA",
        _layers(lambda x: x.rslora and _is_of_experts(x)),
        Cure.SAME_RANK,
    ),
    # PEFT's format has no scale beside alpha / r
    Rule(FOLDER_READERS, "it has no scale of ours", lambda a: [] if a.scale == 1 else ALL, Cure.SAME_RANK),
    # peft_helper.py: vllm_lora_scaling_factor is one, of r and lora_alpha
    Rule(("vllm",), "it has one alpha / r for all layers", _other_than_most(lambda x: x.scaling), Cure.SAME_RANK),
    # lora_config.py: rank_overrides, alpha_overrides, for its admission to refuse
    Rule(("sglang",), "it has one r for all layers", _other_than_most(lambda x: x.rank), Cure.SAME_RANK),
    # the same
    Rule(("sglang",), "it has one alpha for all layers", _other_than_most(lambda x: x.alpha), Cure.SAME_RANK),
    # vllm/config/lora.py, MaxLoRARanks
    Rule(("vllm",), f"its ranks end at {VLLM_RANKS[-1]}", _ranks_above, Cure.MERGE),
    # lora_model.py: an expert's module by its number (models with is_3d_moe_weight, as gpt-oss, read them fused);
    # sglang's lora.py, _ROUTED_EXPERT_PATTERN; llama.cpp's convert_hf_to_gguf.py stacks experts by their numbers
    Rule(LORA_SERVERS, "it reads experts one by one", _layers(lambda x: x.is_fused), Cure.PER_EXPERT),
    # mlx_lm/tuner/lora.py, LoRASwitchLinear, has a layout of its own, which isn't written here
    Rule(("mlx",), "its experts aren't written here", _layers(_is_of_experts), Cure.MERGE),
    # vllm/lora/layers: linear layers, embeddings, heads; so are sglang's layers.py and llama.cpp's build_lora_mm
    Rule(LORA_READERS, "it has no convolutions", _layers(lambda x: x.is_conv), Cure.MERGE),
    # sglang/srt/lora/utils.py, get_normalized_target_modules: "Only 'all' or 'all-linear' can be used as the string"
    Rule(("sglang",), "it takes no regex as target_modules", _is_regex, Cure.PER_EXPERT),
    # the same: what isn't named there is left out of its buffers
    Rule(("sglang",), "target_modules must name them", _unnamed, Cure.PER_EXPERT),
    # _KNOWN_LORA_TARGET_MODULES; of a fused block the names are gate_proj and so on
    Rule(
        ("sglang",),
        "it doesn't know layers of that name",
        _layers(lambda x: x.method in PLAIN and not x.is_fused and x.name not in SGLANG_NAMES),
        Cure.MERGE,
    ),
    # sglang/srt/lora/lora.py, normalize_qkv_proj: k_proj alone may be missing
    Rule(("sglang",), "it wants q_proj and v_proj together", _without_partners, Cure.MERGE),
)


@dataclass(frozen=True)
class Reason:
    """A rule that refuses an adapter, and the layers that it is about."""

    says: str
    layers: list[str]
    cure: Cure


@dataclass(frozen=True)
class Verdict:
    """The answer of an engine to an adapter; `commands` each make one that it takes, the exact one first."""

    path: Path
    engine: Engine
    reasons: list[Reason]
    commands: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def is_taken(self) -> bool:
        return not self.reasons

    def to_json(self) -> Mapping[str, object]:
        reasons = [{"says": r.says, "layers": r.layers, "cure": r.cure.value} for r in self.reasons]
        fields = {"path": str(self.path), "engine": self.engine, "taken": self.is_taken, "reasons": reasons}
        return fields | {"commands": self.commands, "notes": self.notes}


def verdict(path: Path, engine: Engine) -> Verdict:
    """Ask each rule of an engine. Raises CheckpointError for what is no adapter."""
    if engine in OWN_FORMATS and FORMATS[OWN_FORMATS[engine]].is_path(path):
        return Verdict(path, engine, [], [], ["it is in its own format, and no more is known of it here"])
    adapter = read_served(path)
    checks = ((rule, rule.finds(adapter)) for rule in RULES if engine in rule.engines)
    reasons = [Reason(rule.says, layers, rule.cure) for rule, layers in checks if layers]
    commands = list(_commands(adapter, engine, {reason.cure for reason in reasons}))
    return Verdict(path, engine, reasons, commands, [] if reasons else list(_notes(adapter, engine)))


def _commands(adapter: Served, engine: Engine, cures: set[Cure]) -> Iterator[str]:
    if not cures or Cure.NONE in cures:
        return
    if Cure.PER_EXPERT in cures and any(layer.method == "orthogonal" for layer in adapter.layers):
        cures = cures | {Cure.SAME_RANK}  # which is more than two factors
    ranks = {Cure.SAME_RANK: adapter.rank, Cure.TWICE_THE_RANK: 2 * adapter.rank, Cure.SOME_RANK: APPROXIMATE}
    rank = max((ranks[cure] for cure in cures & ranks.keys()), default=None)
    if engine == "vllm" and (rank or 0) > VLLM_RANKS[-1]:
        cures = cures | {Cure.MERGE}
    path = shlex.quote(str(adapter.path))
    if cures & {Cure.MERGE, Cure.SOME_RANK}:
        yield f"lora-lite merge BASE {path} MERGED"
    if Cure.MERGE in cures:
        return
    options = ["" if rank is None else f" --rank {rank}", " --per-expert" * (Cure.PER_EXPERT in cures)]
    # Experts and aLoRA go into GGUF by llama.cpp's own script.
    by_script = engine == "llama.cpp" and any(_is_of_experts(layer) or layer.at_positions for layer in adapter.layers)
    if engine in OWN_FORMATS and not by_script:
        goal = "adapter.gguf" if engine == "llama.cpp" else "FOLDER"
        yield f"lora-lite convert {path} {goal} --to {OWN_FORMATS[engine]} --base BASE{options[0]}"
        return
    if not (by_script and cures == {Cure.OWN_FORMAT} and adapter.is_folder):
        yield f"lora-lite convert {path} FOLDER --base BASE{''.join(options)}"
        path = "FOLDER"
    if by_script:
        yield f"python convert_lora_to_gguf.py {path} --base BASE"


def _notes(adapter: Served, engine: Engine) -> Iterator[str]:
    """Options to start a server with, and questions that the adapter alone doesn't answer."""
    if engine == "vllm":
        rank = max(adapter.rank, adapter.stated.rank if adapter.stated else 0)
        yield f"start it with --enable-lora --max-lora-rank {next(r for r in VLLM_RANKS if r >= rank)}"
    if engine == "vllm" and {"lm_head", "embed_tokens"} & {layer.name for layer in adapter.layers}:
        yield "lm_head, embed_tokens: models with embedding_modules alone"  # vllm/lora/utils.py
