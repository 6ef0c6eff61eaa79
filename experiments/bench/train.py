"""How fast a training step is, compared with PyTorch on the same weights and batches and with plain matrix products.

    python -m experiments.bench.train --run runs/bench_train
    python -m experiments.bench.train --preset gpt2 --torch-python /path/to/python/with/torch

A step is forward, backward, clipping and AdamW (decay on matrices); bfloat16 means bfloat16 products over float32
weights and moments (torch.autocast). PyTorch runs the GPT-2 of transformers and a plain module of the same maths, each
eager and compiled, with fused AdamW, its own fused attention, and our allocator settings. Each trainer has its own
process; they take turns, while the others wait idle. What is reported:

    tokens/s     batch x block x steps / time of a turn: median and range over the turns
    of roof      tokens/s x (6 N + 12 layers width block) FLOPs (Karpathy's nanoGPT; N without positions) / the fastest
                 matrix product in that dtype, measured first in the same run with every library available
    compile      time of the first step, less a typical one
    peak         peak resident memory of the trainer's process, libraries included; on a GPU, device memory
    loss         after the warm-up steps: in float32 all must match ours
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

MODULE = "experiments.bench.train"
RIVALS = {
    "module": "PyTorch module",
    "module-compiled": "PyTorch module, compiled",
    "hf": "transformers GPT-2",
    "hf-compiled": "transformers GPT-2, compiled",
}
LEARNING_RATE, B1, B2, DECAY, CLIP = 1e-3, 0.9, 0.95, 0.1, 1.0  # of AdamW


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about 6 min, mostly PyTorch's; without torch about 1 min. Keep the machine otherwise idle."""

    PLACE_FIELDS: ClassVar[tuple[str, ...]] = ("torch_python",)

    run: Path = Path("runs/bench_train")
    models: tuple[str, ...] = ("small",)  # presets of jaxgpt.config
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    batches: Counts = (12,)
    blocks: Annotated[tuple[int, ...], Range(2)] = (256,)  # tokens per row
    layers: Annotated[tuple[int, ...], Range(0)] = (0,)  # 0: the preset's
    widths: Annotated[tuple[int, ...], Range(0)] = (0,)  # 0: the preset's; others have heads of 64
    vocab: CountOrZero = 0  # 0: the preset's
    microbatches: Count = 1  # parts in which each batch is run, one after another, in all trainers
    steps: Count = 3  # per turn
    repeats: Count = 5  # turns of each trainer
    rivals: tuple[str, ...] = tuple(RIVALS)  # none: only ours
    torch_python: str = ""  # a Python that has torch and transformers; "": this one
    roof_size: Count = 2048  # rows and columns of the matrices whose product is the roof
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_settings(self)
        harness.check_choices(self, {"models": MODELS, "dtypes": ("float32", "bfloat16"), "rivals": RIVALS})
        harness.check_not_empty(self, "models", "dtypes", "batches", "blocks", "layers", "widths")
        for rows in self.batches:
            if rows % self.microbatches:
                raise UserError(f"{self.microbatches} microbatches don't divide a batch of {rows} rows")


