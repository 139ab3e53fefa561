"""Streams of synthetic queries, keys and values that drift from call to call."""

from __future__ import annotations

import jax
import jax.numpy as jnp

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
KINDS = ("topics", "walk", "sinks", "noise")


def draw(
    kind: str, key: jax.Array, step: jax.Array, batch: int, length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query [B, T, N, H], key and value [B, T, K, H] of a call.

    Args:
      kind: 'topics': runs of 32 keys about one topic, looked for by runs of 8 queries, sharper in
        some heads and at some times; 'walk': keys and values move slowly; 'sinks': the first keys
        are long and draw many queries; 'noise': nothing can be saved.
      key: Random key of the call.
      step: Number of the call, for the drift.
      batch: B.
      length: T.
    """
    keys = jax.random.split(key, 6)
    noise = jax.random.normal(keys[0], (batch, length, HEADS, HEAD_DIM))
    k, v = jax.random.normal(keys[1], (2, batch, length, KV_HEADS, HEAD_DIM))
    group = HEADS // KV_HEADS
    drift = 1 + 0.5 * jnp.sin(step / 40)
    match kind:
        case "topics":
            topics = jax.random.normal(keys[2], (2, batch, length // 32, KV_HEADS, HEAD_DIM))
            looked_for = jax.random.randint(keys[3], (length // 8,), 0, length // 32)
            q = jnp.repeat(jnp.repeat(topics[0][:, looked_for], 8, 1), group, 2)
            sharpness = drift * jnp.array([0.5, 1, 2, 3])
            k, v = (jnp.repeat(x, 32, 1) + 0.7 * y for x, y in zip(topics, (k, v), strict=True))
            return q * sharpness[:, None] + noise, k, v
        case "walk":
            k, v = (0.2 * jnp.cumsum(x, 1) for x in (k, v))
            k -= k.mean(1, keepdims=True)
            return drift * jnp.repeat(k, group, 2) + noise, k, v
        case "sinks":
            k = k.at[:, :4].multiply(3)
            pull = jax.random.uniform(keys[4], (batch, length, 1, 1)) ** 0.2
            return noise + drift * pull * jnp.repeat(k[:, :1], group, 2), k, v + 1
        case _:
            return 1.5 * noise, k, v
