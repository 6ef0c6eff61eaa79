"""How fast `make chat` answers, compared with transformers and llama.cpp on the same model and cores.

    python -m experiments.bench.chat --torch-python /path/to/python/with/torch

SmolLM2-135M-Instruct, from its wheel, reads a prompt of 50 tokens and generates 64 more, greedily. Each program has its
own process, and they take turns. Reported are tokens per second of the whole call, prompt included: the median and the
range over the turns.

    jaxgpt             decoding.stream, which chat uses, in float32
    jaxgpt int8        the same with --int8
    HF float32, bf16   transformers' generate, reading the same GGUF file (needs torch, transformers, gguf, accelerate)
    llama.cpp          the file's own 4-bit weights, which are an eighth of float32's bytes (needs llama-cpp-python)
"""

# The workers run this same file: jax and torch are imported inside functions only.

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from experiments.bench import harness
from experiments.bench.harness import OURS
from jaxgpt.config import Count, Range, check_settings
from jaxgpt.data import wheels

MODULE = "experiments.bench.chat"
NAMES = {
    OURS: OURS,
    "int8": "jaxgpt int8",
    "float32": "HF float32",
    "bfloat16": "HF bf16",
    "llama.cpp": "llama.cpp",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """2 CPU cores: about five minutes."""

    run: Path = Path("runs/bench_chat")
    torch_python: str = ""  # a Python that has the other libraries; "": this one
    prompt: Count = 50  # tokens
    new_tokens: Annotated[int, Range(2)] = 64
    repeats: Count = 7  # turns of each program

    def __post_init__(self) -> None:
        check_settings(self)


PRESETS: dict[str, Settings] = {}


class JaxChat(harness.JaxWorker):
    """Chat's own loop, without the terminal."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.int8 = kind == "int8"

    def load(self, file: str) -> dict[str, Any]:
        import jax

        from jaxgpt import decoding
        from jaxgpt.pretrained import loading

        found = loading.load(Path(file))
        params = jax.jit(decoding.prepare, static_argnums=1)(found.params, found.config)
        self.params, self.config = jax.jit(decoding.quantise_int8)(params) if self.int8 else params, found.config
        return {}

    def timed(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        import jax
        import jax.numpy as jnp

        from jaxgpt import decoding
        from jaxgpt.decoding import sampling

        start = time.perf_counter()
        tokens = list(
            decoding.stream(
                self.params,
                self.config,
                jnp.asarray([prompt]),
                jnp.asarray([len(prompt)]),
                jax.random.key(0),
                new_tokens=new_tokens,
                stop=-1,
                sample=sampling.greedy,
                filter_logits=no_filter,
            )
        )
        return {"seconds": time.perf_counter() - start, "tokens": tokens}


def no_filter(logits: Any) -> Any:
    """No filter."""
    return logits


class TorchChat(harness.TorchWorker):
    """transformers, reading the GGUF file, on the CPU with as many threads as PyTorch chooses."""

    def __init__(self, kind: str) -> None:
        import torch
        import transformers

        self.device, self.dtype = "cpu", getattr(torch, kind)
        transformers.logging.set_verbosity_error()

    def load(self, file: str) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM

        path = Path(file)
        self.model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=self.dtype).eval()
        self.model.generation_config.eos_token_id = None
        return {}

    def timed(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        import torch

        ids = torch.tensor([prompt])
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return {"seconds": time.perf_counter() - start, "tokens": out[0, len(prompt) :].tolist()}


class LlamaChat:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, kind: str) -> None:
        import llama_cpp

        self.library = llama_cpp

    def about(self) -> dict[str, Any]:
        return {"platform": "cpu", "device": "cpu", "versions": {"llama-cpp-python": self.library.__version__}}

    def load(self, file: str) -> dict[str, Any]:
        self.model = self.library.Llama(file, n_ctx=1024, verbose=False)
        return {}

    def timed(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        start, tokens = time.perf_counter(), []
        for token in self.model.generate(prompt, temp=0.0, reset=True):
            tokens.append(token)
            if len(tokens) == new_tokens:
                break
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def device_peak(self) -> None:
        return None


def make_worker(kind: str) -> Any:
    """Make a worker of this kind."""
    return (JaxChat if kind in (OURS, "int8") else LlamaChat if kind == "llama.cpp" else TorchChat)(kind)


def main(settings: Settings) -> dict[str, Any]:
    import numpy as np

    from jaxgpt.pretrained import loading
    from jaxgpt.runs.run import Run

    file = str(wheels.fetch(loading.KNOWN["smollm2-135m"]))
    with Run(settings.run, settings, stage="bench_chat", fresh=True) as run:
        rivals = [
            kind for kind in NAMES if kind != OURS and not (kind == "bfloat16" and harness.torch_lacks_bfloat16())
        ]
        bench = harness.Benchmark(run, MODULE, rivals, settings.torch_python)
        bench.python["int8"] = sys.executable
        kinds = [OURS, "float32"]
        bench.machine, _, bench.note = harness.survey_machine(MODULE, kinds, bench.python, bench.log, "transformers")
        run.say(bench.note or harness.machine_text(bench.machine))
        prompt = np.random.default_rng(0).integers(100, 20_000, settings.prompt).tolist()
        seconds: dict[str, list[float]] = {kind: [] for kind in NAMES}
        tokens: dict[str, list[int]] = {}
        with bench.start_workers() as workers:
            turns = harness.Rotation(workers)

            def get_ready(kind: str, worker: Any) -> None:
                worker.ask("load", file=file)
                for _ in range(2):
                    tokens[kind] = worker.ask("timed", prompt=prompt, new_tokens=settings.new_tokens)["tokens"]

            def turn(kind: str, worker: Any) -> None:
                seconds[kind].append(worker.ask("timed", prompt=prompt, new_tokens=settings.new_tokens)["seconds"])

            turns.measure(get_ready, turn, settings.repeats)
            if "llama.cpp" in turns.alive:
                bench.machine["versions"] |= turns.alive["llama.cpp"].ask("about")["versions"]
        found = {kind: [settings.new_tokens / one for one in seconds[kind]] for kind in turns.alive}
        ratios = {kind: harness.speedup(seconds, kind, ("float32", "bfloat16")) for kind in ("int8", OURS)}
        lines = [f"{'':<14}{'tokens/s':>9}   range"]
        for kind, rates in found.items():
            lines.append(f"{NAMES[kind]:<14}{statistics.median(rates):>9.1f}   {min(rates):.1f}-{max(rates):.1f}")
        for kind, ratio in ratios.items():
            if ratio is not None:
                lines.append(f"{NAMES[kind]} is {harness.describe_speedup(ratio, NAMES)}")
        if "float32" in found:
            same = next(
                (i for i, (a, b) in enumerate(zip(tokens[OURS], tokens["float32"], strict=True)) if a != b),
                settings.new_tokens,
            )
            lines.append(f"the first {same} of {settings.new_tokens} tokens match HF float32")
        lines += harness.warn_of_turns(turns.failed, turns.others_share, NAMES)
        share = {"failed": turns.failed, "others_share": turns.others_share}
        return bench.finish(settings, lines, {"tokens_per_second": found, "speedups": ratios, **share})


if __name__ == "__main__":
    harness.run_command(make_worker, main, Settings, PRESETS)
