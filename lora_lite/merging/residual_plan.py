"""A base folder that is quantised with a low-rank residual, layer by layer: what `residual.py` writes.

    W ≈ Q + s B A       Q = q(W - s B A), the numbers of codes       A (r, i)   B (o, r)   s = α/r

QPiSSA (Meng et al. 2024, arXiv:2404.02948) starts at the principal s B A = U_r S_r V_rᵀ of W, LoftQ (Li et al. 2023,
arXiv:2310.08659, section 3) at B A = 0. Both then take turns: A and B from the top r of W - Q, and Q anew.
"""

import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..base.bitsandbytes import is_bitsandbytes
from ..base.fingerprint import BaseRecord
from ..base.load import QUANTIZATIONS, bnb_config
from ..base.storage import Quantization
from ..core.config import BaseConfig
from ..core.layer import Layer
from ..core.names import file_key
from ..core.resolve import checked_config, make_stand_in, resolve
from ..core.state import Method, Site
from ..core.targets import select
from ..core.variant import config_for, lookup
from ..dtypes import dtype_name, fits
from ..errors import BaseModelError, CheckpointError, ConfigError, QuantizedWeightError, TargetError
from ..io.checkpoint import file_metadata
from ..io.safetensors import DTYPES, INDEX, write_json, write_tensors
from ..ops.svd import leading_svd
from .base_folder import BaseFolder, LayerLocation
from .bnb_files import BLOCKSIZE, PackedWeight, layout, pack
from .shards import OutputTensor, Shard, bytes_of, write_index

ADAPTER = "adapter.safetensors"  # in the folder that is made
VARIANTS = ("pissa", "loftq")
NORMS = ("fro", "nuc")


@dataclass(frozen=True)
class LayerErrors:
    """‖W - W'‖ of a layer over ‖W‖: with the quantiser alone, and with the adapter's start."""

    plain: float
    residual: float


