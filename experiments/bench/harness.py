"""Shared by the benchmarks: each decoder or trainer runs in its own worker process, and the workers take turns.

That way threads, allocators and peak memory don't mix, and a disturbance of the machine affects all alike. A worker
process reads requests, one JSON object per line, calls the method that each one names, and answers in one line. jax and
torch are imported inside functions: neither kind of process loads the other's library, and the Python that has torch
need not have jax at all.
"""

import contextlib
import ctypes
import json
import math
import os
import platform
import re
import resource
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.errors import UserError

if TYPE_CHECKING:
    from jaxgpt.runs.run import Run

ROOT = Path(__file__).parents[2]
OURS = "jaxgpt"
ANSWER_TIMEOUT = 1800  # seconds a worker may take for one answer
DISTURBANCE_THRESHOLD = 0.05  # fraction of the cores' time spent on other programs


# ---- the machine ----


def cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_lacks_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this is an x86 CPU with none of the instructions that PyTorch's bfloat16 products need. Without them
    PyTorch multiplies bfloat16 matrices at about a hundredth of its float32 rate."""
    with contextlib.suppress(OSError):
        flags = re.findall(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M)
        return bool(flags) and not {"avx512bw", "amx_bf16", "avx_ne_convert"} & set(flags[0].split())
    return False


def fast_malloc() -> None:
    """A copy of `jaxgpt.runs.process.configure_malloc`, which a Python without jax can't import: both sides then run
    with the same malloc settings."""
    if os.environ.get("JAXGPT_MALLOC") != "0" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-4, 0), (-1, -1), (-8, 1)):
            mallopt(option, value)


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def best_rate(read: Callable[[], Any], size: int, times: int = 12) -> float:
    """`size` (bytes or FLOPs) per second in the fastest of `times` calls of `read`, after a warm-up call."""
    read()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)


def busy_seconds() -> float:
    """Seconds that this machine's cores have been busy since boot, steal time included; 0 if the system does not
    say."""
    with contextlib.suppress(OSError):
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # less idle and iowait
    return 0.0


# ---- what a worker process runs ----


class JaxWorker:
    """A worker that runs our code on jax's first device, without the cache of compiled programs."""

    def __init__(self) -> None:
        import jax

        jax.config.update("jax_enable_compilation_cache", False)

    def about(self) -> dict[str, Any]:
        """The device, and the versions of jax, jaxlib and Python."""
        import jax
        import jaxlib

        device = jax.devices()[0]
        versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": platform.python_version()}
        return {"platform": device.platform, "device": device.device_kind, "versions": versions}

    def device_peak(self) -> int | None:
        """Peak memory of the device in bytes, None if it does not say."""
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class TorchWorker:
    """A worker that runs PyTorch, on the GPU if it finds one, with a thread for each core."""

    def __init__(self) -> None:
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(cores())

    def about(self) -> dict[str, Any]:
        """The device, the threads, and the versions of torch, its Python and, if it is there, transformers."""
        import torch

        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        versions = {"torch": torch.__version__, "python of torch": platform.python_version()}
        with contextlib.suppress(ImportError):
            import transformers

            versions["transformers"] = transformers.__version__
        return {"platform": self.device, "device": name, "threads": torch.get_num_threads(), "versions": versions}

    def wait(self) -> None:
        """Wait until the device has finished its queued work."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def device_peak(self) -> int | None:
        """Peak memory of the GPU in bytes, None without one."""
        import torch

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None


def multiply_exactly(config: ModelConfig) -> None:
    """On a GPU, multiply float32 matrices in float32, as torch does, and not in TF32."""
    import jax

    if config.dtype == "float32" and jax.default_backend() == "gpu":
        jax.config.update("jax_default_matmul_precision", "highest")


def serve(worker: Any, requests: IO[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer each request, {"do": a method of the worker, its arguments}, until there are no more. Errors are answered
    too, in one line."""
    own: dict[str, Callable[[], dict[str, Any]]] = {
        "cpu": lambda: {"seconds": time.process_time()},
        "peak": lambda: peak_of(worker),
    }
    for line in requests:
        request = json.loads(line)
        name = request.pop("do")
        try:
            answer(own[name]() if name in own else getattr(worker, name)(**request))
        except Exception as error:
            text = str(error).strip().splitlines()
            answer({"error": f"{type(error).__name__}: {text[0][:200] if text else ''}"})


