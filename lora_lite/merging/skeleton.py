"""The model that a folder's config describes, on the meta device: modules and shapes, no memory, none of its own code.

A config is anyone's. What could fetch or run something is left out of it, and building ends in bounded time.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from ..errors import CheckpointError, brief

LEAST_BLOCKS = 1000  # any model may have as many blocks as this, whatever its files hold
# At most, modules and parameters; activations and containers have no tensor. 600 models of transformers 5.23: 4.5.
PARTS_A_TENSOR = 10
MOST_LABELS = 30_000  # of more, none: transformers checks a name for each (20 µs). ImageNet-21k has 21,843

# A pretrained backbone would be fetched, an `auto_map` names code to run, an attention may not be installed here.
_NOT_BUILT = {"label2id", "quantization_config", "auto_map", "use_pretrained_backbone", "use_timm_backbone"}
_NOT_BUILT |= {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
_NOT_BUILT |= {"experts_implementation", "_experts_implementation"}
_NOT_BUILT |= {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}  # timm loads the files that these name
# Last parts of the names of fields that count blocks; no more than that, as `block_size` counts tokens.
_BLOCKS = {"layer", "layers", "depth", "depths", "block", "blocks"}
# As transformers 5 writes them, since JSON has none: {"__float__": "Infinity"}.
_FLOATS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def skeleton(path: Path, config: dict[str, Any], tensors: int) -> Any:
    """The model of a folder with this config, and this many tensors in its files.

    Raises:
        CheckpointError: for a class that transformers lacks, a config of no such model, or too large a one.
    """
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        problem = f"architectures={brief(names)} is no model of transformers {transformers.__version__}"
        cure = "code that comes with a model is not run here: merge in memory, with lora_lite.merge"
        raise CheckpointError(f"{path / 'config.json'}: {problem}\n  {cure}")
    _check_depth(path, config, tensors)
    model: Any = cls
    try:
        with torch.device("meta"), _bounded(path, tensors):
            return model(model.config_class.from_dict(_harmless(config)))
    except CheckpointError:
        raise
    except Exception as error:  # of any kind: the config is anyone's, and transformers checks it as it goes
        raise CheckpointError(f"{path / 'config.json'} describes no {name}: {brief(error, 300)}") from error


def _harmless(value: Any) -> Any:
    """The config without fields that say nothing of the weights and could fetch or run code, or fill the memory."""
    if isinstance(value, list):
        return [_harmless(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:
        return _FLOATS.get(str(value["__float__"]), value)
    return {name: _harmless(item) for name, item in value.items() if _is_built(name, item, value.get("model_type"))}


def _is_built(name: str, value: Any, model_type: Any) -> bool:
    if name in ("num_labels", "id2label"):
        labels = len(value) if isinstance(value, dict) else value
        return not isinstance(labels, int) or labels <= MOST_LABELS
    if name == "backbone_config":
        return isinstance(value, dict)
    if name in ("backbone", "architecture"):  # timm's models by name; with a scheme or a folder they would be fetched
        plain = isinstance(value, str) and re.fullmatch(r"\w[\w.-]*", value) is not None
        return plain and (name == "architecture" or model_type == "timm_backbone")  # elsewhere the hub is asked
    return name not in _NOT_BUILT


def _check_depth(path: Path, config: dict[str, Any], tensors: int) -> None:
    """CheckpointError for more blocks than there are tensors: a config makes lists as long before any module."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_depth(path, value, tensors)
        elif (unit := name.rpartition("_")[2]) in _BLOCKS:
            counts = [count for count in (value if isinstance(value, list) else [value]) if isinstance(count, int)]
            blocks = sum(counts) if unit == "depths" else max(counts, default=0)  # a list may hold indices of layers
            if blocks > max(tensors, LEAST_BLOCKS):
                raise _too_large(path, f"{brief(name)}={min(blocks, 10**18):.3g}", tensors)


@contextmanager
def _bounded(path: Path, tensors: int) -> Iterator[None]:
    """Within the block, CheckpointError once this thread has built more modules and parameters than such files fill."""
    thread, most = get_ident(), PARTS_A_TENSOR * max(tensors, LEAST_BLOCKS)
    built = 0

    def count(module: Any, name: str, part: Any) -> None:
        nonlocal built
        built += get_ident() == thread
        if built > most:
            raise _too_large(path, f"more than {most} modules and parameters", tensors)

    modules = torch_module.register_module_module_registration_hook(count)
    parameters = torch_module.register_module_parameter_registration_hook(count)
    with modules, parameters:  # which takes the hooks off
        yield


def _too_large(path: Path, what: str, tensors: int) -> CheckpointError:
    files = f"the files hold {tensors} tensors\n  config and files are of two models"
    return CheckpointError(f"{path / 'config.json'}: {what}, and {files}")
