"""Text in, batches out: builders, sources, pipelines and preference files."""