PRESETS = {
    "laptop": Settings(),
    "toy": Settings(models=("toy",), batches=(2,), blocks=(16,), steps=1, repeats=2, rivals=(), roof_size=256),
    "gpt2": Settings(models=("gpt2",), batches=(2,), steps=1),
    "gpu": Settings(
        models=("gpt2", "gpt2-medium"), dtypes=("bfloat16",), batches=(32,), blocks=(1024,), steps=10, roof_size=8192
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One point of the grid."""

    model: str
    dtype: Literal["float32", "bfloat16"]
    batch: int
    block: int
    layers: int
    width: int

    def config(self, vocab: int) -> ModelConfig:
        preset = MODELS[self.model]
        width = self.width or preset.width
        return dataclasses.replace(
            preset,
            dtype=self.dtype,
            block=self.block,
            layers=self.layers or preset.layers,
            width=width,
            heads=max(width // 64, 1) if self.width else preset.heads,
            vocab=vocab or preset.vocab,
        )


def cases(settings: Settings) -> list[Case]:
    grid = (settings.models, settings.dtypes, settings.batches, settings.blocks, settings.layers, settings.widths)
    return [Case(*point) for point in itertools.product(*grid)]


# ---- workers ----


class Trainer(abc.ABC):
    """The requests that both kinds of worker answer."""

    def load(
        self, config: Mapping[str, Any], weights: str, batch: int, seed: int, microbatches: int = 1
    ) -> dict[str, Any]:
        self.config, self.microbatches = ModelConfig(**config), microbatches
        rng = np.random.default_rng(seed)
        self.batches = rng.integers(0, self.config.vocab, (4, batch, self.config.block)).astype(np.int32)
        self.taken = 0
        with np.load(weights) as flat:
            self.prepare(flat)
        return {}

    def timed(self, steps: int) -> dict[str, Any]:
        start = time.perf_counter()
        loss = self.train([self.batches[(self.taken + i) % len(self.batches)] for i in range(steps)])
        seconds = time.perf_counter() - start
        self.taken += steps
        return {"seconds": seconds, "loss": loss}

    @abc.abstractmethod
    def prepare(self, flat: Mapping[str, np.ndarray]) -> None:
        """Get ready to train from these weights."""

    @abc.abstractmethod
    def train(self, batches: Sequence[np.ndarray]) -> float:
        """Take one step per batch; returns the last one's loss."""


class JaxTrainer(harness.JaxWorker, Trainer):
    """`make_train_step`, jitted by `jit_step`."""

    def roof(self, size: int, dtypes: list[str]) -> dict[str, float]:
        """FLOPs per second of one matrix product, in each of these dtypes."""
        import jax
        import jax.numpy as jnp

        def rate(dtype: str) -> float:
            x, y = jnp.ones((size, size), dtype), jnp.ones((size, size), dtype)
            program = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(dtype))
            return harness.best_rate(lambda: program(x, y).block_until_ready(), 2 * size**3)

        return {dtype: rate(dtype) for dtype in dtypes}

    def prepare(self, flat: Mapping[str, np.ndarray]) -> None:
        import jax
        import optax

        from jaxgpt import training
        from jaxgpt.models import sharding
        from jaxgpt.training import optim

        harness.multiply_exactly(self.config)
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        tx = optim.adamw(optax.constant_schedule(LEARNING_RATE), weight_decay=DECAY, b2=B2, clip=CLIP)
        state = training.init_state(harness.unflatten_names({name: np.asarray(flat[name]) for name in flat}), tx)
        self.state = sharding.replicate(state, self.mesh)
        self.step = training.jit_step(training.make_nll(self.config), tx, self.mesh, microbatches=self.microbatches)

    def train(self, batches: Sequence[np.ndarray]) -> float:
        from jaxgpt.models import sharding
        from jaxgpt.structs import Batch
        from jaxgpt.training import to_floats

        mask = np.ones(batches[0].shape, bool)
        mask[:, 0] = False
        for tokens in batches:
            self.state, metrics = self.step(self.state, sharding.place_local_rows(Batch(tokens, mask), self.mesh), None)
        return to_floats(metrics)["loss"]


class TorchTrainer(harness.TorchWorker, Trainer):
    """A PyTorch model ("hf" or "module", compiled or not) and its fused AdamW."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind.startswith("hf"):
            import transformers

            transformers.logging.set_verbosity_error()

    def roof(self, size: int, dtypes: list[str]) -> dict[str, float]:
        import torch

        if self.device == "cpu" and harness.torch_lacks_bfloat16():
            dtypes = [dtype for dtype in dtypes if dtype != "bfloat16"]

        def rate(dtype: str) -> float:
            x = torch.ones(size, size, dtype=getattr(torch, dtype), device=self.device)

            def multiply() -> None:
                x @ x
                self.wait()

            return harness.best_rate(multiply, 2 * size**3)

        return {dtype: rate(dtype) for dtype in dtypes}

    def prepare(self, flat: Mapping[str, np.ndarray]) -> None:
        import torch

        if self.kind.startswith("hf"):
            model = harness.hf_model(dataclasses.replace(self.config, dtype="float32"), flat, self.device).train()
            self.loss = lambda tokens: model(input_ids=tokens, labels=tokens).loss
        else:
            model = torch_module(self.config, flat).to(self.device)
            self.loss = model
        if self.kind.endswith("compiled"):
            self.loss = torch.compile(self.loss)
        decayed: list[Any] = []
        others: list[Any] = []
        for name, w in model.named_parameters():
            (decayed if w.ndim >= 2 and "wpe" not in name and "positions" not in name else others).append(w)
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        self.weights = decayed + others
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(B1, B2), eps=1e-8, fused=True)

    def train(self, batches: Sequence[np.ndarray]) -> float:
        import torch

        autocast = torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16")
        for batch in batches:
            tokens = torch.from_numpy(batch.astype(np.int64)).to(self.device)
            self.optimizer.zero_grad(set_to_none=True)
            found = torch.zeros((), device=self.device)
            for part in tokens.chunk(self.microbatches):
                with autocast:
                    loss = self.loss(part) / self.microbatches
                loss.backward()
                found += loss.detach()
            torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
            self.optimizer.step()
        mean = float(found)
        self.wait()
        return mean


def make_worker(kind: str) -> Trainer:
    """Make a worker of this kind."""
    return JaxTrainer() if kind == OURS else TorchTrainer(kind)


def torch_module(config: ModelConfig, flat: Mapping[str, np.ndarray]) -> Any:
    """Our GPT-2 in PyTorch as one would write it today: tokens [B, T] -> the mean loss."""
    import torch
    from torch import nn
    from torch.nn import functional

    from jaxgpt.pretrained.places import to_tensors

    tensors = to_tensors(flat, config)

    def linear(n: int, name: str) -> Any:
        kernel, bias = (tensors[f"transformer.h.{n}.{name}.{part}"] for part in ("weight", "bias"))
        layer = nn.Linear(*kernel.shape)
        layer.weight.data, layer.bias.data = torch.from_numpy(kernel.T.copy()), torch.from_numpy(bias.copy())
        return layer

    class Block(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.attention_norm, self.mlp_norm = (nn.LayerNorm(config.width, config.norm_epsilon) for _ in range(2))
            names = "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
            self.qkv, self.out, self.up, self.down = (linear(n, name) for name in names)

        def forward(self, x: Any) -> Any:
            B, T, D = x.shape
            q, k, v = (
                part.view(B, T, config.heads, -1).transpose(1, 2)
                for part in self.qkv(self.attention_norm(x)).split(D, dim=2)
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
            return x + self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.from_numpy(np.array(flat["embed/tokens_VD"])))
            self.positions = nn.Parameter(torch.from_numpy(np.array(flat["embed/positions_TD"])))
            self.blocks = nn.ModuleList(Block(n) for n in range(config.layers))
            self.final_norm = nn.LayerNorm(config.width, config.norm_epsilon)

        def forward(self, tokens: Any) -> Any:
            x = functional.embedding(tokens, self.tokens) + self.positions[: tokens.shape[1]]
            for block in self.blocks:
                x = block(x)
            logits = functional.linear(self.final_norm(x[:, :-1]), self.tokens)
            return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return Gpt()


# ---- measuring ----


def measure(
    case: Case, settings: Settings, workers: Mapping[str, harness.Worker], weights: Path, roofs: Mapping[str, float]
) -> dict[str, Any]:
    """Measure one point of the grid: {trainer: figures}, and failures. The workers take turns."""
    config = case.config(settings.vocab)
    load = {
        "config": dataclasses.asdict(config),
        "weights": str(weights),
        "batch": case.batch,
        "seed": settings.seed,
        "microbatches": settings.microbatches,
    }
    turns = harness.Rotation(workers)
    first: dict[str, float] = {}
    loss: dict[str, float] = {}
    seconds: dict[str, list[float]] = {kind: [] for kind in workers}

    def get_ready(kind: str, worker: harness.Worker) -> None:
        worker.ask("load", **load)
        first[kind] = worker.ask("timed", steps=1)["seconds"]
        loss[kind] = worker.ask("timed", steps=settings.steps)["loss"]

    def turn(kind: str, worker: harness.Worker) -> None:
        seconds[kind].append(worker.ask("timed", steps=settings.steps)["seconds"] / settings.steps)

    turns.measure(get_ready, turn, settings.repeats)
    found: dict[str, Any] = {}
    tokens, flops = case.batch * case.block, config.flops_per_token
    for kind, worker in turns.alive.items():
        typical = statistics.median(seconds[kind])
        found[kind] = {
            "tokens_per_second": tokens / typical,
            "tokens_per_second_range": [tokens / max(seconds[kind]), tokens / min(seconds[kind])],
            "step_seconds": typical,
            "fraction_of_roof": tokens / typical * flops / roofs[case.dtype],
            "compile_seconds": max(first[kind] - typical, 0.0),
            "loss": loss[kind],
            "peak_bytes": worker.ask("peak"),
            "seconds": seconds[kind],
        }
    return {
        **dataclasses.asdict(case),
        "microbatches": settings.microbatches,
        "flops_per_token": flops,
        "others_share": turns.others_share,
        "trainers": found,
        "failed": turns.failed,
        "speedup": harness.speedup(seconds),
    }


def complaints(result: Mapping[str, Any]) -> list[str]:
    """Warnings about one point of the grid, as lines of text."""
    lines = harness.warn_of_turns(result["failed"], result["others_share"], RIVALS)
    ours = result["trainers"][OURS]["loss"]
    tolerance = 1e-4 if result["dtype"] == "float32" else 1e-2
    for kind, found in result["trainers"].items():
        if not abs(found["loss"] - ours) <= tolerance * abs(ours):
            lines.append(f"NOT COMPARABLE: {RIVALS[kind]} has a loss of {found['loss']:.4f}, jaxgpt {ours:.4f}")
    return lines


# ---- output ----

HEADER = (
    f"{'trainer':<30}{'tokens/s':>10}  {'(range)':<17}{'ms per step':>13}{'of roof':>9}{'compile s':>11}"
    f"{'peak MB':>9}{'loss':>9}"
)


def title_of(result: Mapping[str, Any]) -> str:
    changed = [f"{result[name]} {word}" for name, word in (("layers", "layers"), ("width", "wide")) if result[name]]
    changed += [f"{result['microbatches']} microbatches"] if result.get("microbatches", 1) > 1 else []
    return ", ".join(
        [f"{result['model']} {result['dtype']}", *changed, f"batch {result['batch']} x {result['block']} tokens"]
    )


def table(results: Sequence[Mapping[str, Any]], roofs: Mapping[str, float]) -> list[str]:
    """The table's lines, at most 120 columns wide."""
    lines = [HEADER]
    for result in results:
        flops = result["flops_per_token"]
        at_most = roofs[result["dtype"]] / flops
        lines += ["", f"{title_of(result)}: {flops / 1e6:,.1f} MFLOPs per token, so at most {at_most:,.0f} tokens/s"]
        for kind, found in result["trainers"].items():
            low, high = found["tokens_per_second_range"]
            peak = found["peak_bytes"]["device"] or found["peak_bytes"]["process"]
            lines.append(
                f"{RIVALS.get(kind, kind):<30}{found['tokens_per_second']:>10,.0f}  {f'({low:,.0f}-{high:,.0f})':<17}"
                f"{found['step_seconds'] * 1e3:>13.1f}{found['fraction_of_roof']:>9.1%}"
                f"{found['compile_seconds']:>11.1f}{peak / 1e6:>9,.0f}{found['loss']:>9.4f}"
            )
        if result["speedup"] is not None:
            lines.append(f"= {harness.describe_speedup(result['speedup'], RIVALS)}")
        lines += complaints(result)
    return lines


def figure(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A panel for each shape."""
    panels: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for result in results:
        name = title_of(result).replace(f" {result['dtype']}", "", 1).replace(", batch", "\nbatch")
        panels.setdefault(name, []).append((result["dtype"], result["trainers"]))
    harness.draw_bars(panels, {OURS: OURS, **RIVALS}, "fraction of the measured matrix product", path, title)


# ---- the experiment ----


def main(settings: Settings) -> dict[str, Any]:
    from jaxgpt.runs.run import Run

    with Run(settings.run, settings, stage="bench_train", fresh=True) as run:
        bench = harness.Benchmark(run, MODULE, settings.rivals, settings.torch_python)
        bench.warn_of_load()
        answers = bench.survey("PyTorch", size=settings.roof_size, dtypes=settings.dtypes)
        measured = {"jax" if kind == OURS else "torch": rates for kind, rates in answers.items()}
        if bench.note:
            run.say(bench.note)
        roofs: dict[str, float] = {
            dtype: max(rates.get(dtype, 0.0) for rates in measured.values()) for dtype in settings.dtypes
        }
        size = settings.roof_size
        lines = [
            f"roof: {format_rates(roofs)}, the best of 12 products of {size} x {size}"
            f" ({'; '.join(f'{library} {format_rates(rates)}' for library, rates in measured.items())})"
        ]
        run.say(lines[0])
        results: list[dict[str, Any]] = []
        for case in cases(settings):
            config, rng = case.config(settings.vocab), np.random.default_rng(settings.seed)
            with (
                bench.save_weights(harness.initial_weights(config, rng)) as weights,
                bench.start_workers(case.dtype) as workers,
            ):
                results.append(measure(case, settings, workers, weights, roofs))
            bench.log_speeds(len(results), title_of(results[-1]), results[-1]["trainers"], RIVALS, digits=0)
        title = f"{harness.machine_text(bench.machine)}; roof {format_rates(roofs)}"
        return bench.finish(
            settings,
            [*lines, "", *table(results, roofs)],
            {"cases": results, "roof_flops_per_second": roofs, "roofs": measured},
            said=1,
            draw=lambda path: figure(results, path, title),
        )


def format_rates(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in rates.items())


if __name__ == "__main__":
    harness.run_command(make_worker, main, Settings, PRESETS)
