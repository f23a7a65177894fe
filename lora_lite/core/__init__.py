"""Floor 3. The runtime: config, variant, targets, hooks, attach, adapter, effective weight."""
