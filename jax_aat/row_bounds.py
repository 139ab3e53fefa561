"""The certified bound of every row of an adaptive call."""

import jax
import jax.numpy as jnp
from jax import lax

from jax_aat.boundary import boundary
from jax_aat.certificate import certified_bound, group_statistics
from jax_aat.levels import EXACT, GRANULE, HIDDEN, pack_levels, unpack_levels
from jax_aat.plan import TilePlan
from jax_aat.primitives.forward import forward
from jax_aat.problem import Operands, Options, Slot, accumulation_dtype, counted
from jax_aat.pyramid import coarse_rows

_AT_ONCE = 2**21
"""Pairs of a row and a granule that are looked at together."""


def row_bounds(
    operands: Operands, options: Options, plan: TilePlan, out: jax.Array, implementation: str
) -> jax.Array:
    """Bounds on ||out - exact attention|| of every row, [B, T, N] float32; without gradient.

    Args:
      operands: Those of the call, with one batch axis.
      options: Those of the call.
      plan: Its plan.
      out: What it returned, [B, T, N, H].
      implementation: Which one attends to the exact keys.
    """
    operands, out = lax.stop_gradient((operands, out))
    grid = plan.grid
    dtype = accumulation_dtype(out.dtype)
    wide = {
        slot: x.astype(dtype) if slot in (Slot.Q, Slot.K, Slot.V) else x
        for slot, x in operands.items()
    }
    level = unpack_levels(plan.levels, grid.granules)
    hidden = pack_levels(jnp.where(level == EXACT, EXACT, HIDDEN))
    fine = plan.of_levels(hidden, plan.log_lambda, operands, options, plan.adaptation)
    means = coarse_rows(wide, grid.super_tile)
    rows = dict(zip((Slot.COARSE_K, Slot.COARSE_V), means, strict=True))
    exact_out, exact_lse, _ = forward(
        wide | rows | fine.operands(),
        options.planned(grid),
        implementation,
    )

    valid = None
    if Slot.KV_LENGTHS in operands:
        valid = jnp.arange(grid.keys) < operands[Slot.KV_LENGTHS][:, None, None]
    k, v = (jnp.moveaxis(wide[slot], 1, 2) for slot in (Slot.K, Slot.V))  # [B, K, S, H]
    groups = group_statistics(k, v, valid, GRANULE)
    seen = jnp.broadcast_to(boundary(operands, options, grid).seen, level.shape)
    inexact = seen & (level != EXACT)

    def of_tile(tile: jax.Array) -> jax.Array:
        """Bounds of the rows of a tile of positions: [B, K, G, P]."""
        positions = tile * grid.positions + jnp.arange(grid.positions)
        at = jnp.minimum(positions, grid.queries - 1)

        def grouped(x: jax.Array) -> jax.Array:
            # [B, P, N, ...] to [B, K, G P, ...]
            x = jnp.moveaxis(x[:, at], 1, 2)
            return x.reshape(x.shape[0], grid.kv_heads, -1, *x.shape[3:])

        coarse = jnp.repeat(inexact[:, :, tile], grid.tile_heads, axis=1)[:, :, None]
        coarse = jnp.broadcast_to(coarse, (*coarse.shape[:2], grid.positions, grid.granules))
        if Slot.Q_LENGTHS in operands:
            coarse &= (at < operands[Slot.Q_LENGTHS][:, None])[:, None, :, None]
        bias: jax.Array | float = 0.0
        if Slot.BIAS in operands:
            bias = _granule_bias(operands[Slot.BIAS], at)
            bias = jnp.broadcast_to(bias, coarse.shape).reshape(
                coarse.shape[0], grid.kv_heads, -1, grid.granules
            )
        bound = certified_bound(
            grouped(wide[Slot.Q] * options.scale),
            grouped(out),
            grouped(exact_out),
            grouped(exact_lse),
            groups,
            coarse.reshape(coarse.shape[0], grid.kv_heads, -1, grid.granules),
            bias=bias,
            soft_cap=options.soft_cap,
        )
        return bound.reshape(bound.shape[0], grid.heads, grid.positions)

    a_tile = counted(out.shape[0]) * grid.heads * grid.positions * grid.granules
    bounds = lax.map(of_tile, jnp.arange(grid.tiles), batch_size=max(1, _AT_ONCE // a_tile))
    bounds = jnp.transpose(bounds, (1, 0, 3, 2))  # [B, I, P, N]
    return bounds.reshape(bounds.shape[0], -1, grid.heads)[:, : grid.queries]


def _granule_bias(bias: jax.Array, positions: jax.Array) -> jax.Array:
    """Bias of rows at `positions` [P] on the first key of each granule, broadcasts to all heads."""
    rows = bias if bias.shape[-2] == 1 else bias[:, :, positions]
    return rows if rows.shape[-1] == 1 else rows[..., ::GRANULE]