def peak_of(worker: Any) -> dict[str, int | None]:
    """Peak resident memory of this process, and peak memory of the device, in bytes."""
    return {"process": peak_memory(), "device": worker.device_peak()}


def worker_main(kind: str, make: Callable[[str], Any]) -> None:
    """Run one worker process: stdout carries JSON only; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")

    try:
        fast_malloc()  # before jax or torch is imported
        worker = make(kind)
    except ImportError as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    serve(worker, sys.stdin, answer)


# ---- worker processes, from the caller's side ----


class WorkerError(Exception):
    """A worker's failure, in one line."""


class Worker:
    """A worker process, `python -m MODULE --worker KIND`, from the caller's side; it ends with the `with` block."""

    def __init__(self, module: str, kind: str, python: str, log: Path) -> None:
        self.kind, self.log = kind, log
        environment = dict(os.environ)
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared by the workers
        environment.setdefault("HF_HUB_OFFLINE", "1")
        with open(log, "a", encoding="utf-8") as errors:
            try:
                self.process = subprocess.Popen(
                    [python, "-m", module, "--worker", kind],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                )
            except OSError as error:
                raise WorkerError(f"can't start {python}: {error.strerror}") from None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        try:
            stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            stdin.flush()
        except OSError:
            pass  # it has ended: its last answer, or its log, says why
        if not select.select([stdout], [], [], ANSWER_TIMEOUT)[0]:
            self.process.kill()
            raise WorkerError(f"no answer in {ANSWER_TIMEOUT} s")
        line = stdout.readline()
        if not line:
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise WorkerError(f"the process ended ({self.process.wait()}): {''.join(last)[:200]}")
        found = json.loads(line)
        if "error" in found:
            raise WorkerError(found["error"])
        return found


class Rotation:
    """Workers that take turns. A rival that fails is left out and the reason kept; ours must not fail."""

    def __init__(self, workers: Mapping[str, Any]) -> None:
        self.alive, self.failed = dict(workers), {}  # type: dict[str, Any], dict[str, str]
        self.others_share = 0.0  # fraction of the cores' time that other programs used during `watched`

    def each(self, do: Callable[[str, Any], None]) -> None:
        """Call do(kind, worker) for each worker that is alive. Raises UserError if ours fails."""
        for kind, worker in list(self.alive.items()):
            try:
                do(kind, worker)
            except WorkerError as error:
                if kind == OURS:
                    raise UserError(f"{OURS}: {error}") from None
                self.failed[kind] = str(error)
                del self.alive[kind]

    def measure(self, get_ready: Callable[[str, Any], None], turn: Callable[[str, Any], None], repeats: int) -> None:
        """Call get_ready(kind, worker) for each worker, then turn(kind, worker) for each in turn, `repeats` times."""

        def settle_and_turn(kind: str, worker: Any) -> None:
            time.sleep(0.2)  # let the previous worker's threads settle
            turn(kind, worker)

        self.each(get_ready)
        with self.watched():
            for _ in range(repeats):
                self.each(settle_and_turn)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Measure `others_share` over the `with` block."""
        busy, ours, started = busy_seconds(), self._cpu_seconds(), time.perf_counter()
        yield
        busy, ours, elapsed = busy_seconds() - busy, self._cpu_seconds() - ours, time.perf_counter() - started
        self.others_share = max(busy - ours, 0.0) / (elapsed * cores())

    def _cpu_seconds(self) -> float:
        """CPU time of this process and the workers."""
        return time.process_time() + sum(worker.ask("cpu")["seconds"] for worker in self.alive.values())


def warn_of_turns(failed: Mapping[str, str], others_share: float, names: Mapping[str, str]) -> list[str]:
    """Lines that name the rivals left out, and a warning if other programs used a noticeable share of the machine.
    `names` maps kinds to the names that readers see."""
    lines = [f"{names[kind]} left out: {error}" for kind, error in failed.items()]
    if others_share > DISTURBANCE_THRESHOLD:
        lines.append(f"DISTURBED: other programs used {others_share:.0%} of the machine meanwhile")
    return lines


def speedup(
    seconds: Mapping[str, Sequence[float]], ours: str = OURS, rivals: Collection[str] | None = None
) -> dict[str, Any] | None:
    """How many times as fast as the fastest rival ours is: the ratio of medians, and the range of ratios turn by turn.

    `seconds`: each worker's time in every turn; a rival that failed has fewer and isn't compared. None without a rival.
    The range of n ratios holds the median of their distribution with probability 1 - 2^(1-n): 98 % for 7 turns.
    """
    others = [kind for kind in (seconds if rivals is None else rivals) if kind != ours and kind in seconds]
    medians = {kind: statistics.median(seconds[kind]) for kind in others if len(seconds[kind]) == len(seconds[ours])}
    if not medians:
        return None
    over = min(medians, key=lambda kind: medians[kind])
    ratios = [theirs / own for own, theirs in zip(seconds[ours], seconds[over], strict=True)]
    return {
        "over": over,
        "median": medians[over] / statistics.median(seconds[ours]),
        "range": [min(ratios), max(ratios)],
    }


def describe_speedup(ratio: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A `speedup` in words."""
    low, high = ratio["range"]
    return f"{ratio['median']:.2f} x {names[ratio['over']]} ({low:.2f}-{high:.2f} turn by turn)"


