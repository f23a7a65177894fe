"""PEFT's trainable tokens: rows of an embedding, by themselves (TRAINABLE_TOKENS) or beside a LoRA.

PEFT writes the new rows, in the order of the setting; here they are differences from the base's, by ascending token.
A head that shares the embedding's weight goes with it on both sides, unless its list differs: then each has its own.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...core.names import file_key
from ...core.state import Site, Tensors
from ...core.targets import Target
from ...errors import CheckpointError, brief
from ..keys import PREFIX
from .folder import PeftFolder
from .parts import Part, Written, config_of
from .ties import tied_paths

MOST = 1 << 20  # tokens of a list


def ids_of(source: PeftFolder, path: str) -> list[int]:
    """The tokens of the rows at this path, in the file's order. Raises CheckpointError."""
    field = "token_indices" if source.settings["peft_type"] == "TRAINABLE_TOKENS" else "trainable_token_indices"
    ids: Any = source.settings.get(field)
    if isinstance(ids, dict):
        fitting = [tokens for name, tokens in ids.items() if path.endswith(name)]  # as PEFT matches them
        ids = fitting[0] if fitting and all(tokens == fitting[0] for tokens in fitting) else None
    ok = isinstance(ids, list) and 0 < len(ids) <= MOST and all(type(i) is int and i >= 0 for i in ids)
    if not ok or len(set(ids)) < len(ids):
        wanted = "wanted a list of different tokens for it"
        raise source.error(f"{field}={brief(source.settings.get(field), 80)} of {path}: {wanted}")
    return list(ids)


def without_tied(root: nn.Module, source: PeftFolder, layers: Mapping[str, BaseLayer]) -> PeftFolder:
    """The folder without the rows of a head that are those of the embedding whose weight it holds, too.

    Raises:
        CheckpointError: for other rows of the same tokens.
    """
    embeddings = {id(layers[path].stored): path for path in _paths(source) if layers[path].kind.category == "embedding"}
    rows, lists = dict(source.tokens), source.settings.get("trainable_token_indices")
    for name, ids in lists.items() if isinstance(lists, dict) else ():
        # PEFT leaves a tied head out where its list is the embedding's.
        if not any(path.endswith(name) or ids_of(source, path) == ids for path in _paths(source)):
            raise source.error(f"trainable_token_indices has {brief(name, 80)}, and the file no rows of it")
    for path in _paths(source):
        other = embeddings.get(id(layers[path].stored), path)
        if other == path or ids_of(source, path) != ids_of(source, other):
            continue
        keys = [source.tokens[f"{p}.lora_delta"] for p in (path, other)]
        if not torch.equal(*source.header.read(keys).values()):
            raise source.error(f"{path} has other rows than {other}, whose weight it shares, for the same tokens")
        del rows[f"{path}.lora_delta"]
    return replace(source, tokens=rows)


def _paths(source: PeftFolder) -> list[str]:
    return [key.rpartition(".")[0] for key in source.tokens]


