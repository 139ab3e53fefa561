"""Attention rows of many kinds whose error the certificate bounds, in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat import certificate
from jax_aat.problem import EMPTY_LOGSUMEXP

Case = dict[str, Any]

KEYS, GROUP, ROWS, HEAD_DIM = 64, 16, 2, 8


def _gaussian(rng: np.random.Generator, cases: int) -> tuple[Any, Any, Any]:
    k, v = rng.normal(size=(2, cases, KEYS, HEAD_DIM))
    return rng.normal(size=(cases, ROWS, HEAD_DIM)), k, v


def _clustered(rng: np.random.Generator, cases: int) -> tuple[Any, Any, Any]:
    q, k, v = _gaussian(rng, cases)
    k = np.repeat(k[:, ::GROUP], GROUP, 1) + 10 ** rng.uniform(-9, 0, (cases, 1, 1)) * k
    return 3 * q, k, v


def _two_points(rng: np.random.Generator, cases: int) -> tuple[Any, Any, Any]:
    """A few keys of each group far out on one side: what makes Bennett's inequality tight."""
    q, _, v = _gaussian(rng, cases)
    far = rng.random((cases, KEYS, 1)) < rng.choice([1 / 16, 2 / 16, 15 / 16], (cases, 1, 1))
    k = far * q[:, :1] * 10 ** rng.uniform(-3, 1, (cases, 1, 1))
    return q, k, v + 5 * far * rng.normal(size=(cases, 1, HEAD_DIM))


def _huge(rng: np.random.Generator, cases: int) -> tuple[Any, Any, Any]:
    q, k, v = _gaussian(rng, cases)
    q *= 10 ** rng.uniform(0, 5, (cases, 1, 1))
    return (
        q,
        k * 10 ** rng.uniform(0, 5, (cases, 1, 1)),
        v * 10 ** rng.uniform(-9, 9, (cases, 1, 1)),
    )


def _near_ties(rng: np.random.Generator, cases: int) -> tuple[Any, Any, Any]:
    q, k, v = _gaussian(rng, cases)
    return 1e3 * q, k[:, :1] + 1e-12 * k, v


def _offset(rng: np.random.Generator, cases: int) -> tuple[Any, Any, Any]:
    """Logits so large beside their differences that their rounding moves the weights."""
    q, k, v = _gaussian(rng, cases)
    size = 10 ** rng.uniform(0, 8, (cases, 1, 1))
    between = np.repeat(k[:, ::GROUP], GROUP, 1) * 10 ** rng.uniform(-1, 1.2, (cases, 1, 1))
    within = k * 10 ** rng.uniform(-9, -3, (cases, 1, 1))
    return size * q, k[:, :1] + (between + within) / size, v


def _identical(rng: np.random.Generator, cases: int) -> tuple[Any, Any, Any]:
    q, k, v = _gaussian(rng, cases)
    return q, np.repeat(k[:, ::GROUP], GROUP, 1), np.repeat(v[:, ::GROUP], GROUP, 1)


def _aligned(rng: np.random.Generator, cases: int) -> tuple[Any, Any, Any]:
    """Values that grow with the logit: the deviation of the weighted values is largest."""
    q, k, v = _gaussian(rng, cases)
    logits = np.einsum("crh,csh->csr", q[:, :1], k)
    return q, k, logits * v[:, :1] * 10 ** rng.uniform(-2, 2, (cases, 1, 1))


def _outlier_values(rng: np.random.Generator, cases: int) -> tuple[Any, Any, Any]:
    q, k, v = _gaussian(rng, cases)
    return q, k, v * 10 ** (3 * rng.random((cases, KEYS, 1)) ** 8)


KINDS = {
    f.__name__.strip("_"): f
    for f in (
        *(_gaussian, _clustered, _two_points, _huge),
        *(_near_ties, _offset, _identical, _aligned, _outlier_values),
    )
}