def survey_machine(
    module: str, kinds: Sequence[str], python: Mapping[str, str], log: Path, rival: str, **roof: Any
) -> tuple[dict[str, Any], dict[str, dict[str, float]], str]:
    """(machine, roofs, note). `machine`: processor, versions, devices. `roofs`: the hardware's limits (memory bandwidth
    or FLOPs per second) as our worker and the first rival measure them, if arguments `roof` are given. `note`: why the
    rivals are left out, if their library is missing, otherwise "". Raises UserError if our own worker fails."""
    from jaxgpt.runs.process import cpu_kind

    about: dict[str, Any] = {"processor": cpu_kind(), "cores": cores(), "versions": {}}
    roofs: dict[str, dict[str, float]] = {}
    for kind in kinds[:2]:
        try:
            with Worker(module, kind, python[kind], log) as worker:
                found = worker.ask("about")
                about["versions"] |= found.pop("versions")
                about["ours" if kind == OURS else "theirs"] = found
                if roof:
                    roofs[kind] = worker.ask("roof", **roof)
        except WorkerError as error:
            if kind == OURS:
                raise UserError(f"the {OURS} worker failed: {error}") from None
            return about, roofs, f"without {rival}: {python[kind]}: {error}"
    return about, roofs, ""


def machine_text(about: Mapping[str, Any]) -> str:
    """The device, its cores and the versions, in one line."""
    device = about["processor"] if about["ours"]["platform"] == "cpu" else about["ours"]["device"]
    names = [name for name in ("jax", "torch", "transformers", "trl") if name in about["versions"]]
    return ", ".join([f"{device} ({about['cores']} cores)", *(f"{name} {about['versions'][name]}" for name in names)])


# ---- a benchmark, from its command line to its files ----


def run_command(
    make: Callable[[str], Any], main: Callable[[Any], Any], settings: type[Any], presets: Mapping[str, Any]
) -> None:
    """The command line of a benchmark: `main`, or with --worker KIND the worker that make(kind) returns."""
    if sys.argv[1:2] == ["--worker"]:
        worker_main(sys.argv[2], make)
    else:
        from jaxgpt.runs.cli import cli

        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the workers need the GPU
        cli(main, settings, presets)


def check_choices(settings: Any, known: Mapping[str, Collection[str]]) -> None:
    """Raise UserError if one of the named settings holds a value that is not among those known."""
    for name, names in known.items():
        for value in getattr(settings, name):
            if value not in names:
                raise UserError(f"{name} has {value!r}; choose from {', '.join(names)}")


def check_not_empty(settings: Any, *names: str) -> None:
    """Raise UserError if one of the named settings, a tuple, is empty."""
    for name in names:
        if not getattr(settings, name):
            raise UserError(f"{name} is empty; give at least one value")


