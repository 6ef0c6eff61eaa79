"""The one training step that every stage shares."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from jaxgpt import losses
from jaxgpt.config import ModelConfig
from jaxgpt.losses import Mean
from jaxgpt.models import sharding, transformer
from jaxgpt.structs import Array, Batch, Params
from jaxgpt.training import guard, optim

Data = TypeVar("Data")  # a batch: any pytree of arrays whose first axis is its rows
State = TypeVar("State")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Argument = TypeVar("Argument")
Metrics = Mapping[str, Mean | Array]  # pooled over the parts of a batch: Means are added, arrays give their maximum
Sums = tuple[Params, tuple[Mean, Metrics]]  # gradient of the objective's sum, (objective, metrics)
LossFn = Callable[[Params, Data, Array | None], tuple[Mean, Metrics]]


@struct.dataclass
class TrainState:
    """What a step changes (trainable, optimiser, step, guard) and what it passes on unchanged (frozen).

    `trainable` and `frozen` are nested dicts with no leaf in common; a loss sees them merged. `step` counts the updates
    that were applied, not those that the guard skipped.
    """

    step: Array
    trainable: Params
    frozen: Params
    opt_state: optax.OptState
    guard: guard.Guard

    @property
    def params(self) -> Params:
        """All parameters, as a loss sees them."""
        return merge_params(self.frozen, self.trainable)


Step = Callable[[TrainState, Data, Array | None], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Program(Generic[Data]):
    """A jitted step and what it is compiled for: shapes, dtypes and shardings of state and batch."""

    step: Step[Data]
    state: TrainState
    batch: Data


def merge_params(frozen: Params, trainable: Params) -> Params:
    """Both trees as one: dicts that have the same name in both are merged too (a LoRA adapter joins its kernel)."""
    both = {
        name: merge_params(frozen[name], part)
        if isinstance(frozen.get(name), dict) and isinstance(part, dict)
        else part
        for name, part in trainable.items()
    }
    return {**frozen, **both}


def init_state(trainable: Params, tx: optax.GradientTransformation, frozen: Params | None = None) -> TrainState:
    """The state before the first step. Frozen parameters must not share buffers with trainable ones (see `optim.copy`),
    because the step donates both."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen or {}, tx.init(trainable), guard.init())


def pool_metrics(a: Metrics, b: Metrics) -> Metrics:
    """The metrics of two parts of a batch, combined: Means are added, arrays give their maximum."""
    return {name: _pool(a[name], b[name]) for name in b}


def _pool(a: Mean | Array, b: Mean | Array) -> Mean | Array:
    if isinstance(a, Mean) or isinstance(b, Mean):
        return a + b  # type: ignore[operator]  # if one is a Mean, both are
    return jnp.maximum(a, b)


