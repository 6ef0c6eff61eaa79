"""The transformer as pure functions on nested dicts, and what its layers are made of."""