class Benchmark:
    """What every benchmark does around its measurements: find its workers, save their weights, keep the results.

    `kinds`: the workers that run, which are ours and, unless `survey` finds that their library is missing, the rivals.
    """

    def __init__(self, run: "Run", module: str, rivals: Sequence[str], torch_python: str) -> None:
        """`torch_python`: the Python that has the rivals' library; "": this one."""
        self.run, self.module, self.kinds = run, module, [OURS, *rivals]
        self.python = dict.fromkeys(rivals, torch_python or sys.executable) | {OURS: sys.executable}
        self.log = run.folder.absolute() / "workers.log"
        self.log.write_text("")
        for left_behind in run.folder.glob("weights-*"):  # by a killed run
            shutil.rmtree(left_behind)
        self.machine: dict[str, Any] = {}
        self.note = ""

    def warn_of_load(self) -> None:
        """Print a warning if other programs keep the cores busy."""
        load = os.getloadavg()[0]
        if load > 0.5 * cores():
            self.run.say(f"load average {load:.1f} on {cores()} cores: other programs disturb these timings")

    def survey(self, library: str, **roof: Any) -> dict[str, dict[str, float]]:
        """Set `machine` and `note`, and drop the rivals if their `library` is missing; returns the roofs, by kind."""
        kinds = self.kinds
        self.machine, roofs, self.note = survey_machine(self.module, kinds, self.python, self.log, library, **roof)
        if self.note:
            self.kinds = [OURS]
        return roofs

    @contextlib.contextmanager
    def start_workers(self, dtype: str = "float32") -> Iterator[dict[str, Worker]]:
        """Start one worker of each kind for the `with` block; only ours for bfloat16 if PyTorch lacks it."""
        kinds = self.kinds
        on_cpu = self.machine["ours"]["platform"] == "cpu"
        if len(kinds) > 1 and dtype == "bfloat16" and on_cpu and torch_lacks_bfloat16():
            kinds = [OURS]
            self.run.say("bfloat16 without rivals: on this CPU PyTorch's takes a hundred times as long as float32")
        with contextlib.ExitStack() as stack:
            yield {kind: stack.enter_context(Worker(self.module, kind, self.python[kind], self.log)) for kind in kinds}

    @contextlib.contextmanager
    def save_weights(self, weights: dict[str, np.ndarray]) -> Iterator[Path]:
        """Save the weights to a temporary .npz file that exists during the `with` block."""
        with tempfile.TemporaryDirectory(dir=self.run.folder.absolute(), prefix="weights-") as folder:
            path = Path(folder) / "weights.npz"
            np.savez(path, **weights)  # type: ignore[arg-type]
            del weights  # they may be as large as memory allows
            yield path

    def log_speeds(
        self, n: int, title: str, found: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], digits: int
    ) -> None:
        """Print and log the tokens per second at the n-th point of the benchmark's grid."""
        speeds = {kind: one["tokens_per_second"] for kind, one in found.items()}
        shown = ", ".join(f"{names.get(kind, kind)} {speed:,.{digits}f}" for kind, speed in speeds.items())
        self.run.say(f"{title}: {shown} tokens/s")
        self.run.log(n, {f"tokens_per_second/{kind}": speed for kind, speed in speeds.items()})

    def finish(
        self,
        settings: Any,
        lines: Sequence[str],
        found: Mapping[str, Any],
        said: int = 0,
        draw: Callable[[Path], None] | None = None,
    ) -> dict[str, Any]:
        """Print the lines (the first `said` were printed before) and finish the run with `found`, the machine, the
        settings and the note. Lines go to STAGE.txt, results to STAGE.json, and the figure of `draw` to STAGE.png."""
        from jaxgpt.files import write_json
        from jaxgpt.runs.settings import settings_to_json

        for line in lines[said:]:
            self.run.say(line)
        report = {"machine": self.machine, "settings": settings_to_json(settings), "note": self.note, **found}
        place = self.run.folder / self.run.stage
        write_json(place.with_suffix(".json"), report)
        place.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if draw is not None:
            draw(place.with_suffix(".png"))
        self.run.finish(report)
        return self.run.results


# ---- figure ----


