"""Layers of real quantisers, for the tests. Run as a script, it prints the table in docs/quantisers.md."""

import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Make = Callable[[nn.Linear], nn.Module]


class Quantiser(NamedTuple):
    """A way to quantise one nn.Linear with a real library."""

    package: str
    make: Make
    method: str  # as an adapter's file names it
    dequantise: Callable[[Any], Tensor]  # the library's own, (d_out, d_in)
    dtype: torch.dtype = torch.float32  # of the model
    trains: str = ""  # why not, where the library has no backward here


def torchao(config: str, **options: Any) -> Make:
    def make(linear: nn.Linear) -> nn.Module:
        import torchao.quantization as ao

        holder = nn.Sequential(linear)
        ao.quantize_(holder, getattr(ao, config)(**options))
        return holder[0]

    return make


def intx4(linear: nn.Linear) -> nn.Module:
    from torchao.quantization.granularity import PerGroup

    return torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))(linear)


def quanto(name: str) -> Make:
    def make(linear: nn.Linear) -> nn.Module:
        from optimum import quanto as oq

        holder = nn.Sequential(linear)
        oq.quantize(holder, weights=getattr(oq, name))
        oq.freeze(holder)
        return holder[0]

    return make


def hqq(nbits: int) -> Make:
    def make(linear: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=nbits, group_size=64)
        layer: nn.Module = HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu", del_orig=True)
        return layer

    return make


def gguf(name: str) -> Make:
    def make(linear: nn.Linear) -> nn.Module:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        kind = getattr(gguf.GGMLQuantizationType, name)
        codes = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().float().numpy(), kind))
        layer: Any = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)
        layer.weight, layer.bias = GGUFParameter(codes, quant_type=kind), linear.bias
        return layer

    return make


def dequantise_gguf(layer: Any) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(layer.weight).to(layer.compute_dtype)  # as it multiplies


def rounded(linear: nn.Linear, group: int) -> tuple[Tensor, Tensor]:
    """Scales (d_out, groups) and zeros, in float16's numbers, of codes 0 to 15 that are 8 at 0."""
    groups = linear.weight.detach().float().unflatten(1, (-1, group))  # (d_out, groups, group)
    scales = (groups.abs().amax(-1) / 7).half().float()
    return scales, torch.full_like(scales, 8)


def gptq(linear: nn.Linear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    d_in, d_out, bias = linear.in_features, linear.out_features, linear.bias is not None
    layer: Any = TorchLinear(4, 32, True, False, d_in, d_out, bias)
    layer.optimized = True  # or post_init compiles the dequantising
    wide = nn.Linear(d_in, d_out, bias)
    wide.load_state_dict(linear.state_dict())
    layer.pack_original(wide, *rounded(linear, 32), g_idx=(torch.arange(d_in) // 32).to(torch.int32))
    layer.qzero_format(2)  # the torch kernel's layout, in which zeros are what they say
    layer.post_init()
    return layer.eval()


def awq(linear: nn.Linear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    d_in, d_out, bias = linear.in_features, linear.out_features, linear.bias is not None
    layer: Any = AwqTorchLinear(4, 32, True, False, d_in, d_out, bias, dtype=linear.weight.dtype)
    wide = nn.Linear(d_in, d_out, bias)
    wide.load_state_dict(linear.state_dict())
    layer.pack(wide, *rounded(linear, 32))
    layer.post_init()
    return layer.eval()


def autoawq(linear: nn.Linear) -> nn.Module:
    from awq.modules.linear.gemm import WQLinear_GEMM

    scales, zeros = rounded(linear, 32)
    wide = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    wide.load_state_dict(linear.state_dict())
    layer: nn.Module = WQLinear_GEMM.from_linear(wide, 4, 32, scales=scales.T, zeros=zeros.T)
    return layer.eval()


def dequantise_awq(layer: Any) -> Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32).mT


def dequantise_autoawq(layer: Any) -> Tensor:
    from awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32).mT


def of_weight(layer: Any) -> Tensor:
    return layer.weight.dequantize()


BF16 = torch.bfloat16
QUANTISERS = {
    "torchao int8": Quantiser("torchao", torchao("Int8WeightOnlyConfig"), "torchao", of_weight),
    "torchao int8, bfloat16": Quantiser("torchao", torchao("Int8WeightOnlyConfig"), "torchao", of_weight, BF16),
    "torchao int4": Quantiser("torchao", intx4, "torchao", of_weight),
    "torchao float8": Quantiser("torchao", torchao("Float8WeightOnlyConfig"), "torchao", of_weight),
    "quanto int8": Quantiser("optimum.quanto", quanto("qint8"), "quanto", of_weight),
    "quanto int4": Quantiser("optimum.quanto", quanto("qint4"), "quanto", of_weight),
    "quanto float8": Quantiser("optimum.quanto", quanto("qfloat8"), "quanto", of_weight),
    "HQQ 4-bit": Quantiser("hqq.core.quantize", hqq(4), "hqq", lambda layer: layer.dequantize()),
    "HQQ 8-bit, bfloat16": Quantiser("hqq.core.quantize", hqq(8), "hqq", lambda layer: layer.dequantize(), BF16),
    "GGUF Q4_0": Quantiser("diffusers", gguf("Q4_0"), "gguf", dequantise_gguf),
    "GGUF Q8_0, bfloat16": Quantiser("diffusers", gguf("Q8_0"), "gguf", dequantise_gguf, BF16),
    "GPTQ (gptqmodel)": Quantiser("gptqmodel", gptq, "gptq", lambda layer: layer.dequantize_weight().mT),
    "AWQ (gptqmodel), bfloat16": Quantiser("gptqmodel", awq, "awq", dequantise_awq, BF16),
    "AWQ (autoawq)": Quantiser(
        "awq", autoawq, "awq", dequantise_autoawq, trains="its backward wants triton or autoawq-kernels"
    ),
}


def replaced(model: nn.Module, make: Make) -> Any:
    """The model with every projection of its blocks quantised."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name.endswith("_proj"):
                setattr(parent, name, make(child))
    return model


def main() -> None:
    from lora_lite.base.layer import layer_of

    warnings.simplefilter("ignore")
    print("| quantiser | measured - dequantised | measured, ms | dequantised, ms | probe, ms |\n|---|---|---|---|---|")
    for name, quantiser in QUANTISERS.items():
        try:
            importlib.import_module(quantiser.package)
            torch.manual_seed(0)
            module = quantiser.make(nn.Linear(576, 1536, dtype=quantiser.dtype))
        except ImportError as error:
            print(f"| {name} | not installed: {error} |")
            continue
        layer: Any = layer_of(module, "proj")
        times: list[list[float]] = [[], [], []]
        for _ in range(6):
            start = time.perf_counter()
            layer_of(module).storage.dense(layer, None)
            middle = time.perf_counter()
            with torch.no_grad():
                dequantised = quantiser.dequantise(module).float()
            times[0].append(middle - start)
            times[1].append(time.perf_counter() - middle)
        measured = layer.dense_weight()
        first, *rest = times[0]
        ms = [min(rest), min(times[1]), first - min(rest)]
        difference = (measured - dequantised).abs().max() / dequantised.abs().max()
        print(f"| {name} | {float(difference):.1e} | " + " | ".join(f"{1000 * value:.1f}" for value in ms) + " |")


if __name__ == "__main__":
    main()
