"""PEFT's names."""


def plain_key(key: str) -> str:
    """A key of a PEFT model's state_dict as ours: `<path>.lora_A__fr` for `<path>.lora_A.fr.weight`."""
    parts = [part for part in key.removesuffix(".weight").split(".") if part != "base_layer"]
    for i, part in enumerate(parts):
        if part in ("lora_A", "lora_B", "lora_magnitude_vector") and i >= len(parts) - 2:
            tensor, *name = parts[i:]
            tensor = "lora_m" if tensor == "lora_magnitude_vector" else tensor
            return ".".join([*parts[:i], tensor if name in ([], ["default"]) else f"{tensor}__{name[0]}"])
    return ".".join(part for part in key.split(".") if part != "base_layer")