def parts(source: PeftFolder, targets: Mapping[str, Target], layers: Mapping[str, BaseLayer]) -> list[Part]:
    """A part for each list of tokens. Raises CheckpointError."""
    groups: dict[tuple[tuple[int, ...], str, str], dict[str, Target]] = {}
    for path in _paths(source):
        ids, target, key = ids_of(source, path), targets[path], source.tokens[f"{path}.lora_delta"]
        kind = layers[path].kind.category if path in layers else "embedding"
        n, width = (target.d_out, target.d_in) if kind == "linear" else (target.d_in, target.d_out)
        shape = source.header.entries[key].shape
        wanted = (len(ids), width) if path in layers else (len(ids), *shape[1:2])  # the width is the base's
        if len(shape) != 2 or shape != wanted:
            raise source.error(f"{key} is {brief(shape)}, wanted {(len(ids), width)}: a row for each of its tokens")
        if path in layers and max(ids) >= n:
            cure = (
                f"the adapter is of a larger vocabulary: model.resize_token_embeddings(...), to {max(ids) + 1} or more"
            )
            raise source.error(f"{path} has {n} tokens, and the file has rows of token {max(ids)}\n  {cure}")
        shared = [p for p in _paths(source) if p in layers and layers[p].stored is layers[path].stored]
        tied = "apart" if kind == "linear" or len(shared) > 1 else "as_base"
        groups.setdefault((tuple(sorted(ids)), kind, tied), {})[path] = target

    def values(stored: Tensors, path: str, layer: BaseLayer | None, base: BaseLayer | None) -> dict[str, Tensor]:
        rows = stored[f"{path}.lora_delta"]  # (n, d)
        if base is None or layer is None:
            return {"rows": rows}
        ids, old = torch.tensor(ids_of(source, path)), stored.get(file_key(path, "weight"))
        if old is not None:  # the rows are of an embedding that is in the file, too
            old = old if layer.kind.category == "linear" else layer.oriented(old).mT  # (tokens, d)
        else:
            weight = base.weight() if base.storage.is_dense else base.dense_weight()  # (d, tokens), or (tokens, d)
            old = (weight if layer.kind.category == "linear" else weight.mT).detach().cpu()
        dtype = torch.promote_types(torch.promote_types(rows.dtype, old.dtype), torch.float32)
        delta = (rows.to(dtype) - old[ids].to(dtype))[ids.argsort()]
        return {"lora_delta": delta.mT.contiguous()}  # (d, n)

    result = []
    for (tokens, _, tied), at_layers in groups.items():
        fields = {"token_ids": tokens, "tied_weights": tied}
        cfg = config_of(source, "tokens", at_layers, layers, {}, True, source.tokens, **fields)
        result.append(Part(cfg, at_layers, {}, values, of_base=True))
    return result


def written(root: nn.Module, sites: list[Site], weights: Mapping[str, Tensor], is_lora: bool) -> Written:
    """The rows beside a LoRA, or by themselves.

    weights     the new ones, by path, of embeddings that are written whole, too

    Raises:
        CheckpointError: for what PEFT doesn't tie alike.
    """
    tensors: dict[str, Tensor] = {}
    lists: dict[str, list[int]] = {}
    holders = Counter(id(p) for module in root.modules() for p in module._parameters.values())
    for site in sites:
        tied = tied_paths(root, site)
        sharing = [other.cfg.token_ids for other in sites if other.base.stored is site.base.stored]
        is_split = len(set(sharing)) > 1  # PEFT ties them, unless their lists differ
        if holders[id(site.base.stored)] > 1 and not (tied or is_split or site.base.kind.category == "linear"):
            problem = "PEFT gives the rows to all that share its weight, and this adapter to one"
            raise CheckpointError(f"{site.path}: {problem}\n  keep it as our file (lora_lite.save)")
        delta, ids = site.tensor("lora_delta").detach(), list(site.cfg.token_ids)  # (d, n)
        weight = site.base.stored.detach() if site.base.storage.is_dense else site.base.dense_weight()
        rows = weights.get(site.path, weight)[ids].to(delta.device)  # (n, d)
        rows = rows + delta.mT.to(torch.promote_types(delta.dtype, rows.dtype))
        lists[site.path] = ids
        name = "token_adapter.trainable_tokens_delta" if is_lora else "trainable_tokens_delta"
        for path in [site.path, *([] if is_lora else tied)]:
            tensors[f"{PREFIX}{path}.{name}"] = rows
    if is_lora:
        return tensors, {"trainable_token_indices": lists}
    (ids, *others) = lists.values()
    if any(other != ids for other in others):
        raise CheckpointError("PEFT has one list of tokens for all embeddings\n  save them as adapters of their own")
    settings = {"peft_type": "TRAINABLE_TOKENS", "token_indices": ids, "target_modules": list(lists)}
    return tensors, settings | {"init_weights": True}
