"""A run on disk: its folder, settings, checkpoints and models, its command line, and the programs that read it."""

from jaxgpt.runs.endings import open_closed_streams, quit_at_ctrl_c

open_closed_streams()
quit_at_ctrl_c()
