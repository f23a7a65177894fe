"""python -m lora_lite: the command line."""

from .cli import main

main()
