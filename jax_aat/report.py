"""`Report`: what an adaptive call did and how well, by head.

The definitions of the metrics stand in `docs/resolution.md`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_aat.audit import Audit
from jax_aat.boundary import boundary
from jax_aat.levels import EXACT, Grid, count_levels, exact_keys
from jax_aat.plan import TilePlan
from jax_aat.problem import Operands, Options, Slot
from jax_aat.pytrees import exportable, is_known
from jax_aat.router import has_state, means_flops, planning_flops
from jax_aat.state import resolution_change
from jax_aat.visible_pairs import dense_flops, existing_positions, visible_rows

_ROUNDING = 1e-3
"""What sums in float32 may be over a budget that is kept."""
LEVEL_NAMES = ("exact", "mean", "super-tile", "left out")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("levels", "forced", "forced_by_options", "flops", "hidden_flops", "planning_flops"),
        *("audit_flops", "dense_flops", "tiled_flops", "allowed_flops"),
        *("overhead", "change", "log_lambda", "audit", "bound"),
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Report:
    """A pytree of arrays on the device; reading or printing it waits for them.

    Attributes are of N heads, float32, unless said otherwise. Heads that share tiles share what is
    said of tiles. Reports of a scan or a vmap have further leading axes; printed are their means.

    Attributes:
      levels: [N, 4]: of the granules that tiles see, the share at each level; the last one is of
        those that are left out.
      forced: Share of the granules that are exact because causality, window, lengths, segments,
        mask or bias allow nothing else.
      forced_by_options: Share of the granules that causality and window alone would not have made
        exact.
      flops: FLOPs a query for the rows that are read.
      hidden_flops: Those of them for pairs that do not see each other, in granules of which a part
        is hidden.
      planning_flops: FLOPs a query for summaries, routing and state; where the plan was given, or
        kept by a state, for coarse rows and state.
      audit_flops: FLOPs a query for the audited rows, part of none of the others.
      dense_flops: FLOPs a query of exact attention over the pairs that see each other.
      tiled_flops: FLOPs a query if every granule that tiles see were exact.
      allowed_flops: FLOPs a query that the budget allows; infinite without a budget.
      overhead: Cross-tile overhead: bytes of lists, levels, coarse rows and state over bytes of
        exact keys and values read.
      change: dR/dt: mean absolute change of log2 rows a granule since the state's last call.
      log_lambda: Natural logarithm of the price of a row, mean over the batch.
      audit: What the audited rows say; its `rows` are 0 where there were none.
      bound: Certified bound on ||out - exact out|| of each row, [B, T, N] ([T, N]); None unless it
        was asked for.
    """

    levels: jax.Array
    forced: jax.Array
    forced_by_options: jax.Array
    flops: jax.Array
    hidden_flops: jax.Array
    planning_flops: jax.Array
    audit_flops: jax.Array
    dense_flops: jax.Array
    tiled_flops: jax.Array
    allowed_flops: jax.Array
    overhead: jax.Array
    change: jax.Array
    log_lambda: jax.Array
    audit: Audit
    bound: jax.Array | None = None

    @property
    def relative_flops(self) -> jax.Array:
        """FLOPs spent, planning included, over those of exact attention; without hidden pairs."""
        return self._counted_flops / jnp.maximum(self.dense_flops, 1)

    @property
    def budget_spent(self) -> jax.Array:
        """FLOPs spent by all heads, which share a budget, over those that it allows, one number.

        Above 1 the budget is not kept: the cheapest levels, at which all that may be coarse is,
        cost more, or a plan is used that was made for other operands. 0 without a budget.
        """
        return self._counted_flops.sum(-1) / self.allowed_flops.sum(-1)

    @property
    def _counted_flops(self) -> jax.Array:
        return self.flops - self.hidden_flops + self.planning_flops

    @property
    def spent(self) -> jax.Array:
        """FLOPs spent over those of reading all that tiles see exactly; 1 and more saves none."""
        return (self.flops + self.planning_flops) / jnp.maximum(self.tiled_flops, 1)

    @property
    def information_flow_quality(self) -> jax.Array:
        """IFQ: 1 - ||out - exact out||^2 / ||exact out||^2, estimated by the audit."""
        return self.audit.information_flow_quality

    @property
    def compute_to_efficiency(self) -> jax.Array:
        """CER: `relative_flops` over IFQ."""
        quality = self.information_flow_quality
        return jnp.where(
            quality > 0, self.relative_flops / jnp.where(quality > 0, quality, 1), jnp.inf
        )

    @property
    def adaptation_efficiency(self) -> jax.Array:
        """AE: attention mass at level 0 over that of the best set of the same size."""
        return self.audit.adaptation_efficiency

    @property
    def relative_error(self) -> jax.Array:
        """||out - exact out|| / ||exact out||, estimated by the audit."""
        return self.audit.relative_error

    @property
    def relative_error_interval(self) -> jax.Array:
        """95% confidence interval of `relative_error`, [N, 2]."""
        return self.audit.interval

    def __str__(self) -> str:
        if not is_known(self):
            return f"Report({self.flops.shape[-1]} heads; its arrays have no values here)"
        heads = self.flops.shape[-1]

        def mean(x: Any) -> Any:
            return np.asarray(x, np.float64).reshape(-1, heads).mean(0)

        if not mean(self.dense_flops).any():
            return f"Report({heads} heads; no query sees a key)"
        columns = {name: _percent(mean(self.levels[..., i])) for i, name in enumerate(LEVEL_NAMES)}
        columns["forced"] = _percent(mean(self.forced))
        if mean(self.forced_by_options).any():
            columns["by options"] = _percent(mean(self.forced_by_options))
        columns["FLOPs"] = _percent(mean(self.relative_flops))
        columns["a token"] = [f"{x:.3g}" for x in mean(self._counted_flops)]
        if np.asarray(self.audit.rows).max(initial=0) > 0:
            low, high = (mean(self.relative_error_interval[..., i]) for i in range(2))
            columns["IFQ"] = _plain(mean(self.information_flow_quality))
            columns["CER"] = _plain(mean(self.compute_to_efficiency))
            columns["AE"] = _plain(mean(self.adaptation_efficiency))
            columns["error"] = [f"{x:.2g}" for x in mean(self.relative_error)]
            # From a few rows of which one has most of the error nothing follows.
            columns["95% interval"] = [
                "too few rows" if b >= 1e3 * a > 0 else f"{a:.2g} to {b:.2g}"
                for a, b in zip(low, high, strict=True)
            ]
        columns["dR/dt"] = [f"{x:.2f}" for x in mean(self.change)]
        columns["overhead"] = _percent(mean(self.overhead))
        if self.bound is not None:
            largest = np.asarray(self.bound).reshape(-1, heads).max(0)
            columns["largest bound"] = [f"{x:.2g}" for x in largest]
        rows = zip(*columns.values(), strict=True)
        table = [["head", *columns], *([str(i), *row] for i, row in enumerate(rows))]
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in table]
        spent = float(mean(self.spent).mean())
        if spent >= 1:
            lines.append(
                f"nothing is saved: {spent:.1%} of the FLOPs of reading everything exactly"
            )
        over = float(np.asarray(self.budget_spent, np.float64).mean())
        if over > 1 + _ROUNDING:
            parts = (self._counted_flops, self.planning_flops, self.allowed_flops)
            total, planning, allowed = (
                float(mean(x).sum() / mean(self.dense_flops).sum()) for x in parts
            )
            lines.append(
                f"the budget is not kept: {total:.1%} of the FLOPs of exact attention, of which "
                f"{planning:.1%} for planning, where {allowed:.1%} are allowed. What must be exact "
                "and the means beside it cost more: raise the budget, or make them cheaper by a "
                "smaller query_tile or super_tile, or stages=1"
            )
        return "\n".join(lines)


exportable(Report)


def make_report(
    operands: Operands,
    options: Options,
    plan: TilePlan,
    audit: Audit,
    previous: jax.Array | None = None,
    bound: jax.Array | None = None,
    *,
    planned: jax.Array | bool = True,
) -> Report:
    """Reports on a call.

    Args:
      operands: Those of the call, with one batch axis.
      options: Those of the call.
      plan: Its plan.
      audit: What its audit found.
      previous: Levels of the call before, [B, L, I, W]; None: there was none.
      bound: Certified bounds of its rows.
      planned: Whether the plan was made in this call.
    """
    grid, head_dim = plan.grid, operands[Slot.Q].shape[-1]
    bounds = boundary(operands, options, grid)
    shape = plan.levels.shape[:-1]

    def tiles_see(granules: jax.Array) -> jax.Array:
        return jnp.broadcast_to(granules.sum(-1), shape).astype(jnp.float32)

    forced = bounds.seen & ~bounds.whole
    seen = _total(tiles_see(bounds.seen))
    # What a tile does not see is hidden, so that the rest of what it sees is left out.
    counts = count_levels(plan.levels)
    at = [_total(x.astype(jnp.float32)) for x in counts]
    at.append(seen - sum(at))
    count = jnp.maximum(seen, 1)
    batch, tokens = operands[Slot.Q].shape[0], grid.queries * shape[0] * grid.tile_heads
    a_row = 4.0 * head_dim * grid.query_tile / tokens
    # The last tile may have fewer positions than the others.
    part = existing_positions(grid)[0, 0]
    exact = exact_keys(counts[EXACT], plan.levels, grid).astype(jnp.float32)
    coarse = plan.list_headers[..., 3].astype(jnp.float32)
    flops = a_row * _total((exact + coarse) * part)
    cut = _total(tiles_see(jnp.where(forced, grid.granule_sizes, 0)) * part).sum()
    visible = visible_rows(operands, options, grid, bounds).sum()
    hidden = a_row * jnp.maximum(cut - visible, 0) / grid.lists
    a_head = batch * grid.queries * grid.heads
    planning = planning_flops(operands, options, grid, plan.adaptation).sum() / a_head
    means = batch * means_flops(operands, options, plan.adaptation) / a_head
    dense = dense_flops(operands, options, grid).sum() / a_head
    budget = plan.adaptation.budget
    change = jnp.zeros(grid.lists)
    if previous is not None:
        change = resolution_change(plan.levels, previous, grid)
    by_list = {
        "levels": jnp.stack(at, -1) / count[:, None],
        "forced": _total(tiles_see(forced)) / count,
        "forced_by_options": _total(tiles_see(forced & _plainly_whole(operands, options, grid)))
        / count,
        "flops": flops,
        "hidden_flops": jnp.broadcast_to(hidden, count.shape),
        "planning_flops": jnp.broadcast_to(jnp.where(planned, planning, means), count.shape),
        "dense_flops": jnp.broadcast_to(dense, count.shape),
        "tiled_flops": a_row
        * _total(tiles_see(jnp.where(bounds.seen, grid.granule_sizes, 0)) * part),
        "allowed_flops": jnp.broadcast_to(
            jnp.inf if budget is None else budget * dense, count.shape
        ),
        "overhead": _overhead(operands, options, plan, at[0], _total(exact), _total(coarse)),
        "change": change,
        "log_lambda": plan.log_lambda.mean(0),
    }
    by_head = {name: jnp.repeat(x, grid.tile_heads, axis=0) for name, x in by_list.items()}
    audited = 4.0 * head_dim * grid.keys * audit.rows / (batch * grid.queries)
    return Report(**by_head, audit_flops=audited, audit=audit, bound=bound)


def _plainly_whole(operands: Operands, options: Options, grid: Grid) -> jax.Array:
    """`Boundary.whole` by causality and window alone."""
    operands = {slot: operands[slot] for slot in (Slot.Q, Slot.K, Slot.V)}
    return boundary(operands, options, grid).whole


def _overhead(
    operands: Operands,
    options: Options,
    plan: TilePlan,
    exact_granules: jax.Array,
    exact_rows: jax.Array,
    coarse_rows: jax.Array,
) -> jax.Array:
    """Cross-tile overhead of lists, [L]; what lists share is shared out among them."""
    grid, k = plan.grid, operands[Slot.K]
    a_row = 2 * k.shape[-1] * k.dtype.itemsize
    batch = operands[Slot.Q].shape[0]
    # A word a granule or row listed, a header a tile, and the same once more, transposed.
    words = exact_granules + coarse_rows + 4 * grid.tiles * batch
    lists = 4 * 2 * words + 4 * batch * grid.tiles * grid.words
    summaries = batch * grid.coarse_rows * grid.kv_heads * a_row
    state = 0
    if has_state(operands, options, plan.adaptation):
        parts = -(-grid.queries // grid.super_tile) if options.causal else 1
        state = 4 * batch * grid.kv_heads * parts * k.shape[-1] * (k.shape[-1] + 2)
    overhead = lists + coarse_rows * a_row + (summaries + state) / grid.lists
    return overhead / jnp.maximum(exact_rows * a_row, 1)


def _total(by_tile: jax.Array) -> jax.Array:
    """Sum of [B, L, I] by list."""
    return by_tile.sum((0, 2))


def _percent(x: Any) -> list[str]:
    return [f"{value:.1%}" for value in x]


def _plain(x: Any) -> list[str]:
    return [f"{value:.4f}" for value in x]
