"""The base's own tensors with new values in a PEFT folder: heads (modules_to_save), biases, norms, resized embeddings.

PEFT writes the values, and an adapter here is their difference from the base's, in float32 at least: of a quantised
layer from the numbers that it computes with. The variants are full, bias where bias= alone was trained, and norm for
LN_TUNING on a norm.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ...base.layer import BaseLayer, find_layers, shapes_of
from ...base.stacks import find_stacks
from ...base.storage import DENSE
from ...core.names import file_key
from ...core.state import Tensors
from ...core.targets import Target
from ...errors import CheckpointError, brief
from ..keys import resolve
from ..raw import base_tensors, same_tensor
from . import tokens
from .folder import PeftFolder
from .parts import Part, config_of

VARIANTS = ("full", "norm", "bias", "tokens")  # of the parts here, and of tokens.py


def placed(root: nn.Module, source: PeftFolder) -> tuple[PeftFolder, dict[str, Target], dict[str, BaseLayer]]:
    """The folder with this model's paths in the keys of whole tensors and rows, and the layers of these, by their path.

    Tensors that are the model's own are left out, but for those that were trained by the settings.

    Raises:
        CheckpointError: for a tensor that is none of this model's, and a new one where no layer here holds it.
    """
    file, live = source.header.path, base_tensors(root)
    known = find_layers(dict(root.named_modules()))
    holders: dict[str, tuple[BaseLayer, str]] = {}
    for layer in known.values():
        module = layer.path.removesuffix(layer.kind.prefix).removesuffix(".") if layer.kind.prefix else layer.path
        holders[file_key(module, layer.kind.weight)] = layer, "weight"
        if layer.bias is not None:
            holders.setdefault(file_key(module, layer.kind.bias), (layer, "bias"))
    keys = resolve(file, [*source.whole, *source.unused], set(live), type(root).__name__, "whole tensors")
    parameters = {key: id(p) for key, p in root.named_parameters(remove_duplicate=False) if key in live}
    _check_saved(root, source, set(keys.values()), parameters)
    embeddings = {key for key, (layer, _) in holders.items() if layer.kind.category == "embedding"}
    source, whole = _without_tied(source, keys, parameters, embeddings), {}
    for ours, key in source.whole.items():
        holder, tensor = holders.get(keys[ours]), live[keys[ours]]
        is_trained = _is_trained(source, ours)
        if holder is not None and is_trained:
            whole[file_key(holder[0].path, holder[1])] = key
            continue
        storage = DENSE if holder is None or holder[1] == "bias" else holder[0].storage
        same = same_tensor(tensor, source.header, key, storage)
        if same is not True and holder is not None:
            whole[file_key(holder[0].path, holder[1])] = key
        elif same is not True:
            relation = "can not be compared with" if same is None else "is not"
            raise CheckpointError(
                f"{file}: {key} {relation} this model's {keys[ours]}, and no layer that an adapter goes on holds it\n"
                f"  nothing is dropped: such an adapter works with PEFT only, or on the base that has it"
            )
    for ours, key in source.unused.items():
        if same_tensor(live[keys[ours]], source.header, key, DENSE) is False:
            logger.warning(f"{file}: {key} isn't this model's {keys[ours]}; PEFT uses it while the adapter is off only")
    paths = resolve(file, [key.rpartition(".")[0] for key in source.tokens], set(known), type(root).__name__)
    rows = {f"{paths[ours.rpartition('.')[0]]}.lora_delta": key for ours, key in source.tokens.items()}
    source = tokens.without_tied(root, replace(source, whole=whole, tokens=rows), known)
    stacks = find_stacks(dict(root.named_modules()), shapes_of(known.values()))
    return (
        source,
        {path: Target.of(known[path], stacks) for path in source.beside},
        {p: known[p] for p in source.beside},
    )


def _check_saved(root: nn.Module, source: PeftFolder, keys: Container[str], parameters: Iterable[str]) -> None:
    """Raises CheckpointError for a module of modules_to_save that isn't whole in the file."""
    names = tuple(source.settings.get("modules_to_save") or ())
    saved = [path for path, _ in root.named_modules() if names and path.endswith(names)]
    lacking = [key for key in parameters for path in saved if key.startswith(f"{path}.") and key not in keys]
    if lacking:
        raise source.error(f"modules_to_save={brief(list(names), 80)}, and the file has no {lacking[0]}")


def _is_trained(source: PeftFolder, ours: str) -> bool:
    """Do the settings name it, so that it isn't there for the sake of a new vocabulary?"""
    path, _, name = ours.rpartition(".")
    is_whole = source.settings["peft_type"] == "LN_TUNING" and ".ln_tuning_layers." in source.whole[ours]
    return is_whole or source.is_saved(path) or (source.trains_biases and name == "bias")


