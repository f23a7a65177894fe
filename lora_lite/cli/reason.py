"""An error in a few words, for a person."""

from ..errors import LoraLiteError

# Packages that a command may lack, and the extra that has them.
EXTRAS = {"typer": "cli", "rich": "cli", "matplotlib": "demo", "transformers": "hf", "accelerate": "hf"}
EXTRAS |= {"starlette": "play", "uvicorn": "play"}
EXTRAS |= {"bitsandbytes": "bnb", "gguf": "gguf", "diffusers": "diffusers"}


def reason(error: Exception) -> str:
    """The message of an error of ours, all its lines: those below the first say what to do next. Of any other, one."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        cure = f"; pip install 'lora-lite[{EXTRAS[package]}]'" if package in EXTRAS else ""
        return f"{package} is not installed{cure}"
    lines = str(error).strip().splitlines() or ["no reason given"]
    return "\n".join(lines) if isinstance(error, LoraLiteError) else f"{type(error).__name__}: {lines[0]}"
