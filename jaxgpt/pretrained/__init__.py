"""Weights of other people, in and out."""
