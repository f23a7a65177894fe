"""The folder of a base, opened as the model that it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.fingerprint import BaseRecord
from ..base.load import load_as_recorded
from ..errors import BaseModelError
from ..io.safetensors import read_json


def open_base(folder: Path, record: BaseRecord | None, *others: BaseRecord | None) -> Any:
    """The model of a folder that transformers or diffusers has written, on the CPU, as an adapter's record says; the
    records of others on it have a say in its class alone.

    Raises:
        BaseModelError: for a pipeline, and a class that diffusers lacks; and what load_as_recorded raises.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (name := config.get("_class_name")) is None:
        if (folder / "model_index.json").is_file():
            raise BaseModelError(f"{folder} is a pipeline\n  name the folder of the component that the adapter is on")
        kind = class_of(config, record, *others)
        return load_as_recorded(str(folder), record, device_map="cpu", auto_class=kind)
    import diffusers

    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):  # a folder may name anything
        raise BaseModelError(
            f"{folder}: {name!r} is no model of this diffusers ({diffusers.__version__})\n"
            f"  name the folder of a component such as unet or transformer, or install the release that has it"
        )
    return kind.from_pretrained(folder)


def class_of(config: Mapping[str, Any], *records: BaseRecord | None) -> Any:
    """The class of transformers that the adapters were on, or else that the folder was written from, which may be a
    text encoder. Of several, it is the folder's own where one of them is, and else the first. None where none is one
    for this config, and load_base's own choice is right."""
    import transformers

    named = config.get("architectures")
    of_folder = named if isinstance(named, list) else []
    of_adapters = [record.class_name for record in records if record is not None]
    for name in [*(name for name in of_folder if name in of_adapters), *of_adapters, *of_folder]:
        kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if is_model and getattr(kind.config_class, "model_type", None) == config.get("model_type"):
            return kind
    return None
