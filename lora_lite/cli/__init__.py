"""The command `lora-lite`: the commands themselves are in commands.py, which needs the extra `cli`."""

import os
import sys

from loguru import logger


def main() -> None:
    """Run a command of sys.argv; exits with its code, 2 for bad input."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f"lora-lite: {missing} is not installed; pip install 'lora-lite[cli]'", file=sys.stderr)
        sys.exit(2)
    logger.remove()  # commands.py has a sink of its own
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | os.environ
    app(prog_name="lora-lite")
