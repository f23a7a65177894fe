"""Layer paths and tensor keys in files and models: what wrappers add to a path, which is meant, which keys fit."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import CheckpointError, brief

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


def file_key(path: str, tensor: str) -> str:
    """The key of a tensor in `state_dict()` and in a file; the path of a bare layer is empty."""
    return f"{path}.{tensor}" if path else tensor


def check_shapes(got: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """CheckpointError unless both sides have the same keys with the same shapes."""
    missing, extra = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    differ = [key for key in wanted if key in got and got[key] != wanted[key]]
    wrong = [f"{key} {brief(got[key])}, wanted {brief(wanted[key])}" for key in differ]
    for problem, keys in (("missing keys", missing), ("unexpected keys", extra), ("wrong shapes", wrong)):
        if keys:
            raise CheckpointError(
                f"{where}: {len(keys)} {problem}; {len(got)} tensors where {len(wanted)} are wanted\n"
                f"  such as {brief('; '.join(keys[:3]), 1200)}\n"
                f"  an adapter is loaded whole or not at all"
            )
