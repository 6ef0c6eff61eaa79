"""How fast the jitted decoder is, compared with Hugging Face `generate` on the same weights and with memory bandwidth.

    python -m experiments.bench.decode --run runs/bench_decode
    python -m experiments.bench.decode --preset gpt2 --torch-python /path/to/python/with/torch

Each decoder has its own process, so threads, allocators and peak memory don't mix. They take turns, one call each
(ours, theirs, ours, theirs, ...), while the others wait idle. What is reported:

    tokens/s      batch x new tokens / time of a whole call, prompt included: median and range over the repeats
    first         time of a call for one token: reading the prompt and choosing the first token
    ms per step   (whole call - first) / (new tokens - 1): a step adds one token to each row
    MB per step   the least a step must read: the weights of the matrix products and the filled cache, averaged
    of roof       MB per step / ms per step / the fastest read of a large array, measured first in the same run
    compile       time of the two warm-up calls, less two typical calls
    peak          peak resident memory of the decoder's process, libraries included; on a GPU, device memory
    same          greedy tokens that match ours from the first one on, in the row that differs first

The weights are random and large, so that greedy choices have a margin. Not for TPUs, which only one process can hold.
"""

# The workers run this same file: jax and torch are imported inside functions only.

import abc
import dataclasses
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from experiments.bench import harness
from experiments.bench.harness import OURS
from jaxgpt.config import PRESETS as MODELS
from jaxgpt.config import Count, CountOrZero, Counts, ModelConfig, Range, Seed, check_settings
from jaxgpt.errors import UserError

