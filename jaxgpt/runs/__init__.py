"""A run on disk: its folder, settings, checkpoints and models, its command line, and the programs that read it."""

from jaxgpt.runs.endings import quit_at_ctrl_c

quit_at_ctrl_c()
