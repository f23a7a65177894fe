"""The models that are compared, and their work: SmolLM2-135M-Instruct on real text, and a stack of linear layers."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from torch import Tensor, nn
from transformers import AutoTokenizer

import lora_lite as ll
from lora_lite.base.load import faster_on_cpu

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from pairs import read_jsonl, stdlib_pairs
from smollm2 import smollm2_folder

RANK, BATCH, TOKENS = 16, 2, 256
WIDTH, DEPTH = 2048, 8

_asked = "auto"


def choose(dtype: str) -> None:
    """The dtype of all that is loaded and stacked from here on; "auto": the faster of the checkpoint's and float32."""
    global _asked
    _asked = dtype


def stored_in() -> torch.dtype:
    """The dtype on this machine."""
    return faster_on_cpu(torch.bfloat16) if _asked == "auto" else getattr(torch, _asked)


def load(quantization: str | None = None) -> Any:
    return ll.load_base(str(smollm2_folder()), stored_in(), quantization)


def base(quantization: str | None = None) -> Any:
    """The frozen base."""
    return differentiable(load(quantization).requires_grad_(False))


def ours(variant: str = "lora", quantization: str | None = None, **fields: Any) -> Any:
    model = load(quantization)
    adapter = ll.attach(model, configured(variant, **fields))
    settle(adapter.parameters())
    return differentiable(model)


def configured(variant: str, **fields: Any) -> Any:
    cls: Any = ll.config_for(variant)
    return cls(**{"variant": variant, "r": RANK, **fields})


def peft(quantization: str | None = None, bf16: bool = False, **fields: Any) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", **fields)
    model = get_peft_model(load(quantization), config, autocast_adapter_dtype=not bf16)
    settle(p for p in model.parameters() if p.requires_grad)
    return differentiable(model)


def bare() -> Any:
    """LoRA in as few calls of PyTorch as its maths has, in a hook without a name, a scale or a check, and with all that
    autograd likes to keep: what is left of a ratio is the products and calls themselves."""
    model = base()
    for target in ll.plan(model, configured("lora")):
        layer = model.get_submodule(target.path)
        layer.bare_a = nn.Parameter(torch.zeros(RANK, layer.in_features))
        layer.bare_b = nn.Parameter(torch.zeros(layer.out_features, RANK))
        settle((layer.bare_a, layer.bare_b))
        layer.register_forward_hook(_bare_hook)
    return model


def _bare_hook(layer: Any, args: tuple[Tensor], y: Tensor) -> Tensor:
    (x,), (o, i) = args, layer.weight.shape
    if not torch.is_grad_enabled() and x.shape[1] == 1:
        return y.add_(nn.functional.linear(nn.functional.linear(x.float(), layer.bare_a), layer.bare_b))
    h = x.reshape(-1, i) @ layer.bare_a.to(x.dtype).mT
    return torch.addmm(y.reshape(-1, o), h, layer.bare_b.to(x.dtype).mT).view(y.shape)


def differentiable(model: Any) -> Any:
    """With the gradient of the input in every contender: what an adapter adds is then all that differs."""
    model.enable_input_require_grads()
    return model


@torch.no_grad()
def settle(parameters: Any) -> None:
    """Small values, as after some training: with B = 0 some products could be skipped."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        if parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


def text(file: Path | None) -> Tensor:
    """(2, 256) tokens: of a JSONL file of questions and answers such as GSM8K, or of the standard library's
    docstrings."""
    pairs = stdlib_pairs() if file is None else read_jsonl(file)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    words = "\n".join(f"{pair.prompt}\n{pair.completion}" for pair in pairs[:200])
    return torch.tensor(tokenizer(words).input_ids[: BATCH * TOKENS]).view(BATCH, TOKENS)


def train_step(model: Any, ids: Any) -> Callable[[], None]:
    """Forward, backward and AdamW (fused, of what is trained), as a function."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None
    model.train()

    def step() -> None:
        loss_of(model, ids).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def loss_of(model: Any, ids: Any) -> Tensor:
    """The loss of a language model, on ids or on a whole batch, or of the stack with ids as its input."""
    if isinstance(ids, Mapping):
        of_batch: Tensor = model(**ids, use_cache=False).loss
        return of_batch
    if ids.is_floating_point():
        squares: Tensor = model(ids).float().square().mean()
        return squares
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def decoder(model: Any, ids: Tensor, batch: int) -> Callable[[], None]:
    """Greedy decoding after a prompt of 8 tokens: a function whose first call reads the prompt, each later one makes a
    token."""
    model.eval()
    given: dict[str, Any] = {"input_ids": ids.reshape(-1)[: 8 * batch].view(batch, 8), "past_key_values": None}

    @torch.no_grad()
    def token() -> None:
        out = model(**given, use_cache=True, logits_to_keep=1)
        given.update(input_ids=out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=out.past_key_values)

    return token


def within_cache(token: Callable[[], None]) -> Callable[[], None]:
    """A decoder with PEFT's own cache of what DoRA computes from the weights, which is off by default."""

    def run() -> None:
        with DoraCaching():
            token()

    return run


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=stored_in()) for _ in range(DEPTH)]
    return nn.Sequential(*layers).requires_grad_(False)


def stack_ours(variant: str = "lora") -> nn.Sequential:
    model = stack()
    settle(ll.attach(model, configured(variant, target_names=r"^\d+$")).parameters())
    return model


def stack_peft(**fields: Any) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[str(i) for i in range(DEPTH)], **fields)
    model: Any = get_peft_model(stack(), config)
    settle(p for p in model.parameters() if p.requires_grad)
    return model


def stack_input() -> Tensor:
    x = torch.randn(BATCH * TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return x.to(stored_in()).requires_grad_()