def _without_tied(
    source: PeftFolder, keys: Mapping[str, str], parameters: Mapping[str, int], embeddings: Container[str]
) -> PeftFolder:
    """The folder without the weight of a head that is equal to the embedding's, where the model has one for both and
    PEFT wrote both for a new vocabulary, or kept them tied.

    keys            the model's key of each whole tensor
    parameters      the parameter that each key of the model is of
    """
    whole, is_tied = dict(source.whole), False
    firsts = {parameters[keys[ours]]: ours for ours in whole if keys[ours] in embeddings and keys[ours] in parameters}
    for ours, key in source.whole.items():
        embedding = firsts.get(parameters.get(keys[ours], 0), ours)
        if embedding == ours or (_is_trained(source, ours) and not source.settings.get("ensure_weight_tying")):
            continue
        if torch.equal(*source.header.read([key, source.whole[embedding]]).values()):
            is_tied = True
            del whole[ours]
    return replace(source, whole=whole, is_tied=is_tied)


def parts(source: PeftFolder, targets: Mapping[str, Target], layers: Mapping[str, BaseLayer]) -> list[Part]:
    """A part for each method beside the folder's own, or in its place: full, norm, bias, tokens.

    layers      by the path in the file; none without a model

    Raises:
        CheckpointError: for a tensor of another shape, or settings of other tokens. No tensor is read.
    """
    chosen: dict[str, dict[str, Target]] = {"norm": {}, "full": {}, "bias": {}}
    for ours, key in source.whole.items():
        path = ours.rpartition(".")[0]
        if path in layers:
            _check_shape(source, ours, layers[path])
        is_norm = targets[path].is_diagonal and ".ln_tuning_layers." in key
        has_weight = f"{path}.weight" in source.whole
        variant = "norm" if is_norm and has_weight else "full" if has_weight else "bias"
        chosen[variant][path] = targets[path]
    fields: dict[str, Any] = {"tied_weights": "together"} if source.is_tied else {}
    result = []
    for variant, at_layers in chosen.items():
        if at_layers:
            more = fields if variant == "full" else {}
            cfg = config_of(source, variant, at_layers, layers, {}, True, source.whole, **more)
            result.append(Part(cfg, at_layers, {}, _differences, of_base=True))
    return result + tokens.parts(source, targets, layers)


def _check_shape(source: PeftFolder, ours: str, layer: BaseLayer) -> None:
    """Raises CheckpointError."""
    path, _, name = ours.rpartition(".")
    key, sizes = source.whole[ours], (layer.d_out, layer.d_in)
    if name == "bias":
        wanted = tuple(layer.bias.shape) if layer.bias is not None else (layer.d_out,)
    else:
        wanted = tuple(layer.stored.shape) if layer.storage.is_dense else sizes
    shape = source.header.entries[key].shape
    if shape == wanted:
        return
    cure = "the adapter belongs to another base, or to one with another number of labels"
    has_rows = len(shape) == len(wanted) == 2 and shape[1] == wanted[1]
    if has_rows and (layer.kind.category == "embedding" or not source.is_saved(path)):
        cure = f"it has another vocabulary: model.resize_token_embeddings({shape[0]}) before load_peft"
    raise CheckpointError(
        f"{source.header.path}: {key} is {brief(shape)}, and this model's {path}.{name} is {wanted}\n  {cure}"
    )


def _differences(stored: Tensors, path: str, layer: BaseLayer | None, base: BaseLayer | None) -> dict[str, Tensor]:
    """ΔW and Δb of a layer; without one the file's values by their own names, which are no adapter's."""
    new = {name: stored[key] for name in ("weight", "bias") if (key := file_key(path, name)) in stored}
    if base is None:
        return new
    result = {}
    if "weight" in new:
        weight = new["weight"]
        if layer is None:  # it is known by its shape alone, and an embedding's lies the other way round
            weight = weight.flatten(1) if weight.ndim > 2 else weight
            weight = weight.mT if weight.shape == (base.d_in, base.d_out) else weight
        elif layer.kind.has_matrix:
            weight = layer.oriented(weight)
        result["lora_weight"] = _minus(weight, _numbers(base, weight))
    if base.bias is not None:
        result["lora_bias"] = _minus(new["bias"], base.bias) if "bias" in new else torch.zeros_like(base.bias)
    return {name: tensor.cpu() for name, tensor in result.items()}


def _numbers(base: BaseLayer, like: Tensor) -> Tensor:
    """The base's weight as it computes with it: a vector of a norm, a matrix of each expert."""
    if like.ndim == 1:
        return base.stored
    if like.ndim == 3:
        return torch.stack([base.dense_weight(i) for i in range(base.experts)])
    return base.dense_weight()


def _minus(new: Tensor, old: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    return new.to(old.device, dtype) - old.detach().to(dtype)
