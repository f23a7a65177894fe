"""EVA: LoRA whose A starts at what its layer's inputs vary most along (Paischer et al. 2024, arXiv:2410.07170, 3.2).

    y = W x + b + s B A drop(x)             A (r, i)   B (o, r)   s as in LoRA
    A = V_rᵀ, the top r eigenvectors of the covariance of x at all tokens of the data;  B = 0

Identity   B = 0, bit-exact
Base       never read: layers that are called, dense or quantised
Departs    the paper follows the vectors batch by batch, until they hold still; here the covariance of all batches is
           exact. Ranks don't move by themselves: `eva_ranks` gives the config with the paper's redistribution (3.3),
           from the data, before attach, since it changes shapes
Checked    against PEFT's initialize_lora_eva_weights: A up to signs, and its ranks
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from re import escape
from typing import Any

from loguru import logger
from torch import nn

from ..core.plan import plan
from ..core.resolve import overrides_at
from ..core.variant import Layer, register
from ..errors import ConfigError
from ..families.calibration import check_fresh, moments, on_called_layers
from ..ops.svd import leading_svd
from .lora import LoRA, LoRAConfig

__all__ = ["EVA", "EVAConfig", "eva_ranks"]


@dataclass(frozen=True, kw_only=True)
class EVAConfig(LoRAConfig):
    """The fields are LoRA's, but for a bias and tokens. calibration_data: a list of batches."""

    variant: str = "eva"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(not self.bias, "bias", "False: the paper's method has none")
        self.require(self.invocation_tokens is None, "invocation_tokens", "None: they are LoRA's")
        on_called_layers(self)


@register
class EVA(LoRA):
    name, config = "eva", EVAConfig
    needs_calibration = True

    @staticmethod
    def group_init(model: nn.Module, targets: Mapping[str, Layer], cfg: EVAConfig, calibration_data: Any) -> None:
        check_fresh(targets, lambda layer: bool(layer.lora_B.any()))
        sizes = {path: (layer.in_features, layer.out_features) for path, layer in targets.items()}
        for path, statistics in moments(model, sizes, calibration_data):
            layer, r = targets[path], targets[path].cfg.r
            if r > min(statistics.count, layer.in_features):
                problem = f"{path}: r={r} directions of {layer.in_features}, from {statistics.count} tokens"
                raise ConfigError(f"{problem}\n  give more data, or a lower r")
            layer.lora_A.copy_(leading_svd(statistics.covariance, r)[2].mT)


def eva_ranks(model: nn.Module, cfg: EVAConfig, calibration_data: Any, rho: float = 2.0) -> EVAConfig:
    """The config with EVA's ranks: the budget of all layers goes to the directions that explain most of their variance.

    rho     a layer gets at most rho times its rank. Layers that get none are left out; s stays what it is

    Raises:
        ConfigError: for data as `attach` raises it, or a rho below 1.
    """
    if not rho >= 1:
        raise ConfigError(f"rho={rho!r}: wanted a number of at least 1")
    targets = {target.path: (target.d_in, target.d_out) for target in plan(model, cfg)}
    overrides = overrides_at(cfg, list(targets))
    configs = {path: cfg.with_overrides(overrides.get(path, {})) for path in targets}
    shares: list[tuple[float, str]] = []
    for path, statistics in moments(model, targets, calibration_data):
        covariance = statistics.covariance
        most = min(round(rho * configs[path].r), *targets[path], statistics.count)
        variances = leading_svd(covariance, most)[1] / covariance.trace()
        shares += [(share, path) for share in variances.tolist()]
    budget = sum(config.r for config in configs.values())
    ranks = Counter(path for _, path in sorted(shares, key=lambda share: -share[0])[:budget])
    without = tuple(f"^{escape(path)}$" for path in targets if path not in ranks)
    per_layer: dict[str, dict[str, Any]] = {}  # each layer's own: what cfg.per_layer says of it is in its fields
    for path, r in ranks.items():
        config, fields = configs[path], dict(overrides.get(path, {}))
        if config.alpha is not None:  # α/r, or α/√r, stays
            fields["alpha"] = config.alpha * (r / config.r) ** (0.5 if config.rslora else 1)
        per_layer[f"^{escape(path)}$"] = fields | {"r": r}
    logger.info(f"EVA: ranks from {min(ranks.values())} to {max(ranks.values())}; {len(without)} layers are left out")
    return replace(cfg, per_layer=per_layer, exclude_names=(*cfg.exclude_names, *without))
