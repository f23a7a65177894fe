"""Floor 2. The frozen model: kinds of layer, ways of storing a weight, fingerprint, loading."""
