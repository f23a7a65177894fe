"""PEFT's methods that train entries, coefficients or directions of the weight.

shira         the places are a table (2, n) of rows and columns; here one of row-major indices, (n,)
supertuning   the places are in the file, or with save_precomputed_indices=False those of the live weight
fourierft, waveft    the places are a seed
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...base.layer import BaseLayer
from ...core.state import Site
from ...errors import CheckpointError
from ...ops.wavelets import DIGITS
from .kinds import is_linear_module, is_plain_linear
from .settings import flag_of, number_of, text_of
from .table import AtLayer, Format, Named, Setting

if TYPE_CHECKING:
    from .folder import PeftFolder


def _flat(layer: BaseLayer, tensors: Named) -> Named:
    """Rows and columns as one index; -1, which no table takes, where one of them is out of range."""
    rows, columns = tensors["lora_indices"].long()
    is_inside = (rows >= 0) & (rows < layer.d_out) & (columns >= 0) & (columns < layer.d_in)
    return tensors | {"lora_indices": torch.where(is_inside, rows * layer.d_in + columns, -1)}


def _rows_and_columns(site: Site, tensors: Named) -> Named:
    places = tensors["lora_indices"]
    pairs = torch.stack([places // site.target.d_in, places % site.target.d_in])
    return tensors | {"lora_indices": pairs.to(torch.int32)}


SHIRA = Format(
    "SHIRA",
    "shira",
    tensors={"lora_weight": "shira_weight", "lora_indices": "shira_indices"},
    fields={"r": Setting("r", 32)},
    free=("mask_type", "random_seed"),
    lacks=("bias", "layers_to_transform", "layers_pattern"),
    takes=is_linear_module,
    write=lambda cfg: {"mask_type": "random", "random_seed": cfg.seed},
    ours=_flat,
    theirs=_rows_and_columns,
    tables=("lora_indices",),
)


def _alpha(source: "PeftFolder", name: str) -> float | None:
    value = source.settings.get(name)
    return None if value is None else number_of(source, name, value)


_TRAINED = {
    "lora_values": "supertuning_values",
    "lora_A": "supertuning_lora_A.weight",
    "lora_B": "supertuning_lora_B.weight",
}


def _supertuning(has_places: bool) -> Format:
    return Format(
        "SUPERTUNING",
        "supertuning",
        tensors=_TRAINED | ({"lora_indices": "supertuning_indices"} if has_places else {}),
        fields={
            "sparsity": Setting("sparsity", 0.99),
            "select_top": Setting("select_top", True),
            "r": Setting("r", None),
            "dropout": Setting("lora_dropout", 0.0),
        },
        when=lambda settings: (settings.get("save_precomputed_indices") is not False) == has_places,
        free=("save_precomputed_indices", "lora_alpha"),
        lacks=("bias", "fan_in_fan_out", "layers_to_transform", "layers_pattern"),
        takes=is_linear_module,
        read=lambda source: {"alpha": _alpha(source, "lora_alpha")},
        write=lambda cfg: {"lora_alpha": None if cfg.r is None else cfg.scaling * cfg.r},
        tables=("lora_indices",),
    )


DELORA = Format(
    "DELORA",
    "delora",
    tensors={"lora_A": "delora_A", "lora_B": "delora_B", "lora_lambda": "delora_lambda", "lora_norm": "delora_w_norm"},
    fields={
        "r": Setting("r", 8, "rank_pattern"),
        "strength": Setting("delora_lambda", 15.0, "lambda_pattern"),
        "dropout": Setting("module_dropout", 0.0),
    },
    lacks=("fan_in_fan_out",),
    only="delora_only",
    takes=is_linear_module,
    sizes=lambda layer: (layer["lora_A"][1], layer["lora_B"][0]),
)


def _no_starts(_: BaseLayer, tensors: Named) -> Named:
    """PEFT's formula is ours with P0 = R0 = 0."""
    return tensors | {f"{name}0": torch.zeros_like(tensor) for name, tensor in tensors.items() if "lora_R" in tensors}


