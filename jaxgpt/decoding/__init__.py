"""Decoding: prompts in one parallel pass, then token by token from a cache.

`generate` is the function to jit; `stream` yields one answer's tokens as they come; `engine` gives the place of an
answer that has ended to the next prompt. `sampling` shapes the distribution, `beam` searches, `speculative` checks the
tokens of a cheap draft. `weights` and `kv_cache` are what they are made of.
"""

from jaxgpt.decoding.generate import (
    STATIC_ARGNAMES,
    Sampler,
    check_fits_block,
    generate,
    generate_until,
    join_prompt_and_answer,
    scan_until_all_ended,
)
from jaxgpt.decoding.kv_cache import decode_step, feed, prefill
from jaxgpt.decoding.stream import stream
from jaxgpt.decoding.weights import prepare, quantise_int8, unembed
from jaxgpt.structs import Answers

__all__ = [
    "STATIC_ARGNAMES",
    "Answers",
    "Sampler",
    "check_fits_block",
    "decode_step",
    "feed",
    "generate",
    "generate_until",
    "join_prompt_and_answer",
    "prefill",
    "prepare",
    "quantise_int8",
    "scan_until_all_ended",
    "stream",
    "unembed",
]
