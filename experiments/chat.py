"""Talk, in the terminal, to any stage that was trained.

    python -m experiments.chat                           the PPO model of `make assistant`
    python -m experiments.chat --model runs/assistant/sft --top-p 0.9

Each line is one prompt; /model PATH changes the model, /help lists the rest. A pretrained model, which knows no tags,
continues your words.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxgpt import decode, rollout, sampling
from jaxgpt.checkpoint import Loaded, load_language_model
from jaxgpt.cli import cli
from jaxgpt.config import UserError
from jaxgpt.structs import Array
from jaxgpt.tokenizer import prompt_ids

HELP = "/model PATH another model · /stats speed of the last answer · /again the same prompt · /quit"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Any machine; answers appear as they are sampled."""

    model: Path = Path("runs/assistant/ppo")  # a run or model folder
    temperature: float = 0.8  # 0: always the most probable token
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    new_tokens: int = 48
    raw: bool = False  # continue the words themselves instead of answering a prompt
    seed: int = 0


PRESETS: dict[str, Settings] = {}


def filter_logits(settings: Settings) -> sampling.Filter:
    """The sampling settings as one function of the logits."""

    def apply(logits: Array) -> Array:
        if settings.temperature > 0:
            logits = sampling.temperature(logits, settings.temperature)
        if settings.top_k:
            logits = sampling.top_k(logits, settings.top_k)
        return sampling.top_p(logits, settings.top_p)

    return apply


def reply(loaded: Loaded, settings: Settings, text: str, key: Array) -> Iterator[str]:
    """Pieces of the answer's text as tokens come; a piece waits until its characters are whole."""
    raw = settings.raw or loaded.extra.get("raw", False)
    template = loaded.tokenizer.template
    ids = [template.separator, *loaded.tokenizer.encode(text)] if raw else prompt_ids(loaded.tokenizer, text)
    room = loaded.config.block - settings.new_tokens
    if room < 1:
        raise UserError(
            f"new_tokens {settings.new_tokens} leaves no room in a block of {loaded.config.block}; lower it"
        )
    if len(ids) > room:
        raise UserError(f"this prompt has {len(ids)} tokens and {room} fit beside the answer; write a shorter one")
    width = min(room, -(-len(ids) // 16) * 16)  # few shapes, so few compilations
    tokens, length = rollout.pad_prompts([ids], width)
    sampler = sampling.categorical if settings.temperature > 0 else sampling.greedy
    stream = decode.stream(
        loaded.params, loaded.config, jnp.asarray(tokens), jnp.asarray(length), key,
        new_tokens=settings.new_tokens, stop=template.separator if raw else template.end, sample=sampler,
        filter_logits=filter_logits(settings),
    )  # fmt: skip
    said, seen = "", []
    for token in stream:
        seen.append(token)
        whole = loaded.tokenizer.decode(seen)
        if not whole.endswith("\ufffd"):
            yield whole[len(said) :]
            said = whole


def main(settings: Settings) -> None:
    loaded = load_language_model(settings.model)
    print(f"{settings.model}: {loaded.config.layers} layers, width {loaded.config.width}. {HELP}")
    last, stats = "", "nothing said yet"
    answer = functools.partial(reply, settings=settings)
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
                print(HELP)
            elif line == "/stats":
                print(stats)
            elif line.startswith("/model"):
                loaded = load_language_model(Path(line.removeprefix("/model").strip() or settings.model))
                print("changed")
            elif line.startswith("/") and line != "/again":
                raise UserError(f"unknown command {line.split()[0]!r}; {HELP}")
            elif line == "/again" and not last:
                raise UserError("there is no earlier prompt; write one")
            elif line:
                last = last if line == "/again" else line
                started, pieces = time.monotonic(), 0
                for piece in answer(loaded, text=last, key=jax.random.fold_in(jax.random.key(settings.seed), count)):
                    print(piece, end="", flush=True)
                    pieces += 1
                seconds = time.monotonic() - started
                print()
                stats = (
                    f"{pieces} tokens in {seconds:.2f} s, {pieces / seconds:.0f} tokens/s (the first answer compiles)"
                )
        except UserError as error:
            print(f"error: {error}")


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
