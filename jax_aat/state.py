"""`ResolutionState`: what adaptive attention remembers from call to call.

It holds lambda, the price of a row, for every list (the query heads that share tiles), the levels
of the last call and a moving average of the audits. With a tolerance the audits steer lambda:

    d log(lambda) / dt = eta log(0.9 tolerance / audited error)
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_aat import arguments
from jax_aat._compat import vary_like
from jax_aat.adaptation import Adaptation
from jax_aat.audit import Audit
from jax_aat.levels import EXACT, HIDDEN, MEAN, Grid, unpack_levels
from jax_aat.plan import TilePlan
from jax_aat.pytrees import exportable

LEAST, MOST = 1e-12, 10.0
"""Lambda is kept between these: nearly everything is exact at one, nothing that may not at the
other."""
AIM = 0.9
"""Share of the tolerance that audited errors are steered to. They vary from call to call, and their
mean lies above what steering their logarithm gives."""
GAIN = 0.3
"""eta, once the controller has settled."""
FIRST_GAIN_DOWN, FIRST_GAIN_UP = 12.0, 2.0
"""eta in the first step; in step n it is an n-th of that, and not below `GAIN`. An error that is
too large is to go at once, one that is too small may take its time."""
LARGEST_RATIO = 4.0
"""Bound of |log(0.9 tolerance / audited error)|."""
MEMORY = 0.15
"""Weight of a new audit in the moving average."""
REST = 50
"""Calls for which a list stays exact once it has turned out that it cannot save anything."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["log_lambda", "rest", "levels", "audit", "step", "seed", "plan", "plan_hides"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ResolutionState:
    """A pytree of arrays, to be carried through steps, layers, scans and checkpoints.

    L lists are N query heads in chunks that share their tiles, so their lambda.

    Attributes:
      log_lambda: [L] float32, natural logarithm.
      rest: [L] int32: calls for which the list is still exact, because it could save nothing.
      levels: [B, L, I, W] uint32, those of the last call; all hidden before the first.
      audit: Moving average of the audits, by head.
      step: Calls so far, int32; with `seed` it decides which rows are audited.
      seed: uint32.
      plan: That of the last call, where it serves several (`Adaptation.replan_every`); else None.
        `TilePlan.hides` is always True of it, so that the structure is the same after every call.
      plan_hides: Whether the plan may really hide more than causality and window do, bool; or None.
    """

    log_lambda: jax.Array
    rest: jax.Array
    levels: jax.Array
    audit: Audit
    step: jax.Array
    seed: jax.Array
    plan: TilePlan | None = None
    plan_hides: jax.Array | None = None

    @classmethod
    def init(
        cls,
        query: Any,
        key: Any,
        adaptation: Adaptation,
        *,
        is_causal: bool = False,
        local_window_size: int | tuple[int, int] | None = None,
        threshold: float = 1e-4,
        seed: int = 0,
    ) -> "ResolutionState":
        """The state before the first call of `tiled_attention` with these arguments.

        Args:
          query: [B, T, N, H] or [T, N, H]; an array or anything that has a shape.
          key: [B, S, K, H] or [S, K, H], likewise.
          adaptation: That of the calls.
          is_causal: That of the calls.
          local_window_size: That of the calls.
          threshold: Lambda to start from; matters with a tolerance only.
          seed: Of the audits.

        Raises:
          TypeError: An argument is of another type.
          ValueError: A shape does not fit, `threshold` is not a positive number, or `seed` is not
            one of 32 bits.
        """
        arguments.instance("adaptation", adaptation, Adaptation)
        q, k = tuple(query.shape), tuple(key.shape)
        fits = len(q) in (3, 4) and len(k) == len(q) and (q[:-3], q[-1]) == (k[:-3], k[-1])
        if not fits or not k[-2] or q[-2] % k[-2]:
            raise ValueError(
                f"query and key: got shapes {q} and {k}, expected [B, T, N, H] and [B, S, K, H], "
                "or both without B, N a multiple of K"
            )
        threshold = arguments.number("threshold", threshold, "give one to start from")
        if threshold <= 0:
            raise ValueError(f"threshold: got {threshold}, expected a positive number")
        if not arguments.is_integer(seed):
            raise TypeError(f"seed: got {arguments.describe(seed)}, expected an integer")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed: got {seed}, expected one from 0 to 2**32 - 1")
        is_causal = arguments.flag("is_causal", is_causal)
        batch = q[0] if len(q) == 4 else 1
        grid = adaptation.grid(q[-3], k[-3], q[-2], k[-2])
        state = cls.of_grid(grid, batch, threshold, seed)
        if adaptation.replan_every == 1:
            return state
        window = arguments.window(local_window_size)
        plan = TilePlan.unfilled(grid, adaptation, is_causal, window, batch, hides=True)
        return dataclasses.replace(state, plan=plan, plan_hides=jnp.bool_(True))

    @classmethod
    def of_grid(
        cls, grid: Grid, batch: int, threshold: float = 1e-4, seed: int = 0
    ) -> "ResolutionState":
        """The state before the first call, without room for a plan; arguments as in `init`."""
        return cls(
            log_lambda=jnp.full(grid.lists, jnp.log(threshold), jnp.float32),
            rest=jnp.zeros(grid.lists, jnp.int32),
            levels=jnp.full(
                (batch, grid.lists, grid.tiles, grid.words), 0xFFFFFFFF, dtype=jnp.uint32
            ),
            audit=Audit.empty(grid.heads),
            step=jnp.int32(0),
            seed=jnp.uint32(seed),
        )

    def check_call(self, grid: Grid, batch: int) -> None:
        """Checks that a call with such a grid can take the state.

        Raises:
          TypeError: Something in it is no array.
          ValueError: It is of another grid, or an array has another shape or dtype.
        """
        expected = jax.eval_shape(lambda: ResolutionState.of_grid(grid, batch))
        given, wanted = self._arrays(), expected._arrays()
        for name, x in given.items():
            if not hasattr(x, "shape") or not hasattr(x, "dtype"):
                raise TypeError(f"state.{name}: got {arguments.describe(x)}, expected an array")
        shape, heads = self.levels.shape, self.audit.rows.shape
        if shape != expected.levels.shape or heads != (grid.heads,):
            raise ValueError(
                f"state: was made for levels {shape} of {heads[-1] if heads else 1} heads, the "
                f"call has {expected.levels.shape} of {grid.heads}: make one by "
                "ResolutionState.init for these shapes and this adaptation"
            )
        for name, x in given.items():
            arguments.same_type(f"state.{name}", x, wanted[name])

    def _arrays(self) -> dict[str, Any]:
        """Every array but those of a plan, by name."""
        names = ("log_lambda", "rest", "levels", "step", "seed")
        audit = (field.name for field in dataclasses.fields(self.audit))
        return {name: getattr(self, name) for name in names} | {
            f"audit.{name}": getattr(self.audit, name) for name in audit
        }

    @property
    def log_price(self) -> jax.Array:
        """Logarithm of lambda as the next call uses it, [L]; -inf where it is to be exact."""
        return jnp.where(self.rest > 0, -jnp.inf, self.log_lambda)

    def after_call(
        self, plan: TilePlan, audit: Audit | None, spent: jax.Array
    ) -> "ResolutionState":
        """The state after a call with a plan; arguments as those of `after`."""
        state = self.after(plan.levels, audit, spent, plan.adaptation.tolerance)
        if self.plan is None or self.plan_hides is None:
            return state
        hides = vary_like(jnp.bool_(plan.hides), [self.plan_hides])
        return dataclasses.replace(
            state, plan=dataclasses.replace(plan, hides=True), plan_hides=hides
        )

    def after(
        self,
        levels: jax.Array,
        audit: Audit | None,
        spent: jax.Array | None = None,
        tolerance: float | None = None,
    ) -> "ResolutionState":
        """The state after a call.

        Args:
          levels: Levels of the call.
          audit: What its audit found; None: it had none.
          spent: With a tolerance, FLOPs of each list, planning included, over those of reading all
            that its tiles see exactly, [L].
          tolerance: Relative error to keep; None: lambda stays.
        """
        state = dataclasses.replace(self, levels=levels, step=self.step + 1)
        if audit is None:
            return state
        lists, heads = self.log_lambda.shape[-1], audit.rows.shape[-1]
        found, average = audit.joined(heads // lists), self.audit.joined(heads // lists)
        # An average that contradicts the audit says how things were.
        low, high = jnp.moveaxis(found.interval, -1, 0)
        past = average.relative_error
        stale = (average.rows == 0) | (past < low / 2) | (past > 2 * high)
        weight = jnp.where(stale, 1.0, MEMORY)
        # Of a call whose output is not finite nothing is learnt.
        usable = jnp.isfinite(found.relative_error)
        weight, learns = (jnp.repeat(x, heads // lists, axis=-1) for x in (weight, usable))
        average = jax.tree.map(
            lambda old, new: jnp.where(learns, new, old),
            self.audit,
            self.audit.blended(audit, weight),
        )
        state = dataclasses.replace(state, audit=average)
        if tolerance is None or spent is None:
            return state
        return state._steered(average.joined(heads // lists), usable, spent, tolerance)

    def _steered(
        self, audit: Audit, usable: jax.Array, spent: jax.Array, tolerance: float
    ) -> "ResolutionState":
        error = jnp.maximum(audit.relative_error, jnp.finfo(jnp.float32).tiny)
        ratio = jnp.clip(jnp.log(AIM * tolerance / error), -LARGEST_RATIO, LARGEST_RATIO)
        first = jnp.where(ratio < 0, FIRST_GAIN_DOWN, FIRST_GAIN_UP)
        gain = jnp.maximum(GAIN, first / self.step.astype(jnp.float32))
        moved = jnp.clip(self.log_lambda + gain * ratio, jnp.log(LEAST), jnp.log(MOST))
        known = usable & (audit.norm > 0) & (self.rest == 0)
        # Dense attention costs less than this list does though it uses what is tolerated.
        futile = known & (spent >= 1) & (ratio < jnp.log(2.0))
        rest = jnp.where(futile, REST, jnp.maximum(self.rest - 1, 0))
        log_lambda = jnp.where(known, moved, self.log_lambda)
        return dataclasses.replace(self, log_lambda=log_lambda, rest=rest)


exportable(ResolutionState)


def resolution_change(levels: jax.Array, previous: jax.Array, grid: Grid) -> jax.Array:
    """dR/dt: mean absolute change of log2 rows a granule, over what both calls see, [..., L].

    A granule has 16 rows at level 0, one at level 1, and at level 2 its part of the row of its
    super-tile.

    Args:
      levels: [B, L, I, W] uint32 of a call.
      previous: Those of the call before.
      grid: How both calls are cut.
    """
    new, old = unpack_levels(levels, grid.granules), unpack_levels(previous, grid.granules)
    both = (new != HIDDEN) & (old != HIDDEN)

    part = -math.log2(grid.super_tile_granules)

    def log_rows(level: jax.Array) -> Any:
        return jnp.where(level == EXACT, 4.0, jnp.where(level == MEAN, 0.0, part))

    change = jnp.where(both, jnp.abs(log_rows(new) - log_rows(old)), 0)
    count = both.sum((0, -2, -1))
    return change.sum((0, -2, -1)) / jnp.maximum(count, 1)
