"""PEFT's reading of a LoRA folder's names on a model whose checkpoints transformers converts as it loads them.

PEFT 0.21.2 (peft/utils/transformers_weight_conversion.py) does two things as it reads a LoRA or DoRA onto a model type
with an entry in transformers' registry of conversions. Both are meant for folders of transformers 4, and drop adapters
of today's model in silence:

    target_modules   where transformers fuses experts, gate_proj, up_proj, down_proj, w1, ... become target_parameters
                     on the fused tensors, in whatever form they are written: a dense layer of that name is left out
    keys             each goes through the renamings of old checkpoints, which can also find a key of today's model

target_parameters that name a dense layer's own weight are read right, with the same keys. A layer whose key would be
renamed is written under the key of an old checkpoint, where one becomes the layer's as PEFT reads it.
"""

from collections.abc import Container, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from .folder import PeftFolder

# Names that projections of experts, and their router, had in transformers 4.
_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_FUSED = ("gate_up_proj", "down_proj")  # ends of the fused tensors' names


def named_like_experts(root: nn.Module, paths: Iterable[str]) -> list[str]:
    """The layers that PEFT gives no adapter to where target_modules names them.

    PEFT is asked where it is installed. Without it, they are all whose names experts once had, if the model's type has
    fused experts.
    """
    suspects = [path for path in paths if path.rpartition(".")[2] in _EXPERTS]
    if not suspects or not any(end.endswith(_FUSED) for rule in _registered(root) for end in rule.target_patterns):
        return []
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return suspects
    config = LoraConfig(target_modules=list(_EXPERTS))
    convert_peft_config_for_transformers(config, root, None)  # takes the names that it reads as experts' out
    left = set(config.target_modules or ())
    return [path for path in suspects if path.rpartition(".")[2] not in left]


def moved_keys(root: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """The layers whose keys PEFT reads as those of another path, and that path.

    A key that only loses its start is put back by PEFT.
    """
    renamings = _renamings(root)
    keys = {path: _renamed(path, renamings) for path in paths}
    return {path: key for path, key in keys.items() if not path.endswith(key)}


def old_keys(root: nn.Module, moved: Iterable[str]) -> dict[str, str]:
    """The names of an old checkpoint under which PEFT finds these layers, of `moved_keys`; none for some of them."""
    renamings = _renamings(root)
    candidates = ((path, _renamed(path, [rule.reverse_transform()])) for path in moved for rule in renamings)
    return {path: old for path, old in candidates if _renamed(old, renamings) == path}


def led_to_model(root: nn.Module, source: PeftFolder, modules: Container[str]) -> PeftFolder:
    """The folder with this model's paths where it has names of old checkpoints that lead to them."""
    absent = [path for path in source.paths if path not in modules]
    goals = {old: path for old, path in moved_keys(root, absent).items() if path in modules}
    if not goals:
        return source
    paths = {key: key.rpartition(".") for key in source.keys}
    return replace(source, keys={f"{goals.get(p, p)}.{n}": source.keys[key] for key, (p, _, n) in paths.items()})


def _renamed(path: str, renamings: Iterable[Any]) -> str:
    from transformers.core_model_loading import rename_source_key

    end = ".lora_A.weight"  # as transformers sees it: some patterns look for what follows
    return str(rename_source_key(f"{path}{end}", list(renamings), [])[0]).removesuffix(end)


def _renamings(root: nn.Module) -> list[Any]:
    """The renamings of old checkpoints that PEFT applies to the keys of a folder."""
    if not _registered(root):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    model: Any = root
    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]


def _registered(root: nn.Module) -> list[Any]:
    """The conversions that transformers has for the root's model type."""
    kind = getattr(getattr(root, "config", None), "model_type", None)
    if not isinstance(kind, str):
        return []
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return []
    return get_checkpoint_conversion_mapping(kind) or [] if isinstance(root, PreTrainedModel) else []
