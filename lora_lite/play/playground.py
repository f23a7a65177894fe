"""The model with its adapters, as the page sees them, and the jobs that the page can ask for."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

from ..core.attach import detach
from ..dtypes import dtype_name
from ..errors import ConfigError
from ..io.checkpoint import load
from .damage import FURTHEST, Neutral, budgets, finite
from .effect import Effects
from .fields import MOST_SCALE
from .fit import Fitter, Recipe
from .forward import Scales
from .generate import Column, Room, write
from .heat import SCALES, heat, layers_of
from .jobs import Event, Steps

MOST_ADAPTERS = 8
MOST_COLUMNS = 9  # of a sweep
LEAST_16_BIT = 0.005  # nats of a budget: adapters that do nothing have been seen to cost 0.001 in bfloat16


@dataclass(frozen=True)
class Entry:
    """An adapter on the page. Its name on the model is its id, which is never used again, not by another server either:
    a page may outlive one. `label` is what people read, and what a link names it by.

    version     what its divergences are remembered by: two fits of one recipe share it
    start       where its slider starts
    """

    id: str
    label: str
    version: str
    start: float
    says: str
    recipe: Recipe | None = None


class Playground:
    """All of it is used on the thread that owns the model."""

    def __init__(self, model: Any, tokenizer: Any, name: str, prompts: list[str] | None = None) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.entries: dict[str, Entry] = {}
        self.neutral, self.effects = Neutral(model, tokenizer, prompts), Effects(model, tokenizer)
        self.fitter = Fitter(model, tokenizer)
        self.room = Room()
        self._count, self._process = 0, secrets.token_hex(2)

    # ---- adapters ---------------------------------------------------------------------------------

    def load(self, path: Path) -> None:
        """An adapter of the command line: a file or folder of any format that `load` knows."""
        self._check_room()
        name = self._new_id()
        adapter = load(self.model, path, name)
        saved, adapter.scale = adapter.scale, 0.0
        start = max(-MOST_SCALE, min(MOST_SCALE, saved))
        says = f"{adapter.variant}, {adapter.counts()}"
        if start != saved:
            says += f"; its file has c = {saved:g}, beyond this page's {start:g}"
        label = self._free_label(path.stem if path.suffix else path.name)
        self.entries[name] = Entry(name, label, f"file {name}", start, says)

    def _new_id(self) -> str:
        self._count += 1
        return f"a{self._count}_{self._process}"

    def _free_label(self, label: str) -> str:
        """The label, with a number where others have it."""
        taken = {entry.label for entry in self.entries.values()}
        return next(free for i in count(1) if (free := label if i == 1 else f"{label} {i}") not in taken)

    def _check_label(self, label: str, name: str | None) -> None:
        """Raises ConfigError for a label that another adapter than this one has."""
        if any(entry.label == label and entry.id != name for entry in self.entries.values()):
            raise ConfigError(f"another adapter is called {label!r}\n  choose another name")

    def _check_room(self) -> None:
        if len(self.entries) >= MOST_ADAPTERS:
            raise ConfigError(f"{MOST_ADAPTERS} adapters are on the page\n  remove one first")

    def entry(self, name: str) -> Entry:
        """Raises ConfigError for one that isn't there."""
        if name not in self.entries:
            raise ConfigError("this adapter is not on the page any more\n  load the page again")
        return self.entries[name]

    def remove(self, name: str) -> None:
        """Take an adapter off the model and the page. Raises ConfigError for one that isn't there."""
        self.entry(name)
        detach(self.model, name)
        del self.entries[name]

    def rename(self, name: str, label: str) -> None:
        """Give an adapter another label. Raises ConfigError for one that another has."""
        entry = self.entry(name)
        self._check_label(label, name)
        self.entries[name] = replace(entry, label=label)

    def scales(self, given: Mapping[str, float]) -> dict[str, float]:
        """Raises ConfigError for an adapter that isn't there."""
        return {self.entry(name).id: c for name, c in given.items()}

    def versions(self, scales: Scales) -> dict[str, str]:
        """The version of each of these adapters: measurements are remembered by it."""
        return {name: self.entry(name).version for name in scales}

    def state(self) -> dict[str, Any]:
        """All that the page needs to know when it opens."""
        presets = resources.files(__package__).joinpath("presets.json").read_text(encoding="utf-8")
        dtype = dtype_name(next(self.model.parameters()).dtype)
        return {
            "model": self.name,
            "dtype": dtype,
            "blocks": len(self.fitter.blocks),
            "layers": layers_of(len(self.fitter.blocks)),
            "map_scales": SCALES,
            "neutral": len(self.neutral.prompts),
            "furthest": FURTHEST,
            "system": self.tokenizer.chat_template is not None,
            "adapters": self.listed(),
            "presets": json.loads(presets),
        }

    def listed(self) -> list[dict[str, Any]]:
        """The adapters, for the page."""
        return [
            {
                "id": entry.id,
                "label": entry.label,
                "start": entry.start,
                "says": entry.says,
                "fitted": entry.recipe is not None and entry.recipe.lines.is_split,
                "layer": None if entry.recipe is None else entry.recipe.layer,
                "method": None if entry.recipe is None else entry.recipe.method,
            }
            for entry in self.entries.values()
        ]

    # ---- jobs -------------------------------------------------------------------------------------

    def write(self, scales: Scales, prompt: str, system: str, **options: Any) -> Steps:
        """Two columns, or three: the base, the adapted model, and the base with a system prompt."""
        columns = [Column("base"), Column("adapted", self.scales(scales), compared=True)]
        if system:
            columns.append(Column("system", system=system))
        yield from write(self.model, self.tokenizer, columns, prompt, room=self.room, **options)

    def sweep(self, scales: Scales, name: str, cs: Sequence[float], prompt: str, **options: Any) -> Steps:
        """A column for each c of one adapter, the others at their sliders; all in one forward."""
        rest = self.scales(scales)
        columns = [Column(str(i), rest | {self.entry(name).id: c}, compared=True) for i, c in enumerate(cs)]
        yield from write(self.model, self.tokenizer, columns, prompt, room=self.room, **options)

    def measure(self, scales: Scales, target: float) -> Steps:
        """The cost of the sliders, the effect of the fits among them on their held-out lines, and the budgets.

        Raises:
            ConfigError: for a budget that is lost in the rounding of 16 bits.
        """
        dtype = next(self.model.parameters()).dtype
        if dtype.itemsize == 2 and target < LEAST_16_BIT:
            problem = (
                f"a budget of {target:g} nats is too near to what the rounding of {dtype_name(dtype)} costs by itself"
            )
            raise ConfigError(f"{problem}\n  write {LEAST_16_BIT:g} or more, or start the page with --dtype float32")
        on = self.scales(scales)
        versions = self.versions(on)
        kl = yield from self.neutral.damage(on, versions)
        yield {"kind": "damage", "kl": finite(kl)}
        for name, c in on.items():
            recipe = self.entry(name).recipe
            if recipe is not None and recipe.lines.is_split:
                effect = yield from self.effects.effect(recipe.lines, {name: c}, versions)
                yield {"kind": "effect", "adapter": name, "c": c, "effect": finite(effect)}
        yield from budgets(self.neutral, versions, target)
        yield {"kind": "end"}

    def system_prompt(self, system: str, name: str | None) -> Steps:
        """The damage of a system prompt, and its effect on the lines that one of the fits hasn't seen."""
        kl = yield from self.neutral.system_damage(system)
        event: Event = {"kind": "system", "kl": finite(kl), "effect": None}
        recipe = None if name is None else self.entry(name).recipe
        if recipe is not None and recipe.lines.is_split:
            effect = yield from self.effects.effect(recipe.lines, {}, {}, system)
            event["effect"] = finite(effect)
        yield event

    def fit(self, recipe: Recipe, label: str, replaces: str | None) -> Steps:
        """A new adapter, or another in the place of one; the old one stays until the new one is on the model."""
        self._check_label(label, replaces)
        if replaces is None:
            self._check_room()
        captured = yield from self.fitter.prepare(recipe.lines)
        old = None if replaces is None else self.entry(replaces)
        if old is None:
            self._check_room()
        self._check_label(label, replaces)
        name = self._new_id()
        self.fitter.attach(recipe, captured, name)
        where = f"block {recipe.layer}" if recipe.method == "steer" else f"the direction of block {recipe.layer}"
        entry = Entry(name, label, recipe.version, 0.5, f"{recipe.method}, {where}", recipe)
        if old is None:
            self.entries[name] = entry
        else:
            self.entries = {
                entry.id if key == old.id else key: entry if key == old.id else value
                for key, value in self.entries.items()
            }
            detach(self.model, old.id)
        yield {"kind": "fitted", "id": name, "adapters": self.listed()}

    def map(self, recipe: Recipe, scales: Sequence[float]) -> Steps:
        """The heat map of a recipe, whose layer doesn't matter."""
        if not recipe.lines.is_split:
            raise ConfigError("the map is measured on every fourth line\n  write four lines or more on each side")
        yield from heat(self.fitter, self.neutral, self.effects, recipe, scales, f"map{self._new_id()}")
