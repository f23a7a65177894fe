"""load_base: a transformers model, dense or on bitsandbytes, ready for an adapter."""

import functools
import logging
import platform
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger

from ..dtypes import dtype_name
from ..errors import BaseModelError, ConfigError
from .bitsandbytes import compute_in, keep_layout, repackable
from .fingerprint import BaseRecord
from .layer import quantization_of

# dtype="auto" tries these after the checkpoint's own: float16 has more digits than bfloat16 but overflows where the
# numbers need bfloat16's range, and float32 works wherever there is memory for it.
CASCADE = (torch.float16, torch.bfloat16, torch.float32)
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
PRODUCT = (64, 576, 1536)  # (tokens, d_in, d_out) of the product that is timed: a millisecond where the dtype is native
# How many times as fast float32 must be to take the place of 16 bits, which need half the memory. Without native
# bfloat16 it is 5 to 60 times as fast; near 1 the noise of the two times would choose.
WORTH = 1.5
QUANTIZATIONS = ("nf4", "fp4", "int8")
# Options of from_pretrained that say where config.json is. The others may hold tensors, or what can't be copied.
LOCATES = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies", "gguf_file")

_trusted: set[str] = set()  # models whose own code was needed and has worked, on the caller's word, in this process


def load_base(
    model_id: str,
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
    device_map: Any = None,
    trust_remote_code: bool | None = None,
    auto_class: Any = None,
    **kwargs: Any,
) -> Any:
    """Load a base model that works: each try ends with a forward of one token.

    model_id           a hub id or a folder
    dtype              "auto": the checkpoint's dtype, then float16, bfloat16 and float32, until the forward runs and
                       gives finite logits; the reason for each fallback is logged. On a CPU, float32 comes before a
                       checkpoint's 16 bits where its products are clearly faster (many CPUs emulate bfloat16): one of
                       each is timed, once a process, and the log names both times. The weights keep their values and
                       take twice the memory. Without a device_map, a machine with an accelerator counts as no CPU: the
                       model may be moved there. A torch dtype or its name: just that
    quantization       None, "nf4", "fp4" (4-bit) or "int8", through bitsandbytes. A folder that is quantised already
                       opens with None, or with what it holds
    compute_dtype      of a 4-bit base, whatever its folder says: weights are dequantised to it on every forward and the
                       layer multiplies in it. None: the dtype that is asked for; with "auto" bfloat16, which has
                       float32's range at half its cost, or float32 on a CPU where that is clearly faster
    double_quant       quantise the 4-bit scales too: 0.37 bits a weight less (QLoRA, arXiv:2305.14314, section 3)
    device_map         as in transformers. None: the CPU for a dense base, the accelerator if any for a quantised one
    trust_remote_code  True runs code that comes with the model. None: only if an earlier call for this model_id in
                       this process said True, and the model did need its own code, and loaded
    auto_class         default: transformers.AutoModelForCausalLM
    kwargs             for from_pretrained; a quantization_config among them says the compute dtype itself

    Returns the model, in eval mode.

    Raises:
        ConfigError: for a bad argument, or a folder that is quantised in another way than the one asked for.
        BaseModelError: when no dtype works.
        ImportError: without transformers (extra "hf") or bitsandbytes ("bnb").
        And what from_pretrained raises, for a model that isn't there.
    """
    import transformers

    if quantization not in (None, *QUANTIZATIONS):
        raise ConfigError(f"quantization={quantization!r}: wanted None or one of {QUANTIZATIONS}")
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"dtype={dtype!r}: wanted 'auto', a torch dtype or its name")
        dtype = getattr(torch, dtype)
    trust = model_id in _trusted if trust_remote_code is None else trust_remote_code
    options = {"device_map": device_map, "trust_remote_code": trust, **kwargs}
    if quantization is not None:
        options["device_map"] = device_map or {"": _accelerator()}
    chosen = _choice(model_id, dtype, quantization, options["device_map"], kwargs)
    compute_dtype = compute_dtype or chosen.compute
    if quantization is not None:
        options["quantization_config"] = bnb_config(quantization, compute_dtype, double_quant)
    load: Any = (auto_class or transformers.AutoModelForCausalLM).from_pretrained
    reasons: list[str] = []
    for attempt in chosen.attempts:
        model = None  # what failed must be gone before the next is loaded
        try:
            with warnings.catch_warnings():  # of two quantization_configs; _check_quantization raises if it matters
                warnings.filterwarnings("ignore", "You passed `quantization_config`")
                model, info = load(model_id, dtype=attempt, output_loading_info=True, **options)
            if quantization is not None:
                _check_quantization(model_id, model, quantization, double_quant)
            timed = _settle_dtype(model, attempt, chosen)
            if "quantization_config" not in kwargs:
                compute_in(model, compute_dtype)
            for layer in repackable(model):
                keep_layout(layer, True)  # before the first forward, which would repack it
            _one_token(model)
        except torch.OutOfMemoryError:  # a RuntimeError, but one that tells nothing of the dtype
            raise
        except RuntimeError as error:
            reasons.append(f"{_name(attempt)}: {type(error).__name__}: {str(error).splitlines()[0]}")
            logger.warning(f"{model_id} does not work in {reasons[-1]}")
            continue
        if trust and type(model).__module__.startswith("transformers_modules"):
            _trusted.add(model_id)
        _report(model_id, model, timed)
        _warn_of_adapters(model_id, info["unexpected_keys"])
        _warn_of_random(model_id, model, info["missing_keys"])
        return model
    raise BaseModelError(
        f"{model_id} works in none of {len(reasons)} dtypes on {', '.join(devices())}\n  " + "\n  ".join(reasons)
    )


