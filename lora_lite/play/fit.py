"""A vector or an ablation from two lists of sentences, a sentence at a step."""

import hashlib
from collections import OrderedDict
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.stacks import find_stacks
from ..core.attach import attach
from ..core.variant import config_for
from ..errors import ConfigError
from ..measure.capture import Statistics, capture
from ..measure.contrast import contrast_of
from .effect import SIDES, Lines, batch_of
from .forward import at_scales
from .jobs import Event

MOST_SENTENCES = 400  # of one fit; their activations are remembered, so that one at another layer runs no forward
METHODS = ("steer", "abliteration")
DIRECTIONS = ("difference", "pca")


@dataclass(frozen=True)
class Recipe:
    """All that a fitted adapter is made of: `layer` is the index of the block whose direction it has."""

    lines: Lines
    method: str
    direction: str
    layer: int

    @property
    def version(self) -> str:
        """A hash of all that the fit depends on."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def blocks_of(model: Any) -> list[str]:
    """The paths of the model's blocks."""
    modules = dict(model.named_modules())
    return list(find_stacks(modules).blocks(modules))


class Fitter:
    """The mean activation of each sentence at each block, remembered by the sentence."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.blocks = model, tokenizer, blocks_of(model)
        self.sentences: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def prepare(self, lines: Lines) -> Generator[Event | None, None, Mapping[str, Mapping[str, Statistics]]]:
        """The statistics of the lines of both sides that are fitted to, by block; yields how far it is."""
        wanted = [line for side in SIDES for line in lines.fitted(side)]
        vectors: dict[str, dict[str, Tensor]] = {}
        for i, line in enumerate(wanted):
            if line in self.sentences:
                self.sentences.move_to_end(line)
            else:
                self.sentences[line] = self._vectors(line)
                yield {"kind": "progress", "done": i + 1, "of": len(wanted)}
            vectors[line] = self.sentences[line]
            while len(self.sentences) > MOST_SENTENCES:
                self.sentences.popitem(last=False)
        stacked = {
            side: {block: torch.cat([vectors[line][block] for line in lines.fitted(side)]) for block in self.blocks}
            for side in SIDES
        }  # (n, d) each
        return {side: {block: _statistics(x) for block, x in by_block.items()} for side, by_block in stacked.items()}

    def _vectors(self, line: str) -> dict[str, Tensor]:
        """The mean (1, d) over the sentence's tokens at the output of each block, of the base."""
        batch, is_word = batch_of(self.tokenizer, [line])
        if not is_word.any():
            raise ConfigError(f"the line {line!r} has no token\n  leave it out")
        with at_scales(self.model, {}):
            statistics = capture(self.model, [batch], self.blocks, positions=is_word, progress=False)
        return {block: seen.mean[None].float().cpu() for block, seen in statistics.items()}

    def attach(self, recipe: Recipe, captured: Mapping[str, Mapping[str, Statistics]], name: str) -> None:
        """The adapter of a recipe, on the model at scale 0."""
        block = self.blocks[recipe.layer]
        sides = {side: {block: by_block[block]} for side, by_block in captured.items()}
        contrast = contrast_of(sides, method=recipe.direction)[block]
        make: Any = config_for(recipe.method)
        if recipe.method == "steer":
            cfg = make(kinds="block", layers=[recipe.layer])
            given: Any = {block: contrast.step.float()[None]}
        else:
            cfg, given = make(), contrast.directions  # one direction out of all that any layer writes
        attach(self.model, cfg, name, calibration_data={"directions": given}).scale = 0.0


def _statistics(x: Tensor) -> Statistics:
    vectors = x.double()
    return Statistics(len(x), vectors.mean(0), vectors.std(0, correction=0), samples=x)
