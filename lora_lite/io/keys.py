"""Layer paths and tensor keys in files and models: what wrappers add to a path, which is meant, which keys fit."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.")
"""What wrappers put before every path."""
INFIXES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What wrappers of inner modules put within a path."""


def resolve(
    file: Path | str, wanted: Iterable[str], paths: set[str], model: str, what: str = "target layers"
) -> dict[str, str]:
    """File path -> model path: the same, or the one that remains the same without what wrappers add.

    Raises CheckpointError, which calls them `what`, unless each of the file's has one of the model, and each its own.
    """
    wanted = list(wanted)
    if set(wanted) <= paths:
        return {path: path for path in wanted}
    by_core = defaultdict(list)
    for path in paths:
        by_core[core(path)].append(path)
    mapping = {path: by_core[core(path)] for path in wanted}
    uses = Counter(found[0] for found in mapping.values() if found)
    bad = {path: found for path, found in mapping.items() if len(found) != 1 or uses[found[0]] > 1}
    if bad:
        path, found = next(iter(bad.items()))
        near = sorted(p for p in paths if p.rpartition(".")[2] == path.rpartition(".")[2])[:3]
        raise CheckpointError(
            f"{file}: {len(bad)} of its {len(mapping)} {what} "
            f"{'match more than one layer' if found else 'are not'} in this {model}\n"
            f"  file:  {path}\n"
            f"  model: {', '.join(found or near) or 'no layer of such a name'}\n"
            f"  prefixes that are understood: {', '.join(PREFIXES)}"
        )
    return {path: found[0] for path, found in mapping.items()}


def core(path: str) -> str:
    """The path without what wrappers add."""
    if any(infix in path for infix in INFIXES):
        path = ".".join(part for part in path.split(".") if part not in INFIXES)
    while path.startswith(PREFIXES):
        path = path.removeprefix(next(prefix for prefix in PREFIXES if path.startswith(prefix)))
    return path


PREFIX = "base_model.model."


SECOND = "_ff"
"""What follows the name of an IA3 in that of its second half: PEFT's one adapter is two of ours, ia3 and ia3_ff."""


_OURS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_magnitude_vector": "lora_m", "ia3_l": "lora_l"}
"""PEFT's name of a tensor -> ours."""


THEIRS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_m": "lora_magnitude_vector.weight",  # PEFT reads it without ".weight" too, but transformers 5.23 only so
    "lora_l": "ia3_l",
}
"""Our name of a tensor -> PEFT's in a file."""


_KEY = re.compile(
    r"(?P<path>.+)\.(?:(?P<ab>lora_[AB])(?:\.(?P<of>[^.]+))?\.weight"
    r"|(?P<vector>lora_magnitude_vector|ia3_l)(?:\.(?!weight$)(?P<of_vector>[^.]+))?(?:\.weight)?"
    r"|base_layer\.(?P<base>[^.]+))"
)


def plain_key(key: str) -> str:
    """PEFT's key in the words of this library: `<path>.lora_A`, `<path>.weight`; any other key as it is.

    Known are `[base_model.model.]<path>.` with `lora_A[.<adapter>].weight`, `lora_B[...]`, `lora_magnitude_vector[...]`
    (lora_m), `ia3_l[...]` (lora_l) and `base_layer.<tensor>`. Those of another adapter than "default" are suffixed as
    ours are: `<path>.lora_A__fr`.
    """
    plain = key.removeprefix(PREFIX)
    match = _KEY.fullmatch(plain)
    if match is None:
        return plain
    name = match["ab"] or match["vector"]
    of = match["of"] or match["of_vector"] or "default"
    suffix = "" if of == "default" else f"__{of}"
    return f"{match['path']}.{_OURS[name] + suffix if name else match['base']}"
