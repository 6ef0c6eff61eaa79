"""Pretrained models of other projects: reading and writing."""
