"""Lightning with the callback: adapters alone in a checkpoint, the resume that Lightning itself gives, the export."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import IDS, attach, config, tiny_llama
from processes import both_pass
from torch import nn

import lora_lite as ll
from lora_lite.trainer.lightning import AdapterCallback, save_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(num_workers|does not have many workers|log_every_n_steps|pin_memory)"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),  # Lightning's own calls of torch
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*(Checkpoint directory|Found .* module.* in eval mode|dirpath has changed)"),
]
ROWS = (torch.arange(12) + torch.arange(16)[:, None]) % 95 + 1


class Module(pl.LightningModule):
    """A model with an adapter, and a part of its own that is trained beside it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.gain = model, nn.Parameter(torch.ones(()))
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss * self.gain
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def module(cfg: Any = None, **names: float) -> Module:
    model = tiny_llama().train()
    torch.manual_seed(5)
    for name in names or {"default": 1.0}:
        attach(model, cfg or config("lora"), name)
        ll.adapters(model)[name].scale = names.get(name, 1.0)
    return Module(model)


def fit(
    what: Module, folder: Path, steps: int, *, resume: Path | None = None, ours: bool = True, **options: Any
) -> Any:
    callbacks: list[Any] = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, AdapterCallback()] if ours else callbacks,
        default_root_dir=folder,
        **options,
    )
    data = torch.utils.data.DataLoader(ROWS, batch_size=4)  # type: ignore[arg-type]
    trainer.fit(what, data, ckpt_path=None if resume is None else str(resume), weights_only=True)
    return trainer


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{n}:{key}": t.clone() for n, a in ll.adapters(model).items() for key, t in a.state_dict().items()}


def test_a_checkpoint_holds_the_adapters_and_what_is_not_their_model(tmp_path: Path) -> None:
    whole = module(default=1.0, fr=0.5)
    fit(whole, tmp_path / "a", 8)
    file = tmp_path / "a" / "step=4.ckpt"  # at the end of an epoch: within one Lightning takes other batches
    keys = torch.load(file, weights_only=True)["state_dict"].keys()
    assert {key for key in keys if "lora_" not in key} == {"gain"}
    assert len(keys) == 1 + 2 * 28
    again = module(default=1.0, fr=1.0)
    base = {key: t.clone() for key, t in again.state_dict().items() if "lora_" not in key and key != "gain"}
    fit(again, tmp_path / "b", 8, resume=file)
    assert whole.losses[4:] == again.losses
    assert ll.adapters(again)["fr"].scale == 0.5
    end = values(whole.model)
    assert all(torch.equal(t, end[key]) for key, t in values(again.model).items())
    assert torch.equal(whole.gain, again.gain)
    assert all(torch.equal(again.state_dict()[key], t) for key, t in base.items())
    assert not again._load_state_dict_post_hooks


def test_adapters_of_a_checkpoint_are_files(tmp_path: Path) -> None:
    whole = module(default=1.0, fr=0.5)
    fit(whole, tmp_path, 2)
    paths = save_adapters(tmp_path / "step=2.ckpt", tmp_path / "files")
    assert [path.name for path in paths] == ["default.safetensors", "fr.safetensors"]
    with pytest.raises(ll.CheckpointError, match=r"pickle, which is never opened.*\n.*\n.*lightning\.save_adapters"):
        ll.load(tiny_llama(), tmp_path / "step=2.ckpt")
    alone = tiny_llama()
    for name in ("default", "fr"):
        ll.load(alone, tmp_path / "files" / f"{name}.safetensors", name)
    with torch.no_grad():
        assert torch.equal(alone(input_ids=IDS).logits, whole.model.eval()(input_ids=IDS).logits)


def test_schedules_and_penalties_go_with_accumulation_clipping_and_bfloat16(tmp_path: Path) -> None:
    cfg = ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=4, tinit=0, tfinal=1)
    options: dict[str, Any] = {"precision": "bf16-mixed", "gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    lightning = module(cfg)
    fit(lightning, tmp_path, 3, **options)
    adapter = ll.adapters(lightning.model)["default"]
    assert adapter.steps == 3

    by_hand = module(cfg)
    trained = ll.adapters(by_hand.model)["default"]
    optimizer = by_hand.configure_optimizers()
    batches = [*ROWS.split(4), *ROWS.split(4)][:6]
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        for batch in (first, second):
            with torch.autocast("cpu", torch.bfloat16):
                loss = by_hand.training_step(batch, 0)
            ((loss + trained.penalty()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        trained.step()
        optimizer.zero_grad()
    wanted = values(by_hand.model)
    for key, tensor in values(lightning.model).items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-4, atol=1e-6)


def test_a_schedule_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    cfg = ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=9, tinit=0, tfinal=1)
    whole, again = module(cfg), module(cfg)
    fit(whole, tmp_path / "a", 6)
    fit(again, tmp_path / "b", 6, resume=tmp_path / "a" / "step=4.ckpt")
    assert ll.adapters(again)["default"].steps == 6
    end = values(whole.model)
    assert all(torch.equal(t, end[key]) for key, t in values(again.model).items())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    fit(module(), tmp_path / "a", 1)
    file = tmp_path / "a" / "step=1.ckpt"
    with pytest.raises(ll.CheckpointError, match=r"not of one config\n.*alpha"):
        fit(module(config("lora", alpha=5.0)), tmp_path / "b", 2, resume=file)
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj\.lora_A__fr"):
        fit(module(default=1.0, fr=1.0), tmp_path / "b", 2, resume=file)
    plain = module()
    fit(plain, tmp_path / "plain", 1, ours=False)
    with pytest.raises(ll.CheckpointError, match=r"has no adapter of AdapterCallback\n  load it without the callback"):
        fit(module(), tmp_path / "b", 2, resume=tmp_path / "plain" / "step=1.ckpt")
    with pytest.raises(ll.CheckpointError, match=r"step=1\.ckpt has no adapter of AdapterCallback"):
        save_adapters(tmp_path / "plain" / "step=1.ckpt", tmp_path)
    head = module()
    head.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ll.TargetError, match=r"in no adapter, .*: lm_head\.weight"):
        fit(head, tmp_path / "b", 1)
    with pytest.raises(ll.TargetError, match=r"Module has no adapter to train\n  lora_lite\.attach"):
        fit(Module(tiny_llama()), tmp_path / "b", 1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        callbacks=[ModelCheckpoint(tmp_path, save_weights_only=True), AdapterCallback()],
    )
    with pytest.raises(ll.TargetError, match=r"save_weights_only=True\) asks no callback.*\n  leave it out"):
        trainer.fit(module(), torch.utils.data.DataLoader(ROWS))  # type: ignore[arg-type]


def test_the_first_step_is_audited(tmp_path: Path) -> None:
    part = module()
    part.model.model.layers[1].mlp.register_forward_hook(lambda _, args, y: y.detach())
    with pytest.raises(ll.TargetError, match=r"first training step\n  no gradient, although the layer ran: .*mlp"):
        fit(part, tmp_path, 2)
    assert not any(name.endswith(".ckpt") for name in map(str, tmp_path.iterdir()))

    class Fails(Module):
        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            raise ValueError("a bad batch")

    failing = Fails(module().model)
    with pytest.raises(ValueError, match="a bad batch"):
        fit(failing, tmp_path, 2)
    assert not any(layer._forward_pre_hooks for layer in failing.modules())


@pytest.mark.slow
def test_in_two_processes(tmp_path: Path) -> None:
    both_pass("lightning_worker.py", tmp_path, folder=tmp_path, timeout=150)
