"""Tokens: some rows of an embedding, trained, such as those of new tokens (PEFT's trainable tokens).

    E'[t] = E[t] + Δ[:, k]          for the k-th token id t that is trained, Δ (d, n); other rows are E's
    y[t] += Δ[:, k] · x             with kinds="linear", of a head by itself, whose rows are its outputs

Identity   Δ = 0, bit-exact
Base       never read
Departs    what is trained is the difference, so weight decay pulls to the base's rows; PEFT trains the rows themselves.
           A head that shares the embedding's weight multiplies by the new rows, too
Checked    against PEFT TrainableTokensConfig: outputs, gradients, three SGD steps, with a tied head
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.targets import Target
from ..core.validate import is_token
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..errors import ConfigError

__all__ = ["Tokens", "TokensConfig"]


@dataclass(frozen=True, kw_only=True)
class TokensConfig(BaseConfig):
    """token_ids: the rows. Targets the input embedding by default, and a head that is tied to it."""

    variant: str = "tokens"
    token_ids: Sequence[int] = ()
    kinds: Sequence[str] = ("embedding",)
    tied_weights: str = "as_base"
    target_names: Sequence[str] = (r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared|embed)$",)
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*BaseConfig.SAME_AT_ALL_LAYERS, "token_ids")

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.token_ids
        ok = isinstance(ids, Sequence) and not isinstance(ids, str) and all(map(is_token, ids))
        self.require(ok and len(set(ids)) == len(ids), "token_ids", "token ids, each once")
        object.__setattr__(self, "token_ids", tuple(sorted(ids)))
        self.require(self.kinds in (("embedding",), ("linear",)), "kinds", "('embedding',), or ('linear',) for a head")

    @property
    def is_of_head(self) -> bool:
        return self.kinds == ("linear",)


@register
class Tokens:
    name = "tokens"
    config = TokensConfig
    handles_scale = True

    @staticmethod
    def layer_specs(target: Target, cfg: TokensConfig) -> dict[str, ParamSpec]:
        if not cfg.token_ids:
            raise ConfigError("no token_ids: wanted one or more, such as those of tokens that were added")
        tokens, width = (target.d_out, target.d_in) if cfg.is_of_head else (target.d_in, target.d_out)
        if cfg.token_ids[-1] >= tokens:
            problem = (
                f"token_ids has {cfg.token_ids[-1]}, and this {'head' * cfg.is_of_head or 'embedding'} {tokens} tokens"
            )
            cure = "give new tokens a row first: model.resize_token_embeddings(len(tokenizer))"
            raise ConfigError(f"{problem}\n  {cure}")
        n, ids = len(cfg.token_ids), torch.tensor(cfg.token_ids)
        table = ParamSpec((n,), lambda t: t.copy_(ids), False, True, torch.int64, "never", tokens, is_sorted=True)
        return {"lora_delta": ParamSpec((width, n)), "lora_ids": table}

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        if not layer.cfg.is_of_head:
            return LowRank(layer.lora_ids, layer.lora_delta, layer.scale)
        rows = F.one_hot(layer.lora_ids, layer.out_features).mT  # (o, n)
        return LowRank(layer.lora_delta.mT, rows.to(layer.lora_delta.dtype), layer.scale)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        if layer.cfg.is_of_head:  # not by a one-hot matrix, which a vocabulary makes large
            return y.index_add(-1, layer.lora_ids, (layer.scale * (x @ layer.lora_delta)).to(y.dtype))
        return y + Tokens.low_rank(layer).branch(x)
