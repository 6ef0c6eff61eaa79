"""A GPT from language model to assistant, in pure functions. See README.md for the pipeline and the packages."""
