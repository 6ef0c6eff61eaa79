"""Cloud TPU slices: plan one on a laptop; scripts that create, use and delete it."""

import jaxgpt.runs  # noqa: F401  from here on Ctrl-C is one line
