"""PEFT's adapter folders and its names, which no other file knows."""

import re

_PREFIX = "base_model.model."
_OURS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_magnitude_vector": "lora_m", "ia3_l": "lora_l"}
"""PEFT's name of a tensor -> ours."""
_KEY = re.compile(
    r"(?P<path>.+)\.(?:(?P<ab>lora_[AB])(?:\.[^.]+)?\.weight"
    r"|(?P<vector>lora_magnitude_vector|ia3_l)(?:\.[^.]+)?(?:\.weight)?"
    r"|base_layer\.(?P<base>[^.]+))"
)


def plain_key(key: str) -> str:
    """PEFT's key in the words of this library: `<path>.lora_A`, `<path>.weight`; any other key as it is.

    Known are `[base_model.model.]<path>.` with `lora_A[.<adapter>].weight`, `lora_B[...]`, `lora_magnitude_vector[...]`
    (lora_m), `ia3_l[...]` (lora_l) and `base_layer.<tensor>`. Two adapters in one state dict come out under one key.
    """
    plain = key.removeprefix(_PREFIX)
    match = _KEY.fullmatch(plain)
    if match is None:
        return plain
    name = match["ab"] or match["vector"]
    return f"{match['path']}.{_OURS[name] if name else match['base']}"
