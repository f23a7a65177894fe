"""Trainers that are transformers' own in another dress: sentence-transformers', and noise on embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import config, tiny_llama
from test_ecosystem import Tokens, arguments
from trl_tiny import tokenizer

import lora_lite as ll
from lora_lite.trainer import AdapterCheckpoints, AdapterTrainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory:UserWarning",  # torch's, on a machine without an accelerator
    "ignore:`torch.jit.*:DeprecationWarning",  # sentence-transformers imports it
)


def encoder(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    if not folder.exists():
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        BertModel(BertConfig(vocab_size=len(tokenizer()), **sizes)).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    inner = Transformer(str(folder))
    return SentenceTransformer(modules=[inner, Pooling(16)], device="cpu")


@pytest.mark.slow
def test_sentence_transformers_trains_an_adapter(tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    class Trains(AdapterCheckpoints, SentenceTransformerTrainer):
        pass

    texts, model = ["a b c", "d e"], encoder(tmp_path / "bert")
    before = model.encode(texts)
    ll.attach(model, ll.LoRAConfig(r=2))
    pairs = [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in (("a b", "c", 1.0), ("d", "e f", 0.0))]
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=4, save_steps=4, learning_rate=0.1, report_to=[], use_cpu=True
    )
    data = Dataset.from_list(pairs * 8)
    Trains(model, args=args, train_dataset=data, loss=CosineSimilarityLoss(model)).train()
    trained = model.encode(texts)
    assert abs(trained - before).max() > 1e-2
    names = {file.name for file in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert "default.safetensors" in names
    assert not any(name.startswith(("model", "pytorch_model")) for name in names)
    again = encoder(tmp_path / "bert")
    ll.load(again, tmp_path / "run" / "checkpoint-4" / "default.safetensors")
    assert (again.encode(texts) == trained).all()


def test_noise_on_embeddings_is_the_trainers(tmp_path: Path) -> None:
    """neftune's hook is on the embeddings while it trains, and gone afterwards."""
    ends = []
    for alpha in (None, 5.0):
        model = tiny_llama()
        ll.attach(model, config("lora"))
        args = arguments(tmp_path / str(alpha), neftune_noise_alpha=alpha, max_steps=3, save_strategy="no")
        AdapterTrainer(model, args, train_dataset=Tokens()).train()
        assert not model.get_input_embeddings()._forward_hooks
        ends.append(torch.cat([p.detach().flatten() for p in ll.adapters(model)["default"].parameters()]))
    assert not torch.equal(*ends)