def of_adapters(keys: Iterable[str]) -> list[str]:
    """The keys that an adapter's tensors have: a trainer that knows nothing of adapters saves them with the base."""
    return sorted(key for key in keys if any(part.startswith("lora_") for part in key.split(".")))


def _warn_of_adapters(model_id: str, unexpected: Iterable[str]) -> None:
    """from_pretrained leaves out what its model doesn't have."""
    if lost := of_adapters(unexpected):
        logger.warning(
            f"{model_id} holds {len(lost)} tensors of an adapter, which this model is without, such as {lost[0]}\n"
            f"  lora_lite.load(model, {model_id!r}, cfg=...) puts it on, with the config that it was trained with"
        )


def _warn_of_random(model_id: str, model: Any, missing: Iterable[str]) -> None:
    """from_pretrained draws what its folder lacks: of a language model that becomes a classifier, the head."""
    if lacking := sorted(missing):
        names = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        layer = lacking[0].removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        logger.warning(
            f"{model_id} lacks {len(lacking)} tensors of this {type(model).__name__}, which start at random: {names}\n"
            f"  the next load draws others: put them into the adapter, by attach(model, [cfg, "
            f"ll.FullConfig(target_names={layer!r})])"
        )


def load_as_recorded(folder: str, record: BaseRecord | None, **kwargs: Any) -> Any:
    """The base as an adapter's base record says that it was: in its dtype, dense or with each recorded module quantised
    in the same way.

    kwargs are load_base's; a dtype among them comes first. Without a record, load_base alone decides.

    Raises:
        BaseModelError: for an unknown way of quantising, or if other modules are quantised; and what load_base raises.
    """
    if record is not None:
        kwargs = {"dtype": record.dtype, **kwargs}
    if record is None or (recorded := record.quantization) is None:
        return load_base(folder, **kwargs)
    if recorded.quant_type not in QUANTIZATIONS:
        raise BaseModelError(
            f"the adapter was trained on {recorded.quant_type} weights, which can't be made again here\n"
            f"  wanted one of {', '.join(QUANTIZATIONS)}, or a dense base"
        )
    if recorded.compute_dtype is not None:
        kwargs = {"compute_dtype": getattr(torch, recorded.compute_dtype), **kwargs}
    model = load_base(folder, quantization=recorded.quant_type, double_quant=recorded.double_quant, **kwargs)
    live = quantization_of(model)
    modules = live.modules if live else []
    if different := sorted(set(modules) ^ set(recorded.modules)):
        raise BaseModelError(
            f"{folder} quantises to {len(modules)} modules, where the adapter was trained on {len(recorded.modules)}\n"
            f"  such as {', '.join(different[:3])}"
        )
    return model


