"""The map over layers and scales: what a fit would do there, cell by cell."""

from collections.abc import Sequence
from dataclasses import replace

from ..core.adapter import adapters
from ..core.attach import detach
from .damage import Neutral, finite
from .effect import Effects
from .fit import Fitter, Recipe
from .jobs import Steps

BATCHES = 1
"""A cell's damage is measured on the first batch of neutral requests alone, so that a map takes a minute or two."""
MOST_ROWS = 16
SCALES = {"steer": (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0), "abliteration": (0.25, 0.5, 0.75, 1.0)}


def layers_of(count: int) -> list[int]:
    """The layers of a map of `count` blocks: all, or every second, third, ... of them, but for the last."""
    stride = -(-count // MOST_ROWS)
    return list(range(stride - 1, count, stride))


def spread(layers: Sequence[int]) -> list[int]:
    """An order in which the map is coarse at first, and then filled in."""
    order = [layers[i] for step in (4, 2, 1) for i in range(step // 2, len(layers), step)]
    return list(dict.fromkeys(order))


def heat(
    fitter: Fitter, neutral: Neutral, effects: Effects, recipe: Recipe, scales: Sequence[float], name: str
) -> Steps:
    """The events of a map: "cell" with layer, c, effect and KL; the adapter `name` is on the model in between."""
    captured = yield from fitter.prepare(recipe.lines)
    for layer in spread(layers_of(len(fitter.blocks))):
        there = replace(recipe, layer=layer)
        versions = {name: there.version}
        fitter.attach(there, captured, name)
        try:
            for c in scales:
                effect = yield from effects.effect(recipe.lines, {name: c}, versions)
                kl = yield from neutral.damage({name: c}, versions, BATCHES)
                yield {"kind": "cell", "layer": layer, "c": c, "effect": finite(effect), "kl": finite(kl)}
        finally:
            if name in adapters(fitter.model):
                detach(fitter.model, name)
    yield {"kind": "end"}
