"""A method of PEFT's as a table: the names of its tensors in a file, and of its settings in a config.

A `Format` is all that most methods need, for both ways (`by_table.py` reads and writes it). Where PEFT's tensors have
other shapes than ours, or a layer's tensors say what its config is, a function of the table says how.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...base.layer import BaseLayer
from ...core.state import Site
from ...core.targets import Target

if TYPE_CHECKING:
    from ..factors import Layers
    from .folder import PeftFolder

Named = dict[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """A field of our config as a setting of PEFT's.

    name        PEFT's
    default     PEFT's, for a folder without it; its type is what the value has to be (true, 1, 1.0, "a" or None, which
                lets an integer or null pass)
    pattern     the setting with other values at some layers, by the end of their path: "alpha_pattern"
    """

    name: str
    default: bool | int | float | str | None
    pattern: str = ""


@dataclass(frozen=True)
class AtLayer:
    """One layer of a folder."""

    source: "PeftFolder"
    path: str  # in the file
    target: Target
    layer: BaseLayer | None  # None without a model
    values: Mapping[str, Any]  # of the config, as the settings and their patterns have them
    shapes: Mapping[str, Shape]  # of the layer's tensors in the file, by our name


def _same(_: object, tensors: Named) -> Named:
    return tensors


def _every(_: BaseLayer) -> bool:
    return True


@dataclass(frozen=True)
class Format:
    """How PEFT keeps one method.

    tensors     our name of a tensor at a layer -> what follows the layer's path in PEFT's key: "lora_block" ->
                "miss_block", "lora_R" -> "oft_R.weight". A "*" at the end of both stands for the same rest. The tensors
                that a method has and this lacks aren't in the file: they are the base's, and our `init` makes them
    fields      our field -> PEFT's setting
    embedding   `tensors` on an embedding, where PEFT calls them otherwise
    shared      our name of a tensor that the adapter has once -> PEFT's key after "base_model."; "*" as above
    copies      what follows a layer's path in a key that is a shared tensor again -> our name of that
    zeros       the same of tensors that hold nothing but zeros, and aren't ours
    unread      as `shared`'s keys, of tensors that say nothing which the others don't
    when        settings -> is it this method? For several methods of one peft_type
    given       settings that are written, and say nothing else: {"init_lora_weights": "mica"}
    free        settings that say nothing which the tensors don't, such as how they started
    lacks       the common settings that its config doesn't have ("bias", "fan_in_fan_out", ...)
    only        what `bias` is called where the targets' own are trained: "vera_only"; "" where it hasn't
    takes       layer -> has PEFT the method on it?
    read        folder -> values of our config beside `fields`. Raises what source.error gives
    write       our config -> settings beside `fields`
    by_layer    sites by path -> settings beside `fields` that the layers make together. Raises CheckpointError
    at_layer    values of our config that a layer's tensors tell, such as a rank
    at_site     the same for writing: of a site whose config leaves them open
    rows        our names of shared tensors of which each row is a tensor of PEFT's: "v.3", by `shared` of "v.*"
    once        (the file's tensors by our keys, its layers by path, none without a model) -> shared tensors that it has
                beside those. Raises CheckpointError
    at_place    (our config, a layer's number among the layers in module order, how many there are, its tensors by our
                names) -> tensors that it has beside those; None for none
    ours        (layer, PEFT's tensors of a layer by our names, and the shared ones by our keys) -> ours
    of_base     the same, where some of ours are made from the live weight: (layer, cfg, tensors of the layer, those
                that all share) -> ours. Raises CheckpointError
    theirs      (site, ours) -> PEFT's. Raises CheckpointError for what PEFT hasn't
    settle      (settings, PEFT's tensors by key, layers) -> the settings as they are written. Raises CheckpointError
    shapes      site -> the shapes of PEFT's tensors by our names; None: those of `theirs`
    shapes_by   the same by the shapes in the file, which say more than the settings: (site, shapes) -> shapes
    sizes       the shapes of a layer's tensors by our names -> (d_in, d_out), 0 for one that they don't tell, where
                there is no model; None: the folder is refused then
    tables      our names of the tensors that hold integers; "*" as above
    reads_base  16-bit tensors are compared with numbers of the live weight, so they are loaded in float32
    anchored    may a pattern's key begin with "^"? So PEFT writes it by `re.match(rf"(.*\\.)?({key})$")`
    """

    peft_type: str
    variant: str
    tensors: Mapping[str, str]
    fields: Mapping[str, Setting] = field(default_factory=dict)
    embedding: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    when: Callable[[Mapping[str, Any]], bool] = lambda settings: True
    given: Mapping[str, Any] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    only: str = ""
    takes: Callable[[BaseLayer], bool] = _every
    read: Callable[["PeftFolder"], dict[str, Any]] = lambda source: {}
    write: Callable[[Any], dict[str, Any]] = lambda cfg: {}
    by_layer: Callable[[Mapping[str, Site]], dict[str, Any]] = lambda sites: {}
    at_layer: Callable[[AtLayer], dict[str, Any]] = lambda place: {}
    at_site: Callable[[Site], dict[str, Any]] = lambda site: {}
    once: Callable[[Named, Mapping[str, BaseLayer]], Named] = lambda tensors, layers: {}
    at_place: Callable[[Any, int, int, Named], Named] | None = None
    ours: Callable[[BaseLayer, Named], Named] = _same
    of_base: Callable[[BaseLayer, Any, Named, Named], Named] | None = None
    theirs: Callable[[Site, Named], Named] = _same
    settle: Callable[[dict[str, Any], Named, "Layers"], dict[str, Any]] = lambda settings, tensors, layers: settings
    shapes: Callable[[Site], dict[str, Shape]] | None = None
    shapes_by: Callable[[Site, Mapping[str, Shape]], dict[str, Shape]] | None = None
    sizes: Callable[[Mapping[str, Shape]], tuple[int, int]] | None = None
    tables: tuple[str, ...] = ()
    reads_base: bool = False
    anchored: bool = True

    @property
    def settings(self) -> set[str]:
        """All settings that it understands."""
        patterns = {setting.pattern for setting in self.fields.values() if setting.pattern}
        return {setting.name for setting in self.fields.values()} | patterns | {*self.given, *self.free}

    def ours_of(self, end: str) -> str | None:
        """Our name of a tensor at a layer, by what follows the layer's path in PEFT's key."""
        pairs = [*self.tensors.items(), *self.embedding.items()]
        return next((name for ours, theirs in pairs if (name := _name(end, theirs, ours)) is not None), None)

    def shared_of(self, end: str) -> str | None:
        """Our name of a shared tensor, by what follows "base_model." in PEFT's key."""
        pairs = self.shared.items()
        return next((name for ours, theirs in pairs if (name := _name(end, theirs, ours)) is not None), None)

    def is_unread(self, end: str) -> bool:
        """Is it a tensor that says nothing, by what follows "base_model." in PEFT's key?"""
        return any(_name(end, key, key) is not None for key in self.unread)

    def is_table(self, ours: str) -> bool:
        """Does it hold integers, by our key?"""
        name = ours.rpartition(".")[2]
        return any(_name(name, table, table) is not None for table in self.tables)

    def end_of(self, ours: str, is_embedding: bool) -> str | None:
        """PEFT's name of a tensor at a layer; None if it is in no file of PEFT's."""
        pairs = (self.embedding if is_embedding and self.embedding else self.tensors).items()
        return next((end for name, theirs in pairs if (end := _name(ours, name, theirs)) is not None), None)

    def key_of(self, ours: str) -> str | None:
        """PEFT's key of a shared tensor."""
        pairs = self.shared.items()
        end = next((end for name, theirs in pairs if (end := _name(ours, name, theirs)) is not None), None)
        return None if end is None else f"base_model.{end}"


def _name(text: str, pattern: str, into: str) -> str | None:
    """`into` for a text that is the pattern, with what "*" stands for; None for another text."""
    if not pattern.endswith("*"):
        return into if text == pattern else None
    start, goal = pattern.removesuffix("*"), into.removesuffix("*")
    return goal + text.removeprefix(start) if text.startswith(start) and text != start else None
