"""What limits the calls of a profile, and what to do about it, with the numbers that say so.

A kernel is placed on the roofline: the rate of its products over that of the device, and the rate
at which it has to move bytes over the device's bandwidth. Each rule looks at one cause.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jax_aat import roofline, vulkan
from jax_aat.roofline import Ceilings

if TYPE_CHECKING:
    from jax_aat.profiling import KernelTime, Profile, ProfiledCall

LARGE = 0.5
"""Share of a ceiling from which on it is what limits a kernel, and of time that is worth words."""
WORTH_A_WORD = 0.05
"""Share of all kernels' time below which a kernel is not spoken of."""
SHORT = 20e-6
"""Seconds; a kernel of less ends before the device is full."""
PLANNING_SHARE = 0.2
WANTED_PLANNING_SHARE = 0.05
IMBALANCE = 4.0
"""Rows of the longest list over the mean."""
NOTHING_SAVED = 0.8
"""Share of all pairs that a plan leaves, from which on it saves next to nothing."""
HAND_OVER = 0.35e-3
"""Seconds that a change from CUDA to Vulkan and back takes (docs/performance.md), where the stream
was not timed."""

PLANNING = frozenset(
    {
        *("segment_ranges", "tile_processor", "cross_tile_router", "plan_price", "plan_levels"),
        *("plan_list_starts", "plan_key_lists", "plan_lists"),
    }
)
"""Shaders that make plans."""


@dataclass(frozen=True)
class Insight:
    """One finding.

    Attributes:
      cause: 'compute', 'memory', 'launch', 'imbalance', 'latency', 'planning', 'copies',
        'hand-over', 'dtype', 'kernels' or 'nothing saved'.
      subject: The kernel, the direction of calls or the dtype that it is about.
      seconds: Time that it is about.
      message: What was found and what to do.
    """

    cause: str
    subject: str
    seconds: float
    message: str

    def __str__(self) -> str:
        return f"[{self.cause}] {self.message}"


def insights(profile: Profile, ceilings: Ceilings) -> tuple[Insight, ...]:
    """Findings about a profile, those about most time first.

    Args:
      profile: Taken by kernel; of calls timed as a whole only the rules about calls speak.
      ceilings: Of the device that ran the calls.
    """
    found = [
        *_kernels(profile, ceilings),
        *_planning(profile),
        *_nothing_saved(profile),
        *_host(profile),
        *_choices(profile),
    ]
    return tuple(sorted(found, key=lambda insight: -insight.seconds))


def _kernels(profile: Profile, ceilings: Ceilings) -> Iterator[Insight]:
    """The place of each kernel on the roofline."""
    timed = [(call, kernel) for call in profile.calls for kernel in call.kernels]
    total = sum(kernel.seconds for _, kernel in timed)
    for name in dict.fromkeys(kernel.name for _, kernel in timed):
        calls = [call for call, kernel in timed if kernel.name == name]
        kernels = [kernel for _, kernel in timed if kernel.name == name]
        seconds = sum(kernel.seconds for kernel in kernels)
        if seconds < WORTH_A_WORD * total:
            continue
        head = f"{name} takes {seconds / total:.0%} of the kernels' time"
        compute = _share(kernels, "flops", ceilings.matrix_flops[calls[0].dtype])
        memory = _share(kernels, "bytes", ceilings.bandwidth)
        mean = seconds / len(kernels)
        if compute >= LARGE and compute >= memory:
            yield Insight(
                "compute",
                name,
                seconds,
                f"{head} at {compute:.0%} of the device's rate of products: fewer pairs make it "
                "faster (a budget, a window), nothing else will by much",
            )
        elif memory >= LARGE:
            yield Insight(
                "memory",
                name,
                seconds,
                f"{head} at {memory:.0%} of the device's bandwidth: 16-bit operands and fewer "
                "key/value heads make it faster",
            )
        elif mean < SHORT:
            yield Insight(
                "launch",
                name,
                seconds,
                f"{head} in {len(kernels)} runs of {1e6 * mean:.1f} µs, too short to fill the "
                "device: put more heads or sequences into a call (vmap, a larger batch)",
            )
        elif imbalance := _imbalance(calls, name):
            yield Insight(
                "imbalance",
                name,
                seconds,
                f"{head} at {max(compute, memory):.0%} of what the device could do, and the "
                f"longest work list is {imbalance:.1f} times the mean: most of the device waits "
                "for few tiles; more heads in a call, or a smaller query_tile, spread the work",
            )
        elif not (math.isnan(compute) or math.isnan(memory)):
            yield Insight(
                "latency",
                name,
                seconds,
                f"{head} at {compute:.0%} of the device's rate of products and {memory:.0%} of "
                "its bandwidth: neither limits it; longer sequences or more heads fill it better",
            )


