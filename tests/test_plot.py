"""Pictures: what is drawn is what the plan, the points or the profile say."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from levels_maps import packed
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from jax_aat import Adaptation, Audit, Report, TilePlan, plot
from jax_aat.levels import EXACT, HIDDEN, MEAN, SUPER_MEAN, Grid
from jax_aat.plot.style import spread

NAVY, ORANGE, YELLOW, GREY, WHITE = "#16285c", "#d1603d", "#f3c969", "#c3d0dc", "#ffffff"


def test_matplotlib_is_imported_with_the_pictures_only_and_without_pyplot() -> None:
    script = (
        "import sys, jax_aat; assert 'matplotlib' not in sys.modules; "
        "import jax_aat.plot; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_matplotlib_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("jax_aat.plot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        importlib.import_module("jax_aat.plot")


# Resolution maps.


def plan_of(levels: Any, grid: Grid, adaptation: Adaptation | None = None) -> TilePlan:
    """A causal plan of levels [B, L, I, granules], for pictures: its lists are empty."""
    adaptation = adaptation or Adaptation(
        budget=0.5, query_tile=grid.query_tile, super_tile=grid.super_tile
    )
    unfilled = TilePlan.unfilled(grid, adaptation, True, (-1, -1), len(levels))
    return dataclasses.replace(unfilled, levels=jnp.asarray(packed(np.asarray(levels))))


# Four query heads over two: 2 lists, tiles of 16 positions; 4 tiles x 4 granules.
SMALL = Grid(queries=64, keys=60, heads=4, kv_heads=2, query_tile=32, super_tile=256)
X = HIDDEN
FIRST = [[0, X, X, X], [1, 0, X, X], [2, 1, 0, X], [2, 2, 1, 0]]
SECOND = [[0, X, X, X], [0, 0, X, X], [0, 0, 0, X], [0, 0, 0, 0]]


def colours(axes: Axes) -> list[list[str]]:
    (image,) = axes.images
    cells = image.cmap(image.norm(image.get_array()))
    return [[to_hex(cell) for cell in row] for row in cells]


def test_resolution_map_has_a_panel_a_list_and_a_colour_a_level() -> None:
    figure = plot.resolution_map(plan_of([[FIRST, SECOND]], SMALL))
    first, second = figure.axes
    assert colours(first) == [
        [NAVY, WHITE, WHITE, WHITE],
        [ORANGE, NAVY, WHITE, WHITE],
        [YELLOW, ORANGE, NAVY, WHITE],
        [YELLOW, YELLOW, ORANGE, NAVY],
    ]
    assert colours(second)[3] == [NAVY] * 4
    for axes in (first, second):
        assert axes.images[0].get_extent() == [0, 64, 64, 0]
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 60), (64, 0))
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("key position", "query position")
    assert first.get_title() == "query heads 0 to 1\n40.0% exact, 30.0% mean, 30.0% super-tile"
    assert second.get_title() == "query heads 2 to 3\n100.0% exact"
    (legend,) = figure.legends
    labels = {text.get_text() for text in legend.get_texts()}
    assert labels == {
        *("exact", "mean of 16 keys", "super-tile: mean of up to 256 keys", "not visible")
    }
    swatches = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
    assert swatches == [NAVY, ORANGE, YELLOW, WHITE]
    assert legend.get_title().get_text() == "level in 16 keys x 16 queries"


def test_granules_left_out_differ_from_those_that_causality_hides() -> None:
    left_out = [[0, X, X, X], [X, 0, X, X], [0, X, 0, X], [X, X, X, 0]]
    only_exact = Adaptation(budget=0.5, query_tile=32, levels=(EXACT,))
    figure = plot.resolution_map(plan_of([[left_out, SECOND]], SMALL, only_exact), heads=[1])
    (axes,) = figure.axes
    assert colours(axes) == [
        [NAVY, WHITE, WHITE, WHITE],
        [GREY, NAVY, WHITE, WHITE],
        [NAVY, GREY, NAVY, WHITE],
        [GREY, GREY, GREY, NAVY],
    ]
    assert axes.get_title().endswith("50.0% exact, 50.0% left out")
    swatches = [to_hex(patch.get_facecolor()) for patch in figure.legends[0].get_patches()]
    assert swatches == [NAVY, GREY, WHITE]


def test_batch_entry_and_heads_are_chosen_and_axes_may_be_given() -> None:
    plan = plan_of([[FIRST, FIRST], [FIRST, SECOND]], SMALL)
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    assert plot.resolution_map(plan, batch=1, heads=[3], axes=left) is figure
    plot.resolution_map(plan, batch=1, heads=[0, 1], axes=[right])
    assert colours(left)[3] == [NAVY] * 4
    assert colours(right)[3] == [YELLOW, YELLOW, ORANGE, NAVY]
    assert len(figure.axes) == 2
    assert len(figure.legends) == 1


def test_long_sequences_are_drawn_by_the_most_frequent_level(rng: np.random.Generator) -> None:
    grid = Grid(
        queries=300 * 16, keys=520 * 16, heads=1, kv_heads=1, query_tile=16, super_tile=1024
    )
    level = rng.integers(0, 4, (300, 520))
    level[:2, :4] = HIDDEN
    level[:2, 4:8] = [[MEAN, HIDDEN, HIDDEN, HIDDEN], [SUPER_MEAN, MEAN, HIDDEN, HIDDEN]]
    figure = plot.resolution_map(plan_of([[level]], grid))
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    assert drawn.shape == (150, 130)
    assert (drawn[0, 0], drawn[0, 1]) == (4, MEAN)
    for i, j in itertools.product(range(150), range(130)):
        cell = level[2 * i : 2 * i + 2, 4 * j : 4 * j + 4].ravel()
        counts = Counter(int(x) for x in cell if x != HIDDEN)
        finest = min(counts, key=lambda x: (-counts[x], x), default=4)
        assert drawn[i, j] == finest, (i, j)
    assert figure.axes[0].get_title().startswith("query head 0\n")
    title = figure.legends[0].get_title().get_text()
    assert title == "most frequent level in 64 keys x 32 queries"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 1}, "batch: got 1, the plan has entries 0 to 0"),
        ({"batch": -1}, "batch: got -1"),
        ({"heads": [0, 4]}, "heads: got 4, the plan has heads 0 to 3"),
        ({"heads": []}, "heads: got none"),
        ({"axes": []}, "axes: got 0, expected one for each of 2 panels"),
    ],
)
def test_what_a_plan_does_not_have_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.resolution_map(plan_of([[FIRST, SECOND]], SMALL), **arguments)


def test_stacked_plans_and_other_things_are_refused() -> None:
    plan = plan_of([[FIRST, SECOND]], SMALL)
    with pytest.raises(ValueError, match=r"\[1, 1, 2, 4, 1\], expected \[B, L, I, W\]"):
        plot.resolution_map(jax.tree.map(lambda x: x[None], plan))
    with pytest.raises(TypeError, match="plan: got ndarray"):
        plot.resolution_map(np.zeros((1, 2, 4, 1)))  # type: ignore[arg-type]


# Quality.


def report_of(flops: Sequence[float], error: Sequence[float], rows: int = 4) -> Report:
    """A report of heads with FLOPs of a dense 100, and audited errors of norm 1."""
    n = len(flops)
    one = jnp.ones(n)
    audit = Audit(
        rows=rows * one,
        error=jnp.asarray(error) ** 2,
        error_squares=jnp.asarray(error) ** 4 / 4,
        erring=jnp.ones_like(jnp.asarray(error)),
        largest_error=jnp.asarray(error) ** 2 / 4,
        norm=one,
        held=one,
        best=one,
    )
    names = [field.name for field in dataclasses.fields(Report)]
    values = dict.fromkeys(names, 0 * one) | {"audit": audit, "bound": None}
    values |= {"flops": jnp.asarray(flops, jnp.float32), "dense_flops": 100 * one}
    return Report(**values)


def test_quality_draws_points_in_order_with_their_intervals() -> None:
    curves = {
        "ours": [(0.5, 0.01, 0.008, 0.02), (0.125, 0.1, 0.05, 0.2)],
        "nothing": [],
        "others": [(0.25, 0.5)],
    }
    (axes,) = plot.quality(curves, value="error").axes
    ours, others = axes.lines
    np.testing.assert_allclose(ours.get_xydata(), [(0.125, 0.1), (0.5, 0.01)])
    np.testing.assert_allclose(others.get_xydata(), [(0.25, 0.5)])
    assert (ours.get_label(), others.get_label()) == ("ours", "others")
    assert (ours.get_linestyle(), others.get_linestyle()) == ("-", "--")
    assert others.get_color() == "#009e73"  # the third, that of the second is kept for it
    band, bars = axes.collections
    bounds = band.get_paths()[0].get_extents()
    np.testing.assert_allclose([*bounds.min, *bounds.max], [0.125, 0.008, 0.5, 0.2])
    np.testing.assert_allclose(
        bars.get_segments(), [[(0.125, 0.05), (0.125, 0.2)], [(0.5, 0.008), (0.5, 0.02)]]
    )
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["12.5%", "25%", "50%"]
    assert axes.get_ylabel() == "error"


def test_intervals_that_say_nothing_do_not_flatten_the_values() -> None:
    (axes,) = plot.quality({"a": [(0.25, 0.1, 1e-9, 1e9), (0.5, 0.05, 0.04, 0.06)]}).axes
    np.testing.assert_allclose(axes.get_ylim(), (0.005, 1))
    (axes,) = plot.quality({"a": [(0.25, 0.1, 0.09, 0.12)]}).axes
    np.testing.assert_allclose(axes.get_ylim(), (0.09 / 1.3, 0.12 * 1.3))


def test_a_loss_that_falls_is_drawn_on_a_linear_axis() -> None:
    figure = Figure()
    axes = figure.subplots()
    assert plot.quality({"a": [(0.25, -0.01), (0.5, 0.0)]}, axes=axes) is figure
    assert axes.get_yscale() == "linear"
    assert axes.lines[-1].get_ydata() == [0, 0]


def test_a_report_is_a_point_of_all_its_heads() -> None:
    report = report_of([10, 30], [0.03, 0.04])
    (axes,) = plot.quality({"budget": [report]}).axes
    error = math.sqrt((0.03**2 + 0.04**2) / 2)
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [(0.2, error)], rtol=1e-6)
    low, high = np.asarray(report.audit.joined(2).interval[0])
    assert low < error < high
    (bar,) = axes.collections[1].get_segments()
    np.testing.assert_allclose(bar[:, 1], [low, high])


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, r"curves: got no points of \[\]"),
        ({"a": []}, r"curves: got no points of \['a'\]"),
        ({"a": [(0.5, 1.0, 2.0)]}, r"curves\['a'\]\[0\]: got 3 numbers"),
        ({"a": [(0.5, 1.0), (0.0, 1.0)]}, r"curves\['a'\]\[1\]: got .* FLOPs above 0"),
        ({"a": [(0.5, math.nan)]}, "finite"),
        ({"a": [(0.5, 1.0, 2.0, 0.0)]}, "low <= high"),
        ({"a": [report_of([10.0], [0.1], rows=0)]}, "without audited rows"),
        ({"a": [jax.tree.map(lambda x: x[None], report_of([10.0], [0.1]))]}, "of one call"),
    ],
)
def test_points_that_cannot_be_drawn_are_refused(curves: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.quality(curves)


# Profiles, by stand-ins that have the fields of those of `jax_aat.profiling`.


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    start: float
    seconds: float
    flops: float = 0.0
    bytes: float = 1e6


@dataclasses.dataclass(frozen=True)
class Call:
    sequence: int
    direction: str
    queue: int
    host_start: float
    host_seconds: float
    start: float
    seconds: float
    kernels: tuple[Kernel, ...]
    device: str = "a device"


def profile_of(*calls: Call, device: Any = None) -> Any:
    return SimpleNamespace(device=device, seconds=1.0, calls=calls)


FORWARD = Call(
    *(7, "forward", 0, 0.001, 0.002, 0.010, 0.030),
    kernels=(Kernel("means.f32", 0.010, 0.005), Kernel("attend.f32", 0.020, 0.020, 4e10, 1e9)),
)
BACKWARD = Call(
    *(8, "backward", 1, 0.004, 0.001, 0.050, 0.040),
    kernels=(Kernel("attend.f32", 0.050, 0.010, 2e10, 1e9), Kernel("sum.f32", 0.06, 0.03)),
)


def bars(axes: Axes) -> list[list[tuple[float, float, float]]]:
    """Start, length and middle of the bars of each row."""
    rows = []
    for collection in axes.collections:
        boxes = [path.get_extents() for path in collection.get_paths()]
        rows.append([(box.x0, box.width, (box.y0 + box.y1) / 2) for box in boxes])
    return rows


def test_timeline_draws_handlers_calls_and_kernels_in_milliseconds() -> None:
    (axes,) = plot.timeline(profile_of(FORWARD, BACKWARD)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "host: handlers",
        *("queue 0: calls", "means.f32", "attend.f32"),
        *("queue 1: calls", "attend.f32", "sum.f32"),
    ]
    expected = [
        [(1, 2, 0), (4, 1, 0)],
        *([(10, 30, 1)], [(10, 5, 2)], [(20, 20, 3)]),
        *([(50, 40, 4)], [(50, 10, 5)], [(60, 30, 6)]),
    ]
    drawn = bars(axes)
    for row, wanted in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(row, wanted)
    blue, navy = "#3f7fb5", "#16285c"
    of_rows = [[to_hex(x) for x in row.get_facecolor()] for row in axes.collections]
    assert of_rows == [[blue, navy], *[[blue]] * 3, *[[navy]] * 3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["forward", "backward"]
    shaded = [patch.get_bbox().bounds for patch in axes.patches]
    np.testing.assert_allclose(shaded, [(10, 0.6, 30, 2.8), (50, 3.6, 40, 2.8)])
    texts = [text.get_text() for text in axes.texts]
    assert texts[:7] == ["3 ms", "30 ms", "5 ms", "20 ms", "40 ms", "10 ms", "30 ms"]
    assert texts[7:] == ["7", "8"]
    assert axes.get_xlabel() == "time since the profile began (ms)"
    assert axes.get_title(loc="left") == "a device"
    low, high = axes.get_xlim()
    assert low < 1 < 90 < high < 100


def test_timeline_joins_what_kernels_of_a_name_took_and_leaves_out_numbers_without_room() -> None:
    calls = [
        dataclasses.replace(FORWARD, sequence=i, start=0.1 * i, kernels=(k,))
        for i in range(200)
        for k in (Kernel("attend.f32", 0.1 * i, 0.02),)
    ]
    (axes,) = plot.timeline(profile_of(*calls)).axes
    assert [text.get_text() for text in axes.texts] == ["400 ms", "6,000 ms", "4,000 ms"]
    assert len(bars(axes)[2]) == 200


CEILINGS: Any = SimpleNamespace(
    matrix_flops={"bfloat16": 8e13, "float16": 8e13, "float32": 4e12}, bandwidth=2e11
)


def test_roofline_places_kernels_by_intensity_rate_and_share_of_time() -> None:
    device = SimpleNamespace(name="GPU 7")
    figure = plot.roofline(profile_of(FORWARD, BACKWARD, device=device))
    (axes,) = figure.axes
    points = axes.collections[0]
    # 6e10 FLOPs and 2e9 bytes in 30 ms of 65 ms.
    np.testing.assert_allclose(points.get_offsets(), [(30, 2)])
    small = plot.roofline(profile_of(FORWARD)).axes[0].collections[0]
    ratio = small.get_sizes()[0] / points.get_sizes()[0]
    np.testing.assert_allclose(ratio, (20 / 25) / (30 / 65))
    label, note = (text.get_text() for text in axes.texts)
    assert label == "46.2%  attend.f32"
    assert note.endswith("sum.f32 46.2%, means.f32 7.7%")
    assert axes.get_title().startswith("GPU 7")
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        *("arithmetic intensity (FLOP/byte)", "TFLOP/s of matrix products"),
    )
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.lines[:] == []


def test_roofline_draws_the_ceilings_from_their_ridges() -> None:
    (axes,) = plot.roofline(profile_of(FORWARD, BACKWARD), CEILINGS).axes
    left, right = axes.get_xlim()
    slanted, matrix, float32 = (line.get_xydata() for line in axes.lines)
    np.testing.assert_allclose(slanted, [(left, 0.2 * left), (400, 80)])
    np.testing.assert_allclose(matrix, [(400, 80), (right, 80)])
    np.testing.assert_allclose(float32, [(20, 4), (right, 4)])
    texts = {text.get_text() for text in axes.texts}
    assert texts >= {
        "bfloat16, float16: 80 TFLOP/s",
        "float32: 4 TFLOP/s",
        "bandwidth: 200 GB/s",
    }


def test_roofline_labels_do_not_overlap(rng: np.random.Generator) -> None:
    kernels = tuple(
        Kernel(f"kernel_{i}.f32", 0.01, 0.01, 1e10 * (1 + 0.01 * rng.random()), 1e9)
        for i in range(30)
    )
    call = dataclasses.replace(FORWARD, kernels=kernels)
    rates = {"a": 3.0e12, "b": 3.05e12, "c": 3.1e12}
    ceilings: Any = SimpleNamespace(matrix_flops=rates, bandwidth=2e11)
    figure = plot.roofline(profile_of(call), ceilings)
    figure.draw_without_rendering()
    texts = figure.axes[0].texts
    assert len(texts) == 3 + 1 + 30
    # Of the labels alone: the extent of an annotation includes its line.
    for one, other in itertools.combinations(texts, 2):
        a, b = (Text.get_window_extent(text) for text in (one, other))
        assert not a.overlaps(b), (one.get_text(), other.get_text())


def test_known_and_unknown_flops_of_a_name_are_told_apart() -> None:
    unknown = dataclasses.replace(
        FORWARD, kernels=(Kernel("attend.f32", 0.1, 0.02, math.nan, math.nan),)
    )
    known = dataclasses.replace(FORWARD, kernels=FORWARD.kernels[1:])
    (axes,) = plot.roofline(profile_of(known, unknown)).axes
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [(40, 2)])
    label, note = (text.get_text() for text in axes.texts)
    assert label == "50.0%  attend.f32"
    assert note.endswith("attend.f32 50.0%")


def test_profiles_without_anything_to_draw_are_refused() -> None:
    for draw in (plot.timeline, plot.roofline):
        with pytest.raises(ValueError, match="profile: it has no calls"):
            draw(profile_of())
    no_products = dataclasses.replace(FORWARD, kernels=(Kernel("means.f32", 0.0, 1.0),))
    with pytest.raises(ValueError, match=r"profile: no kernel of it .* it has means\.f32"):
        plot.roofline(profile_of(no_products))
    broken: Any = SimpleNamespace(matrix_flops={"float32": 0.0}, bandwidth=1e11)
    with pytest.raises(ValueError, match=r"ceilings: got 0\.0 for float32"):
        plot.roofline(profile_of(FORWARD), broken)


def test_spread_keeps_order_and_distance() -> None:
    placed = spread([0.5, 0.9, 0.52, 0.0, 0.99, 1.0], 0.1)
    assert np.argsort(placed).tolist() == [3, 0, 2, 1, 4, 5]
    assert (np.diff(sorted(placed)) >= 0.1 - 1e-9).all()
    assert placed[3] == 0.0
    assert placed[0] == 0.5
    assert placed[5] == 1.0