MODULE = "experiments.bench.decode"
RIVALS = {"dynamic": "HF dynamic cache", "compiled": "HF static + compile"}
MIN_AGREEING_TOKENS = 20  # leading greedy tokens on which all decoders must agree in float32


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 4 min, mostly Hugging Face's; without torch about 1 min. Keep the machine otherwise idle."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("torch_python",)

    run: Path = Path("runs/bench_decode")
    models: tuple[str, ...] = ("small",)  # presets of jaxgpt.config
    block: CountOrZero = 256  # longest sequence; at most the preset's (0: the preset's)
    vocab: CountOrZero = 0  # size of the vocabulary (0: the preset's)
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    batches: Counts = (1, 16)
    prompts: Counts = (16,)  # tokens per prompt
    new_tokens: Annotated[tuple[int, ...], Range(2)] = (200,)
    repeats: Count = 5  # turns of each decoder
    rivals: tuple[str, ...] = ("dynamic", "compiled")  # Hugging Face's caches to compare with; none: only ours
    torch_python: str = ""  # a Python that has torch and transformers; "": this one
    prepare_once: bool = False  # prepare our weights for decoding once, ahead of time, instead of in each call
    roof_mb: Count = 1024  # size of the array read to measure memory bandwidth; much larger than the CPU's caches
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_settings(self)
        harness.check_choices(self, {"models": MODELS, "dtypes": ("float32", "bfloat16"), "rivals": RIVALS})
        harness.check_not_empty(self, "models", "dtypes", "batches", "prompts", "new_tokens")
        longest = max(self.prompts) + max(self.new_tokens)
        for name in self.models:
            if longest > self.config(name).block:
                raise UserError(
                    f"{longest} tokens don't fit the block of {self.config(name).block} ({name}); "
                    "raise block, or lower prompts or new_tokens"
                )

    def config(self, name: str, dtype: Literal["float32", "bfloat16"] = "float32") -> ModelConfig:
        preset = MODELS[name]
        block = min(self.block, preset.block) or preset.block
        return dataclasses.replace(preset, dtype=dtype, block=block, vocab=self.vocab or preset.vocab)


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(
        models=("toy",),
        block=0,
        dtypes=("float32",),
        batches=(1, 2),
        prompts=(8,),
        new_tokens=(24,),
        repeats=3,
        rivals=(),
        roof_mb=64,
    ),
    "gpt2": Settings(models=("gpt2",), batches=(1,)),
    "gpu": Settings(models=("gpt2", "gpt2-xl"), dtypes=("bfloat16",), batches=(1, 64), roof_mb=8192),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One point of the grid."""

    model: str
    dtype: Literal["float32", "bfloat16"]
    batch: int
    prompt: int
    new_tokens: int


def cases(settings: Settings) -> list[Case]:
    grid = (settings.models, settings.dtypes, settings.batches, settings.prompts, settings.new_tokens)
    return [Case(*point) for point in itertools.product(*grid)]


def bytes_per_step(config: ModelConfig, batch: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """Bytes that one step (one token per row) must read: the weights of the matrix products, once for all rows, and
    the keys and values of the slots filled so far, the new one included, averaged over the steps of a call."""
    D, F, size = config.width, config.mlp_hidden, 4 if config.dtype == "float32" else 2
    GK, inner = config.groups * config.head_dim, 3 if config.mlp == "swiglu" else 2
    weights = config.layers * (D * (D + 2 * GK) + D * D + inner * D * F) + config.vocab * D
    filled = prompt + new_tokens / 2  # the mean of prompt + 1 ... prompt + new_tokens - 1
    cache = config.layers * 2 * GK * batch * filled
    return {"weights": weights * size, "cache": cache * size, "total": (weights + cache) * size}


def random_weights(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Parameters with the shapes of `transformer.init`, by name ("block_0/qkv/kernel"). All of them matter, biases too,
    and logits have a standard deviation of about 3."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("scale"):
            return x  # of both signs: otherwise the tied head would answer each token with itself
        if name.endswith("bias"):
            return 0.05 * x
        return x * {"kernel": 2.0, "tokens_VD": 3.0, "positions_TD": 3.0}[name.rpartition("/")[2]] / fan_in(name, shape)

    def fan_in(name: str, shape: tuple[int, ...]) -> np.float32:
        return np.float32(np.sqrt(shape[0] if name.endswith("kernel") else shape[1]))

    return harness.draw_weights(config, draw)


# ---- workers ----


class Decoder(abc.ABC):
    """The requests that both kinds of worker answer."""

    def load(self, config: Mapping[str, Any], weights: str, prompts: list[list[int]], prepared: bool) -> dict[str, Any]:
        with np.load(weights) as flat:
            self.prepare(ModelConfig(**config), flat, np.array(prompts, np.int32), prepared)
        return {}

    def timed(self, new_tokens: int, show: bool) -> dict[str, Any]:
        start = time.perf_counter()
        tokens_BA = self.generate(new_tokens)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens_BA.tolist() if show else None}

    @abc.abstractmethod
    def prepare(self, config: ModelConfig, flat: Mapping[str, np.ndarray], prompts: np.ndarray, prepared: bool) -> None:
        """Get ready to answer these prompts with this model; `prepared`: with weights in decoding's own form."""

    @abc.abstractmethod
    def generate(self, new_tokens: int) -> np.ndarray:
        """The answers, [rows, new_tokens], on the host."""


