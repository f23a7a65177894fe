"""record_dense: a model's config says which of its layers are still quantised, after a merge made others dense."""

from typing import Any

from loguru import logger
from torch import nn

from ..base.layer import find_layers


def record_dense(root: nn.Module) -> None:
    """Let the folder that transformers' `save_pretrained` writes open as what the model is now.

    Without a quantised layer, the config has no quantisation any more; of bitsandbytes, what is dense is a module to
    skip. Of another library a warning says that it can't be told.
    """
    for model in root.modules():
        quantizer: Any = getattr(model, "hf_quantizer", None)
        if quantizer is None:
            continue
        layers = find_layers(dict(model.named_modules())).items()
        dense = [path for path, layer in layers if layer.storage.is_dense]
        if len(dense) == len(layers):
            quantizer.remove_quantization_config(model)
            continue
        config: Any = model.config
        if quantizer.quantization_config.quant_method == "bitsandbytes":
            config.quantization_config.llm_int8_skip_modules = dense
        else:
            problem = "some layers are dense now and others quantised, which its config can't say"
            logger.warning(f"{type(model).__name__}: {problem}\n  a folder of save_pretrained may open wrongly")