def make(kind: str, rng: np.random.Generator, cases: int) -> Case:
    """Rows of a kind, with random exact groups, hidden keys, biases and judged outputs."""
    q, k, v = KINDS[kind](rng, cases)
    length = np.where(rng.random(cases) < 0.3, rng.integers(1, KEYS + 1, cases), KEYS)
    groups = KEYS // GROUP
    case = {
        "q": q,
        "k": k,
        "v": v,
        "valid": np.arange(KEYS) < length[:, None],
        "exact": rng.random((cases, ROWS, groups)) < rng.random((cases, 1, 1)) ** 2,
        "bias": rng.normal(size=(cases, ROWS, groups)) * (rng.random((cases, 1, 1)) < 0.2),
        # What is added to the output of coarse attention before it is judged.
        "shift": rng.normal(size=q.shape)
        * np.abs(v).max((1, 2))[:, None, None]
        * np.where(rng.random((cases, 1, 1)) < 0.5, 0, 10 ** rng.uniform(-12, 1, (cases, 1, 1))),
    }
    return {name: jnp.asarray(x) for name, x in case.items()}


def evaluate(
    case: Case, soft_cap: float = 0.0, dtype: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Distances from the true output, their bounds and the norm of the true output, [C, R].

    The bounds are computed in `dtype`, None: float64 as the rest.
    """
    dtype = dtype or jnp.float64
    groups = certificate.group_statistics(case["k"], case["v"], case["valid"], GROUP)
    logits = _cap(jnp.einsum("crh,csh->crs", case["q"], case["k"]), soft_cap)
    logits += jnp.repeat(case["bias"], GROUP, -1)
    logits = jnp.where(case["valid"][:, None], logits, -jnp.inf)
    exact = jnp.repeat(case["exact"], GROUP, -1)
    true, _ = _attend(logits, case["v"])
    o_exact, z_exact = _attend(jnp.where(exact, logits, -jnp.inf), case["v"])

    means = _cap(jnp.einsum("crh,cgh->crg", case["q"], groups.key_mean), soft_cap) + case["bias"]
    means += jnp.log(groups.count)[:, None]
    means = jnp.where(case["exact"], -jnp.inf, means)
    rows = jnp.concatenate([jnp.where(exact, logits, -jnp.inf), means], -1)
    out = _attend(rows, jnp.concatenate([case["v"], groups.value_mean], 1))[0] + case["shift"]
    z_exact = jnp.where(z_exact == -jnp.inf, EMPTY_LOGSUMEXP, z_exact)
    bound = certificate.certified_bound(
        *(x.astype(dtype) for x in (case["q"], out, o_exact, z_exact)),
        certificate.group_statistics(
            case["k"].astype(dtype), case["v"].astype(dtype), case["valid"], GROUP
        ),
        ~case["exact"],
        bias=case["bias"].astype(dtype),
        soft_cap=soft_cap,
    )
    return jnp.linalg.norm(out - true, axis=-1), bound, jnp.linalg.norm(true, axis=-1)


def _cap(logits: jax.Array, soft_cap: float) -> jax.Array:
    return soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits


def _attend(logits: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    lse = jax.nn.logsumexp(logits, axis=-1)
    shift = jnp.where(jnp.isfinite(lse), lse, 0)[..., None]
    return jnp.einsum("crs,csh->crh", jnp.exp(logits - shift), values), lse


def climb(case: Case, rng: np.random.Generator, steps: int) -> Case:
    """Hill-climbing towards cases whose error exceeds its bound: random moves that help stay."""

    @jax.jit
    def ratio(case: Case) -> jax.Array:
        error, bound, _ = evaluate(case)
        return (error / jnp.maximum(bound, 1e-300)).max(-1)

    best = ratio(case)
    for _ in range(steps):
        moved = dict(case)
        for name in ("q", "k", "v", "shift"):
            x = case[name]
            size = (
                10 ** rng.uniform(-3, 0, (x.shape[0], 1, 1))
                * jnp.abs(x).mean((1, 2))[:, None, None]
            )
            some = rng.random(x.shape) < 0.2
            moved[name] = x + size * some * rng.normal(size=x.shape)
        new = ratio(moved)
        better = new > best
        case = {
            name: jnp.where(better.reshape(-1, *[1] * (x.ndim - 1)), moved[name], x)
            for name, x in case.items()
        }
        best = jnp.where(better, new, best)
    return case
