"""Floor 5. What several methods share: the base of their configs, and how they are fitted."""
