"""Floor 5. Adapters into weights, in memory and on disk."""
