"""The command `lora-lite play`: load, say where the page is, serve."""

import os
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import torch

from ..base.load import load_base
from ..errors import BaseModelError
from .playground import Playground
from .server import serve


def run(
    model_id: str,
    adapters: Sequence[Path],
    *,
    port: int = 8421,
    open_browser: bool = True,
    dtype: str = "auto",
    quantization: str | None = None,
) -> None:
    """Serve the page of a model and its adapters until Ctrl-C. Nothing else is read from the disk, and no network used.

    Raises:
        BaseModelError: for a model that isn't there, or a port that is taken.
        And what load_base and load raise.
    """
    play = playground(model_id, dtype, quantization)
    for path in adapters:
        play.load(path)

    def ready(address: str) -> None:
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if open_browser:
            # A browser of the terminal stays in this call until its user leaves it.
            threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()

    serve(play, port, ready)


def playground(model_id: str, dtype: str = "auto", quantization: str | None = None) -> Playground:
    """The model and its tokenizer, from the disk alone."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it then
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id, local_files_only=True)
        model = load_base(model_id, dtype, quantization, local_files_only=True)
    except OSError as error:
        first = str(error).splitlines()[0]
        raise BaseModelError(f"{model_id} can't be opened from this disk: {first}") from error
    # The server and the browser have the last core: threads that compete for one wait many times as long as they work.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - 1)))
    return Playground(model, tokenizer, Path(model_id).name if Path(model_id).is_dir() else model_id)
