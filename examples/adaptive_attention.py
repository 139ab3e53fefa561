"""Adaptive attention step by step: a budget, the report, a plan that is reused, a tolerance.

    python examples/adaptive_attention.py --length 4096

The parts that begin with ``# %%`` are cells: Jupyter (by jupytext) and most editors open the file
as a notebook.
"""

# %% Inputs
from __future__ import annotations

import argparse
import sys
from functools import partial

import jax
import jax.numpy as jnp

import jax_aat

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--length", type=int, default=1024, help="queries and keys, a multiple of 64")
parser.add_argument("--steps", type=int, default=8, help="calls in which the tolerance settles")
# The command line of a notebook is not ours.
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
if args.length < 1024 or args.length % 64 or args.steps < 1:
    parser.error("--length must be a multiple of 64 from 1024 on, --steps at least 1")

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32


def topics(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query [1, T, N, H], key and value [1, T, K, H] of a text that comes back to its topics.

    Runs of 64 positions are about one of 32 topics; queries look for keys of their own topic.
    """
    draw = jax.random.split(jax.random.key(seed), 4)
    about = jnp.repeat(jax.random.randint(draw[0], (args.length // 64,), 0, 32), 64)
    topic = jax.random.normal(draw[1], (32, KV_HEADS, HEAD_DIM))[about]
    key, value = topic + 0.5 * jax.random.normal(draw[2], (2, 1, *topic.shape))
    query = jnp.repeat(topic, HEADS // KV_HEADS, axis=1)
    return query + 0.5 * jax.random.normal(draw[3], (1, *query.shape)), key, value


def difference(out: jax.Array, expected: jax.Array) -> float:
    """Relative error of the whole output."""
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


query, key, value = topics(seed=0)
attention = partial(jax_aat.tiled_attention, is_causal=True)
exact = jax.jit(attention)(query, key, value)

# %% A budget
# At most a quarter of the FLOPs of exact attention, planning included. The report estimates the
# error from a few rows that it computes exactly as well; here we know it.
budget = jax_aat.Adaptation(budget=0.25, audit_rate=1 / 16)
out, report = jax.jit(partial(attention, adaptation=budget, return_report=True))(query, key, value)
error = difference(out, exact)
low, high = (float(end) for end in report.audit.joined(HEADS).interval[0])
print(report)
print(f"true error {error:.3f}, estimated to lie between {low:.3f} and {high:.3f}")
assert report.budget_spent < 1.001, "the budget is not kept"
assert error < 0.2

# %% A plan
# What each tile reads, once for several calls: here for other values under the same queries and
# keys. The levels depend on the values but little.
plan = jax.jit(partial(jax_aat.plan_tiles, adaptation=budget, is_causal=True))(query, key, value)
print(plan)
other = value[:, :, ::-1]
reused = jax.jit(attention)(query, key, other, plan=plan)
error = difference(reused, jax.jit(attention)(query, key, other))
print(f"error with the plan of other values {error:.3f}")
assert error < 0.2

# %% A tolerance
# The state is carried from call to call: audits of each call move the price of a row until the
# error is what is tolerated.
tolerance = jax_aat.Adaptation(tolerance=0.015, audit_rate=1 / 16)
state = jax_aat.ResolutionState.init(query, key, tolerance, is_causal=True, threshold=1e-6)
attend = jax.jit(partial(attention, adaptation=tolerance, return_report=True))
errors, spent = [], []
for step in range(args.steps):
    arrays = topics(seed=step)
    out, state, report = attend(*arrays, state=state)
    errors.append(difference(out, jax.jit(attention)(*arrays)))
    spent.append(float(report.relative_flops.mean()))
    print(f"call {step}: error {errors[-1]:.4f}, {spent[-1]:.1%} of the FLOPs of exact attention")
settled = errors[args.steps // 2 :]
assert sum(settled) / len(settled) < 1.5 * tolerance.tolerance, "the tolerance is not kept"
assert spent[-1] < 0.9, "nothing is saved"
