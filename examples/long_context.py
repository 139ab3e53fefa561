"""What a plan sees of a long context: which distances it reads exactly, as means, hardly at all.

    python examples/long_context.py --length 32768

One passage of the context, the needle, is what the last queries look for. The parts that begin
with ``# %%`` are cells: Jupyter (by jupytext) and most editors open the file as a notebook.
"""

# %% A context with a needle
from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jax_aat
from jax_aat.levels import EXACT, GRANULE, HIDDEN, MEAN, SUPER_MEAN, unpack_levels

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--length", type=int, default=8192, help="keys, at least 2048")
parser.add_argument("--budget", type=float, default=0.125)
parser.add_argument("--depth", type=float, default=0.3, help="of the needle, 0 to 1")
# The command line of a notebook is not ours.
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
if args.length < 2048 or not 0 <= args.depth < 0.9:
    parser.error("--length must be at least 2048 and --depth at least 0 and below 0.9")

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
NEEDLE, LOOKING = 16, 64  # keys, queries
draw = jax.random.split(jax.random.key(0), 4)
query = jax.random.normal(draw[0], (args.length, HEADS, HEAD_DIM))
key, value = jax.random.normal(draw[1], (2, args.length, KV_HEADS, HEAD_DIM))
# Nearby keys are alike, as in any text: each is a mean of its neighbourhood and noise.
drift = jnp.cumsum(jax.random.normal(draw[2], key.shape), axis=0) / jnp.sqrt(args.length)
key = 0.3 * key + drift - drift.mean(axis=0)
start = int(args.depth * args.length) // GRANULE * GRANULE
needle = jax.random.normal(draw[3], (KV_HEADS, HEAD_DIM))
needle /= jnp.linalg.norm(needle, axis=-1, keepdims=True)
key = key.at[start : start + NEEDLE].add(12 * needle)
# The last queries look for it, all others look elsewhere.
looks = jnp.repeat(needle, HEADS // KV_HEADS, axis=0)
query -= (query * looks).sum(-1, keepdims=True) * looks
query = query.at[-LOOKING:].add(8 * looks)

# %% The plan
adaptation = jax_aat.Adaptation(budget=args.budget)
plan = jax.jit(partial(jax_aat.plan_tiles, adaptation=adaptation, is_causal=True))(
    query, key, value
)
print(plan)
level = np.asarray(unpack_levels(plan.levels, plan.grid.granules))[0]  # [lists, tiles, granules]

# %% What is seen at which distance
tile = np.arange(plan.grid.tiles)[:, None] * plan.grid.positions
distance = tile - np.arange(plan.grid.granules) * GRANULE
print(f"{'keys before the query':>24}  {'exact':>6}  {'mean':>6}  {'super-tile':>10}")
edges = [0, *(2**i for i in range(8, 40) if 2**i < args.length), args.length]
for near, far in itertools.pairwise(edges):
    seen = level[:, (distance >= near) & (distance < far)]
    seen = seen[seen != HIDDEN]
    exact, mean, coarse = (np.mean(seen == which) for which in (EXACT, MEAN, SUPER_MEAN))
    print(f"{f'{near:,} to {far:,}':>24}  {exact:6.1%}  {mean:6.1%}  {coarse:10.1%}")

# %% The needle
# The last tile reads it exactly, however far away; tiles that do not look for it need not.
found = level[:, -1, start // GRANULE] == EXACT
others = level[:, : (args.length - LOOKING) // plan.grid.positions, start // GRANULE]
seen, read = (others != HIDDEN).sum(), (others == EXACT).sum()
print(f"needle at {start:,}: read exactly by {found.sum()} of {found.size} last tiles,")
print(f"by {read} of the {seen} before them that see it")
assert found.all()
assert read < seen / 4

# %% The output
attention = partial(jax_aat.tiled_attention, is_causal=True)
exact = jax.jit(attention)(query, key, value)
out, report = jax.jit(partial(attention, return_report=True))(query, key, value, plan=plan)
for name, rows in (("all queries", slice(None)), ("those that look", slice(-LOOKING, None))):
    error = jnp.linalg.norm((out - exact)[rows]) / jnp.linalg.norm(exact[rows])
    print(f"error of {name}: {error:.3f}")
print(report)
assert report.budget_spent < 1.001
assert error < 0.1, "the needle was not found"
