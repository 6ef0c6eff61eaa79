"""Argument checks for the losses: shapes and dtypes while tracing, values where they are concrete."""

import sys

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify
from jax.typing import ArrayLike

KINDS = {"float": jnp.floating, "int": jnp.integer, "bool": jnp.bool}


def expect(**arguments: tuple[ArrayLike | None, str]) -> None:
    """Check arrays against specs such as `scores=(scores_BC, "float B C")`; None is an omitted argument.

    A letter names one axis, which must have the same size wherever it appears; a leading `...` matches any axes, and
    must also match everywhere. Shapes and dtypes are known while tracing, so this costs nothing at run time.
    Raises TypeError (dtype) or ValueError (shape), naming the function, the argument, its type and the expected one.
    """
    sizes: dict[str, object] = {}
    origin: dict[str, str] = {}
    for name, (array, spec) in arguments.items():
        if array is None:
            continue
        kind, *axes = spec.split()
        shape, dtype = jnp.shape(array), jnp.result_type(array)
        found = f"{_caller()}: `{name}` is {dtype}[{', '.join(map(str, shape))}]"
        expected = f"expected {kind} [{', '.join(axes)}]"
        if not jnp.issubdtype(dtype, KINDS[kind]):
            raise TypeError(f"{found}; {expected}")
        rest = axes[:1] == ["..."]
        named = axes[rest:]
        if len(shape) < len(named) or (not rest and len(shape) != len(named)):
            raise ValueError(f"{found}; {expected}, an array of {'at least ' * rest}{len(named)} axes")
        split = len(shape) - len(named)
        for axis, size in [*([("...", shape[:split])] if rest else []), *zip(named, shape[split:], strict=True)]:
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"{found}; {expected} with {axis} = {sizes[axis]} as in `{origin[axis]}`")
            origin.setdefault(axis, name)


def promote(*arrays: ArrayLike) -> tuple[Array, ...]:
    """The arrays as float64 if one of them is, otherwise as float32.

    Every function of `losses` computes in this dtype and returns it: bfloat16 can't count to 1,000, and float16 ends at
    65,504. The cast is explicit, so that `jax.numpy_dtype_promotion("strict")` allows it.
    """
    dtype = jnp.float64 if any(jnp.result_type(x) == jnp.float64 for x in arrays) else jnp.float32
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def expect_value(ok: ArrayLike, message: str, **values: ArrayLike) -> None:
    """Require all of `ok` to be True: checked at once if concrete; if traced, only under `checkify.checkify`.

    `message` is a format string for `values`. Raises ValueError("function: message").
    """
    text = f"{_caller()}: {message}"
    if isinstance(ok, jax.core.Tracer):
        checkify.debug_check(jnp.all(ok), text, **{name: jnp.asarray(value) for name, value in values.items()})
    elif not (ok if isinstance(ok, bool) else jnp.all(ok)):
        raise ValueError(text.format(**values))


def _caller() -> str:
    """The public function that called `expect` or `expect_value`."""
    return sys._getframe(2).f_code.co_name
