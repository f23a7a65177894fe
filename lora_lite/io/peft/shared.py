"""PEFT's methods with tensors that all layers share."""

from .kinds import is_plain_linear
from .table import Format, Setting

VERA = Format(
    "VERA",
    "vera",
    tensors={"lora_d": "vera_lambda_d", "lora_b": "vera_lambda_b"},
    shared={"A": "vera_A", "B": "vera_B"},
    fields={
        "r": Setting("r", 256),
        "seed": Setting("projection_prng_key", 0),
        "save_projection": Setting("save_projection", True),
        "d_initial": Setting("d_initial", 0.1),
        "dropout": Setting("vera_dropout", 0.0),
    },
    only="vera_only",
    takes=is_plain_linear,
    sizes=lambda layer: (0, layer["lora_b"][0]),  # A has as many columns as the widest layer
)

FORMATS = (VERA,)