def split_rows(tree: Data, parts: int) -> Data:
    """Split a batch into `parts` smaller ones: [B, ...] -> [parts, B / parts, ...]. Part p has the rows p, p + parts,
    ...: if each device holds a block of consecutive rows, no row moves to another device."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def join_rows(tree: Data) -> Data:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def make_train_step(
    loss_fn: LossFn[Data],
    tx: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    axis_name: str | None = None,
    spike: float = 0.0,
) -> Step[Data]:
    """step(state, batch, key) -> (state, metrics); pure, to be jitted with donate_argnums=0.

    loss_fn(params, batch, key) returns the objective as `Mean(sum, count)` and a dict of metrics (see `Metrics`).
    The gradient of the sum is divided by the global count, so that `microbatches` parts of a batch (run one after
    another) give the gradient of the whole batch, even if their masks mark different numbers of tokens. Under
    `jax.pmap` or `jax.shard_map`, `axis_name` pools the devices' sums; under `jax.jit` with shardings it is not needed.

    A loss, gradient or update that is not finite changes nothing but the guard's counts (`jaxgpt.training.guard`),
    which are the metrics `skipped` and `skipped_in_a_row`; a `spike` above 0 also skips updates whose loss is more than
    that many standard deviations above its running mean.
    """

    def loss_sum(
        trainable: Params, frozen: Params, batch: Data, key: Array | None
    ) -> tuple[Array, tuple[Mean, Metrics]]:
        with jax.named_scope("loss"):
            objective, metrics = loss_fn(merge_params(frozen, trainable), batch, key)
        return objective.sum, (objective, metrics)

    grad_fn = jax.grad(loss_sum, has_aux=True)

    def gradients(state: TrainState, batch: Data, key: Array | None) -> tuple[Params, tuple[Mean, Metrics]]:
        if microbatches == 1:
            return grad_fn(state.trainable, state.frozen, batch, key)
        parts = split_rows(batch, microbatches)
        keys = None if key is None else jax.random.split(key, microbatches)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(lambda batch: grad_fn(state.trainable, state.frozen, batch, key), first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(total: Sums, part: tuple[Data, Array | None]) -> tuple[Sums, None]:
            grads_so_far, (objective_so_far, metrics_so_far) = total
            grads, (objective, metrics) = grad_fn(state.trainable, state.frozen, *part)
            grads = jax.tree.map(jnp.add, grads_so_far, grads)
            return (grads, (objective_so_far + objective, pool_metrics(metrics_so_far, metrics))), None

        return jax.lax.scan(add, zeros, (parts, keys))[0]

    def update_norm(state: TrainState, grads: Params, updates: Params) -> Array:
        """The norm of the updates; 0 where it is known to be finite."""
        if not isinstance(tx, optim.Bounded):
            return optax.tree.norm(updates)
        computed = lambda: optax.tree.norm(tx.update(grads, state.opt_state, state.trainable)[0])  # noqa: E731
        return jax.lax.cond(tx.size(state.step) <= 1, lambda: jnp.zeros(()), computed)

    def step(state: TrainState, batch: Data, key: Array | None = None) -> tuple[TrainState, Metrics]:
        grads, (objective, metrics) = gradients(state, batch, key)
        if axis_name is not None:
            grads, objective = jax.lax.psum((grads, objective), axis_name)
            metrics = {name: _pool_over(axis_name, part) for name, part in metrics.items()}
        with jax.named_scope("optimiser"):
            grads = jax.tree.map(lambda g: g / jnp.maximum(objective.count, 1), grads)
            updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            loss, grad_norm = objective.value, optax.tree.norm(grads)
            admitted = guard.accepts(state.guard, loss, grad_norm, update_norm(state, grads, updates), spike)
            count, trainable, opt_state = guard.select(
                admitted, (state.step + 1, trainable, opt_state), (state.step, state.trainable, state.opt_state)
            )
        new_guard = guard.update(state.guard, admitted, loss)
        counts = {"skipped": new_guard.skipped, "skipped_in_a_row": new_guard.in_a_row}
        state = TrainState(count, trainable, state.frozen, opt_state, new_guard)
        return state, {"loss": objective, **metrics, "grad_norm": grad_norm, **counts}

    return step


def _pool_over(axis_name: str, metric: Mean | Array) -> Mean | Array:
    """`pool_metrics` over the parts of all devices."""
    return jax.lax.psum(metric, axis_name) if isinstance(metric, Mean) else jax.lax.pmax(metric, axis_name)


def make_nll(config: ModelConfig) -> LossFn[Batch]:
    """The loss of pretraining and finetuning: the mean of -log P over the tokens where the mask is True."""

    def loss_fn(params: Params, batch: Batch, key: Array | None = None) -> tuple[Mean, Metrics]:
        logp_BT, _ = transformer.token_log_probs(params, config, batch, key=key)
        return losses.reduce(-logp_BT, batch.mask_BT), {}

    return loss_fn


def jit_step(
    loss_fn: LossFn[Data],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState | None = None,
    *,
    microbatches: int = 1,
    spike: float = 0.0,
) -> Step[Data]:
    """`make_train_step`, jitted for a mesh: batch rows are divided among the devices, and the state is donated.

    `state` holds the state's shapes with their shardings, the same before and after the step (see `sharded_shapes`);
    without it the state is replicated on every device.
    """
    replicated = sharding.replicated_sharding(mesh)
    state_shardings = replicated if state is None else jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        sharding.within(mesh, make_train_step(loss_fn, tx, microbatches=microbatches, spike=spike)),
        donate_argnums=0,
        in_shardings=(state_shardings, sharding.row_sharding(mesh), replicated),
        out_shardings=(state_shardings, replicated),
    )


def make_program(
    loss_fn: LossFn[Data],
    tx: optax.GradientTransformation,
    config: ModelConfig,
    mesh: Mesh,
    start: Callable[[Argument], TrainState],
    argument: Argument,
    batch: Data,
    *,
    microbatches: int = 1,
    spike: float = 0.0,
) -> Program[Data]:
    """`jit_step` for the state that `start(argument)` makes and for batches of these shapes; allocates nothing.

    UserError if the model or the batch can't be divided evenly over the mesh."""
    sharding.check_model(config, mesh)
    sharding.check_batch(jax.tree.leaves(batch)[0].shape[0], microbatches, mesh)
    state = sharded_shapes(mesh, start, argument)
    step = jit_step(loss_fn, tx, mesh, state, microbatches=microbatches, spike=spike)
    return Program(step, state, batch)


