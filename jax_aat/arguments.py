"""Checks the arguments of `tiled_attention` when it is traced and brings them into one form."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_aat.problem import Operands, Options, Slot, accumulation_dtype

IMPLEMENTATIONS = ("vulkan", "xla")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
WIDEST_WINDOW = 2**30
"""A side of a window that reaches further reaches as far."""
_INT32 = np.iinfo(np.int32)
_SOFT_CAPS = (1e-30, 1e30)
"""Between these a logit divided by the cap is a normal float32, if it is near 1 or the cap."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """Arguments that fit.

    Attributes:
      operands: Arrays by slot, with one batch axis.
      options: The rest of what decides the result.
      batched: Whether the caller's arrays have a batch axis (BTNH) or not (TNH).
    """

    operands: Operands
    options: Options
    batched: bool


def check(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    *,
    scale: ArrayLike | None,
    is_causal: bool,
    query_seq_lengths: ArrayLike | None,
    key_value_seq_lengths: ArrayLike | None,
    local_window_size: int | tuple[int, int] | None,
    query_segment_ids: ArrayLike | None,
    key_value_segment_ids: ArrayLike | None,
    logits_soft_cap: ArrayLike | None,
) -> Checked:
    """Checks everything about a call but its implementation.

    Raises:
      TypeError: An argument has a type or dtype that is not allowed.
      ValueError: A shape does not fit or a value is out of range.
    """
    q, k, v = _array("query", query), _array("key", key), _array("value", value)
    _check_query_key_value(q, k, v)
    batched = q.ndim == 4
    if not batched:
        q, k, v = q[None], k[None], v[None]
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    operands = {Slot.Q: q, Slot.K: k, Slot.V: v}

    logits = (batch, heads, queries, keys)
    if bias is not None:
        operands[Slot.BIAS] = _bias(bias, logits, q.dtype)
    if mask is not None:
        operands[Slot.MASK] = _mask(mask, logits)

    lengths: Mapping[Slot, tuple[str, ArrayLike | None, int]] = {
        Slot.Q_LENGTHS: ("query_seq_lengths", query_seq_lengths, queries),
        Slot.KV_LENGTHS: ("key_value_seq_lengths", key_value_seq_lengths, keys),
    }
    for slot, (name, given, limit) in lengths.items():
        if given is not None:
            operands[slot] = _lengths(name, given, batch, limit)

    segments: Mapping[Slot, tuple[str, ArrayLike | None, int, str]] = {
        Slot.Q_SEGMENTS: ("query_segment_ids", query_segment_ids, queries, "[B, T]"),
        Slot.KV_SEGMENTS: ("key_value_segment_ids", key_value_segment_ids, keys, "[B, S]"),
    }
    missing = [name for name, given, *_ in segments.values() if given is None]
    if len(missing) == 1:
        raise ValueError(f"{missing[0]}: got None, expected segment ids for both or for neither")
    for slot, (name, given, size, layout) in segments.items():
        if given is not None:
            operands[slot] = _broadcastable(name, _segments(name, given), (batch, size), layout)

    options = Options(
        scale=1 / math.sqrt(head_dim) if scale is None else _scale(scale, q.dtype),
        causal=flag("is_causal", is_causal),
        window=window(local_window_size),
        soft_cap=0.0 if logits_soft_cap is None else _soft_cap(logits_soft_cap),
    )
    return Checked(operands, options, batched)


def check_implementation(implementation: str | None) -> None:
    """Checks the name of an implementation.

    Raises:
      ValueError: There is none of this name.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: got {implementation!r}, expected 'vulkan', 'xla' or None"
        )


def flag(name: str, given: Any) -> bool:
    """A Python bool.

    Raises:
      TypeError: It is something else.
    """
    if not isinstance(given, bool | np.bool_):
        raise TypeError(f"{name}: got {describe(given)}, expected True or False")
    return bool(given)


