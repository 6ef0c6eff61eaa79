"""How long one PPO iteration takes, compared with TRL's PPOTrainer on the same machine.

    python -m experiments.bench.ppo --run runs/bench_ppo --torch-python /path/to/python/with/torch/and/trl

An iteration samples an answer to each prompt, evaluates it with a reward model and a frozen reference, and trains
policy and critic for several epochs on the whole batch. Both sides use models of the same shape with the same random
weights, prompts of equal length, no stop before `new_tokens`, and their own process; they take turns. Ours is the
iteration of experiments/ppo.py, one jitted program. TRL's is `PPOTrainer.train` of trl 1.12 (later versions have none),
timed from one `on_step_end` to the next. TRL's critic has its own trunk, as its authors built it; ours shares the
policy's.
"""

import dataclasses
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.bench import harness
from experiments.bench.harness import OURS
from jaxgpt.config import PRESETS as MODELS
from jaxgpt.config import Count, ModelConfig, Seed, check_settings
from jaxgpt.errors import UserError

MODULE = "experiments.bench.ppo"
RIVALS = {"trl": "TRL PPOTrainer"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 3 min, mostly TRL's. Keep the machine otherwise idle."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("torch_python",)

    run: Path = Path("runs/bench_ppo")
    model: str = "small"  # a preset of jaxgpt.config
    batch: Count = 64  # prompts, each with one answer
    prompt: Count = 16  # tokens per prompt
    new_tokens: Count = 32
    epochs: Count = 4
    repeats: Count = 5  # turns of each trainer
    torch_python: str = ""  # a Python that has torch and trl 1.12; "": this one
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.model not in MODELS:
            raise UserError(f"model is {self.model!r}; choose from {', '.join(MODELS)}")

    @property
    def config(self) -> ModelConfig:
        return dataclasses.replace(MODELS[self.model], block=max(self.prompt + self.new_tokens, 2))


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(model="toy", batch=4, prompt=4, new_tokens=6, epochs=2, repeats=2),
}


# ---- workers ----


class JaxPPO(harness.JaxWorker):
    """The jitted iteration of experiments/ppo.py."""

    def load(self, config: Mapping[str, Any], weights: str, prompts: list[list[int]], **options: int) -> dict[str, Any]:
        import jax

        from experiments import ppo as stage
        from jaxgpt.data.tokenizer import ANSWER_END
        from jaxgpt.models import sharding
        from jaxgpt.rlhf import ppo, reward
        from jaxgpt.rlhf.ppo import PPOConfig
        from jaxgpt.structs import Prompts

        model_config = ModelConfig(**config)
        algorithm = PPOConfig(
            new_tokens=options["new_tokens"], temperature=0.7, epochs=options["epochs"], minibatches=1
        )
        settings = stage.Settings(batch=len(prompts), iterations=1000, ppo=algorithm)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        program = stage.build(settings, model_config, len(prompts[0]), mesh, ANSWER_END)
        self.iteration = program.iteration
        with np.load(weights) as flat:
            params = harness.unflatten_names({name: np.asarray(flat[name]) for name in flat})
        reward_params = reward.init(jax.random.key(1), params, model_config.width)
        policy = ppo.policy_of(model_config, algorithm, ANSWER_END)
        state = ppo.init(policy, params, stage.optimizer(settings), {"reward": reward_params})
        self.state = sharding.place_like(state, program.state)
        self.control = sharding.replicate(stage.controller(settings), mesh)
        lengths = np.full(len(prompts), len(prompts[0]), np.int32)
        self.prompts = sharding.place_whole(Prompts(np.array(prompts, np.int32), lengths), mesh)
        self.taken = 0
        return {}

    def timed(self) -> dict[str, Any]:
        import jax

        from jaxgpt.training.step import to_floats

        start = time.perf_counter()
        key = jax.random.key(self.taken)
        self.state, self.control, _, metrics = self.iteration(self.state, self.control, self.prompts, key)
        found = to_floats(metrics)
        self.taken += 1
        return {"seconds": time.perf_counter() - start, "tokens": found["length"]}


