"""Whether a device computes what it should: compared with plain formulas in float32 on the CPU of the same process, or
with NumPy. Each check has an error and a limit; errors of arrays are |x - y| / |y| (norms over all elements)."""

import dataclasses
import functools
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import decoding, losses, training
from jaxgpt.config import ModelConfig
from jaxgpt.decoding import sampling
from jaxgpt.errors import first_line
from jaxgpt.losses import vocab_head
from jaxgpt.models import attention, transformer
from jaxgpt.structs import Batch
from tpu.compiling import attention_kernels

# float32 products must really be float32: TF32, with 10 bits, would give 5e-4. bfloat16 has 8 bits.
LIMITS = {"float32": 1e-4, "bfloat16": 0.05}
GPT2 = ModelConfig(layers=1, width=128, heads=2, block=72, vocab=640)
LLAMA = dataclasses.replace(
    GPT2, kv_heads=1, mlp="swiglu", norm="rms", positions="rotary", biases=False, tied=False, mlp_width=256
)


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    error: float
    limit: float

    def to_json(self) -> dict[str, Any]:
        """With `ok`; an error that is not finite becomes null."""
        error, ok = float(self.error), bool(self.error <= self.limit)  # False for NaN
        return {"name": self.name, "error": error if math.isfinite(error) else None, "limit": self.limit, "ok": ok}


def run(device: jax.Device) -> Iterator[Check]:
    """All checks that fit in one process. A check that raises an error fails, and the next ones still run."""
    for group in (check_models, check_attention, check_head, check_sampling, check_greedy):
        try:
            yield from group(device, jax.devices("cpu")[0])
        except Exception as error:
            traceback.print_exc()
            yield Check(f"{group.__name__}: {first_line(error, 200)}", math.inf, 0.0)


def compute(device: jax.Device, f: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """f's results on this device, as NumPy arrays, and the text of the compiled program."""
    placed = jax.device_put(arguments, device)
    options: dict[str, str | bool] | None = (
        {"xla_backend_optimization_level": "0"} if device.platform == "cpu" else None
    )
    compiled = jax.jit(f).lower(*placed).compile(options)  # a CPU spends most of the time compiling
    return jax.device_get(compiled(*placed)), compiled.as_text() or ""


def relative_error(found: Any, expected: Any) -> float:
    """|x - y| / |y| of the worst leaf, in float64."""

    def one(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x.astype(np.float64), y.astype(np.float64)
        return float(np.linalg.norm(x - y) / np.linalg.norm(y))

    return float(np.max(jax.tree.leaves(jax.tree.map(one, found, expected))))  # NaN if one is


def precision(dtype: str) -> Any:
    """A context in which float32 products are computed in float32."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


def random_params(config: ModelConfig) -> Any:
    """Random parameters, biases and norms included, large enough that every input matters."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        size = 0.08 if like.ndim >= 2 else 0.1
        return (size * rng.standard_normal(like.shape) + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, training.param_shapes(config))


def plain(config: ModelConfig) -> ModelConfig:
    """The same model as plain formulas on a CPU."""
    return dataclasses.replace(config, gradients="plain", platform="cpu")


def packed_rows(rows: int, config: ModelConfig) -> Batch:
    """Rows of 65 tokens: two examples and padding."""
    tokens = np.random.default_rng(1).integers(6, config.vocab, (rows, 65)).astype(np.int32)
    lengths = (31, 30, 4)
    segments = np.tile(np.repeat([1, 2, 0], lengths), (rows, 1)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(n) for n in lengths]), (rows, 1)).astype(np.int32)
    return Batch(tokens, (positions > 0) & (segments > 0), segments, positions)