def devices() -> list[str]:
    """The names of the devices that torch sees."""
    names = [f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"]
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None:
        name_of = getattr(torch.get_device_module(kind), "get_device_name", lambda _: kind.type)
        names += [f"{kind.type}:{i} ({name_of(i)})" for i in range(torch.accelerator.device_count())]
    return names


def bnb_config(quantization: str, compute_dtype: torch.dtype, double_quant: bool) -> Any:
    """transformers' config of one of QUANTIZATIONS."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_warning)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
    )


def _check_quantization(model_id: str, model: Any, quantization: str, double_quant: bool) -> None:
    """Raises ConfigError if the folder was quantised in another way than is asked for: transformers keeps that way."""
    live = quantization_of(model)
    stored = _quantized_as(live.quant_type, live.double_quant) if live else "no quantised layer"
    wanted = _quantized_as(quantization, double_quant)
    if stored != wanted:
        raise ConfigError(
            f"{model_id} holds {stored}, and {wanted} was asked for\n"
            f"  use quantization=None for what it holds, or the folder of the original weights"
        )


def _quantized_as(quant_type: str, double_quant: bool) -> str:
    if quant_type not in ("nf4", "fp4"):
        return quant_type
    return f"{quant_type} {'with' if double_quant else 'without'} double quantisation"


def _is_no_cast_warning(record: logging.LogRecord) -> bool:
    """bitsandbytes warns of float16 inputs for each layer of each forward; `_report` says it once."""
    return "inputs will be cast" not in str(record.msg)


def _accelerator() -> Any:
    kind = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if kind is None else torch.device(kind.type, torch.accelerator.current_device_index())


@functools.cache
def product_milliseconds(dtype: torch.dtype) -> float:
    """The time that one thread of this CPU takes for a product of PRODUCT's sizes."""
    tokens, d_in, d_out = PRODUCT
    threads = torch.get_num_threads()
    # Ones, not random numbers: a load must not move the seed.
    x, weight = (torch.ones(rows, d_in, dtype=dtype, device="cpu") for rows in (tokens, d_out))
    seconds = []
    # Where all cores are busy, two threads wait for each other up to 70 times as long as the product takes.
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for _ in range(4):  # the first, which isn't counted, sets the library up
                started = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 1000 * min(seconds[1:])


def product_times(*dtypes: torch.dtype) -> str:
    """A clause that says how long the product takes in each dtype."""
    tokens, d_in, d_out = PRODUCT
    times = ", ".join(f"{product_milliseconds(dtype):.2g} ms in {_name(dtype)}" for dtype in dtypes)
    return f"{tokens} tokens through a layer of {d_in} x {d_out} take one thread {times}"


def faster_on_cpu(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or float32 where this CPU multiplies at least WORTH times as fast in that."""
    slow = product_milliseconds(dtype) > WORTH * product_milliseconds(torch.float32)
    return torch.float32 if slow else dtype


@dataclass(frozen=True)
class _Choice:
    """The dtypes of one load_base."""

    attempts: list[Any]  # to be tried in this order; "auto" is the checkpoint's own
    compute: torch.dtype  # of 4-bit layers' products
    timed: list[torch.dtype]  # the 16-bit ones that were timed to choose, which the log names
    after_load: bool = False  # time the checkpoint's once the load has told it: its config.json doesn't


def _choice(
    model_id: str, dtype: str | torch.dtype, quantization: str | None, device_map: Any, kwargs: Mapping[str, Any]
) -> _Choice:
    if isinstance(dtype, torch.dtype):
        return _Choice([dtype], dtype, [])
    if not _on_cpu(device_map):  # accelerators have 16-bit products, so nothing is timed
        return _Choice(["auto", *CASCADE], torch.bfloat16, [])
    config = _stored_config(model_id, kwargs)
    stored: Any = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), None)
    quantized = quantization or config.get("quantization_config")  # 4-bit layers compute in bfloat16
    timed = [dtype for dtype in SIXTEEN_BITS if dtype is stored or (quantized and dtype is torch.bfloat16)]
    faster = {dtype: faster_on_cpu(dtype) for dtype in timed}
    attempts = ["auto", *CASCADE]
    if faster.get(stored) is torch.float32:
        attempts.sort(key=lambda attempt: attempt is not torch.float32)  # it comes first, the others as they were
    return _Choice(attempts, faster.get(torch.bfloat16, torch.bfloat16), timed, after_load=stored is None)


def _settle_dtype(model: Any, attempt: Any, chosen: _Choice) -> list[torch.dtype]:
    """Cast what is still in 16 bits to the dtype that is tried, or to the faster one where only the load told what the
    checkpoint's is; returns the 16-bit dtypes that were timed.

    Of a folder that is quantised already, from_pretrained leaves head, embeddings and norms in the dtype they have.
    """
    timed, quantization = chosen.timed, quantization_of(model)
    if quantization is not None and not quantization.method.startswith("bitsandbytes"):
        return timed
    if attempt == "auto" and chosen.after_load and model.dtype in SIXTEEN_BITS:
        timed = [*timed, *({model.dtype} - set(timed))]
        attempt = faster_on_cpu(model.dtype)
    if isinstance(attempt, torch.dtype):
        # One by one, not model.to(): transformers refuses that for a quantised model.
        for tensor in (*model.parameters(), *model.buffers()):
            if type(tensor) in (torch.nn.Parameter, torch.Tensor) and tensor.dtype in SIXTEEN_BITS:
                tensor.data = tensor.data.to(attempt)
    return timed


def _stored_config(model_id: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config.json as it stands, read without its classes, or the config among load_base's kwargs."""
    import transformers

    if isinstance(kwargs.get("config"), transformers.PreTrainedConfig):
        return {"dtype": kwargs["config"].dtype}
    options = {name: kwargs[name] for name in LOCATES if name in kwargs}
    config, _ = transformers.PreTrainedConfig.get_config_dict(model_id, **options)
    return config


def _on_cpu(device_map: Any) -> bool:
    """True if the whole model will be on the CPU, and stay there."""
    # Beside an accelerator, a model without a device_map is moved to it: by `.to()`, a trainer, or from_pretrained.
    if torch.accelerator.current_accelerator(check_available=True) is None:
        return device_map is not None or torch.get_default_device().type == "cpu"
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return all(str(device) == "cpu" for device in devices)


@torch.no_grad()
def _one_token(model: Any) -> None:
    bos = getattr(model.config.get_text_config(), "bos_token_id", None)
    inputs = {"input_ids": torch.tensor([[bos if isinstance(bos, int) else 0]], device=model.device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    output = model(**inputs)[0]  # logits, or the last hidden state of a model without a head
    if not output.isfinite().all():
        raise RuntimeError("the logits of one token are not finite")


def _report(model_id: str, model: Any, timed: list[torch.dtype]) -> None:
    stored, quantization = dtype_name(model.dtype), quantization_of(model)
    if quantization and quantization.method == "bitsandbytes-8bit":
        stored = f"8 bit (LLM.int8: eval forwards round inputs to float16 and int8), all else in {stored}"
    elif quantization and quantization.method == "bitsandbytes-4bit":
        stored = f"4 bit ({quantization.quant_type}, computing in {quantization.compute_dtype}), all else in {stored}"
    elif quantization:
        stored = f"{quantization.quant_type} weights, all else in {stored}"
    placed = sorted({str(parameter.device) for parameter in model.parameters()})
    times = f"; {product_times(*timed, torch.float32)}" if timed else ""
    logger.info(f"loaded {model_id} in {stored}, on {', '.join(placed)} of {'; '.join(devices())}{times}")


def _name(dtype: Any) -> str:
    return dtype_name(dtype) if isinstance(dtype, torch.dtype) else str(dtype)
