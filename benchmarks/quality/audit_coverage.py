r"""How often the audited error's 95% interval holds the true error, and how wide it is.

    python benchmarks/quality/audit_coverage.py --calls 1000

Of synthetic streams; with `--weights` of all layers of a trained model on held-out windows:

    python benchmarks/quality/audit_coverage.py --weights build/quality --windows 125 --draws 8
    python benchmarks/quality/audit_coverage.py --weights build/quality --windows 60 --draws 4 \
        --window-length 512                                                # on a processor
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import model_streams
import numpy as np
from model import Shape
from synthetic_streams import KINDS, draw
from tqdm import tqdm

import jax_aat

Found = tuple[jax.Array, ...]
"""Of calls: true relative errors [calls, N + 1] of every head and of all of them together, audited
ones, the ends of their intervals [calls, N + 1, 2], and numbers of audited rows [calls]."""


def audited(
    operands: tuple[jax.Array, ...],
    steps: jax.Array,
    adaptation: jax_aat.Adaptation,
    implementation: str | None,
) -> Found:
    """Calls with the same operands, each of which audits other rows."""
    attend = partial(
        jax_aat.tiled_attention, *operands, is_causal=True, implementation=implementation
    )
    exact = model_streams.attend_exactly(operands, implementation)
    start = jax_aat.ResolutionState.init(*operands[:2], adaptation)

    def call(step: jax.Array) -> Found:
        state = dataclasses.replace(start, step=step)
        out, _, report = attend(adaptation=adaptation, state=state, return_report=True)
        audits = report.audit, report.audit.joined(operands[0].shape[2])
        found = jnp.concatenate([a.relative_error for a in audits])
        interval = jnp.concatenate([a.interval for a in audits])
        return model_streams.relative_errors(out, exact), found, interval, audits[0].rows.max()

    return jax.lax.map(call, steps)


@partial(jax.jit, static_argnames=("kind", "calls", "batch", "length", "adaptation"))
def of_stream(
    kind: str, calls: int, batch: int, length: int, adaptation: jax_aat.Adaptation
) -> Found:
    """Calls with operands of their own."""

    def call(i: jax.Array) -> Found:
        operands = draw(kind, jax.random.fold_in(jax.random.key(1), i), i, batch, length)
        return jax.tree.map(lambda x: x[0], audited(operands, i[None], adaptation, "xla"))

    return jax.lax.map(call, jnp.arange(calls))


@partial(jax.jit, static_argnames=("shape", "adaptation", "implementation"))
def of_window(
    shape: Shape,
    params: Any,
    window: jax.Array,
    steps: jax.Array,
    adaptation: jax_aat.Adaptation,
    implementation: str | None,
) -> Found:
    """Calls [layers, steps] of the layers of a model on a window [T + 1]."""
    operands = model_streams.operands_by_layer(shape, params, window)
    return jax.lax.map(lambda x: audited(x, steps, adaptation, implementation), operands)


def _factor(width: np.ndarray) -> str:
    """The median factor between the ends of intervals: at most e^80, or infinite."""
    median = np.median(width)
    if median > 1e30:
        return "unbounded"
    return f"{median:.2f}" if median < 1000 else f"{median:.0e}"


def print_row(inputs: str, size: str, results: Found) -> None:
    """Prints a row of the table."""
    true, found, interval, rows = (np.asarray(x) for x in results)
    low, high = interval[..., 0], interval[..., 1]
    covered = (low <= true) & (true <= high)
    width = np.divide(high, low, out=np.full_like(high, np.inf), where=low > 0)
    print(
        f"| {inputs} | {size} | {len(true)} | {rows.max():.0f} "
        f"| {true[:, -1].mean():.4f} | {(found**2).sum() / (true**2).sum():.3f} "
        f"| {covered[:, :-1].mean():.1%} | {_factor(width[:, :-1])} "
        f"| {covered[:, -1].mean():.1%} | {_factor(width[:, -1])} |",
        flush=True,
    )


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--calls", type=int, default=1000, help="of a synthetic stream")
    parser.add_argument("--draws", type=int, default=8, help="of rows, a window and layer")
    model_streams.add_arguments(parser)
    args = parser.parse_args()
    model_streams.print_surroundings()
    print("| inputs | B x T | calls | audited rows | true error", end=" ")
    print("| mean square, audited / true | covered, a head | width | covered, all heads | width |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    if args.weights is None:
        adaptation = jax_aat.Adaptation(budget=args.budget, query_tile=32)
        for batch, length in ((1, 512), (2, 1024)):
            for kind in KINDS:
                calls = of_stream(kind, args.calls, batch, length, adaptation)
                print_row(kind, f"{batch} x {length}", calls)
        return
    shape, params, windows = model_streams.load(args)
    adaptation = jax_aat.Adaptation(budget=args.budget)
    parts = []
    for i, window in enumerate(tqdm(windows, unit="window")):
        steps = jnp.arange(args.draws) + i * args.draws
        parts.append(of_window(shape, params, window, steps, adaptation, args.implementation))
    joined = [np.concatenate(x, axis=1) for x in zip(*jax.device_get(parts), strict=True)]
    size = f"1 x {args.window_length}"
    for layer in range(shape.layers):
        print_row(f"layer {layer}", size, tuple(x[layer] for x in joined))
    print_row("all layers", size, tuple(np.concatenate(x) for x in joined))


if __name__ == "__main__":
    main()