class ResidualPlan:
    """All that can be told from headers, told; then one layer at a time."""

    def __init__(
        self,
        base_dir: str | os.PathLike[str],
        cfg: BaseConfig,
        quantization: str,
        iterations: int,
        double_quant: bool,
        skip_modules: Sequence[str],
        norm: str = "fro",
    ) -> None:
        _check(cfg, quantization, iterations)
        base = self.base = BaseFolder(Path(base_dir).resolve())
        self._iterations, self._norm, self._dtype = iterations, norm, _dtype(base)
        model: Any = base.model  # not None: `_dtype` has seen to it
        self._config = bnb_config(quantization, self._dtype, double_quant)
        if skip_modules:
            from transformers.quantizers.base import get_keys_to_not_convert

            self._config.llm_int8_skip_modules = [*get_keys_to_not_convert(model), *skip_modules]
        self._loftq = _as_loftq(cfg)
        selection = select(model, cfg)
        self._starts = {site.path: site for site in resolve(selection, cfg)}  # those of the config
        self.sites = {site.path: site for site in resolve(selection, self._loftq)}  # those of the file
        paths = _quantized_paths(model, self._config)
        for path, site in self.sites.items():
            _check_target(site, path in paths)
        self.locations = base.find(base.path, paths)
        for location in self.locations.values():
            check_location(base, location, self._dtype)
        name = dtype_name(self._dtype)
        if quantization == "int8":
            self._quantization = Quantization("bitsandbytes-8bit", "int8")
        else:
            how = quantization, BLOCKSIZE, double_quant, name, name  # computes in the weights' dtype
            self._quantization = Quantization("bitsandbytes-4bit", *how)
        self._quantization.modules.extend(sorted(paths))
        self.errors: dict[str, LayerErrors] = {}
        self._tensors: dict[str, Tensor] = {}
        self._fingerprint: dict[str, list[Any]] = {}

    def shards(self) -> list[Shard]:
        """Every tensor stays in its file; in the place of a weight come its codes and their parts."""
        shards: dict[str, Shard] = {}
        paths = {location.weight[0].key: path for path, location in self.locations.items()}
        for key, header in self.base.headers.items():
            shard = shards.setdefault(header.path.name, Shard(header.path.name))
            shard.tensors += self._packed(key, paths[key]) if key in paths else [self.base.copied(key)]
        return list(shards.values())

    def _packed(self, key: str, path: str) -> Iterator[OutputTensor]:
        parts: dict[str, Tensor] = {}

        def pieces(name: str) -> Iterator[Any]:
            if not parts:  # the first of them that is written
                parts.update(self.quantize(path).parts)
            yield bytes_of(parts.pop(name))

        location = self.locations[path]
        stem = key.removesuffix("weight") if "SCB" in layout((1, 1), self._quantization) else f"{key}."
        for name, (dtype, shape) in layout((location.layer.d_out, location.layer.d_in), self._quantization).items():
            size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
            full_name = key if name == "weight" else stem + name
            yield OutputTensor(full_name, dtype, shape, size, partial(pieces, name))

    def quantize(self, path: str) -> PackedWeight:
        """The codes of a layer; what its adapter starts at, and the errors, are noted."""
        weight = self.base.matrix(self.locations[path].weight[0]).float()  # (d_out, d_in)
        if not fits(weight):
            problem = f"{path}: base weights are NaN or infinite"
            raise BaseModelError(f"{problem}\n  check the checkpoint; nothing was written")
        if path not in self.sites:
            return self._pack(weight)
        packed, a, b = self._alternate(path, weight)
        product = self.sites[path].cfg.scaling * (b.float() @ a.float())  # (d_out, d_in)
        lacking = weight - self._pack(weight.clone()).numbers, weight - packed.numbers - product
        size, *norms = (float(torch.linalg.matrix_norm(matrix, ord=self._norm)) for matrix in (weight, *lacking))
        self.errors[path] = LayerErrors(*(norm / size if size else 0.0 for norm in norms))
        self._tensors |= {file_key(path, "lora_A"): a, file_key(path, "lora_B"): b}
        self._fingerprint[path] = packed.fingerprint
        return packed

    def _alternate(self, path: str, weight: Float[Tensor, "o i"]) -> tuple[PackedWeight, Tensor, Tensor]:
        """The papers' rounds: the codes Q, A and B. PiSSA's first has its A and B before any Q is there."""
        site, is_pissa = self.sites[path], self._starts[path].cfg.variant == "pissa"
        s, tensors = site.cfg.scaling, {name: torch.zeros(spec.shape) for name, spec in site.specs.items()}
        a, b = _principal(self._starts[path], weight) if is_pissa else (tensors["lora_A"], tensors["lora_B"])
        packed = self._pack(weight - s * (b @ a))
        for turn in range(self._iterations - is_pissa):
            if turn:
                packed = self._pack(weight - s * (b @ a))
            rest = weight - packed.numbers  # (d_out, d_in)
            if not rest.any():  # as a LoRA starts: with B = A = 0 neither would ever get a gradient
                site.specs["lora_A"].fill(a := torch.empty_like(a))
                b = torch.zeros_like(b)
                continue
            u, values, v = leading_svd(rest, site.cfg.r)
            root = (values / s).sqrt()  # (r,)
            # As the file holds them, so that the next Q takes up what a 16-bit A and B have lost.
            a, b = (m.to(site.cfg.dtype).float() for m in (root[:, None] * v.mT, u * root))
        return packed, a.to(site.cfg.dtype).contiguous(), b.to(site.cfg.dtype).contiguous()

    def _pack(self, weight: Float[Tensor, "o i"]) -> PackedWeight:
        return pack(weight, self._quantization, self._dtype)

    def write_rest(self, folder: Path, shards: Sequence[Shard], out: Path) -> None:
        """The adapter's file, the config and the index, once all layers have been quantised."""
        base = self.base
        record = BaseRecord(
            type(base.model).__name__, str(out), dtype_name(self._dtype), self._quantization, self._fingerprint
        )
        # The layers in the config's order, which is the model's: the shards have their own.
        method = Method(self._loftq, list(self.sites.values()))
        tensors = {key: self._tensors[key] for path in self.sites for key in self._keys(path)}
        write_tensors(folder / ADAPTER, tensors, file_metadata([method], 1.0, record.to_json()))
        self.errors = {path: self.errors[path] for path in self.sites}
        assert base.config is not None, "there is no model without one"
        write_json(folder / "config.json", {**base.config, "quantization_config": self._config.to_dict()})
        if (base.path / INDEX).exists():
            write_index(folder, shards, sum(torch.Size(base.shape(key)).numel() for key in base.headers))

    def _keys(self, path: str) -> list[str]:
        return [file_key(path, name) for name in self.sites[path].specs]


# ---- what is refused ----------------------------------------------------------------------------


