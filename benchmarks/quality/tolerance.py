r"""Whether the controller keeps a tolerance: true errors over 200 calls, from any lambda.

python benchmarks/quality/tolerance.py
"""

from __future__ import annotations

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from synthetic_streams import KINDS, draw

import jax_aat


@partial(jax.jit, static_argnames=("kind", "calls", "batch", "length", "adaptation"))
def stream(
    state: jax_aat.ResolutionState,
    kind: str,
    calls: int,
    batch: int,
    length: int,
    adaptation: jax_aat.Adaptation,
) -> tuple[jax.Array, ...]:
    """True relative error, share of the FLOPs and share of exact lists of every call."""

    def call(state: jax_aat.ResolutionState, i: jax.Array) -> tuple[jax_aat.ResolutionState, ...]:
        q, k, v = draw(kind, jax.random.fold_in(jax.random.key(2), i), i, batch, length)
        attend = partial(jax_aat.tiled_attention, q, k, v, is_causal=True, implementation="xla")
        exact = attend()
        out, state, report = attend(adaptation=adaptation, state=state, return_report=True)
        error = jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)
        resting = (report.log_lambda == -jnp.inf).mean()
        return state, (error, report.spent.mean(), resting)

    return jax.lax.scan(call, state, jnp.arange(calls))[1]


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    print("| inputs | tolerance | first lambda | mean true error / tolerance |", end=" ")
    print("its largest in a call after 20 | FLOPs / exact | lists that rest |")
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for tolerance in (0.03, 0.1):
            adaptation = jax_aat.Adaptation(tolerance=tolerance, query_tile=32)
            for start in (1e-12, 1e-4, 1.0, 1e6):
                q, k, _ = draw(kind, jax.random.key(0), jnp.int32(0), args.batch, args.length)
                state = jax_aat.ResolutionState.init(q, k, adaptation, threshold=start)
                shape = (kind, args.calls, args.batch, args.length, adaptation)
                error, spent, resting = (np.asarray(x) for x in stream(state, *shape))
                print(
                    f"| {kind} | {tolerance} | {start:g} | {error.mean() / tolerance:.2f} "
                    f"| {error[20:].max() / tolerance:.2f} | {spent[20:].mean():.1%} "
                    f"| {resting[20:].mean():.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
