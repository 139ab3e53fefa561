"""How far a contender is off, at any length: by rows that are drawn, in float32, in chunks.

No matrix of all queries by all keys is ever held, so one method serves every length:

- out, its tangent and dq: of one query position drawn at random from each of 64 equal parts of the
  sequence, in every head of the first batch entry.
- dk and dv: whole, of the first key/value head of the first batch entry; each needs all queries, so
  they are left out, and the row says so, where queries times keys are too many.

Operands are rounded to the dtype of the case first, so errors are those of the computation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from passes import Array, Measured

from jax_aat.commands.contenders import NAMES, Case, Direction, with_tangent
from jax_aat.reference import relative_error

_ROWS = 64
_CHUNK = 2**26
"""Scores that are held at a time."""
_MOST_SCORES = {"gpu": 2**37}
_MOST_SCORES_ELSEWHERE = 2**28


@dataclass(frozen=True)
class Expected:
    """What is right.

    Attributes:
      rows: The query positions that were drawn, ascending.
      parts: By name: out, tangent and dq [rows, N, H], dk and dv [S, H], as far as they are known.
      direction: Of the pass that is judged by it.
      left_out: What is not known and why; empty: nothing.
    """

    rows: Array
    parts: dict[str, Array]
    direction: Direction
    left_out: str = ""


def draw_rows(queries: int) -> Array:
    """One position from each of up to 64 equal parts of the sequence, always the same ones.

    Even distances would meet the tiles of a kernel at the same place over and over.
    """
    bounds = np.linspace(0, queries, min(_ROWS, queries) + 1).astype(int)
    return np.random.default_rng(0).integers(bounds[:-1], bounds[1:])


def expect(
    case: Case, arrays: list[Array], direction: Direction, most: int | None = None
) -> Expected:
    """Computes what is right for a case.

    Args:
      case: The problem.
      arrays: q, k, v and the cotangent of the output.
      direction: Of the pass: whether a tangent or gradients are wanted.
      most: Scores, queries times keys times query heads a key/value head, up to which dk and dv
        are computed; None: what takes seconds on this device.
    """
    rows = draw_rows(case.queries)
    # Query, output and what goes along with them are rows; keys, values and theirs are whole.
    operands = [
        _rounded(case, x[0] if i % 3 else x[0, rows])
        for i, x in enumerate(case.operands(arrays, direction))
    ]
    run = partial(_by_row, direction=direction, causal=case.causal)
    found = run(operands, jnp.asarray(rows))
    parts = {name: np.asarray(x) for name, x in zip(NAMES[direction], found, strict=False)}
    if direction != "backward":
        return Expected(rows, parts, direction)
    group = case.heads // case.kv_heads
    scores = case.queries * case.keys * group
    if most is None:
        most = _MOST_SCORES.get(jax.default_backend(), _MOST_SCORES_ELSEWHERE)
    if scores > most:
        return Expected(
            rows, parts, direction, f"dk and dv: {scores:.2g} scores of one head are too many"
        )
    first = [_rounded(case, x[0, :, :n]) for x, n in zip(arrays, (group, 1, 1, group), strict=True)]
    chunk = max(1, _CHUNK // (case.keys * group))
    dk, dv = _by_key(*first, chunk=min(chunk, case.queries), causal=case.causal)
    return Expected(rows, parts | {"dk": np.asarray(dk), "dv": np.asarray(dv)}, direction)


def judge(expected: Expected, made: Measured, results: Any) -> dict[str, Any]:
    """What a pass gave against what is right: fields of its row.

    ``errors``, ||x - right|| / ||right|| by name; ``ifq``, 1 - sum ||out - right||^2 / sum
    ||right||^2; ``not_checked`` where something is left out.
    """
    found = results if isinstance(results, tuple) else (results,)
    errors = {}
    for name, x in zip(NAMES[expected.direction], found, strict=True):
        if name in expected.parts:
            part = x[0, :, 0] if name in ("dk", "dv") else x[0, expected.rows]
            errors[name] = relative_error(made.as_float32(part), expected.parts[name])
    judged: dict[str, Any] = {"errors": errors, "ifq": 1 - errors["out"] ** 2}
    return judged | ({"not_checked": expected.left_out} if expected.left_out else {})


def _rounded(case: Case, x: Array) -> jax.Array:
    return jnp.asarray(x, case.dtype).astype(jnp.float32)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array, causal: bool
) -> jax.Array:
    """Attention of some query rows [R, G, H] at positions [R] to one head [S, H]."""
    logits = jnp.einsum("rgh,sh->rgs", q, k, precision="highest") / math.sqrt(q.shape[-1])
    if causal:
        visible = jnp.arange(len(k)) <= position[:, None, None]
        logits = jnp.where(visible, logits, -jnp.inf)
    return jnp.einsum("rgs,sh->rgh", jax.nn.softmax(logits), v, precision="highest")


@partial(jax.jit, static_argnames=("direction", "causal"))
def _by_row(
    operands: list[jax.Array], position: jax.Array, *, direction: Direction, causal: bool
) -> tuple[jax.Array, ...]:
    """Out and its tangent or dq of some rows [R, N, H], a key/value head at a time."""
    shape, kv_heads = operands[0].shape, operands[1].shape[1]

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(len(x), kv_heads, -1, x.shape[-1]), 1, 0)

    def one(head: list[jax.Array]) -> tuple[jax.Array, ...]:
        query, *others = head
        key, value = (x[:, 0] for x in others[:2])
        if direction == "tangent":
            moved = others[2], *(x[:, 0] for x in others[3:])
            attend = partial(_attend, position=position, causal=causal)
            return with_tangent(attend)(query, key, value, *moved)
        out, pull = jax.vjp(lambda q: _attend(q, key, value, position, causal), query)
        return (out, *pull(others[2])) if direction == "backward" else (out,)

    found = jax.lax.map(one, [by_head(x) for x in operands])
    return tuple(jnp.moveaxis(x, 0, 1).reshape(shape) for x in found)


@partial(jax.jit, static_argnames=("chunk", "causal"))
def _by_key(
    q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, *, chunk: int, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Dk and dv [S, H] of one key/value head, `chunk` queries [T, G, H] at a time."""
    chunks = -(-len(q) // chunk)
    k, v = k[:, 0], v[:, 0]

    def cut(x: jax.Array) -> jax.Array:
        # Rows past the last have no cotangent, so they add nothing.
        padded = jnp.pad(x, ((0, chunks * chunk - len(x)), (0, 0), (0, 0)))
        return padded.reshape(chunks, chunk, *x.shape[1:])

    def add(total: Any, part: tuple[jax.Array, ...]) -> tuple[Any, None]:
        _, pull = jax.vjp(lambda k, v: _attend(part[0], k, v, part[2], causal), k, v)
        return jax.tree.map(jnp.add, total, pull(part[1])), None

    positions = jnp.arange(chunks * chunk).reshape(chunks, chunk)
    none = (jnp.zeros_like(k), jnp.zeros_like(v))
    (dk, dv), _ = jax.lax.scan(add, none, (cut(q), cut(dout), positions))
    return dk, dv
