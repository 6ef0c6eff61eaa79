"""Talk to a model in the terminal.

    python -m experiments.chat                                  SmolLM2-135M-Instruct, a download of 90 MB
    python -m experiments.chat --model runs/assistant/ppo       a model trained here, at any stage
    python -m experiments.chat --model ~/models/Llama-3.2-1B    a Hugging Face folder; or a .gguf file

Each line is one prompt. A model with a chat template remembers the conversation, a model trained here answers each
prompt on its own, and a base model, which has learned no prompt format, continues your text.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxgpt.config import Seed
from jaxgpt.data.templates import Turn
from jaxgpt.errors import UserError
from jaxgpt.runs.cli import cli
from jaxgpt.structs import Array
from jaxgpt.web.speaker import SamplingConfig, Speaker

COMMANDS = "/new  /again  /model PATH  /stats  /help  /quit"
HELP_TEXT = """/new         forget the conversation
/again       answer the same prompt again
/model PATH  switch to another model
/stats       show the speed of the last answer
/quit        quit; so does the end of the input (Ctrl-D)
Ctrl-C       stop an answer; it doesn't quit"""


@dataclasses.dataclass(frozen=True)
class Settings(SamplingConfig):
    """Runs on any machine; answers appear as they are sampled."""

    model: Path = Path("smollm2-135m")  # or a run, a model folder, a Hugging Face folder or a .gguf file
    int8: bool = True  # weights rounded to int8: less memory to read per token; --no-int8 for float32
    raw: bool = False  # continue your text instead of answering it as a prompt
    seed: Seed = 0


PRESETS: dict[str, Settings] = {}


class Chat:
    """A model ready to answer, and the conversation so far."""

    def __init__(self, settings: Settings) -> None:
        self.speaker = Speaker(settings.model, int8=settings.int8, raw=settings.raw)
        self.sampling: SamplingConfig = settings
        self.history: list[Turn] = []
        self.last, self.stats = "", "no answer yet"

    def reply(self, text: str, key: Array) -> Iterator[str]:
        """Yield the answer's text in pieces, as tokens are sampled. The oldest turns are forgotten where the
        conversation is too long for the model."""
        ids = self.speaker.prompt(text, self.history, self.sampling.new_tokens)
        started, first_token_at = time.monotonic(), 0.0
        sampled: list[int] = []
        said = ""
        for token, piece in self.speaker.generate(ids, self.sampling, key):
            first_token_at = first_token_at or time.monotonic()
            sampled.append(token)
            said += piece
            if piece:
                yield piece
        ended = time.monotonic()
        if self.speaker.is_multi_turn:
            self.history.append((text, said))
        speed = max(len(sampled) - 1, 0) / max(ended - first_token_at, 1e-9)
        self.stats = (
            f"prompt of {len(ids)} tokens in {(first_token_at or ended) - started:.2f} s, then {len(sampled)} tokens "
            f"at {speed:.1f} tokens/s; the first prompt of each length also includes compilation"
        )


def main(settings: Settings) -> None:
    chat = Chat(settings)
    config = chat.speaker.config
    print(f"{settings.model}: {config.layers} layers, width {config.width}; the first answer compiles. {COMMANDS}")
    for count in range(sys.maxsize):
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D to leave)")
            continue
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
                path = Path(line.removeprefix("/model").strip() or settings.model)
                chat = Chat(dataclasses.replace(settings, model=path))
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
            print(" (stopped; /quit or Ctrl-D to leave)")


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
