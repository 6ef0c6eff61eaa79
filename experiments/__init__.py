"""Programs to run: one file per stage, studies, benchmarks, and pages and chats for people."""

import jaxgpt.runs  # noqa: F401  from here on Ctrl-C is one line
