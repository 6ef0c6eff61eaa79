"""From text to batches: dataset builders, sources, pipelines and preference files."""
