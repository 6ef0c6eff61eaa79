"""The figures of docs/maths.md, drawn with the library's own functions: `python docs/maths.py` (a few seconds)."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from jaxgpt import losses
from jaxgpt.losses import kl, returns, vocab_head
from jaxgpt.training import optim

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "0.6"


def plot_surrogate(positive: Axes, negative: Axes) -> None:
    """-L of one token against its ratio: PPO's clip, clip-higher and dual clip."""
    ratio = jnp.linspace(0.05, 5.0, 1000)
    for axis, advantage in ((positive, 1.0), (negative, -1.0)):
        d, a = jnp.log(ratio), jnp.full(ratio.shape, advantage)
        axis.plot(ratio, ratio * a, color=GREY, ls=":", label="r A")
        axis.plot(ratio, -losses.ppo_clip(d, a, 0.2), color=BLUE, label="ppo_clip, 0.2")
        if advantage > 0:
            axis.plot(ratio, -losses.ppo_clip(d, a, 0.2, 0.5), color=GREEN, ls="--", label="clip_high = 0.5")
            axis.set(xlim=(0, 2.5), ylim=(0, 2.0), title="A = 1")
        else:
            axis.plot(ratio, -losses.dual_clip(d, a, 0.2), color=RED, ls="--", label="dual_clip, limit 3")
            axis.set(xlim=(0, 5), ylim=(-5, 0), title="A = −1")
        axis.axvline(1.0, color="0.85", lw=1, zorder=0)
        axis.set(xlabel="ratio r = π / π_old", ylabel="objective −L")
        axis.legend(frameon=False)


def estimators(shape: Axes, quality: Axes) -> None:
    """k1, k2 and k3 as functions of d, and their bias and standard deviation, enumerated over a whole vocabulary."""
    d = jnp.linspace(-3, 3, 301)
    named = {"k1": (kl.k1, GREY), "k2": (kl.k2, ORANGE), "k3": (kl.k3, BLUE)}
    for name, (estimator, color) in named.items():
        shape.plot(d, estimator(d, jnp.zeros_like(d)), color=color, label=name)
    shape.set(xlabel="d = log π − log ρ of one token", ylabel="value, nats", ylim=(-3, 6), title="one token's estimate")
    shape.axhline(0, color="0.85", lw=1, zorder=0)
    shape.legend(frameon=False)

    key_ref, key_drift = jax.random.split(jax.random.key(0))
    ref_logits, drift = jax.random.normal(key_ref, (64,)), jax.random.normal(key_drift, (64,))
    sizes = np.geomspace(0.02, 2.5, 40)

    def moments(size: jax.Array) -> tuple[jax.Array, ...]:
        logits = ref_logits + size * drift
        pi, logp, ref_logp = jax.nn.softmax(logits), jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
        values = jnp.stack([estimator(logp, ref_logp) for estimator, _ in named.values()])
        mean = values @ pi
        return kl.exact(logits, ref_logits), mean, jnp.sqrt((jnp.square(values - mean[:, None])) @ pi)

    truth, mean, spread = jax.vmap(moments)(jnp.asarray(sizes))
    for i, (name, (_, color)) in enumerate(named.items()):
        quality.plot(truth, spread[:, i] / truth, color=color, label=f"sd of {name}")
    quality.plot(truth, mean[:, 1] / truth, color=ORANGE, ls=":", label="mean of k2")
    quality.axhline(1, color="0.85", lw=1, zorder=0, label="mean of k1 and k3")
    quality.set(
        xscale="log",
        yscale="log",
        xlabel="KL(π‖ρ) of the token, nats",
        ylabel="relative to the KL",
        title="bias and spread, 64 tokens enumerated",
    )
    quality.legend(frameon=False, fontsize=8)


def pairs(value: Axes, slope: Axes) -> None:
    """Losses of one pair against the margin of its log-ratios, in nats, and their slopes."""
    beta = 0.5
    margin = jnp.linspace(-8, 8, 401)
    zeros = jnp.zeros_like(margin)

    def of_pairs(f: Callable[..., jax.Array], *more: float) -> Callable[[jax.Array], jax.Array]:
        choice = jnp.zeros(margin.shape, jnp.int32)
        return lambda m: f(jnp.stack([m, zeros], 1), jnp.stack([zeros, zeros], 1), choice, beta, *more)

    functions = {
        "dpo": (of_pairs(losses.dpo), BLUE),
        "cdpo, ε = 0.2": (of_pairs(losses.cdpo, 0.2), GREEN),
        "ipo, τ = 0.1 (÷ 40)": (lambda m: losses.ipo(m, zeros, 0.1) / 40, ORANGE),
        "simpo, γ = 1": (lambda m: losses.simpo(m, zeros, beta, 1.0), PURPLE),
        "kto, desirable": (lambda m: losses.kto(m, m == m, 0.0, beta), RED),
    }
    for name, (f, color) in functions.items():
        value.plot(margin, f(margin), color=color, label=name)
        slope.plot(margin, jax.grad(lambda m, f=f: f(m).sum())(margin), color=color)
    value.set(xlabel="h_w − h_l (kto: h − z₀), nats", ylabel="loss", ylim=(0, 4.2), title=f"loss of a pair, β = {beta}")
    slope.set(xlabel="h_w − h_l (kto: h − z₀), nats", ylabel="slope", ylim=(-0.65, 0.35), title="its slope")
    slope.axhline(0, color="0.85", lw=1, zorder=0)
    value.legend(frameon=False, fontsize=8)