def _check(cfg: BaseConfig, quantization: str, iterations: int) -> None:
    """ConfigError for arguments that no folder could make right."""
    if checked_config(cfg).variant not in VARIANTS:
        problem = f"variant {cfg.variant!r} is no start from a quantised residual; wanted one of {VARIANTS}"
        raise ConfigError(f"{problem}\n  use lora_lite.PiSSAConfig(r=16), or LoftQConfig")
    if quantization not in QUANTIZATIONS:
        problem = f"quantization={quantization!r}: wanted one of {QUANTIZATIONS}"
        raise ConfigError(f"{problem}\n  bitsandbytes has no other whose numbers are known here")
    if type(iterations) is not int or iterations < 1:
        raise ConfigError(f"iterations={iterations!r}: wanted 1 or more\n  the papers take up to 5")
    if getattr(cfg, "svd_of", "base") != "base":
        raise ConfigError('svd_of="history": a folder has no history\n  merge it first, with merge_checkpoint')


def _dtype(base: BaseFolder) -> torch.dtype:
    """The dtype that from_pretrained opens the folder in. Raises for one that can't be quantised."""
    if base.model is None or base.config is None:
        problem = f"{base.path} has no config.json, which tells what is quantised"
        raise CheckpointError(f"{problem}\n  save the model with save_pretrained")
    if base.packed or base.config.get("quantization_config"):
        problem = f"{base.path} is quantised already, and what that took is lost"
        raise QuantizedWeightError(f"{problem}\n  use the folder of the original weights")
    stored = (DTYPES.get(base.dtype(key)) for key in base.headers if len(base.shape(key)) == 2)
    dtype = base.model.config.dtype or next(stored, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        problem = f"{base.path} is in {dtype}; wanted bfloat16, float16 or float32"
        raise QuantizedWeightError(f"{problem}\n  bitsandbytes quantises no other")
    return dtype


def _quantized_paths(model: Any, config: Any) -> list[str]:
    """The paths of the layers that transformers quantises as it loads such a model with this config."""
    from transformers.quantizers import AutoHfQuantizer

    twin = deepcopy(model)  # on the meta device, without memory
    AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(twin, device_map=None)
    return [path for path, module in twin.named_modules() if is_bitsandbytes(module)]


def _check_target(site: Site, is_quantized: bool) -> None:
    target = site.target
    if not is_quantized:
        problem = f"{target.path}: transformers leaves it in 16 bits, so there is no residual"
        raise TargetError(
            f"{problem}\n  leave it out with exclude_names; load the adapter and attach another one to it"
        )
    if site.cfg.r > min(target.d_in, target.d_out):
        problem = f"{target.path}: r={site.cfg.r} is more than the {min(target.d_in, target.d_out)} directions there"
        raise ConfigError(f"{problem}\n  use a smaller r, or per_layer")


def check_location(base: BaseFolder, location: LayerLocation, dtype: torch.dtype) -> None:
    """Raises unless the weight is one tensor there, as it lies in the module, and in this dtype."""
    ref, *others = location.weight
    cure = "load the model and save it with save_pretrained, or name it in skip_modules"
    if others or ref.rows is not None or ref.expert is not None or ref.transposed != location.layer.transposed:
        problem = f"{base.path}: {location.target.path} lies in parts, or in other tensors, such as {ref.key}"
        raise CheckpointError(f"{problem}\n  {cure}")
    # Of a quantised folder from_pretrained casts nothing, so what isn't quantised would stay in the other one.
    if DTYPES.get(base.dtype(ref.key)) != dtype:
        problem = f"{base.path}: {ref.key} is stored as {base.dtype(ref.key)}, and the config says {dtype_name(dtype)}"
        raise QuantizedWeightError(f"{problem}\n  {cure}")


def _as_loftq(cfg: BaseConfig) -> BaseConfig:
    """The config of the file: `loftq`'s, with the fields that this one shares."""
    loftq = config_for("loftq")
    if isinstance(cfg, loftq):
        return cfg
    names = {field.name for field in fields(loftq)} - {"variant", "per_layer"}
    entries = {p: {n: v for n, v in some.items() if n in names} for p, some in cfg.per_layer.items()}
    shared = {field.name: getattr(cfg, field.name) for field in fields(cfg) if field.name in names}
    return loftq(variant="loftq", per_layer={p: some for p, some in entries.items() if some}, **shared)


def _principal(site: Site, weight: Float[Tensor, "o i"]) -> tuple[Tensor, Tensor]:
    """A (r, i) and B (o, r) in float32, as the variant's own init has them on this weight, rounded to its dtype."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    stand_in = make_stand_in(site.target, site.cfg, module, {}, 1.0)
    for name, spec in stand_in.specs.items():
        setattr(module, stand_in.attribute(name), torch.zeros(spec.shape, dtype=site.cfg.dtype))
    lookup(site.cfg.variant).init(Layer(module, stand_in), site.cfg)
    start: Any = module
    return start.lora_A.float(), start.lora_B.float()
