"""`tiled_attention`: the public function."""

import dataclasses
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_aat import adaptive, arguments, vulkan
from jax_aat._compat import in_auto_mesh
from jax_aat.adaptation import Adaptation, grid_of
from jax_aat.plan import TilePlan
from jax_aat.primitives import BY_SIZE, forward
from jax_aat.problem import Operands, Options, Slot
from jax_aat.promotion import may_promote
from jax_aat.state import ResolutionState

Implementation = Literal["vulkan", "xla"]

# Compiled as a whole even where the caller compiles nothing: operation by operation, a plan alone
# would be hundreds of programs.
_choose = jax.jit(TilePlan.choose, static_argnames=("options", "adaptation", "implementation"))
_attend_observed = jax.jit(
    adaptive.attend_observed,
    static_argnames=("options", "adaptation", "implementation", "reports", "certifies"),
)


@overload
def tiled_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    logits_soft_cap: ArrayLike | None = None,
    implementation: Implementation | None = None,
    adaptation: Adaptation | None = None,
    plan: TilePlan | None = None,
    state: None = None,
    return_report: Literal[False] = ...,
    return_residual: Literal[False] = ...,
) -> jax.Array: ...


@overload
def tiled_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    logits_soft_cap: ArrayLike | None = None,
    implementation: Implementation | None = None,
    adaptation: Adaptation | None = None,
    plan: TilePlan | None = None,
    state: None = None,
    return_report: Literal[False] = ...,
    return_residual: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


@overload
def tiled_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, *args: Any, **kwargs: Any
) -> Any: ...