class TrlPPO(harness.TorchWorker):
    """TRL's PPOTrainer in a thread that waits for permission before each iteration."""

    def __init__(self) -> None:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from trl.experimental.ppo import PPOTrainer  # noqa: F401

        super().__init__()
        self.may_go, self.has_gone = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None

    def about(self) -> dict[str, Any]:
        import trl

        found = super().about()
        found["versions"]["trl"] = trl.__version__
        return found

    def load(self, config: Mapping[str, Any], weights: str, prompts: list[list[int]], **options: int) -> dict[str, Any]:
        import torch
        from transformers import TrainerCallback
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        model_config = ModelConfig(**config)
        with np.load(weights) as flat:
            policy, reference = (harness.hf_model(model_config, flat) for _ in range(2))
        scorers = [make_scorer(policy) for _ in range(2)]
        worker = self

        class Pause(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                worker.may_go.acquire()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                worker.has_gone.release()
                worker.may_go.acquire()

        self.folder = tempfile.TemporaryDirectory()
        arguments = PPOConfig(
            output_dir=self.folder.name,
            per_device_train_batch_size=len(prompts),
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=options["epochs"],
            total_episodes=1000 * len(prompts),
            response_length=options["new_tokens"],
            temperature=0.7,
            local_rollout_forward_batch_size=len(prompts),
            num_sample_generations=0,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to=[],
            bf16=False,
            gradient_checkpointing=False,
            learning_rate=3e-4,
            disable_tqdm=True,
        )
        rows = [{"input_ids": torch.tensor(row)} for row in prompts]
        trainer = PPOTrainer(
            args=arguments,
            processing_class=make_tokenizer(model_config.vocab),
            model=policy,
            ref_model=reference,
            reward_model=scorers[0],
            value_model=scorers[1],
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=lambda rows: {"input_ids": torch.stack([row["input_ids"] for row in rows])},
            callbacks=[Pause()],
        )

        def train() -> None:
            try:
                trainer.train()
            except BaseException as error:
                self.error = error
            self.has_gone.release()

        threading.Thread(target=train, daemon=True).start()
        return {}

    def timed(self) -> dict[str, Any]:
        start = time.perf_counter()
        self.may_go.release()
        self.has_gone.acquire()
        if self.error is not None:
            raise self.error
        return {"seconds": time.perf_counter() - start}


def make_worker(kind: str) -> JaxPPO | TrlPPO:
    """Make a worker of this kind."""
    return JaxPPO() if kind == OURS else TrlPPO()


def make_scorer(policy: Any) -> Any:
    """A model with a scalar head on a copy of the policy's trunk."""
    from transformers import GPT2ForSequenceClassification

    scorer = GPT2ForSequenceClassification(type(policy.config)(**{**policy.config.to_dict(), "num_labels": 1}))
    scorer.transformer.load_state_dict(policy.transformer.state_dict())
    return scorer


def make_tokenizer(vocab: int) -> Any:
    """A tokenizer with one word per id: TRL needs little more from it than the ids of padding and end. Both are the
    last id, which random weights hardly ever choose."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"w{vocab - 1}", eos_token=f"w{vocab - 1}")


# ---- measuring ----


def measure(settings: Settings, workers: Mapping[str, harness.Worker], weights: Path) -> dict[str, Any]:
    """Measure {trainer: figures}, and failures. The workers take turns."""
    rng = np.random.default_rng(settings.seed)
    load = {
        "config": dataclasses.asdict(settings.config),
        "weights": str(weights),
        "epochs": settings.epochs,
        "prompts": rng.integers(6, settings.config.vocab - 1, (settings.batch, settings.prompt)).tolist(),
        "new_tokens": settings.new_tokens,
    }
    turns = harness.Rotation(workers)
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {kind: [] for kind in workers}

    def get_ready(kind: str, worker: harness.Worker) -> None:
        worker.ask("load", **load)
        first[kind] = worker.ask("timed")["seconds"]
        worker.ask("timed")

    def turn(kind: str, worker: harness.Worker) -> None:
        seconds[kind].append(worker.ask("timed")["seconds"])

    turns.measure(get_ready, turn, settings.repeats)
    found = {
        kind: {
            "seconds": statistics.median(seconds[kind]),
            "range": [min(seconds[kind]), max(seconds[kind])],
            "first_seconds": first[kind],
            "peak_bytes": worker.ask("peak"),
            "all_seconds": seconds[kind],
        }
        for kind, worker in turns.alive.items()
    }
    return {
        "trainers": found,
        "failed": turns.failed,
        "others_share": turns.others_share,
        "speedup": harness.speedup(seconds),
    }


def table(result: Mapping[str, Any], settings: Settings) -> list[str]:
    """The table's lines, at most 120 columns wide."""
    lines = [
        f"{settings.model} float32: {settings.batch} prompts of {settings.prompt} tokens, {settings.new_tokens} new "
        f"ones each, {settings.epochs} epochs on the whole batch",
        f"{'':<18}{'s per iteration':>16}  {'(range)':<15}{'first s':>9}{'peak MB':>9}",
    ]
    for kind, found in result["trainers"].items():
        low, high = found["range"]
        peak = found["peak_bytes"]["device"] or found["peak_bytes"]["process"]
        lines.append(
            f"{RIVALS.get(kind, kind):<18}{found['seconds']:>16.2f}  {f'({low:.2f}-{high:.2f})':<15}"
            f"{found['first_seconds']:>9.1f}{peak / 1e6:>9,.0f}"
        )
    if result["speedup"] is not None:
        lines.append(f"= {harness.describe_speedup(result['speedup'], RIVALS)}")
    return lines + harness.warn_of_turns(result["failed"], result["others_share"], RIVALS)


def main(settings: Settings) -> dict[str, Any]:
    from jaxgpt.runs.run import Run

    with Run(settings.run, settings, stage="bench_ppo", fresh=True) as run:
        bench = harness.Benchmark(run, MODULE, tuple(RIVALS), settings.torch_python)
        bench.survey("TRL")
        if bench.note:
            run.say(bench.note)
        rng = np.random.default_rng(settings.seed)
        with (
            bench.save_weights(harness.initial_weights(settings.config, rng)) as weights,
            bench.start_workers() as workers,
        ):
            result = measure(settings, workers, weights)
        run.log(1, {f"seconds/{kind}": found["seconds"] for kind, found in result["trainers"].items()})
        return bench.finish(settings, [harness.machine_text(bench.machine), *table(result, settings)], result)


if __name__ == "__main__":
    harness.run_command(make_worker, main, Settings, PRESETS)
