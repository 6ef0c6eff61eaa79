"""Decoding: prompts in one parallel pass, then token by token from a cache.

`generate` is the function to jit; `stream` yields one answer's tokens as they come. `sampling` shapes the distribution,
`beam` searches, `speculative` checks the tokens of a cheap draft.
"""

from jaxgpt.decoding.generate import (
    STATIC,
    Sampler,
    check_room,
    decode_step,
    feed,
    generate,
    generate_until,
    int8,
    join,
    prefill,
    prepare,
    unembed,
    until_all_ended,
)
from jaxgpt.decoding.stream import stream
from jaxgpt.structs import Answers

__all__ = [
    "STATIC",
    "Answers",
    "Sampler",
    "check_room",
    "decode_step",
    "feed",
    "generate",
    "generate_until",
    "int8",
    "join",
    "prefill",
    "prepare",
    "stream",
    "unembed",
    "until_all_ended",
]
