"""The command `lora-lite`: the commands themselves are in commands.py, which needs the extra `cli`."""

import os
import sys

from loguru import logger

from .reason import reason


def main() -> None:
    """Run a command of sys.argv; exits with its code, 2 for bad input."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        print(f"lora-lite: {reason(error)}", file=sys.stderr)
        sys.exit(2)
    logger.remove()  # commands.py has a sink of its own
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | os.environ
    app(prog_name="lora-lite")