class JaxDecoder(harness.JaxWorker, Decoder):
    """`decoding.generate`, jitted."""

    def __init__(self) -> None:
        super().__init__()
        self.programs: dict[int, Any] = {}

    def roof(self, megabytes: int) -> dict[str, float]:
        """Bytes per second, float32: a maximum over an axis, and a matrix [R, 4096] times a vector."""
        import jax
        import jax.numpy as jnp

        rows = max(megabytes * 2**20 // (4 * 4096) // 16, 1) * 16
        w_RC, x_C = jnp.ones((rows, 4096)), jnp.ones(4096)
        programs = {
            "largest of each column (jax)": jax.jit(lambda w, x: w.reshape(16, -1, 4096).max(axis=1)),
            "matrix times vector (jax)": jax.jit(lambda w, x: w @ x),
        }

        def rate(program: Any) -> float:
            return harness.best_rate(lambda: program(w_RC, x_C).block_until_ready(), w_RC.nbytes)

        return {name: rate(program) for name, program in programs.items()}

    def prepare(self, config: ModelConfig, flat: Mapping[str, np.ndarray], prompts: np.ndarray, prepared: bool) -> None:
        import jax
        import jax.numpy as jnp

        from jaxgpt import decoding

        harness.multiply_exactly(config)
        self.config, self.prompts = config, jnp.asarray(prompts)
        self.lengths = jnp.full(prompts.shape[0], prompts.shape[1])
        self.params = harness.unflatten_names({name: jnp.asarray(flat[name]) for name in flat})
        if prepared:
            self.params = jax.jit(decoding.prepare, static_argnums=1)(self.params, config)

    def generate(self, new_tokens: int) -> np.ndarray:
        import jax

        from jaxgpt import decoding
        from jaxgpt.decoding import sampling

        if new_tokens not in self.programs:
            config = self.config
            self.programs[new_tokens] = jax.jit(
                lambda params, prompts, lengths, key: decoding.generate(
                    params,
                    config,
                    prompts,
                    lengths,
                    key,
                    new_tokens=new_tokens,
                    stop=-1,
                    sample=sampling.greedy,
                    filter_logits=lambda logits: logits,
                )
            )
        answers = self.programs[new_tokens](self.params, self.prompts, self.lengths, jax.random.key(0))
        return np.asarray(answers.tokens_BA)


class TorchDecoder(harness.TorchWorker, Decoder):
    """Hugging Face `generate`: greedy, with a cache that grows ("dynamic") or a static one and torch.compile."""

    def __init__(self, cache: str) -> None:
        import transformers

        super().__init__()
        self.cache = cache
        transformers.logging.set_verbosity_error()

    def roof(self, megabytes: int) -> dict[str, float]:
        import torch

        w_RC, x_C = torch.ones(megabytes * 2**20 // (4 * 4096), 4096, device=self.device), torch.ones(4096)
        x_C = x_C.to(self.device)

        def read() -> None:
            w_RC @ x_C
            self.wait()

        return {"matrix times vector (torch)": harness.best_rate(read, w_RC.numel() * 4)}

    def prepare(self, config: ModelConfig, flat: Mapping[str, np.ndarray], prompts: np.ndarray, prepared: bool) -> None:
        import torch
        from transformers import CompileConfig

        self.model = harness.hf_model(config, flat, self.device)
        self.prompts = torch.from_numpy(prompts.astype(np.int64)).to(self.device)
        self.settings: dict[str, Any] = {}
        if self.cache == "compiled":
            compile_config = CompileConfig(mode="reduce-overhead" if self.device == "cuda" else "default")
            compile_config._compile_all_devices = True  # `generate` compiles on GPUs alone unless asked
            self.settings = {"cache_implementation": "static", "compile_config": compile_config}

    def generate(self, new_tokens: int) -> np.ndarray:
        import torch

        with torch.no_grad():
            rows = self.model.generate(
                self.prompts,
                attention_mask=torch.ones_like(self.prompts),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                use_cache=True,
                **self.settings,
            )
        return rows[:, self.prompts.shape[1] :].cpu().numpy()


def make_worker(kind: str) -> Decoder:
    """Make a worker of this kind."""
    return JaxDecoder() if kind == OURS else TorchDecoder(kind)


# ---- measuring ----


def count_agreeing_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that match, in the row that differs first."""
    different_BA = np.asarray(ours) != np.asarray(theirs)
    return int(np.where(different_BA.any(axis=1), different_BA.argmax(axis=1), different_BA.shape[1]).min())


def summarise_times(
    seconds: Sequence[float], first: Sequence[float], warm_up: float, case: Case, must_read: float
) -> dict:
    """One decoder's figures from its times: medians and ranges."""
    whole, prompt = statistics.median(seconds), statistics.median(first)
    tokens = case.batch * case.new_tokens
    # If noise made one token take longer than all of them, the whole time counts.
    step = (whole - prompt if whole > prompt else whole) / (case.new_tokens - 1)
    return {
        "tokens_per_second": tokens / whole,
        "tokens_per_second_range": [tokens / max(seconds), tokens / min(seconds)],
        "first_token_seconds": prompt,
        "first_token_seconds_range": [min(first), max(first)],
        "step_seconds": step,
        "bytes_per_second": must_read / step,
        "compile_seconds": max(warm_up - 2 * whole, 0.0),
        "seconds": list(seconds),
        "first_seconds": list(first),
    }


def measure(case: Case, settings: Settings, workers: Mapping[str, harness.Worker], weights: Path) -> dict[str, Any]:
    """Measure one point of the grid: {decoder: figures}, and failures. The workers take turns."""
    config = settings.config(case.model, case.dtype)
    rng = np.random.default_rng(settings.seed)
    prompts = rng.integers(0, config.vocab, (case.batch, case.prompt)).tolist()
    load = {
        "config": dataclasses.asdict(config),
        "weights": str(weights),
        "prompts": prompts,
        "prepared": settings.prepare_once,
    }
    must_read = bytes_per_step(config, case.batch, case.prompt, case.new_tokens)
    turns = harness.Rotation(workers)
    warm_up: dict[str, float] = {}
    tokens: dict[str, list[list[int]]] = {}
    seconds: dict[str, list[float]] = {kind: [] for kind in workers}
    first: dict[str, list[float]] = {kind: [] for kind in workers}

    def call(worker: harness.Worker, new_tokens: int) -> float:
        return worker.ask("timed", new_tokens=new_tokens, show=False)["seconds"]

    def get_ready(kind: str, worker: harness.Worker) -> None:
        worker.ask("load", **load)
        shown = worker.ask("timed", new_tokens=case.new_tokens, show=True)
        tokens[kind], warm_up[kind] = shown["tokens"], shown["seconds"] + call(worker, case.new_tokens)
        for _ in range(2):
            call(worker, 1)

    def turn(kind: str, worker: harness.Worker) -> None:
        seconds[kind].append(call(worker, case.new_tokens))
        first[kind].append(call(worker, 1))

    turns.measure(get_ready, turn, settings.repeats)
    found: dict[str, Any] = {}
    for kind, worker in turns.alive.items():
        found[kind] = summarise_times(seconds[kind], first[kind], warm_up[kind], case, must_read["total"])
        found[kind] |= {
            "peak_bytes": worker.ask("peak"),
            "agreeing_tokens": count_agreeing_tokens(tokens[OURS], tokens[kind]),
        }
    return {
        **dataclasses.asdict(case),
        "bytes_per_step": must_read,
        "others_share": turns.others_share,
        "decoders": found,
        "failed": turns.failed,
        "speedup": harness.speedup(seconds),
        "first_speedup": harness.speedup(first),
    }


def add_roof_fractions(results: list[dict[str, Any]], roof: float) -> list[dict[str, Any]]:
    """The results with each decoder's fraction of the roof (bytes per second)."""
    for result in results:
        for found in result["decoders"].values():
            found["fraction_of_roof"] = found["bytes_per_second"] / roof
    return results


def warning_lines(result: Mapping[str, Any]) -> list[str]:
    """Warnings about one point of the grid, as lines of text."""
    lines = harness.warn_of_turns(result["failed"], result["others_share"], RIVALS)
    for kind, found in result["decoders"].items():
        enough = min(MIN_AGREEING_TOKENS, result["new_tokens"])
        if result["dtype"] == "float32" and found["agreeing_tokens"] < enough:
            equal = found["agreeing_tokens"]
            lines.append(f"NOT COMPARABLE: {RIVALS[kind]} differs from jaxgpt in greedy tokens after the first {equal}")
    return lines


# ---- output ----

HEADER = (
    f"{'decoder':<21}{'tokens/s':>10}  {'(range)':<17}{'first ms':>9}{'ms per step':>13}{'of roof':>9}"
    f"{'compile s':>11}{'peak MB':>9}{'same':>10}"
)


def case_title(result: Mapping[str, Any]) -> str:
    model, dtype = result["model"], result["dtype"]
    return f"{model} {dtype}, batch {result['batch']}, prompt {result['prompt']} + {result['new_tokens']}"


def table(results: Sequence[Mapping[str, Any]], roof: float) -> list[str]:
    """The table's lines, at most 120 columns wide."""
    lines = [HEADER]
    for result in results:
        must_read = result["bytes_per_step"]["total"]
        lines += [
            "",
            f"{case_title(result)}: {must_read / 1e6:,.1f} MB per step, so at most "
            f"{roof / must_read * result['batch']:,.0f} tokens/s",
        ]
        for kind, found in result["decoders"].items():
            low, high = found["tokens_per_second_range"]
            peak = found["peak_bytes"]["device"] or found["peak_bytes"]["process"]
            same = "" if kind == OURS else f"{found['agreeing_tokens']}/{result['new_tokens']}"
            lines.append(
                f"{RIVALS.get(kind, kind):<21}{found['tokens_per_second']:>10,.1f}  {f'({low:,.0f}-{high:,.0f})':<17}"
                f"{found['first_token_seconds'] * 1e3:>9.2f}{found['step_seconds'] * 1e3:>13.3f}"
                f"{found['fraction_of_roof']:>9.1%}{found['compile_seconds']:>11.1f}{peak / 1e6:>9,.0f}{same:>10}"
            )
        if result["speedup"] is not None:
            lines.append(f"= {harness.describe_speedup(result['speedup'], RIVALS)}")
        lines += warning_lines(result)
    return lines


def figure(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A panel for each model and batch."""
    several = len({(result["prompt"], result["new_tokens"]) for result in results}) > 1
    panels: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for result in results:
        lengths = f"\n{result['prompt']} + {result['new_tokens']}" if several else ""
        panel = panels.setdefault(f"{result['model']}, batch {result['batch']}", [])
        panel.append((result["dtype"] + lengths, result["decoders"]))
    harness.draw_bars(panels, {OURS: OURS, **RIVALS}, "fraction of the measured memory rate", path, title)


# ---- the experiment ----


def main(settings: Settings) -> dict[str, Any]:
    from jaxgpt.runs.run import Run

    with Run(settings.run, settings, stage="bench_decode", fresh=True) as run:
        bench = harness.Benchmark(run, MODULE, settings.rivals, settings.torch_python)
        bench.warn_of_load()
        read = bench.survey("Hugging Face", megabytes=settings.roof_mb)
        before = {name: rate for rates in read.values() for name, rate in rates.items()}
        run.say(f"memory: {format_roofs(before)}")
        if bench.note:
            run.say(bench.note)
        results: list[dict[str, Any]] = []
        for name, group in itertools.groupby(cases(settings), key=lambda case: case.model):
            rng = np.random.default_rng(settings.seed)
            with bench.save_weights(random_weights(settings.config(name), rng)) as weights:
                for case in group:
                    with bench.start_workers(case.dtype) as workers:
                        results.append(measure(case, settings, workers, weights))
                    bench.log_speeds(len(results), case_title(results[-1]), results[-1]["decoders"], RIVALS, digits=1)
        _, read, _ = harness.survey_machine(
            MODULE, bench.kinds, bench.python, bench.log, "Hugging Face", megabytes=settings.roof_mb
        )
        after = {name: rate for rates in read.values() for name, rate in rates.items()}
        run.say(f"memory, again: {format_roofs(after)}")
        roofs = {name: max(before[name], after.get(name, 0.0)) for name in before}
        used = max(roofs, key=lambda name: roofs[name])
        roof_text = f"{roofs[used] / 1e9:.1f} GB/s, {used}, the best of 24 reads of {settings.roof_mb} MB of float32"
        title = f"{harness.machine_text(bench.machine)}; roof {roofs[used] / 1e9:.1f} GB/s"
        return bench.finish(
            settings,
            [f"roof: {roof_text}", "", *table(add_roof_fractions(results, roofs[used]), roofs[used])],
            {
                "cases": results,
                "roof": used,
                "roof_bytes_per_second": roofs[used],
                "roofs_before": before,
                "roofs_after": after,
            },
            draw=lambda path: figure(results, path, title),
        )


def format_roofs(roofs: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in roofs.items())


if __name__ == "__main__":
    harness.run_command(make_worker, main, Settings, PRESETS)
