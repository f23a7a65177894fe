"""Floor 4. Run batches, and look at activations and outputs."""