def check_models(device: jax.Device, cpu: jax.Device) -> Iterator[Check]:
    """Logits, loss and gradients of small models."""

    def outputs(params: Any, batch: Batch, config: ModelConfig) -> Any:
        def loss(params: Any) -> Any:
            logp_BT, h_BTD = transformer.token_log_probs(params, config, batch)
            return losses.reduce(-logp_BT, batch.mask_BT).value, transformer.unembed(params, h_BTD)

        return jax.value_and_grad(loss, has_aux=True)(params)

    for name, config in {"GPT-2": GPT2, "Llama": LLAMA}.items():
        arguments = random_params(config), packed_rows(4, config)
        expected, _ = compute(cpu, functools.partial(outputs, config=plain(config)), *arguments)
        for dtype, limit in LIMITS.items():
            kind = dataclasses.replace(config, dtype=dtype)  # type: ignore[arg-type]
            with precision(dtype):
                found, _ = compute(device, functools.partial(outputs, config=kind), *arguments)
            parts = ("loss", "logits", "gradients")
            for part, x, y in zip(parts, (*found[0], found[1]), (*expected[0], expected[1]), strict=True):
                yield Check(f"{name} {dtype}: {part}", relative_error(x, y), limit)


def check_attention(device: jax.Device, cpu: jax.Device) -> Iterator[Check]:
    """The attention kernel that models use on this device, in bfloat16: results and gradients."""
    cases = {  # tokens, heads, groups, head dimension, packed
        "64 tokens": (64, 2, 2, 64, False),
        "65 tokens, packed": (65, 2, 2, 64, True),
        "129 tokens, shared heads of 128": (129, 4, 2, 128, False),
    }
    wanted = {"gpu": "cuDNN", "tpu": "splash"}.get(device.platform, "")
    if device.platform == "gpu" and float(device.compute_capability) < 8.0:
        wanted = ""  # cuDNN's attention needs Ampere or newer
    used = True

    def kernel(*qkv_and_segments: Any) -> Any:
        return transformer.select_layers(ModelConfig()).attend(*qkv_and_segments)

    def run_kernel(attend: Any, q: Any, k: Any, v: Any, segments: Any, given: Any) -> Any:
        result, pull_back = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
        return result, *pull_back(given)

    for name, (T, H, G, K, packed) in cases.items():
        rng = np.random.default_rng(T)
        q, k, v, given = (rng.normal(size=(2, T, n, K)).astype(jnp.bfloat16) for n in (H, G, G, H))
        segments = np.repeat([[1, 2, 0]], 2, 0).repeat([T // 2, T - T // 2 - 3, 3], 1).astype(np.int32)
        rows = segments if packed else None
        wide = [x.astype(np.float32) for x in (q, k, v, given)]
        expected, _ = compute(cpu, functools.partial(run_kernel, attention.attend), *wide[:3], rows, wide[3])
        found, text = compute(device, functools.partial(run_kernel, kernel), q, k, v, rows, given)
        used = used and wanted in ["", *attention_kernels(text)]
        yield Check(f"attention bfloat16: {name}", relative_error(found, expected), 0.01)
    if wanted:
        yield Check(f"attention is {wanted}'s", float(not used), 0.0)


def check_head(device: jax.Device, cpu: jax.Device) -> Iterator[Check]:
    """The vocabulary head in tiles, with its own gradient, against autodiff."""
    rng = np.random.default_rng(2)
    hidden, table = rng.normal(size=(3, 37, 64)), 0.3 * rng.normal(size=(640, 64))
    tokens, weights = rng.integers(0, 640, (3, 37)).astype(np.int32), rng.normal(size=(4, 3, 37)).astype(np.float32)

    def outputs(hidden: Any, table: Any, gradients: Any) -> Any:
        def total(hidden: Any, table: Any) -> Any:
            found = vocab_head.tiled_head_outputs(hidden, table, jnp.asarray(tokens), tile=16, gradients=gradients)
            return sum((w * x).sum() for w, x in zip(weights, found, strict=True)), found

        return jax.grad(total, (0, 1), has_aux=True)(hidden, table)

    for dtype, limit in LIMITS.items():
        given = [np.asarray(x, jnp.dtype(dtype)) for x in (hidden, table)]
        wide = [x.astype(np.float32) for x in given]
        expected, _ = compute(cpu, functools.partial(outputs, gradients="plain"), *wide)
        with precision(dtype):
            found, _ = compute(device, functools.partial(outputs, gradients="auto"), *given)
        yield Check(f"vocabulary head {dtype}: gradients", relative_error(found, expected), limit)


def check_sampling(device: jax.Device, _: jax.Device) -> Iterator[Check]:
    """What top-k and top-p keep, against a sort in float64, and that no other token is drawn."""
    logits = (np.random.default_rng(3).normal(size=(32, 50_304)) * 3).astype(np.float32)
    logits[0] = logits[0].round()  # ties
    k, p = 50, 0.9

    def outputs(key: Any, logits: Any) -> Any:
        kept = sampling.top_k(logits, k), sampling.top_p(logits, p)
        keys = sampling.answer_keys(key, jnp.arange(len(logits)))
        return [x > -1e20 for x in kept], sampling.categorical(keys, kept[1])

    (by_k, by_p), drawn = compute(device, outputs, jax.random.key(0), logits)[0]
    yield Check(
        "top-k: tokens that a sort decides differently", (by_k != (logits >= np.sort(logits)[:, [-k]])).sum(), 0
    )
    wide = logits.astype(np.float64)
    probability = np.exp(wide - wide.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    least = np.where(by_p, logits, np.inf).min(1, keepdims=True)
    short = p - (probability * by_p).sum(1)  # enough is kept, and without the least likely of them it isn't
    excess = (probability * (logits > least)).sum(1) - p
    yield Check("top-p: dropped tokens with a larger logit than a kept one", (by_p != (logits >= least)).sum(), 0)
    yield Check("top-p: too little or too much probability kept", max(short.max(), excess.max(), 0.0), 1e-5)
    yield Check("top-p: drawn tokens that were not kept", (~by_p[np.arange(len(drawn)), drawn]).sum(), 0)


def check_greedy(device: jax.Device, cpu: jax.Device) -> Iterator[Check]:
    """Greedy decoding with the cache, against the argmax of one forward pass over prompt and answer."""
    config, new = GPT2, 24
    params, lengths = random_params(config), np.array([13, 2, 7, 12], np.int32)
    prompts = np.random.default_rng(4).integers(6, config.vocab, (4, 13)).astype(np.int32)
    prompts *= np.arange(13) < lengths[:, None]

    def decode(params: Any, prompts: Any, lengths: Any) -> Any:
        key, never = jax.random.key(0), config.vocab
        return decoding.generate(
            params, config, prompts, lengths, key, new_tokens=new, stop=never, sample=sampling.greedy
        )

    with precision("float32"):
        answers, _ = compute(device, decode, params, prompts, lengths)
    rows = np.zeros((4, 13 + new), np.int32)
    for row, prompt, answer, length in zip(rows, prompts, answers.tokens_BA, lengths, strict=True):
        row[: length + new] = [*prompt[:length], *answer]

    def forward(params: Any, rows: Any) -> Any:
        logits = transformer.unembed(params, transformer.hidden(params, plain(config), rows))
        return logits, jax.nn.log_softmax(logits)

    (logits, logp), _ = compute(cpu, forward, params, rows)
    at = np.arange(4)[:, None], lengths[:, None] - 1 + np.arange(new)
    chosen = np.take_along_axis(logits[at], answers.tokens_BA[..., None], 2)[..., 0]
    yield Check("greedy decoding: largest logit minus the chosen one", (logits[at].max(2) - chosen).max(), 1e-3)
    chosen = np.take_along_axis(logp[at], answers.tokens_BA[..., None], 2)[..., 0]
    yield Check("greedy decoding: log-probability", np.abs(chosen - answers.logp_BA).max(), 1e-3)
