"""PEFT's folders: read, and written."""
