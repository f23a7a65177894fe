"""The loop of torchrun.py on Ray Train: workers train by DDP, and a checkpoint is the adapter's file.

pip install "ray[train]"
python examples/ray_train.py --workers 2 --steps 4
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer, prepare_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_lite as ll


def train(settings: dict[str, Any]) -> None:
    """What each worker does."""
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    torch.manual_seed(0)
    adapter = ll.attach(model, ll.LoRAConfig(r=8))  # before the model is wrapped
    first = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:  # a worker was lost, and Ray starts again
        with checkpoint.as_directory() as folder:
            ll.restore(model, Path(folder) / "adapter.safetensors")
            first = int((Path(folder) / "steps").read_text())
    wrapped = prepare_model(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    tokens = AutoTokenizer.from_pretrained(settings["model"])(settings["text"], return_tensors="pt").input_ids[0]
    rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    for step in range(first, settings["steps"]):
        batch = rows[[(world * step + rank) % len(rows)]].to(next(model.parameters()).device)
        optimizer.zero_grad()
        loss = wrapped(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                ll.save(model, Path(folder) / "adapter.safetensors", resume=True)
                (Path(folder) / "steps").write_text(str(step + 1))
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"loss": loss.item()}, checkpoint=saved)


def main(arguments: list[str] | None = None) -> Path:
    """Run it; returns the folder with the adapter's file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder; SmolLM2-135M-Instruct if none is given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("ray-out"))
    args = parser.parse_args(arguments)
    if args.model is None:
        from smollm2 import smollm2_folder

        args.model = str(smollm2_folder())
    settings = {"model": args.model, "steps": args.steps, "text": Path(__file__).with_name("smollm2.py").read_text()}
    result = TorchTrainer(
        train,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=ray.train.RunConfig(
            storage_path=str(args.out.resolve()),
            name="lora",
            failure_config=ray.train.FailureConfig(max_failures=1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    ).fit()
    assert result.checkpoint is not None
    print(f"loss {result.metrics['loss']:.4f}; the adapter is in {result.checkpoint.path}")
    return Path(result.checkpoint.path)


if __name__ == "__main__":
    main()
