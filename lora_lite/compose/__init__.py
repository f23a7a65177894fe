"""Floor 5. More than one adapter at work."""
