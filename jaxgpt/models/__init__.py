"""The transformer as pure functions on nested dicts, and its layers."""