@may_promote
def tiled_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    logits_soft_cap: ArrayLike | None = None,
    implementation: Implementation | None = None,
    adaptation: Adaptation | None = None,
    plan: TilePlan | None = None,
    state: ResolutionState | None = None,
    return_report: bool | Literal["certified"] = False,
    return_residual: bool = False,
) -> Any:
    """Softmax attention, tile by tile: memory is linear in the lengths.

    A drop-in for `jax.nn.dot_product_attention`, with segment ids and a soft cap besides. With
    B the batch size, T and S the numbers of queries and keys, N query heads, K key/value heads and
    H the size of a head,

        out = softmax(cap(scale * query key^T) + bias) value

    over the keys that a query sees: those that the mask, causality, the window, the lengths and the
    segments all allow. Differentiable any number of times, in both modes, in query, key, value and
    bias, and through the residual.

    Args:
      query: [B, T, N, H] or [T, N, H]; float32, bfloat16, float16 or (XLA only) float64.
      key: [B, S, K, H] or [S, K, H] in the dtype of query. N is a multiple of K; query head n uses
        key/value head n // (N / K).
      value: Shape and dtype of key.
      bias: Added to the logits; any floating-point dtype, broadcasts to [B, N, T, S] ([N, T, S]).
      mask: True where a query may attend to a key; bool, broadcasts to [B, N, T, S] ([N, T, S]).
      scale: Factor of the logits, a number or a concrete array of one; None: 1 / sqrt(H). One that
        is traced can be multiplied into query.
      is_causal: Query t sees keys s <= t only.
      query_seq_lengths: Number of valid queries, [B] integers; the rows after them are zero.
      key_value_seq_lengths: Number of valid keys, [B] integers.
      local_window_size: (left, right), or one number for both: query t sees keys
        t - left <= s <= t + right.
      query_segment_ids: [B, T] integers ([T]); a query sees keys of its own segment only. Compared
        as int32: of a wider dtype concrete ids beyond it are refused, and traced ones count as the
        nearest that it holds.
      key_value_segment_ids: [B, S] integers ([S]); given if and only if query_segment_ids is.
      logits_soft_cap: c, from 1e-30 to 1e30: scaled logits x become c tanh(x / c) before the bias
        is added.
      implementation: 'vulkan': the shaders of this package; 'xla': the same algorithm in jax.numpy;
        None: Vulkan where a hardware GPU serves the call, else XLA, which also gets calls without
        adaptation that are too short for Vulkan to pay: on CUDA those of up to 2^23 pairs of a
        query row and a key in up to 8 tiles of 256 positions by 512 keys.
        `jax_aat.last_dispatch()` tells what Vulkan ran.
      adaptation: How much is computed exactly; None: everything, unless there is a plan. The
        gradient is that of the chosen levels, which have none themselves.
      plan: Levels to use, from `plan_tiles` for arguments of the same shapes, causality and window;
        None: chosen for this call.
      state: What calls remember, see `ResolutionState.init`. The state after the call is returned
        as well; a tolerance needs one, and levels settle with it.
      return_report: Also return a `Report` of what was done and, by an audit of some rows, how
        well. 'certified': with a certified bound on the error of every row, at the cost of a second
        call in float32 and more.
      return_residual: Also return the logsumexp of the logits of every row.

    Returns:
      The output in the shape and dtype of query; a row that sees no key is zero. With
      `return_residual` also logsumexp, [B, T, N] ([T, N]), in the dtype of query as
      `jax.nn.dot_product_attention` gives it; for a row that sees no key it is -0.7 times the
      largest float32 (in float16 the lowest number). Unlike there, gradients flow through it.
      A next state and a report follow it, in this order, where they are wanted; no gradient flows
      through these.

    Raises:
      TypeError: An argument has a type or dtype that is not allowed.
      ValueError: A shape does not fit, a value is out of range or the implementation is unknown.
      RuntimeError: implementation='vulkan' where Vulkan cannot be used; says why.
    """
    arguments.check_implementation(implementation)
    with_residual = arguments.flag("return_residual", return_residual)
    checked = arguments.check(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        logits_soft_cap=logits_soft_cap,
    )
    q = checked.operands[Slot.Q]
    chosen = vulkan.choose_implementation(implementation, q.dtype, q.shape[-1])
    adaptation = _adaptation(adaptation, plan, state)
    _check_observation(checked.operands, checked.options, adaptation, state, return_report)
    empty = any(x.size == 0 for x in checked.operands.values())
    following, report = state, None
    if adaptation is None or empty:
        by_size = implementation is None and chosen == "vulkan"
        out, lse = _attend(checked.operands, checked.options, BY_SIZE if by_size else chosen)
    else:
        out, lse, following, report = _attend_adaptively(
            checked.operands, checked.options, adaptation, chosen, plan, state, return_report
        )
    lowest = jnp.finfo(q.dtype).min
    residual = jnp.maximum(lse, lowest).astype(q.dtype)
    if not checked.batched:
        out, residual = out[0], residual[0]
        if report is not None and report.bound is not None:
            report = dataclasses.replace(report, bound=report.bound[0])
    wanted = (True, with_residual, state is not None, bool(return_report))
    results = [x for x, w in zip((out, residual, following, report), wanted, strict=True) if w]
    return tuple(results) if len(results) > 1 else out


@may_promote
def plan_tiles(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    adaptation: Adaptation,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    logits_soft_cap: ArrayLike | None = None,
    implementation: Implementation | None = None,
    state: ResolutionState | None = None,
) -> TilePlan:
    """Chooses at which level each tile of queries sees each granule of keys.

    Arguments are those of `tiled_attention`, to which the plan can be given for this and for other
    operands of the same shapes, causality and window.

    Returns:
      The plan; it has a batch axis even where the arguments have none.

    Raises:
      TypeError: An argument has a type or dtype that is not allowed.
      ValueError: A shape does not fit, a value is out of range or an axis has size 0.
      RuntimeError: implementation='vulkan' where Vulkan cannot be used; says why.
    """
    arguments.check_implementation(implementation)
    checked = arguments.check(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        logits_soft_cap=logits_soft_cap,
    )
    if any(x.size == 0 for x in checked.operands.values()):
        raise ValueError(
            f"plan_tiles: got query {jnp.shape(query)} and key {jnp.shape(key)}, "
            "expected no axis of size 0"
        )
    arguments.instance("adaptation", adaptation, Adaptation)
    _adaptation(adaptation, None, state)
    _check_observation(checked.operands, checked.options, adaptation, state, False)
    q = checked.operands[Slot.Q]
    chosen = vulkan.choose_implementation(implementation, q.dtype, q.shape[-1])
    past = (None, None) if state is None else (state.log_price, state.levels)

    def choose(values: tuple[Operands, Any, Any]) -> TilePlan:
        operands, price, previous = values
        chosen_plan: TilePlan = _choose(
            operands, checked.options, adaptation, price, previous, implementation=chosen
        )
        return chosen_plan

    plan: TilePlan = in_auto_mesh(choose, (checked.operands, *past), jax.sharding.PartitionSpec())
    return plan


