r"""How far the certified bound lies above the true error of attention with coarse granules.

    python benchmarks/quality/certificate_tightness.py
    python benchmarks/quality/certificate_tightness.py --qkv qkv.npz --head 3

Granules of the largest mass are exact, the others their mean rows. Without ``--qkv`` the inputs are
synthetic; with it, an .npz of ``q``, ``k`` [T, N, H] and ``v`` as a model computes them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat import certificate

GRANULE = 16
QUANTILES = (0.1, 0.5, 0.9)


def synthetic(keys: int, head_dim: int, seed: int) -> Iterator[tuple[str, np.ndarray, ...]]:
    """(name, q, k, v) of 256 queries."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(256, head_dim))
    noise_k, noise_v = rng.normal(size=(2, keys, head_dim))
    yield "noise, logits of deviation 1", q / np.sqrt(head_dim), noise_k, noise_v
    for size in (0.3, 0.1, 0.03):
        centres = rng.normal(size=(2, keys // 64, head_dim)).repeat(64, 1)
        k, v = centres + size * np.stack([noise_k, noise_v])
        yield f"clusters of relative radius {size}", 3 * q / np.sqrt(head_dim), k, v
    t = np.arange(keys)[:, None] / keys
    waves = 2 * np.pi * rng.uniform(0, 8, head_dim) * t
    k, v = np.cos(waves), np.sin(waves) + 1
    yield "smooth signal", 3 * q / np.sqrt(head_dim), k, v


@jax.jit
def judge(q: jax.Array, k: jax.Array, v: jax.Array, exact: jax.Array) -> tuple[jax.Array, ...]:
    """Relative error and relative bound of each row; `exact` is the number of exact granules."""
    groups = certificate.group_statistics(k, v, size=GRANULE)
    logits = q @ k.T
    true = jax.nn.softmax(logits) @ v
    mass = jax.nn.logsumexp(logits.reshape(len(q), -1, GRANULE), axis=-1)
    ranks = jnp.argsort(jnp.argsort(-mass))
    fine = ranks < exact
    row_logits = jnp.where(jnp.repeat(fine, GRANULE, -1), logits, -jnp.inf)
    coarse = jnp.where(fine, -jnp.inf, q @ groups.key_mean.T + jnp.log(GRANULE))
    values = jnp.concatenate([v, groups.value_mean])
    out = jax.nn.softmax(jnp.concatenate([row_logits, coarse], -1)) @ values
    exact_lse = jax.nn.logsumexp(row_logits, axis=-1)
    exact_out = jax.nn.softmax(row_logits) @ v
    bound = certificate.certified_bound(q, out, exact_out, exact_lse, groups, ~fine)
    norm = jnp.linalg.norm(true, axis=-1)
    return jnp.linalg.norm(out - true, axis=-1) / norm, bound / norm


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--qkv", type=Path)
    parser.add_argument("--head", type=int, default=0)
    args = parser.parse_args()
    if args.qkv:
        file = np.load(args.qkv)
        q, k, v = (np.asarray(file[name], np.float64) for name in "qkv")
        kv_head = args.head // (q.shape[1] // k.shape[1])
        q = q[-256:, args.head] / np.sqrt(q.shape[-1])
        inputs = [(f"{args.qkv.name}, head {args.head}", q, k[:, kv_head], v[:, kv_head])]
    else:
        inputs = list(synthetic(args.keys, args.head_dim, args.seed))
    print("| inputs | exact granules | relative error | relative bound | bound / error |")
    print("|---|---|---|---|---|")
    with jax.enable_x64(True):
        for name, q, k, v in inputs:
            k, v = (x[: len(x) // GRANULE * GRANULE] for x in (k, v))
            for fraction in (0.125, 0.25, 0.5):
                exact = int(fraction * len(k) / GRANULE)
                error, bound = (np.asarray(x) for x in judge(q, k, v, exact))
                assert (error <= bound).all()
                cells = [
                    " / ".join(f"{x:.2g}" for x in np.quantile(values, QUANTILES))
                    for values in (error, bound, bound / error)
                ]
                print(f"| {name} | {fraction:.1%} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
