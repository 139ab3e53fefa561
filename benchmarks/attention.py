r"""Times attention of this package beside JAX's and PyTorch's, and states each one's error.

    python benchmarks/attention.py --lengths 4096 16384 65536 262144 --heads 8 --kv-heads 2 \
        --batch 1 --inputs clustered                                           # on a GPU
    python benchmarks/attention.py --lengths 256 512 --batch 1 --heads 4 --head-dims 32 \
        --dtype float32 --repeats 3 --contenders "jax_aat exact" "jax_aat adaptive" "jax.nn xla" \
        --budgets 0.5                                                          # on a processor

One run writes a table, JSON and a picture to ``benchmarks/results``, after every case, so that what
was measured stays if it is stopped. A contender that fails, is not installed or would not fit is
one row that says why.

Three times a row, in milliseconds: ``latency``, the median of single calls, each waited for;
``pipelined``, the mean over calls that are started one after another and waited for together;
``kernel``, the median of the device's own time stamps, where the contender has them. ``hand-over``
is what a call of this package in such a row takes beside its kernels, both of the same calls: a
device in use slows down, so time stamps of calls that were waited for do not tell it. Rates are
taken from ``kernel``, else from ``pipelined``, and count the FLOPs that the contender spent;
with gradients they count as 3.5 forward passes, with a tangent as 3. Adaptive attention plans anew
in every call.

``error`` is the largest of those of out, its tangent, dq, dk, dv, each as ||x - right|| /
||right|| against float32; ``IFQ`` is 1 - sum ||out - right||^2 / sum ||right||^2. They are of rows
that are drawn from the first batch entry (`sampling.py`). ``FLOPs`` are those of a forward pass
over those of exact attention: 1 for dense ones, from its report for adaptive attention, from its
blocks for FlexAttention. ``memory`` is the most device memory taken, operands and results included,
by what ``memory_from`` in the JSON says (`passes.py`). What is attended to is in `inputs.py`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import inputs
import numpy as np
from passes import Array, Maker, Measured, SkippedError
from sampling import Expected, expect, judge
from speed_contenders import NAMES, Budget, chosen
from surroundings import surroundings
from tables import line_of, write
from torch_contenders import release_memory

import jax_aat
from jax_aat.commands.contenders import Case, Direction, Pass

FOLDER = Path(__file__).parent
PASSES: dict[str, Direction] = {
    "forward": "forward",
    "forward+tangent": "tangent",
    "forward+backward": "backward",
}
_FORWARD_PASSES: dict[Direction, float] = {"forward": 1.0, "tangent": 3.0, "backward": 3.5}
"""So many products as of forward passes: 2, 6 and 7."""
_WARM_UP = 2
_LEAST_REPEATS = 3


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[4096, 16384])
    add("--head-dims", type=int, nargs="+", default=[64, 128])
    add("--batch", type=int, nargs="+", default=[4])
    add("--heads", type=int, default=16)
    add("--kv-heads", type=int, nargs="+", help="default: as many as heads")
    add("--causal", choices=["both", "yes", "no"], default="both")
    add("--passes", nargs="+", choices=PASSES, default=["forward", "forward+backward"])
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--inputs", choices=inputs.KINDS, default="noise")
    add("--model", type=Path, help="folder of weights or captured file, for --inputs model")
    add("--layer", type=int, default=0, help="layer of the model, where it is a folder")
    add("--contenders", nargs="+", default=list(NAMES), choices=NAMES)
    add("--budgets", type=float, nargs="*", default=[0.125], help="fractions of exact attention")
    add("--budget-keys", type=float, nargs="*", default=[], help="keys a query, at every length")
    add(
        "--settings",
        type=settings_of,
        nargs="+",
        default=[()],
        help="of adaptive attention beside its budget, each set of them a contender: NAME=NUMBER"
        " of stages, query_tile or super_tile, joined by commas, or 'default'",
    )
    add("--flex-blocks", type=int, nargs="+", default=[128], help="sizes of FlexAttention's blocks")
    add("--repeats", type=int, default=30)
    add("--seconds", type=float, default=2.0, help="a row's timing stops repeating after them")
    add("--output", type=Path, default=FOLDER / "results")
    add("--name", help="of the files; default: attention and the date")
    return parser.parse_args(arguments)


def settings_of(text: str) -> tuple[tuple[str, int], ...]:
    """Attributes of an `Adaptation`, as the command line has them."""
    if text == "default":
        return ()
    pairs = [part.partition("=") for part in text.split(",")]
    if any(name not in ("stages", "query_tile", "super_tile") for name, _, _ in pairs):
        raise ValueError(text)
    return tuple((name, int(value)) for name, _, value in pairs)


def cases_of(args: argparse.Namespace) -> Iterator[Case]:
    """The problems, the shortest first: what can fail for want of memory comes last."""
    causal = {"both": [False, True], "yes": [True], "no": [False]}[args.causal]
    kv_heads = args.kv_heads or [args.heads]
    for sizes in itertools.product(args.lengths, args.batch, kv_heads, args.head_dims, causal):
        length, batch, kv, head_dim, is_causal = sizes
        yield Case(batch, args.heads, kv, length, length, head_dim, is_causal, args.dtype)


def measure(made: Pass, repeats: int, seconds: float) -> dict[str, Any]:
    """Times a pass that has been warmed up; milliseconds."""
    began = time.perf_counter()
    made.wait(made.start())
    # Each is called four times: for its time stamps, alone, in a row, in a row with time stamps.
    once = time.perf_counter() - began
    repeats = min(repeats, max(_LEAST_REPEATS, int(seconds / 4 / once)))
    kernels = [made.device_milliseconds() for _ in range(repeats)]
    latencies = []
    for _ in range(repeats):
        began = time.perf_counter()
        made.wait(made.start())
        latencies.append((time.perf_counter() - began) * 1e3)
    pipelined = _in_a_row(made, repeats)
    with jax_aat.profile(by_kernel=False) as prof:
        stamped = _in_a_row(made, repeats)
    on_device = sum(call.seconds for call in prof.calls) * 1e3 / repeats
    return {
        "latency": statistics.median(latencies),
        "latency_p90": float(np.percentile(latencies, 90)),
        "pipelined": pipelined,
        "kernel": None if None in kernels else statistics.median(kernels),
        "hand_over": stamped - on_device if on_device > 0 else None,
        "repeats": repeats,
    }


def _in_a_row(made: Pass, repeats: int) -> float:
    """Milliseconds a call of calls that are started one after another and waited for together."""
    began = time.perf_counter()
    for _ in range(repeats):
        last = made.start()
    made.wait(last)
    return (time.perf_counter() - began) * 1e3 / repeats


def run_row(
    case: Case,
    make: Maker,
    direction: Direction,
    arrays: list[Array],
    expected: Expected,
    repeats: int,
    seconds: float,
) -> dict[str, Any]:
    """Measures one contender on one case: fields of its row, ``failed`` among them if it did."""
    row: dict[str, Any] = {}
    try:
        made = make(case, arrays, direction)
        # Nobody keeps these results: they would count as memory of the next call.
        for _ in range(_WARM_UP):
            made.wait(made.start())
        row |= {"path": made.path(), **_memory(made)}
        row |= judge(expected, made, made.wait(made.start()))
        row |= measure(made, repeats, seconds)
    except Exception as error:  # one contender that fails must not hide the others
        return row | {"failed": reason(error)}
    try:
        row |= made.facts()
    except Exception as error:  # a report, say, for which there is no room: the times stand
        return row | {"relative_flops": None, "tflops": None, "facts_failed": reason(error)}
    operations = case.floating_point_operations() * _FORWARD_PASSES[direction]
    milliseconds = row["kernel"] or row["pipelined"]
    row["tflops"] = operations * row["relative_flops"] / milliseconds * 1e-9
    return row


def _memory(made: Measured) -> dict[str, Any]:
    found = made.memory()
    return {} if found is None else {"memory": found[0], "memory_from": found[1]}


def reason(error: Exception) -> str:
    """Why a contender failed, in a line."""
    if isinstance(error, SkippedError):
        return f"skipped: {error}"
    return (f"{type(error).__name__}: {error}".splitlines() or ["unknown"])[0][:200]


def run_case(case: Case, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of all passes and contenders of a case."""
    budgets = [Budget(x) for x in args.budgets] + [Budget(x, True) for x in args.budget_keys]
    budgets = [replace(budget, settings=x) for budget in budgets for x in args.settings]
    contenders = chosen(args.contenders, budgets, args.flex_blocks)
    problem = ""
    try:
        arrays = inputs.make(args.inputs, case, args.model, args.layer)
    except Exception as error:
        problem = f"no inputs: {reason(error)}"
    for name in args.passes:
        direction = PASSES[name]
        try:
            expected = None if problem else expect(case, arrays, direction)
        except Exception as error:
            problem = f"no reference: {reason(error)}"
        for contender, make in contenders.items():
            row = {"inputs": args.inputs, **asdict(case), "pass": name, "contender": contender}
            if problem or expected is None:
                yield row | {"failed": problem}
                continue
            yield row | run_row(case, make, direction, arrays, expected, args.repeats, args.seconds)
            gc.collect()  # what it held of the device is free for the next one
            release_memory()


def main(arguments: list[str] | None = None) -> int:
    """Runs every case and returns 1 if jax_aat failed in any."""
    args = parse_arguments(arguments)
    facts: dict[str, Any] = surroundings()
    if args.inputs == "model":
        facts["model"] = f"{args.model and args.model.name}, layer {args.layer}"
    rows: list[dict[str, Any]] = []
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / (args.name or f"attention-{facts['date'].replace(':', '')[:15]}")
    text = ""
    for case in cases_of(args):
        for row in run_case(case, args):
            rows.append(row)
            print(line_of(row), flush=True)
        text = write(stem, facts, rows)
    print(f"\n{text}\n\nwritten: {stem}.md, {stem}.json, {stem}.png")
    ours = [row for row in rows if row["contender"].startswith("jax_aat")]
    return any("failed" in row and not row["failed"].startswith("skipped") for row in ours)


if __name__ == "__main__":
    sys.exit(main())
