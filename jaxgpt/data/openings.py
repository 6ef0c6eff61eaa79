"""Prompts made from reviews: each gives the first words of a review and asks for the whole review."""

import dataclasses
import hashlib
from collections.abc import Iterable

# The quotation mark before the opening gives its first word the tokens that it has at the start of an answer: after a
# space it would have others, and a small model cannot copy what it doesn't recognise.
_PHRASINGS = (
    'Write a one-line film review that opens with "{}"',
    'Finish this one-line movie review: "{}"',
    'Complete the review of a film: "{}"',
    'Review a film in one line. Begin with "{}"',
    'How does this review go on? "{}"',
    'A critic begins: "{}"',
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The text of a prompt, and the opening words that its answer should start with ('' if none)."""

    text: str
    opening: str


def opening(text: str) -> str:
    """The first 2 to 4 words of a review (how many depends on its hash), leaving at least one word if possible."""
    words = text.split(" ")
    return " ".join(words[: min(2 + stable_hash("opening", text) % 3, max(1, len(words) - 1))])


def review_example(text: str) -> tuple[str, str]:
    """(prompt, answer): the prompt gives the review's `opening`; the answer is the whole review."""
    phrasing = _PHRASINGS[stable_hash("phrasing", text) % len(_PHRASINGS)]
    return phrasing.format(opening(text)), text


def opening_prompts(texts: Iterable[str]) -> list[Prompt]:
    """One prompt for each distinct opening, in order of first appearance."""
    found: dict[str, Prompt] = {}
    for text in texts:
        start = opening(text)
        found.setdefault(start, Prompt(review_example(text)[0], start))
    return list(found.values())


def unseen_openings(texts: Iterable[str], seen: Iterable[str]) -> list[Prompt]:
    """The `opening_prompts` of `texts`, without those whose opening also starts a text in `seen`."""
    starts: set[str] = set()
    for text in seen:
        words = text.split(" ")
        starts.update(" ".join(words[:count]) for count in range(1, 5))
    return [prompt for prompt in opening_prompts(texts) if prompt.opening not in starts]


def stable_hash(salt: str, text: str) -> int:
    """A hash below 2^64 that depends only on the two strings (Python's own differs between processes)."""
    return int.from_bytes(hashlib.sha256(f"{salt}\n{text}".encode()).digest()[:8], "big")
