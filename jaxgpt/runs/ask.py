"""Asking a person in the terminal which of several answers they like best. Votes are on disk before the next
question."""

import shutil
import textwrap
import time
import uuid
from collections.abc import Callable

import numpy as np

from jaxgpt.data.comparisons import Kind
from jaxgpt.data.votes import Store, Task, Vote

KEYS = "a number picks, s skips, u takes the last pick back, Ctrl-C stops (every pick is saved)"


def ask(
    store: Store,
    annotator: str,
    task: Task,
    title: str,
    rng: np.random.Generator,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = print,
) -> bool:
    """Show a task's answers, blind and shuffled, until a pick or a skip is stored; False if the last vote was undone
    instead. EOFError or KeyboardInterrupt from `read` stores nothing."""
    order = [int(i) for i in rng.permutation(len(task.answers))]
    write(f"\n{title}\n{_wrapped(task.prompt, '  ')}\n")
    for number, i in enumerate(order, 1):
        write(_wrapped(task.answers[i].text, f"  {number}  ") + "\n")
    started = time.monotonic()
    while True:
        word = read("> ").strip().lower()
        if word == "u":
            if store.undo(annotator, uuid.uuid4().hex):
                return False
            write("there is no pick to take back")
        elif word == "s" or (word.isdecimal() and 1 <= int(word) <= len(order)):
            best = () if word == "s" else (order[int(word) - 1],)
            rest = tuple(i for i in order if i not in best)
            kind: Kind = "favourite" if best else "skip"
            tiers = (best, rest) if best else (rest,)
            seconds = time.monotonic() - started
            store.vote(Vote(uuid.uuid4().hex, task.id, annotator, kind, tiers, tuple(order), seconds, time.time()))
            return True
        else:
            write(f"type a number from 1 to {len(order)}, s or u")


def _wrapped(text: str, indent: str) -> str:
    width = min(shutil.get_terminal_size().columns, 96)
    lines = textwrap.wrap(" ".join(text.split()) or "(nothing)", max(width - len(indent), 20))
    return "\n".join((indent if n == 0 else " " * len(indent)) + line for n, line in enumerate(lines))
