"""An error in one line, for a person."""

from ..errors import LoraLiteError

# Packages that a command may lack, and the extra that has them.
EXTRAS = {"typer": "cli", "rich": "cli", "matplotlib": "demo", "transformers": "hf", "accelerate": "hf"}
EXTRAS |= {"starlette": "play", "uvicorn": "play"}
EXTRAS |= {"bitsandbytes": "bnb", "gguf": "gguf", "diffusers": "diffusers"}


def reason(error: Exception) -> str:
    """One line for a person."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        cure = f"; pip install 'lora-lite[{EXTRAS[package]}]'" if package in EXTRAS else ""
        return f"{package} is not installed{cure}"
    first = (str(error).strip().splitlines() or ["no reason given"])[0]  # the lines below it say what to do next
    return first if isinstance(error, LoraLiteError) else f"{type(error).__name__}: {first}"
