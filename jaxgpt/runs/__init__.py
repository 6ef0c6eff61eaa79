"""A run on disk: its folder, settings, checkpoints and models, its command line, and the programs that read it."""
