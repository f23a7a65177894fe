"""A step of greedy decoding whose tensors all stay where they are, so that a CUDA graph can hold it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer


class StaticDecoder:
    """Greedy decoding in a StaticCache, a token for each row a step. What a step changes, it changes in place.

    ids         (b, t), the prompts
    length      of the cache, the prompt's tokens included

    Raises ValueError for a model whose cache isn't all of that length.
    """

    def __init__(self, model: Any, ids: Tensor, length: int) -> None:
        self.model, self.prompt = model.eval(), ids.shape[1]
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        if any(type(layer) is not StaticLayer for layer in self.cache.layers):
            raise ValueError(
                f"{type(model).__name__} has layers that don't keep all tokens, such as a sliding window\n"
                f"  measure it with --only training"
            )
        self.columns = torch.arange(length, device=ids.device)
        self.position = torch.tensor([self.prompt], device=ids.device)  # (1,), of the token that a step reads
        with torch.no_grad():
            out = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.first: Tensor = out.logits[:, -1].argmax(-1, keepdim=True)  # (b, 1)
        self.token, self.logits = self.first.clone(), out.logits[:, -1].clone()  # (b, 1) and (b, vocabulary)

    @torch.no_grad()
    def step(self) -> None:
        """Read `token` at `position`; put the next one, and its logits, in their places."""
        is_seen = self.columns <= self.position  # (length,); as (b, 1, 1, length) the model takes it as it is
        out = self.model(
            input_ids=self.token,
            attention_mask=is_seen.expand(len(self.token), 1, 1, -1),
            position_ids=self.position[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits.copy_(out.logits[:, -1])
        self.token.copy_(self.logits.argmax(-1, keepdim=True))
        self.position.add_(1)

    @torch.no_grad()
    def rewind(self) -> None:
        """Back to the end of the prompt: what the cache has after it is overwritten before it is seen."""
        self.token.copy_(self.first)
        self.position.fill_(self.prompt)
        layers: Any = self.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(self.prompt)


def captured(decoder: StaticDecoder, warm: int = 3) -> Callable[[], None]:
    """The step as a CUDA graph, at the end of the prompt. Captured within `lora_lite.capturable`, it goes on with a
    scale, and with values of an adapter, that are set later."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are loaded and workspaces made before a capture, which allows neither
        for _ in range(warm):
            decoder.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    decoder.rewind()
    return graph.replay
