"""Fixtures; every test starts from one seed and leaves the registry as it was."""

import copy
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from loguru import logger

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_HERE = Path(__file__).parent
_FOLDERS = sorted({str(file.parent) for file in _HERE.rglob("*.py")})  # tests of one room use helpers of another
sys.path[:0] = [*_FOLDERS, str(_HERE.parent / "examples")]

import checked  # noqa: E402, F401  # before lora_lite
from transformers import AutoTokenizer  # noqa: E402

import lora_lite as ll  # noqa: E402
from lora_lite.core.variant import REGISTRY  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for the real model, and not for its tokenizer alone, is slow; so are the thousand that say PEFT in
    their name. The slow ones come first, so that no process ends with one."""
    for item in items:
        has_model = not {"smollm2", "real_base"}.isdisjoint(getattr(item, "fixturenames", ()))
        if has_model or "peft" in item.nodeid:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Thousands of tests and all modules live to the end: a collection of garbage, 0.7 s with them, leaves them out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    before = dict(REGISTRY)
    torch.manual_seed(0)
    logger.disable("lora_lite")
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.fixture(scope="module")
def without_type_checks() -> Iterator[None]:
    """Users have none: a type check's own error must not stand in for ours."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The library's log lines, "LEVEL message"."""
    lines: list[str] = []
    logger.enable("lora_lite")
    sink = logger.add(lambda message: lines.append(str(message).rstrip()), format="{level} {message}", level="DEBUG")
    yield lines
    logger.remove(sink)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny bfloat16 Llama, wide enough for bitsandbytes' kernels."""
    from models import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def real_folder() -> str:
    """The folder of the real model. Without its wheel an error says how to get it: no test is left out in silence."""
    from smollm2 import smollm2_folder

    return str(smollm2_folder())


@pytest.fixture(scope="session")
def smollm2(real_folder: str) -> str:
    """The same, for tests that load the model: they are slow."""
    return real_folder


@pytest.fixture(scope="session")
def real_base(smollm2: str) -> Callable[..., Any]:
    """real_base(quantization=None): the real model afresh, in the dtype that this machine is fast in.

    To quantise it takes seconds, so that is done once, and each test has a copy.
    """
    quantised = functools.cache(lambda quantization: ll.load_base(smollm2, quantization=quantization))

    def load(quantization: str | None = None) -> Any:
        return ll.load_base(smollm2) if quantization is None else copy.deepcopy(quantised(quantization))

    return load


@pytest.fixture(scope="session")
def real_tokenizer(real_folder: str) -> Any:
    """The real model's; a test that changes it takes one of its own."""
    return AutoTokenizer.from_pretrained(real_folder)


@pytest.fixture(scope="session")
def tiny_chat(real_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny bfloat16 Llama that is sure of its next token, and the real model's tokenizer."""
    from models import tiny_llama

    folder = tmp_path_factory.mktemp("tiny_chat")
    real_tokenizer.save_pretrained(folder)
    model = tiny_llama(torch.bfloat16, vocab_size=len(real_tokenizer), max_position_embeddings=128)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def double() -> Any:
    """A variant without a config class of its own, as in the README."""

    @ll.register
    class Double:
        name = "double"

        @staticmethod
        def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ll.ParamSpec]:
            return {"lora_gain": ll.ParamSpec((1,), init="zeros")}

        @staticmethod
        def forward(layer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return y + layer.lora_gain * y

    return Double
