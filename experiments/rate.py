"""PPO with a person as the reward function: what a learned reward model replaces, and why.

    python -m experiments.rate --model runs/assistant/sft --run runs/rated

The loop waits at every batch until somebody has given each answer one to five stars on a web page; the person is a host
function `reward_fn(prompts, answers) -> scores` like any other. At the end it reports how long the loop waited. Ratings
are saved at once: the same command replays them without asking, and resumes from there.
"""

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt.config import Count, Nonnegative, Positive, Seed, check_settings
from jaxgpt.data import sources, votes
from jaxgpt.data.questions import questions
from jaxgpt.data.templates import prompt_ids, text_reward
from jaxgpt.files import cache_root
from jaxgpt.losses import kl
from jaxgpt.rlhf import ppo, rollout
from jaxgpt.rlhf.ppo import PPOConfig
from jaxgpt.runs.cli import cli
from jaxgpt.runs.run import Run, run_fingerprint
from jaxgpt.runs.saved_model import load_language_model, save_model
from jaxgpt.structs import Prompts
from jaxgpt.training import optim
from jaxgpt.training.step import to_floats
from jaxgpt.web import rate, server
from jaxgpt.web.server import ServeConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """40 ratings. 2 CPU cores: seconds per step; the person takes most of the time."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("model", "serve")  # their contents matter, not their location

    run: Path = Path("runs/rated")
    model: Path = Path("runs/assistant/sft")
    prompts: str = "movie_reviews"  # or "questions", or files as for the other stages
    iterations: Count = 5
    batch: Count = 8  # answers rated before each update
    ppo: PPOConfig = PPOConfig(new_tokens=40, temperature=0.7, epochs=4)
    learning_rate: Positive = 1e-4
    beta: Nonnegative = 0.1  # stars per nat
    seed: Seed = 0
    serve: ServeConfig = ServeConfig(port=8002)
    cache: Path = cache_root() / "data"
    fresh: bool = False

    def __post_init__(self) -> None:
        check_settings(self)


PRESETS: dict[str, Settings] = {}


def main(settings: Settings) -> dict[str, Any]:
    inputs = {"model": run_fingerprint(settings.model), **sources.fingerprint(settings.prompts)}
    with Run(settings.run, settings, stage="rate", inputs=inputs) as run:
        if run.finished:
            return run.results
        start, config, tok, _ = load_language_model(settings.model)
        texts = (
            questions()
            if settings.prompts == "questions"
            else [one.text for one in sources.prompts(settings.prompts, "train", settings.cache)]
        )
        ids = [prompt_ids(tok, text) for text in texts]
        tokens_NP, lengths_N = rollout.pad_prompts(ids, max(map(len, ids)))
        ppo.check_batch(settings.batch, settings.ppo, config.block, tokens_NP.shape[1])
        order = np.random.default_rng(settings.seed).permutation(len(ids))

        bound = server.Server(settings.serve, token := settings.serve.required_token())
        person = rate.HumanReward(votes.Store(settings.run / "ratings.sqlite"))
        app = rate.application(person, settings.serve, token)
        threading.Thread(target=bound.run, args=(app,), daemon=True).start()
        run.say(f"rate at {bound.address} ({settings.iterations} rounds of {settings.batch} answers)")
        server.open_page(bound.address)

        tx = optim.adam_tf(optax.constant_schedule(settings.learning_rate))
        policy = ppo.policy_of(config, settings.ppo, tok.template.end, slots=min(settings.batch, 16))
        state = ppo.init(policy, start, tx, {})
        control: ppo.Controller = kl.FixedKL(jnp.float32(settings.beta))
        reward_fn = text_reward(person, tok)
        iteration = ppo.host_iteration(policy=policy, ppo=settings.ppo, tx=tx, reward_fn=reward_fn)
        began, waited = time.monotonic(), 0.0
        for i in range(1, settings.iterations + 1):
            person.about = f"round {i} of {settings.iterations}"
            index = order[np.arange((i - 1) * settings.batch, i * settings.batch) % len(order)]
            prompts = Prompts(jnp.asarray(tokens_NP[index]), jnp.asarray(lengths_N[index]))
            key = jax.random.fold_in(jax.random.key(settings.seed), i)
            state, control, _, metrics = iteration(state, control, prompts, key)
            floats = {**to_floats(metrics), "seconds_waited": person.waited - waited}
            waited = person.waited
            run.log(i, floats)
            run.say(
                f"round {i}: score {floats['score']:.2f}, KL {floats['kl']:.2f} nats, "
                f"waited {floats['seconds_waited']:.1f} s for the person"
            )
        total = time.monotonic() - began
        save_model(settings.run / "model", state.params["policy"], config, tok)
        run.say(
            f"rate: of {total:.0f} s the loop waited {waited:.0f} s ({waited / total:.0%}) for "
            f"{settings.iterations * settings.batch} ratings; a reward model answers at once"
        )
        run.finish({"seconds": total, "seconds_waited": waited, "score": floats["score"], "kl": floats["kl"]})
        person.finished = True
        time.sleep(1.5)  # time for the page to show that it is done
        bound.stop()
        return run.results


if __name__ == "__main__":
    cli(main, Settings, PRESETS)