def _check_query_key_value(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if q.ndim not in (3, 4):
        raise ValueError(f"query: got shape {q.shape}, expected [B, T, N, H] or [T, N, H]")
    layout = "[B, S, K, H]" if q.ndim == 4 else "[S, K, H]"
    for name, x in (("key", k), ("value", v)):
        if x.ndim != q.ndim:
            raise ValueError(
                f"{name}: got shape {x.shape}, expected {layout} to go with query {q.shape}"
            )
    if q.dtype.name not in _DTYPES:
        raise TypeError(f"query: got dtype {q.dtype.name}, expected one of {', '.join(_DTYPES)}")
    for name, x in (("key", k), ("value", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype.name}, expected query's, {q.dtype.name}")
    if k.shape[:-3] != q.shape[:-3]:
        raise ValueError(
            f"key: got shape {k.shape} with B={k.shape[0]}, expected query's B={q.shape[0]}"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"key: got shape {k.shape} with H={k.shape[-1]}, expected query's H={q.shape[-1]}"
        )
    if v.shape != k.shape:
        raise ValueError(f"value: got shape {v.shape}, expected key's shape {k.shape}")
    if q.shape[-1] == 0:
        raise ValueError(f"query: got shape {q.shape} with H=0, expected H of at least 1")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"query: got N={heads} heads, expected a multiple of key's K={kv_heads} heads"
        )


def _bias(bias: ArrayLike, logits: tuple[int, ...], dtype: Any) -> jax.Array:
    x = _array("bias", bias)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        hint = "; pass a boolean mask as mask" if x.dtype == jnp.bool_ else ""
        raise TypeError(f"bias: got dtype {x.dtype.name}, expected a floating-point one{hint}")
    if x.dtype.name not in _DTYPES[:3] and dtype != jnp.float64:
        x = x.astype(jnp.float32)
    return _broadcastable("bias", x, logits, "[B, N, T, S]")


def _mask(mask: ArrayLike, logits: tuple[int, ...]) -> jax.Array:
    x = _array("mask", mask)
    if x.dtype != jnp.bool_:
        raise TypeError(
            f"mask: got dtype {x.dtype.name}, expected bool; pass an additive mask as bias"
        )
    return _broadcastable("mask", x, logits, "[B, N, T, S]")


def _lengths(name: str, lengths: ArrayLike, batch: int, limit: int) -> jax.Array:
    x = _broadcastable(name, _integers(name, lengths), (batch,), "[B]")
    if isinstance(limit, int):
        _check_range(name, "lengths", lengths, 0, limit)
    return x


def _segments(name: str, ids: ArrayLike) -> jax.Array:
    x = _integers(name, ids)
    if jnp.iinfo(getattr(ids, "dtype", np.int64)).max > _INT32.max:
        _check_range(name, "ids", ids, _INT32.min, _INT32.max)
    return x


def _check_range(name: str, what: str, given: ArrayLike, lowest: int, largest: int) -> None:
    """Checks values where they are known when a call is traced.

    Those of what came rather than of an array of JAX made of it: under jit even a constant is
    traced once it is one.
    """
    if isinstance(given, jax.core.Tracer):
        return
    if isinstance(given, jax.Array) and not given.is_fully_addressable:
        return
    known = np.asarray(given)
    if known.size and not lowest <= known.min() <= known.max() <= largest:
        raise ValueError(
            f"{name}: got {what} from {known.min()} to {known.max()}, "
            f"expected them to lie in {lowest} to {largest}"
        )


def _integers(name: str, given: ArrayLike) -> jax.Array:
    """As int32; what is not known and beyond it becomes the nearest that it holds."""
    x = _array(name, given)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name}: got dtype {x.dtype.name}, expected an integer one")
    if jnp.iinfo(x.dtype).max > _INT32.max:
        lowest = max(_INT32.min, int(jnp.iinfo(x.dtype).min))
        x = jnp.clip(x, x.dtype.type(lowest), x.dtype.type(_INT32.max))
    return x.astype(jnp.int32)


