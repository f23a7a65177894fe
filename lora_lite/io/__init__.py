"""Floor 4. Adapter files as untrusted input."""
