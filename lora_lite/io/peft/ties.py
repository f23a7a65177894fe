"""PEFT's ensure_weight_tying, of an embedding and a head of one weight: the head has the embedding's factors, mirrored.

PEFT writes both. Here they are one adapter, at the embedding, with tied_weights="together".
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...core.state import Site
from ...errors import CheckpointError
from ..keys import PREFIX
from .folder import PeftFolder
from .patterns import alphas_of, ranks_of
from .settings import flag_of

_MIRRORED = {"lora_A": "lora_B", "lora_B": "lora_A"}  # of x (W + s B A)ᵀ: A' = Bᵀ, B' = Aᵀ


def without_heads(root: nn.Module, source: PeftFolder, layers: Mapping[str, BaseLayer]) -> PeftFolder:
    """The folder without the tensors of heads that mirror an embedding's, and base copies there; of a model where no
    embedding's weight is another module's, too, without the setting, as PEFT takes it.

    layers      by their paths in the file

    Raises:
        CheckpointError: where such a pair isn't tied in this model, a head's tensors aren't the embedding's, or PEFT
            scales them differently.
    """
    if not flag_of(source, "ensure_weight_tying"):
        return source
    embeddings = {id(layer.stored): path for path, layer in layers.items() if layer.kind.category == "embedding"}
    heads = {
        path for path, layer in layers.items() if path not in embeddings.values() and id(layer.stored) in embeddings
    }
    holders = Counter(id(p) for module in root.modules() for p in module._parameters.values())
    if not any(holders[weight] > 1 for weight in embeddings):
        return replace(source, settings=source.settings | {"ensure_weight_tying": False})
    numbers = source.header.read() if heads else {}
    for head in heads:
        embedding = embeddings[id(layers[head].stored)]
        others = [
            key
            for ours, key in source.keys.items()
            for path, _, name in [ours.rpartition(".")]
            if path in (head, embedding) and name not in _MIRRORED
        ]
        if others:
            raise source.error(f"ensure_weight_tying: {others[0]} is neither of the two factors that it ties")
        for name, mirrored in _MIRRORED.items():
            key, other = (source.keys.get(f"{path}.{n}") for path, n in ((head, name), (embedding, mirrored)))
            if key is None or other is None or not _is_transposed(numbers[key], numbers[other]):
                raise source.error(f"ensure_weight_tying: {head} has another adapter than {embedding}, transposed")
        _check_scaling(source, head, embedding)
    keys, base = (
        {ours: key for ours, key in keys.items() if ours.rpartition(".")[0] not in heads}
        for keys in (source.keys, source.base)
    )
    return replace(source, keys=keys, base=base)


def _is_transposed(a: Tensor, b: Tensor) -> bool:
    return a.ndim == b.ndim == 2 and torch.equal(a, b.mT)


def _check_scaling(source: PeftFolder, head: str, embedding: str) -> None:
    """PEFT takes r and alpha of a head from its own path, though the factors are the embedding's."""
    alphas, ranks = (numbers(source, (head, embedding)) for numbers in (alphas_of, ranks_of))
    rslora = flag_of(source, "use_rslora")
    scales = [alphas[path] / (math.sqrt(ranks[path]) if rslora else ranks[path]) for path in (head, embedding)]
    if not math.isclose(*scales):
        raise source.error(
            f"ensure_weight_tying: PEFT scales {head} by {scales[0]:.5g}, and {embedding} by {scales[1]:.5g}\n"
            f"  here they are one adapter with one scaling; such a folder works with PEFT only"
        )


def mirrored(root: nn.Module, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors of the modules that share a site's weight, by its keys.

    Raises:
        CheckpointError: for what PEFT doesn't tie.
    """
    if not site.base.ties:
        return {}
    if tensors.keys() != _MIRRORED.keys():
        problem = f"{site.path}: PEFT ties a LoRA of two factors, and {site.cfg.variant!r} has {', '.join(tensors)}"
        raise CheckpointError(f"{problem}\n  give rank= to write a plain LoRA, or keep it as our file (lora_lite.save)")
    return {
        f"{PREFIX}{path}.{other}.weight": tensors[name].mT
        for path in tied_paths(root, site)
        for name, other in _MIRRORED.items()
    }


def tied_paths(root: nn.Module, site: Site) -> list[str]:
    """The paths of the modules that share a site's weight and are adapted with it."""
    paths = {id(module): path for path, module in root.named_modules()} if site.base.ties else {}
    return [paths[id(holder)] for holder, *_ in site.base.ties]