def jit_on(
    mesh: Mesh,
    f: Callable[Arguments, Result],
    *,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
) -> Callable[Arguments, Result]:
    """`jax.jit` of f for a mesh; arguments stay where they are, and results are replicated on every device."""
    return jax.jit(
        sharding.within(mesh, f),
        out_shardings=sharding.replicated_sharding(mesh),
        static_argnums=static_argnums,
        static_argnames=static_argnames,
        donate_argnums=donate_argnums,
    )


def pmap_step(loss_fn: LossFn[Data], tx: optax.GradientTransformation, *, microbatches: int = 1) -> Step[Data]:
    """`make_train_step` under `jax.pmap`: the same numbers, with a leading device axis on every array.

    State and key: one copy per device (`jax.numpy.broadcast_to`; keys may differ). Batch: `reshape(devices, -1, ...)`.
    Metrics are pooled, and equal on every device.
    """
    step = make_train_step(loss_fn, tx, microbatches=microbatches, axis_name="data")
    return jax.pmap(step, axis_name="data", donate_argnums=0)


def sharded_shapes(
    mesh: Mesh, make: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Shapes of what make(...) returns, each sharded according to `transformer.PARTITION`; allocates nothing."""
    shapes = jax.eval_shape(make, *args, **kwargs)
    return sharding.with_shardings(shapes, sharding.shardings_by_path(shapes, transformer.PARTITION, mesh))


def make_row_nll(config: ModelConfig) -> Callable[[Params, Batch], tuple[Array, Array]]:
    """The sum of -log P over each row's masked tokens, and their number, [B] each: `make_nll` row by row, from which an
    interval can be made (`rlhf.intervals`)."""

    def rows(params: Params, batch: Batch) -> tuple[Array, Array]:
        logp_BT, _ = transformer.token_log_probs(params, config, batch)
        return losses.sequence_sum(-logp_BT, batch.mask_BT), batch.mask_BT.sum(axis=1)

    return rows


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Metrics on the host: a Mean becomes its value. This waits for the device."""
    means = jax.tree.map(
        lambda m: m.value if isinstance(m, Mean) else m, metrics, is_leaf=lambda m: isinstance(m, Mean)
    )
    return {name: float(value) for name, value in jax.device_get(means).items()}


def param_shapes(config: ModelConfig) -> Params:
    """Shapes and dtypes of a model's parameters; allocates nothing."""
    return jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))