def draw_bars(
    panels: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]],
    names: Mapping[str, str],
    lower: str,
    path: Path,
    title: str,
) -> None:
    """Draw tokens per second (each panel on its own scale) above the fraction of the roof (all panels on one scale).

    A panel is a list of (label, {kind: tokens_per_second, tokens_per_second_range, fraction_of_roof}); `names` maps
    kinds to labels, `lower` is the lower axis label and says what the roof is.
    """
    from matplotlib.figure import Figure

    kinds = [kind for kind in names if any(kind in found for group in panels.values() for _, found in group)]
    sizes = [len(group) for group in panels.values()]
    picture = Figure(figsize=(2.4 + max(1.3, 0.55 * len(kinds)) * sum(sizes), 7), dpi=110, layout="constrained")
    grid = picture.add_gridspec(2, len(panels), width_ratios=sizes)
    tops = [picture.add_subplot(grid[0, i]) for i in range(len(panels))]
    bottoms = [picture.add_subplot(grid[1, i]) for i in range(len(panels))]
    largest = max(one["fraction_of_roof"] for group in panels.values() for _, found in group for one in found.values())
    width = 0.8 / len(kinds)
    for (name, group), top, bottom in zip(panels.items(), tops, bottoms, strict=True):
        for i, kind in enumerate(kinds):
            at = [
                (x + (i - (len(kinds) - 1) / 2) * width, found[kind])
                for x, (_, found) in enumerate(group)
                if kind in found
            ]
            if not at:
                continue
            place = [x for x, _ in at]
            speed = [found["tokens_per_second"] for _, found in at]
            ranges = np.abs(np.array([found["tokens_per_second_range"] for _, found in at]).T - speed)
            top.bar(place, speed, width * 0.92, yerr=ranges, capsize=2, color=f"C{i}", label=names[kind])
            bottom.bar(place, [found["fraction_of_roof"] for _, found in at], width * 0.92, color=f"C{i}")
            for x, found in at:
                high = found["tokens_per_second_range"][1]
                top.annotate(
                    f"{found['tokens_per_second']:,.0f}",
                    (x, high),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=7,
                )
                bottom.annotate(
                    f"{found['fraction_of_roof']:.0%}",
                    (x, found["fraction_of_roof"]),
                    xytext=(0, 1),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=7,
                )
        top.set_title(name, fontsize=10)
        for axis in (top, bottom):
            axis.set_xticks(range(len(group)), [label for label, _ in group], fontsize=8)
            axis.set_xlim(-0.6, len(group) - 0.4)
            axis.spines[["top", "right"]].set_visible(False)
        bottom.set_ylim(0, max(1.05, 1.1 * largest))
        bottom.axhline(1, color="0.5", ls=":", lw=1)
        top.margins(y=0.12)
    tops[0].set_ylabel("tokens per second (bar: median, line: range)")
    bottoms[0].set_ylabel(lower)
    handles, labels = tops[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=min(len(kinds), 3), frameon=False)
    picture.suptitle(title, fontsize=9)
    picture.savefig(path)


# ---- weights, also as Hugging Face's GPT-2 ----


def draw_weights(config: ModelConfig, draw: Callable[[str, tuple[int, ...]], np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters with the shapes of `transformer.init`, by name ("block_0/qkv/kernel"), each from draw(name, shape)."""
    import jax

    from jaxgpt.models import transformer

    shapes = jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))
    leaves, _ = jax.tree_util.tree_flatten_with_path(shapes)
    named = ((jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape) for path, leaf in leaves)
    return {name: draw(name, shape) for name, shape in named}


def initial_weights(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """GPT-2's initialisation, as in `transformer.init`, by name."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(("scale", "bias")):
            return np.full(shape, name.endswith("scale"), np.float32)
        residual = name.endswith(("out/kernel", "down/kernel"))
        size = 0.02 / math.sqrt(2 * config.layers) if residual else 0.01 if name.endswith("positions_TD") else 0.02
        return np.float32(size) * rng.standard_normal(shape, dtype=np.float32)

    return draw_weights(config, draw)


def unflatten_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


def hf_model(config: ModelConfig, flat: Mapping[str, np.ndarray], device: str = "cpu") -> Any:
    """A GPT2LMHeadModel with our weights, in config.dtype without an end token. UserError if `config` isn't GPT-2's."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from jaxgpt.pretrained.places import architecture_of, to_tensors

    if architecture_of(config) != "gpt2":
        raise UserError("only GPT-2 models can be compared with transformers' GPT-2; choose another model")

    theirs = GPT2Config(
        vocab_size=config.vocab,
        n_positions=config.block,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        n_inner=config.mlp_hidden,
        activation_function="gelu_new",
        layer_norm_epsilon=config.norm_epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model = GPT2LMHeadModel(theirs).to(getattr(torch, config.dtype)).eval()
    model.generation_config.eos_token_id = None
    places = dict(model.named_parameters())  # the tied head appears once, as wte
    with torch.no_grad():
        for name, w in to_tensors(flat, config).items():
            places.pop(name).copy_(torch.from_numpy(w))
    if places or model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr():
        extra = ", ".join(places) or "an untied head"
        raise UserError(f"this version of transformers has different parameters: {extra}; install another version")
    return model