def advantages(axis: Axes) -> None:
    """A prompt's weight against its solve rate, relative to a prompt solved half the time; 8 answers scored 0 or 1."""
    right = np.arange(0, 9)
    scores = jnp.asarray((np.arange(8) < right[:, None]).astype(np.float32))
    for name, f, color in (("rloo, centred", returns.rloo, BLUE), ("grpo", returns.grpo, RED)):
        weight = jnp.abs(f(scores)).mean(axis=1)
        axis.plot(right / 8, weight / weight[4], "o-", color=color, label=f"returns.{name}")
    axis.set(
        xlabel="share of the prompt's 8 answers that are right",
        ylabel="mean |advantage|, relative",
        title="weight of a prompt",
    )
    axis.legend(frameon=False)


def adam(axis: Axes) -> None:
    """Step size of Adam in both forms against the magnitude of a constant gradient."""
    g = jnp.geomspace(1e-7, 1e-2, 121)

    def step(tx: optax.GradientTransformation, t: int) -> jax.Array:
        return jax.lax.scan(lambda s, _: tx.update(g, s)[::-1], tx.init(g), length=t)[1][-1]

    axis.plot(g, step(optax.scale_by_adam(eps=1e-5), 1), color=ORANGE, label="optax, any step")
    for t, style in ((1, "-"), (100, "--"), (3000, ":")):
        axis.plot(g, step(optim.scale_by_adam_tf(eps=1e-5), t), color=BLUE, ls=style, label=f"TensorFlow, step {t:,}")
    axis.set(xscale="log", xlabel="gradient of a parameter", ylabel="step / learning rate", title="Adam, eps 1e-5")
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def placements_table() -> str:
    """A table comparing each KL estimator's expected gradient, by placement, with the two enumerated gradients."""
    key, key_ref = jax.random.split(jax.random.key(1))
    logits, ref_logits = jax.random.normal(key, (8,)), jax.random.normal(key_ref, (8,))
    ref_logp = jax.nn.log_softmax(ref_logits)
    pi = jax.nn.softmax(logits)
    forward = jax.grad(lambda x: kl.exact(x, ref_logits))(logits)
    reverse = jax.grad(lambda x: kl.exact(ref_logits, x))(logits)
    lines = ["| placement | size | distance to ∇KL(π‖ρ) | to ∇KL(ρ‖π) | to their difference |", "|---|---|---|---|---|"]
    for name, f in (("k1", kl.k1), ("k2", kl.k2), ("k3", kl.k3)):
        as_loss = jax.grad(lambda x, f=f: pi @ f(jax.nn.log_softmax(x), ref_logp))(logits)
        value = f(jax.nn.log_softmax(logits), ref_logp)
        in_reward = jax.grad(lambda x, v=value: pi @ (v * jax.nn.log_softmax(x)))(logits)
        for place, gradient in (("as a loss", as_loss), ("in the reward", in_reward)):
            sizes = [gradient, gradient - forward, gradient - reverse, gradient - (forward - reverse)]
            lines.append(f"| {name} {place} | " + " | ".join(f"{float(jnp.linalg.norm(x)):.4f}" for x in sizes) + " |")
    return "\n".join(lines)


def memory_table() -> str:
    """A table of the temporary memory of the NLL's gradient from hidden states, as counted by the compiler."""
    B, T, D, V = 8, 1024, 768, 50304
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((B, T, D), jnp.bfloat16), ((V, D), jnp.float32), ((B, T), jnp.int32))
    ]

    def whole(hidden: jax.Array, head: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = jnp.einsum("btd,vd->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return losses.nll(logits, tokens)

    rows = [("whole logits, `losses.nll`", whole)]
    for tile in (256, 128, 32):
        rows.append((f"`vocab_head.nll`, tile {tile}", functools.partial(vocab_head.nll, tile=tile)))
    lines = ["| | temporary memory of the gradient |", "|---|---|"]
    for name, f in rows:
        compiled = jax.jit(jax.grad(lambda *x, f=f: f(*x).mean(), argnums=(0, 1))).lower(*shapes).compile()
        lines.append(f"| {name} | {compiled.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB |")
    return "\n".join(lines)


def save(name: str, *draw: Callable[..., None], panels: int) -> None:
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.5), layout="constrained", squeeze=False)
    at = 0
    for f in draw:
        count = f.__code__.co_argcount
        f(*axes[0, at : at + count])
        at += count
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / name, dpi=110)
    print(f"wrote {name}")


if __name__ == "__main__":
    save("surrogate.png", plot_surrogate, panels=2)
    save("kl.png", estimators, panels=2)
    save("pairs.png", pairs, panels=2)
    save("advantages_adam.png", advantages, adam, panels=2)
    print(placements_table())
    print(memory_table())