def _share(kernels: Sequence[KernelTime], what: str, ceiling: float) -> float:
    """Rate over the ceiling, of the kernels whose amount is known; NaN: of none."""
    return roofline.rate(kernels, what) / ceiling if ceiling > 0 else math.nan


def _imbalance(calls: Sequence[ProfiledCall], name: str) -> float:
    """Rows of the longest list over the mean, if large, where the kernel walks such lists; or 0."""
    if not name.startswith(("attend_forward", "attend_tangent", "attend_backward_dq")):
        return 0
    worst = 0.0
    for call in calls:
        if (
            _shares_lists(call)
            or call.most_rows is None
            or call.exact_pairs is None
            or call.coarse_pairs is None
        ):
            continue
        pairs = call.exact_pairs + call.coarse_pairs
        if pairs > 0:
            worst = max(worst, call.most_rows * call.query_rows / pairs)
    return worst if worst >= IMBALANCE else 0


def _planning(profile: Profile) -> Iterator[Insight]:
    calls = [call for call in profile.calls if call.kernels]
    planning = sum(
        kernel.seconds for call in calls for kernel in call.kernels if _family(kernel) in PLANNING
    )
    total = sum(
        kernel.seconds for call in calls if call.exact_pairs is not None for kernel in call.kernels
    )
    share = planning / total if total > 0 else 0
    if share < PLANNING_SHARE:
        return
    # Of p / r + a = wanted * (p / r + a), the r to reuse plans for.
    rest = total - planning
    calls_a_plan = math.ceil(
        planning * (1 - WANTED_PLANNING_SHARE) / max(WANTED_PLANNING_SHARE * rest, 1e-12)
    )
    yield Insight(
        "planning",
        "plan",
        planning,
        f"planning takes {share:.0%} of the kernels' time of planned calls: use "
        f"replan_every={min(calls_a_plan, 64)} with a state, or make a plan once and give it as "
        "plan=, or stages=1, which causal calls of at least 32,768 keys and budgets of up to a "
        "quarter have by default; "
        f"{WANTED_PLANNING_SHARE:.0%} is little",
    )


def _nothing_saved(profile: Profile) -> Iterator[Insight]:
    for direction in dict.fromkeys(call.direction for call in profile.calls):
        calls = [
            call
            for call in profile.calls
            if call.direction == direction != "plan" and call.exact_pairs is not None
        ]
        left = sum((call.exact_pairs or 0) + (call.coarse_pairs or 0) for call in calls)
        pairs = sum(call.dense_pairs for call in calls)
        if pairs > 0 and left >= NOTHING_SAVED * pairs:
            yield Insight(
                "nothing saved",
                direction,
                sum(call.seconds for call in calls),
                f"{direction} calls with a plan read {left / pairs:.0%} of the rows that exact "
                "attention reads: exact attention (adaptation=None) is as fast and exact; the "
                "report of a call says which rows must be exact",
            )


