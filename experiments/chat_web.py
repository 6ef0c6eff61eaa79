"""A web page where several models answer side by side and every token can be inspected.

    python -m experiments.chat_web                                        `make chat-web`: the models of runs/assistant
    python -m experiments.chat_web --models smollm2-135m runs/align/ppo --reference smollm2-135m

Each answer shows its token probabilities, its KL to the reference, the critic's values and the reward model's score;
picking the best one records a vote in the label page's database. A second view shows the rollouts that a PPO run saved:
log-probability, reference log-probability, ratio, advantage, value and return of each token.
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

    models: tuple[Path, ...] = ()  # none: the stages of runs/assistant, or smollm2-135m if there are none
    reference: Path | None = None  # model to measure the KL from; with runs/assistant: its sft
    reward: Path | None = None  # reward model that scores the answers; with runs/assistant: its reward
    ppo: Path | None = None  # PPO run whose rollouts are shown; with runs/assistant: its ppo
    votes: Path = Path("runs/label/votes.sqlite")
    serve: ServeConfig = ServeConfig(port=8001)


PRESETS: dict[str, Settings] = {}


def fill_from_runs(settings: Settings, root: Path = Path("runs/assistant")) -> Settings:
    """The settings, filled in from the runs in `root` if no models are named."""
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
    settings = fill_from_runs(settings)
    if settings.ppo and not (settings.ppo / "settings.json").exists():
        raise UserError(f"{settings.ppo} is not a PPO run; give the folder of one")
    bound = server.Server(settings.serve, token := settings.serve.required_token())
    models = chat.load_models(settings.models, settings.reference, settings.reward)
    store = votes.Store(settings.votes)
    rollouts = settings.ppo / "rollouts" if settings.ppo else None
    print("models: " + ", ".join(f"{seat.name} ({seat.place})" for seat in models))
    print(f"chat at {bound.address} (Ctrl-C to stop)", flush=True)
    server.open_page(bound.address)
    bound.run(chat.application(models, store, settings.serve, token, rollouts))


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