def _adaptation(
    adaptation: Adaptation | None, plan: TilePlan | None, state: Any
) -> Adaptation | None:
    """The adaptation of a call, which a plan brings along."""
    arguments.instance("adaptation", adaptation, Adaptation, or_none=True)
    arguments.instance("plan", plan, TilePlan, or_none=True)
    if plan is not None:
        if adaptation not in (None, plan.adaptation):
            raise ValueError(f"plan: was made for {plan.adaptation}, the call has {adaptation}")
        return plan.adaptation
    if adaptation is not None and adaptation.tolerance is not None and state is None:
        raise ValueError("adaptation: a tolerance needs a state, which holds lambda; got none")
    return adaptation


def _check_observation(
    operands: Operands,
    options: Options,
    adaptation: Adaptation | None,
    state: ResolutionState | None,
    return_report: bool | str,
) -> None:
    """Checks what concerns state and report."""
    is_word = isinstance(return_report, str)
    if not (
        return_report == "certified" if is_word else isinstance(return_report, bool | np.bool_)
    ):
        raise (ValueError if is_word else TypeError)(
            f"return_report: got {arguments.describe(return_report)}, "
            "expected False, True or 'certified'"
        )
    if adaptation is None:
        for name, given in (("state", state is not None), ("return_report", return_report)):
            if given:
                raise ValueError(f"{name}: needs an adaptation or a plan, got neither")
        return
    if return_report and any(x.size == 0 for x in operands.values()):
        raise ValueError("return_report: got an axis of size 0, of which nothing can be reported")
    if state is not None:
        arguments.instance("state", state, ResolutionState, or_none=True)
        grid = grid_of(operands, adaptation)
        state.check_call(grid, operands[Slot.Q].shape[0])
        if (state.plan is None) != (adaptation.replan_every == 1):
            raise ValueError(
                f"state: was made for another replan_every than {adaptation.replan_every}: make "
                "one by ResolutionState.init for this adaptation"
            )
        if state.plan is not None:
            if state.plan.adaptation != adaptation:
                raise ValueError(
                    f"state: was made for {state.plan.adaptation}, the call has {adaptation}"
                )
            state.plan.check_call(operands, options, "state")


def _attend_adaptively(
    operands: Operands,
    options: Options,
    adaptation: Adaptation,
    implementation: str,
    plan: TilePlan | None,
    state: ResolutionState | None,
    return_report: bool | str,
) -> Any:
    """`adaptive.attend_observed` where mesh axes may be Explicit: results are sharded as q is."""
    spec = jax.typeof(operands[Slot.Q]).sharding.spec
    whole = jax.sharding.PartitionSpec()
    return in_auto_mesh(
        lambda values: _attend_observed(
            values[0],
            options,
            adaptation,
            implementation,
            *values[1:],
            reports=bool(return_report),
            certifies=return_report == "certified",
        ),
        (operands, plan, state),
        (spec, jax.sharding.PartitionSpec(*spec[:-1]), whole, whole),
    )


def _attend(operands: Operands, options: Options, implementation: str) -> Any:
    """The forward primitive; where mesh axes are Explicit, its results are sharded as q is."""
    spec = jax.typeof(operands[Slot.Q]).sharding.spec
    return in_auto_mesh(
        lambda values: forward(values, options, implementation),
        operands,
        (spec, jax.sharding.PartitionSpec(*spec[:-1])),
    )
