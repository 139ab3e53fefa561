r"""How often the audited error's 95% interval holds the true error, and how wide it is.

python benchmarks/quality/audit_coverage.py --calls 1000
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from synthetic_streams import HEADS, KINDS, draw

import jax_aat


@partial(jax.jit, static_argnames=("kind", "calls", "batch", "length", "adaptation"))
def audited(
    kind: str, calls: int, batch: int, length: int, adaptation: jax_aat.Adaptation
) -> tuple[jax.Array, ...]:
    """True errors, audited ones and their intervals, of every head and of all heads together."""

    def call(i: jax.Array) -> tuple[jax.Array, ...]:
        q, k, v = draw(kind, jax.random.fold_in(jax.random.key(1), i), i, batch, length)
        state = jax_aat.ResolutionState.init(q, k, adaptation)
        # Other rows in every call.
        state = dataclasses.replace(state, step=i)
        attend = partial(jax_aat.tiled_attention, q, k, v, is_causal=True, implementation="xla")
        out, _, report = attend(adaptation=adaptation, state=state, return_report=True)
        exact = attend()
        error = ((out - exact) ** 2).sum((0, 1, 3))
        norm = (exact**2).sum((0, 1, 3))
        audits = report.audit, report.audit.joined(HEADS)
        true = [jnp.sqrt(error / norm), jnp.sqrt(error.sum() / norm.sum())[None]]
        found = [a.relative_error for a in audits]
        interval = [a.interval for a in audits]
        return tuple(jnp.concatenate(x) for x in (true, found, interval))

    return jax.lax.map(call, jnp.arange(calls))


def _factor(width: np.ndarray) -> str:
    """The median factor between the ends of intervals."""
    median = np.median(width)
    return f"{median:.2f}" if median < 1000 else "> 1000"


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--budget", type=float, default=0.25)
    args = parser.parse_args()
    adaptation = jax_aat.Adaptation(budget=args.budget, query_tile=32)
    print("| inputs | B x T | audited rows | true error | mean square, audited / true |", end=" ")
    print("covered, a head | width | covered, all heads | width |")
    print("|---|---|---|---|---|---|---|---|---|")
    for batch, length in ((1, 512), (2, 1024)):
        for kind in KINDS:
            true, found, interval = (
                np.asarray(x) for x in audited(kind, args.calls, batch, length, adaptation)
            )
            low, high = interval[..., 0], interval[..., 1]
            covered = (low <= true) & (true <= high)
            width = high / np.maximum(low, 1e-30)
            print(
                f"| {kind} | {batch} x {length} | {batch * length // 64} "
                f"| {true[:, -1].mean():.3f} | {(found**2).sum() / (true**2).sum():.3f} "
                f"| {covered[:, :-1].mean():.1%} | {_factor(width[:, :-1])} "
                f"| {covered[:, -1].mean():.1%} | {_factor(width[:, -1])} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
