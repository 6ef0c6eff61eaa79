"""A page on which several models answer side by side, and where every token can be looked at.

    python -m experiments.chat_web                                        `make chat-web`: what runs/assistant holds
    python -m experiments.chat_web --models smollm2-135m runs/align/ppo --reference smollm2-135m

Each answer shows its probability token by token, its KL to the reference, the critic's values and the reward model's
score; the best one may be picked, which is a vote in the same database as the label page's. A second view shows what a
run of PPO kept of its own answers: log-probability, reference, ratio, advantage, value and return of each token.
"""

import dataclasses
from pathlib import Path

from jaxgpt.data import votes
from jaxgpt.errors import UserError
from jaxgpt.runs.cli import cli
from jaxgpt.web import chat, server
from jaxgpt.web.server import ServeConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """Any machine."""

    models: tuple[Path, ...] = ()  # none: the stages of runs/assistant, or smollm2-135m where there are none
    reference: Path | None = None  # what KL is measured to; of runs/assistant: its sft
    reward: Path | None = None  # a reward model that scores the answers; of runs/assistant: its reward
    ppo: Path | None = None  # the run whose rollouts are shown; of runs/assistant: its ppo
    votes: Path = Path("runs/label/votes.sqlite")
    serve: ServeConfig = ServeConfig(port=8001)


PRESETS: dict[str, Settings] = {}


def filled(settings: Settings, root: Path = Path("runs/assistant")) -> Settings:
    """With what lies in `root` where no models are named."""
    if settings.models:
        return settings
    there = {path.parent.name: path.parent for path in root.glob("*/done.json")}
    return dataclasses.replace(
        settings,
        models=tuple(there[name] for name in ("pretrain", "sft", "ppo", "dpo") if name in there)
        or (Path("smollm2-135m"),),
        reference=settings.reference or there.get("sft"),
        reward=settings.reward or there.get("reward"),
        ppo=settings.ppo or there.get("ppo"),
    )


def main(settings: Settings) -> None:
    settings = filled(settings)
    if settings.ppo and not (settings.ppo / "settings.json").exists():
        raise UserError(f"{settings.ppo} is no run of ppo; give the folder of one")
    bound = server.Server(settings.serve, token := settings.serve.secret())
    models = chat.seats(settings.models, settings.reference, settings.reward)
    store = votes.Store(settings.votes)
    rollouts = settings.ppo / "rollouts" if settings.ppo else None
    print("models: " + ", ".join(f"{seat.name} ({seat.place})" for seat in models))
    print(f"chat at {bound.address} (Ctrl-C ends)", flush=True)
    server.open_page(bound.address)
    bound.run(chat.application(models, store, settings.serve, token, rollouts))


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