def _from_zero(site: Site, tensors: Named) -> Named:
    """PEFT has no P0 and R0: R0 is E0ᵀ W/s, or both are 0, and what it computes is the same."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("0")}


def _deft_alpha(source: "PeftFolder") -> dict[str, Any]:
    return {"alpha": _alpha(source, "alpha") or None}  # of 0, too, PEFT makes s = 1


DEFT = Format(
    "DEFT",
    "deft",
    tensors={"lora_P": "deft_P", "lora_R": "deft_R"},
    fields={
        "r": Setting("r", 8),
        "decomposition": Setting("decomposition_method", "relu"),
        "para": Setting("para", False),
        "dropout": Setting("deft_dropout", 0.0),
    },
    free=("alpha", "init_scale"),
    only="deft_only",
    takes=is_plain_linear,
    read=_deft_alpha,
    write=lambda cfg: {"alpha": cfg.alpha},
    ours=_no_starts,
    theirs=_from_zero,
)


C3A = Format(
    "C3A",
    "c3a",
    tensors={"lora_kernel": "c3a_kernel"},
    fields={"block_size": Setting("block_size", 256, "block_size_pattern")},
    lacks=("fan_in_fan_out",),
    only="c3a_only",
    takes=is_linear_module,
    at_site=lambda site: {"block_size": site.specs["lora_kernel"].shape[2]},
    sizes=lambda layer: (
        layer["lora_kernel"][1] * layer["lora_kernel"][2],
        layer["lora_kernel"][0] * layer["lora_kernel"][2],
    ),
    anchored=False,
)

FOURIERFT = Format(
    "FOURIERFT",
    "fourierft",
    tensors={"lora_spectrum": "fourierft_spectrum"},
    fields={
        "n_frequency": Setting("n_frequency", 1000, "n_frequency_pattern"),
        "scaling": Setting("scaling", 150.0),
        "seed": Setting("random_loc_seed", 777),
    },
    only="fourierft_only",
    takes=is_plain_linear,
    anchored=False,
)


def _number(place: AtLayer) -> dict[str, Any]:
    """With proportional_parameters PEFT counts all of its targets for n; the tensor has it."""
    is_proportional = flag_of(place.source, "proportional_parameters")
    return {"n_frequency": place.shapes["lora_spectrum"][0]} if is_proportional else {}


def _family(source: "PeftFolder") -> dict[str, Any]:
    family, is_transformed = text_of(source, "wavelet_family", "db1"), flag_of(source, "use_idwt", True)
    if not is_transformed:
        return {"wavelet_family": family if family in DIGITS else "db1"}  # PEFT never looks at it
    if family in WRONG:
        raise source.error(f"wavelet_family={family!r}: PEFT's numbers of it are no wavelet's, and ours are")
    return {"wavelet_family": family}


WRONG = ("coif4", "coif5")


def _waveft_spectrum(site: Site, tensors: Named) -> dict[str, Tensor]:
    if site.cfg.use_idwt and site.cfg.wavelet_family in WRONG:
        raise CheckpointError(
            f"{site.path}: PEFT has other numbers for {site.cfg.wavelet_family}\n  keep it as our file"
        )
    return tensors


WAVEFT = Format(
    "WAVEFT",
    "waveft",
    tensors={"lora_spectrum": "waveft_spectrum"},
    fields={
        "n_frequency": Setting("n_frequency", 2592, "n_frequency_pattern"),
        "scaling": Setting("scaling", 25.0),
        "use_idwt": Setting("use_idwt", True),
        "seed": Setting("random_loc_seed", 777),
    },
    free=("proportional_parameters", "wavelet_family"),
    only="waveft_only",
    takes=is_plain_linear,
    read=_family,
    write=lambda cfg: {"wavelet_family": cfg.wavelet_family},
    at_layer=_number,
    at_site=lambda site: {"n_frequency": site.specs["lora_spectrum"].shape[0]},
    theirs=_waveft_spectrum,
)

FORMATS = (SHIRA, _supertuning(True), _supertuning(False), DELORA, DEFT, C3A, FOURIERFT, WAVEFT)
