"""Routing of long sequences: each tile looks into its foremost key tiles only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import look_into, normal

from jax_aat import Adaptation, plan_tiles, tiled_attention
from jax_aat.levels import EXACT, HIDDEN, SUPER_MEAN, unpack_levels
from jax_aat.problem import Options, Slot
from jax_aat.router import break_even, planning_flops

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 4096, 4, 2, 8
ADAPTATION = Adaptation(budget=0.2, query_tile=128, super_tile=1024)
GRID = ADAPTATION.grid(LENGTH, LENGTH, HEADS, KV_HEADS)
CAUSAL = Options(HEAD_DIM**-0.5, causal=True)


@pytest.fixture
def half_judged(set_traced):
    """As if a tile of so short a sequence looked into 15 of its 32 key tiles."""
    look_into(set_traced, 15)


def operands_of(rng, batch=1):
    q = normal(rng, batch, LENGTH, HEADS, HEAD_DIM)
    k, v = (normal(rng, batch, LENGTH, KV_HEADS, HEAD_DIM) for _ in range(2))
    return {Slot.Q: 3 * q, Slot.K: k, Slot.V: v}


def prices(operands):
    packed = np.asarray(jax.jit(lambda x: break_even(x, CAUSAL, GRID, ADAPTATION))(operands))
    return packed >> 16, packed & 0xFFFF


def test_tiles_that_see_no_more_are_routed_as_ever(rng, set_traced):
    operands = operands_of(rng, batch=2)
    operands[Slot.KV_LENGTHS] = jnp.array([LENGTH, 3000])
    expected = prices(operands)
    look_into(set_traced, 15)
    early = 15 * 128 // GRID.positions
    for found, whole in zip(prices(operands), expected, strict=True):
        # The upper halves of float32 numbers: products of another shape round otherwise.
        apart = np.abs(found.astype(int) - whole)[:, :, :early]
        assert (apart > 1).mean() < 1e-3
        assert (found[:, :, early:] != whole[:, :, early:]).any()


def test_looks_into_the_key_tiles_that_are_asked_for(rng, half_judged):
    operands = operands_of(rng)
    direction = np.eye(HEAD_DIM, dtype=np.float32)[0]
    k = 0.1 * operands[Slot.K] - 3 * direction
    # The queries of the last 1,024 positions look for keys in the second super-tile only.
    k = k.at[:, 1200:1264].add(6 * direction)
    q = 0.1 * operands[Slot.Q] + 6 * direction
    plan = plan_tiles(q, k, operands[Slot.V], ADAPTATION, is_causal=True).validate()
    level = np.asarray(unpack_levels(plan.levels, GRID.granules))[0, :, 3 * 1024 // 64 :]
    assert (level[:, :, 1200 // 16 : 1264 // 16] == EXACT).all()
    assert (level[:, :, :192] == SUPER_MEAN).mean() > 0.6
    out = tiled_attention(
        q, k, operands[Slot.V], is_causal=True, adaptation=ADAPTATION, implementation="xla"
    )
    exact = tiled_attention(q, k, operands[Slot.V], is_causal=True, implementation="xla")
    error = jnp.linalg.norm((out - exact)[:, 3072:]) / jnp.linalg.norm(exact[:, 3072:])
    assert error < 0.02


def test_the_nearest_granules_are_exact_whatever_they_weigh(rng, half_judged):
    operands = operands_of(rng)
    direction = np.eye(HEAD_DIM, dtype=np.float32)[0]
    q = 0.1 * operands[Slot.Q] + 6 * direction
    k = (0.1 * operands[Slot.K]).at[:, 3072:].add(-3 * direction)
    plan = plan_tiles(q, k, operands[Slot.V], ADAPTATION, is_causal=True).validate()
    level = np.asarray(unpack_levels(plan.levels, GRID.granules))[0]
    for tile in range(3328 // GRID.positions, GRID.tiles):
        first = tile * GRID.positions // 16
        # A fortieth of 212 granules and more.
        assert (level[:, tile, first - 5 : first] == EXACT).all()


def test_budget_is_kept_and_planning_costs_less(rng, set_traced):
    operands = operands_of(rng)
    stage_1 = dataclasses.replace(ADAPTATION, stages=1, levels=(0, 1))

    def planning():
        return float(jax.jit(lambda x: planning_flops(x, CAUSAL, GRID, stage_1))(operands)[0])

    dense = planning()
    look_into(set_traced, 8)
    fewer = planning()
    # Twice the budget of 32 key tiles are 13, 1,664 keys: 0.65 of all pairs, and key tiles.
    assert 0.65 * dense < fewer < 0.9 * dense
    q, k, v = (operands[slot] for slot in (Slot.Q, Slot.K, Slot.V))
    _, report = jax.jit(
        lambda *x: tiled_attention(
            *x,
            is_causal=True,
            adaptation=ADAPTATION,
            return_report=True,
            implementation="xla",
        )
    )(q, k, v)
    spent = float(report.relative_flops.mean())
    assert 0.9 * ADAPTATION.budget < spent <= ADAPTATION.budget * (1 + 1e-5)


@pytest.mark.parametrize("levels", [(0,), (0, 1)])
def test_what_is_not_judged_is_never_exact(levels, rng, half_judged):
    operands = operands_of(rng)
    q, k, v = (operands[slot] for slot in (Slot.Q, Slot.K, Slot.V))
    adaptation = dataclasses.replace(ADAPTATION, levels=levels)
    plan = plan_tiles(q, k, v, adaptation, is_causal=True).validate()
    level = np.asarray(unpack_levels(plan.levels, GRID.granules))
    by_key_tile = (level == EXACT).reshape(*level.shape[:3], 32, 8).any(-1)
    assert 8 < by_key_tile.sum(-1).max() <= 15
    seen = np.arange(GRID.granules) * 16 < (np.arange(GRID.tiles)[:, None] + 1) * GRID.positions
    shown = (level != HIDDEN).any((0, 1))
    assert not shown[~seen].any()
    assert (shown == seen).all() == (levels != (0,))