def _host(profile: Profile) -> Iterator[Insight]:
    for platform in dict.fromkeys(call.platform for call in profile.calls):
        calls = [
            call
            for call in profile.calls
            if call.platform == platform and not math.isnan(call.seconds)
        ]
        device = sum(call.seconds for call in calls)
        host = sum(call.host_seconds for call in calls)
        staged = sum(call.staged_bytes for call in calls)
        if platform == "cuda":
            hand_overs = [_hand_over(call) for call in calls]
            shorter = sum(
                call.seconds < hand_over for call, hand_over in zip(calls, hand_overs, strict=True)
            )
            if shorter > LARGE * len(calls):
                yield Insight(
                    "hand-over",
                    platform,
                    sum(hand_overs),
                    f"{shorter} of {len(calls)} calls take less than the "
                    f"{1e3 * statistics.median(hand_overs):.2f} ms of a hand-over from "
                    "CUDA to Vulkan and back: put more work into a call, or use "
                    "jax.nn.dot_product_attention at these sizes",
                )
            if staged > 0:
                yield Insight(
                    "copies",
                    platform,
                    device,
                    f"{staged / 1e6:.1f} MB were copied on the device because XLA's memory cannot "
                    "be imported: use the default allocator "
                    "(XLA_PYTHON_CLIENT_ALLOCATOR=default), not cuda_async or platform",
                )
            continue
        idle = host - device
        if host <= 0 or idle < LARGE * host:
            continue
        if staged > 0:
            yield Insight(
                "copies",
                platform,
                idle,
                f"the device waits for {idle / host:.0%} of the calls' {1e3 * host:.1f} ms while "
                f"{staged / 1e6:.1f} MB are copied between the host and the device: larger arrays "
                "are imported, and on JAX's CUDA platform nothing is copied",
            )
        else:
            yield Insight(
                "launch",
                platform,
                idle,
                f"the device works for {device / host:.0%} of the calls' {1e3 * host:.1f} ms; "
                "the rest starts and ends them: put more heads or sequences into a call (vmap, "
                "a larger batch)",
            )


def _hand_over(call: ProfiledCall) -> float:
    """What of the stream's time is not the kernels'."""
    taken = call.stream_seconds - call.seconds
    return HAND_OVER if math.isnan(taken) else taken


def _choices(profile: Profile) -> Iterator[Insight]:
    traits = profile.device.traits if profile.device is not None else {}
    portable = [call for call in profile.calls if call.path == "portable" and call.kernels]
    matrices = [dtype for dtype in ("bfloat16", "float16") if vulkan.has_matrices(traits, dtype)]
    if not matrices:
        return
    wide = [call for call in portable if call.dtype == "float32"]
    if wide:
        yield Insight(
            "dtype",
            "float32",
            sum(call.seconds for call in wide),
            f"{len(wide)} calls are of float32, which the device's matrix units do not multiply: "
            f"{' or '.join(matrices)} operands use them",
        )
    others = [call for call in portable if call.dtype in matrices and call.direction != "plan"]
    if others:
        yield Insight(
            "kernels",
            "portable",
            sum(call.seconds for call in others),
            f"{len(others)} calls, of {others[0].problem} and the like, run on portable kernels: "
            "matrix kernels take a head_dim up to 256 that is a multiple of 8 (those of tangents "
            "bfloat16 and up to 128), and plans with a query_tile of 64 or more",
        )


def _shares_lists(call: ProfiledCall) -> bool:
    """Whether several workgroups walk the list of a tile."""
    return any(_family(kernel) == "merge_parts" for kernel in call.kernels)


def _family(kernel: KernelTime) -> str:
    return kernel.name.split(".")[0].removesuffix("_coopmat")


def default_ceilings(profile: Profile) -> Ceilings:
    """Those of the device of a profile's calls."""
    names = {call.device for call in profile.calls}
    for device in vulkan.devices():
        if device.name in names:
            return roofline.ceilings(device)
    return roofline.ceilings(profile.device)