def _broadcastable(name: str, x: jax.Array, shape: tuple[int, ...], layout: str) -> jax.Array:
    """`x` with leading axes of size 1 up to the rank of `shape`, to which it broadcasts."""
    full = (1,) * (len(shape) - x.ndim) + x.shape
    if x.ndim > len(shape) or any(
        size not in (1, wanted) for size, wanted in zip(full, shape, strict=True)
    ):
        raise ValueError(
            f"{name}: got shape {x.shape}, expected one that broadcasts to {layout} = {shape}"
        )
    return x.reshape(full)


def window(window: int | tuple[int, int] | None) -> tuple[int, int]:
    """`local_window_size` as (left, right), -1: unbounded.

    Raises:
      TypeError: It has a type that is not allowed.
      ValueError: A side is negative.
    """
    if window is None:
        return (-1, -1)
    sides = tuple(window) if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2 or not all(is_integer(side) for side in sides):
        raise TypeError(
            f"local_window_size: got {describe(window)}, expected an int or a pair of ints"
        )
    if min(sides) < 0:
        raise ValueError(f"local_window_size: got {window}, expected no negative side")
    left, right = (min(int(side), WIDEST_WINDOW) for side in sides)
    return left, right


def _scale(given: Any, dtype: Any) -> float:
    scale = number("scale", given, "multiply query by it instead")
    largest = float(jnp.finfo(accumulation_dtype(dtype)).max)
    if abs(scale) > largest:
        raise ValueError(
            f"scale: got {scale}, expected a number that {accumulation_dtype(dtype).name} holds, "
            f"from {-largest:.3g} to {largest:.3g}"
        )
    return scale


def _soft_cap(given: Any) -> float:
    cap = number("logits_soft_cap", given, "it has to be a Python number")
    lowest, largest = _SOFT_CAPS
    if not lowest <= cap <= largest:
        raise ValueError(
            f"logits_soft_cap: got {cap}, expected a positive number, from {lowest} to {largest}, "
            "or None"
        )
    return cap


def number(name: str, given: Any, otherwise: str) -> float:
    """A number, or an array of JAX or NumPy that holds one, as a float.

    Args:
      name: Of the argument.
      given: What came.
      otherwise: What to do with one that is not known when the call is traced.
    """
    if isinstance(given, jax.core.Tracer):
        raise TypeError(
            f"{name}: got {given}, expected a Python number, known when the call is traced: "
            f"{otherwise}"
        )
    value = given
    is_array = isinstance(given, np.ndarray | np.generic | jax.Array)
    if is_array and given.ndim == 0 and jnp.issubdtype(given.dtype, jnp.number):
        value = given.item()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {describe(given)}, expected a Python number")
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{name}: got a number beyond float64, expected a smaller one") from None
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return value


def instance(name: str, given: Any, wanted: type, *, or_none: bool = False) -> None:
    """Checks that an argument is of a class of this package.

    Raises:
      TypeError: It is something else.
    """
    if not isinstance(given, wanted) and not (or_none and given is None):
        expected = f"a jax_aat.{wanted.__name__}" + (" or None" if or_none else "")
        raise TypeError(f"{name}: got {describe(given)}, expected {expected}")


def same_type(name: str, given: Any, expected: jax.ShapeDtypeStruct) -> None:
    """Checks the shape and dtype of an array.

    Raises:
      ValueError: They are others.
    """
    if given.shape != expected.shape or given.dtype != expected.dtype:
        raise ValueError(
            f"{name}: got {given.dtype.name}{list(given.shape)}, "
            f"expected {expected.dtype.name}{list(expected.shape)}"
        )


def is_integer(x: Any) -> bool:
    """Whether it is an integer of Python, of NumPy or the like; True, equal to 1, is none."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _array(name: str, given: Any) -> jax.Array:
    try:
        return jnp.asarray(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name}: got {describe(given)}, expected an array") from error


def describe(x: Any) -> str:
    """What came, in the words of an error; of an array its dtype and shape."""
    if isinstance(x, np.ndarray | jax.Array) and x.ndim:
        return f"an array {x.dtype.name}{list(x.shape)}"
    return f"{x!r} of type {type(x).__name__}"
