"""Floor 1. Tensor maths that methods share."""
