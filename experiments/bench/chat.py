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

import contextlib
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from experiments.bench.harness import (
    OURS,
    Rotation,
    Worker,
    disturbance_warning,
    machine_text,
    speedup,
    survey_machine,
    worker_main,
)
from jaxgpt.data import wheels
from jaxgpt.errors import UserError

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
    prompt: int = 50  # tokens
    new_tokens: int = 64
    repeats: int = 7  # turns of each program

    def __post_init__(self) -> None:
        if min(self.prompt, self.repeats) < 1 or self.new_tokens < 2:
            raise UserError("prompt and repeats must be at least 1, and new_tokens at least 2")


PRESETS: dict[str, Settings] = {}


class JaxWorker:
    """Chat's own loop, without the terminal."""

    def __init__(self, kind: str) -> None:
        import jax

        self.int8 = kind == "int8"
        jax.config.update("jax_enable_compilation_cache", False)

    def about(self) -> dict[str, Any]:
        import jax

        from experiments.bench.harness import jax_versions

        device = jax.devices()[0]
        return {"platform": device.platform, "device": device.device_kind, "versions": jax_versions()}

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

    def device_peak(self) -> None:
        return None


def no_filter(logits: Any) -> Any:
    """No filter."""
    return logits


class TorchWorker:
    """transformers, reading the GGUF file."""

    def __init__(self, kind: str) -> None:
        import torch
        import transformers

        self.dtype = getattr(torch, kind)
        transformers.logging.set_verbosity_error()

    def about(self) -> dict[str, Any]:
        import torch
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"platform": "cpu", "device": "cpu", "versions": versions}

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

    def device_peak(self) -> None:
        return None


class LlamaWorker:
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


def make(kind: str) -> Any:
    """Make a worker of this kind."""
    return (JaxWorker if kind in (OURS, "int8") else LlamaWorker if kind == "llama.cpp" else TorchWorker)(kind)


def main(settings: Settings) -> dict[str, Any]:
    import numpy as np

    from jaxgpt.files import write_json
    from jaxgpt.pretrained import loading
    from jaxgpt.runs.run import Run

    file = str(wheels.fetch(loading.KNOWN["smollm2-135m"]))
    python = {
        kind: sys.executable if kind in (OURS, "int8") else settings.torch_python or sys.executable for kind in NAMES
    }
    with Run(settings.run, settings, stage="bench_chat", fresh=True) as run:
        log = run.folder.absolute() / "workers.log"
        about, _, note = survey_machine(MODULE, [OURS, "bfloat16"], python, log, "transformers")
        run.say(note or machine_text(about))
        prompt = np.random.default_rng(0).integers(100, 20_000, settings.prompt).tolist()
        seconds: dict[str, list[float]] = {kind: [] for kind in NAMES}
        tokens: dict[str, list[int]] = {}
        with contextlib.ExitStack() as stack:
            turns = Rotation({kind: stack.enter_context(Worker(MODULE, kind, python[kind], log)) for kind in NAMES})

            def ready(kind: str, worker: Any) -> None:
                worker.ask("load", file=file)
                for _ in range(2):
                    tokens[kind] = worker.ask("timed", prompt=prompt, new_tokens=settings.new_tokens)["tokens"]

            def turn(kind: str, worker: Any) -> None:
                time.sleep(0.2)  # let the previous worker's threads settle
                seconds[kind].append(worker.ask("timed", prompt=prompt, new_tokens=settings.new_tokens)["seconds"])

            turns.each(ready)
            with turns.watched():
                for _ in range(settings.repeats):
                    turns.each(turn)
        found = {kind: [settings.new_tokens / one for one in seconds[kind]] for kind in turns.alive}
        lines = [f"{'':<14}{'tokens/s':>9}   range"]
        for kind, rates in found.items():
            lines.append(f"{NAMES[kind]:<14}{statistics.median(rates):>9.1f}   {min(rates):.1f}-{max(rates):.1f}")
        for kind in ("float32", "bfloat16"):
            if kind in found and (ratio := speedup(seconds, kind)):
                low, high = ratio["range"]
                lines.append(f"{ratio['median']:.2f} x {NAMES[kind]} ({low:.2f}-{high:.2f} turn by turn)")
        if "float32" in found:
            same = next(
                (i for i, (a, b) in enumerate(zip(tokens[OURS], tokens["float32"], strict=True)) if a != b),
                settings.new_tokens,
            )
            lines.append(f"the first {same} of {settings.new_tokens} tokens match HF float32")
        lines += [f"{NAMES[kind]} left out: {why}" for kind, why in turns.failed.items()]
        lines += disturbance_warning(turns.others_share)
        for line in lines:
            run.say(line)
        report = {"machine": about, "tokens_per_second": found, "others_share": turns.others_share}
        write_json(run.folder / "bench_chat.json", report)
        run.finish(report)
        return run.results


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker_main(sys.argv[2], make)
    else:
        from jaxgpt.runs.cli import cli

        cli(main, Settings, PRESETS)
