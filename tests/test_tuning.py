"""Tuning: shapes of kernels that compute rightly, a file that outlives the process, the command."""

from __future__ import annotations

import dataclasses
import re
import threading
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from oracle import Attention, relative_error
from test_kernels import TOLERANCE, backward, forward, make, normal, tangent

import jax_aat
from jax_aat import tuning
from jax_aat.__main__ import main
from jax_aat.commands import tune
from jax_aat.problem import Slot
from jax_aat.tuning import Kernel, Shape

FORWARD = Kernel("forward", "float32", 32, planned=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of its own for each test, and no tuning before and after it."""
    monkeypatch.setenv("JAX_AAT_CACHE_DIR", str(tmp_path))
    tuning.set_tuning(device(), {})
    yield tmp_path
    tuning.set_tuning(device(), {})


def device():
    return jax_aat.default_device()


def processor():
    return dataclasses.replace(device(), kind="cpu")


def tuning_after_a_restart():
    """What a new context of the device, as that of a new process, reads from the file."""
    jax_aat._native.mark_device_lost()
    with pytest.raises(RuntimeError, match="was lost"):
        tuning.tuning(device())
    return tuning.tuning(device())


def shape_that_runs(kernel):
    """By the planner, for a plain call."""
    direction = kernel.name.partition("_")[0]
    plan = jax_aat._native.example_plan(device().index, direction, kernel.dtype, kernel.head_dim)
    # The first: matrix kernels have a second pass of the same shape.
    constants = next(
        constants
        for shader, constants in zip(plan["shaders"], plan["specializations"], strict=True)
        if shader.partition(".")[0].removesuffix("_coopmat") == f"attend_{kernel.name}"
    )
    return Shape(*(constants[i] for i in (4, 6, 8, 9, 0)))


def test_every_shape_computes_rightly():
    """head_dim 40 is cut into one slice and two, which are not full. First shapes run elsewhere."""
    problem = make(queries=100, keys=77, heads=4, kv_heads=2, head_dim=40, batch=(1,), causal=True)
    expected = Attention(problem)
    kernels = [Kernel(name, "float32", 40, planned=False) for name in tuning.KERNELS]
    shapes = {kernel: tuning.shapes_of(device(), kernel) for kernel in kernels}
    along = {slot: normal(slot, getattr(problem, slot.name[1].lower())) for slot in GRADIENTS}
    tolerance, derivative_tolerance = TOLERANCE["float32"]
    outs = set()
    for i in range(1, max(map(len, shapes.values()))):
        used = {kernel: fitting[min(i, len(fitting) - 1)] for kernel, fitting in shapes.items()}
        tuning.set_tuning(device(), used)
        assert {kernel: shape_that_runs(kernel) for kernel in kernels} == used
        out, logsumexp = forward(problem)
        outs.add(out.tobytes())
        assert relative_error(out, expected.out) <= tolerance, used
        moved, moved_logsumexp = tangent(problem, out, logsumexp, along)
        named = {slot.name.lower(): x for slot, x in along.items()}
        for x, reference in zip((moved, moved_logsumexp), expected.tangent(**named), strict=True):
            assert relative_error(x, reference) <= derivative_tolerance, used
        cotangents = {Slot.DOUT: normal(7, out), Slot.DLSE: normal(8, logsumexp)}
        gradients = backward(problem, out, logsumexp, cotangents, GRADIENTS)
        for slot, reference in zip(
            GRADIENTS, expected.backward(*cotangents.values()), strict=False
        ):
            assert relative_error(gradients[slot], reference) <= derivative_tolerance, (slot, used)
    # Other shapes add in other orders.
    assert len(outs) > 1


GRADIENTS = [Slot.DQ, Slot.DK, Slot.DV]


def test_a_shape_of_adaptive_calls_computes_the_same(monkeypatch):
    def plan(q, k, v, adaptation, implementation):
        # Kernels that make plans take long to compile, and are none of this.
        choose = partial(jax_aat.plan_tiles, adaptation=adaptation, implementation="xla")
        return jax.jit(choose)(q, k, v)

    def two_shapes(device, kernel, every=tuning.shapes_of):
        return every(device, kernel)[:2]

    monkeypatch.setattr(tuning, "plan_tiles", plan)
    monkeypatch.setattr(tuning, "shapes_of", two_shapes)
    kernel = Kernel("forward", "float32", 16, planned=True)
    steps = []
    measured = tuning.measure(device(), kernel, 256, lambda: steps.append(None))
    assert len(measured.shapes) == 2
    assert measured.refused == ()
    assert all(time > 0 for time in measured.milliseconds)
    assert len(steps) == tuning.steps_of(measured.shapes)
    assert tuning.tuning(device()) == {}


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no such shape on this device"):
        tuning.set_tuning(device(), {FORWARD: Shape(512, 512, 8, 32, 512)})
    with pytest.raises(ValueError, match="no kernel 'backward'"):
        tuning.set_tuning(device(), {FORWARD._replace(name="backward"): Shape(64, 32, 8, 32, 64)})
    assert tuning.tuning(device()) == {}


def test_the_first_shape_is_what_runs_without_a_tuning():
    for name in tuning.KERNELS:
        for head_dim in (32, 64, 128, 256):
            kernel = Kernel(name, "float32", head_dim, planned=False)
            assert shape_that_runs(kernel) == tuning.shapes_of(device(), kernel)[0]


def test_a_saved_tuning_is_read_again(cache):
    wanted = {
        Kernel(name, dtype, 64, planned): tuning.shapes_of(
            device(), Kernel(name, dtype, 64, planned)
        )[1]
        for name in tuning.KERNELS
        for dtype in ("float32", "bfloat16")
        for planned in (False, True)
    }
    tuning.set_tuning(device(), wanted, save=True)
    file = tuning.file_of(device())
    assert file.parent == cache
    assert sorted(x.suffix for x in cache.iterdir() if x.suffix != ".pipelines") == [".tuning"]
    assert tuning_after_a_restart() == wanted
    for kernel, shape in wanted.items():
        if not kernel.planned:
            assert shape_that_runs(kernel) == shape
    tuning.set_tuning(device(), {}, save=True)
    assert not file.exists()
    assert tuning_after_a_restart() == {}


def changed(change):
    def write(file: Path) -> None:
        file.write_bytes(change(file.read_bytes()))

    return write


def with_a_shape_that_does_not_fit(file):
    """As a build with other shapes would have written it."""
    lines = file.read_text().splitlines(keepends=True)[:-1]
    text = "".join(lines).replace(" 32 exact 64 ", " 32 exact 512 ")
    checksum = 0xCBF29CE484222325
    for byte in text.encode():
        checksum = (checksum ^ byte) * 0x100000001B3 % 2**64
    file.write_text(f"{text}checksum {checksum:x}\n")


@pytest.mark.parametrize(
    ("damage", "warning"),
    [
        (changed(lambda text: b""), "is damaged or of another device"),
        (changed(lambda text: text[:-20]), "is damaged or of another device"),
        (changed(lambda text: text.replace(b" 32 ", b" 16 ", 1)), "is damaged or of another"),
        (changed(lambda text: b"\xff" * 1000), "is damaged or of another device"),
        (changed(lambda text: text.replace(b"tuning 1 of ", b"tuning 1 of 0")), "is damaged or of"),
        (with_a_shape_that_does_not_fit, "has a shape that does not fit (forward float32 32 exact"),
    ],
    ids=["empty", "cut", "changed", "not text", "foreign", "impossible"],
)
def test_a_file_that_is_no_good_is_ignored(damage, warning, capfd):
    other = FORWARD._replace(head_dim=64)
    shapes = {kernel: tuning.shapes_of(device(), kernel)[1] for kernel in (FORWARD, other)}
    tuning.set_tuning(device(), shapes, save=True)
    damage(tuning.file_of(device()))
    left = tuning_after_a_restart()
    assert left == ({other: shapes[other]} if "does not fit" in warning else {})
    printed = capfd.readouterr().err
    assert warning in printed
    assert "python -m jax_aat tune makes it anew" in printed
    problem = make()
    assert relative_error(forward(problem)[0], Attention(problem).out) <= TOLERANCE["float32"][0]


def test_a_tuning_that_cannot_be_written(cache, quick, monkeypatch, capsys):
    (cache / "file").touch()
    monkeypatch.setenv("JAX_AAT_CACHE_DIR", str(cache / "file"))
    assert main(ARGUMENTS) == 1
    printed = capsys.readouterr()
    assert "forward" in printed.out
    assert "could not be written: make its folder writable" in printed.err


def test_calls_go_on_while_the_tuning_changes():
    problem = make()
    shapes = tuning.shapes_of(device(), FORWARD)[:2]
    bits = []
    for shape in shapes:
        tuning.set_tuning(device(), {FORWARD: shape})
        bits.append(forward(problem)[0].tobytes())
    done = threading.Event()

    def change():
        while not done.is_set():
            for shape in shapes:
                tuning.set_tuning(device(), {FORWARD: shape})

    thread = threading.Thread(target=change)
    thread.start()
    try:
        seen = {forward(problem)[0].tobytes() for _ in range(50)}
    finally:
        done.set()
        thread.join()
    assert seen <= set(bits)


def test_only_what_is_clearly_faster_replaces_the_first():
    first = [10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0]
    assert tuning.choose([first]) == 0
    assert tuning.choose([first, [9.8] * 7]) == 0  # too little
    assert tuning.choose([first, [9.6] * 7]) == 1
    assert tuning.choose([first, [9.6] * 7, [9.0] * 7, [9.2] * 7]) == 2
    assert tuning.choose([first, [9.0] * 6 + [11.0]]) == 1
    assert tuning.choose([first, [9.0] * 5 + [11.0] * 2]) == 0  # too often slower


ARGUMENTS = ["tune", "--dtype", "float32", "--head-dim", "32", "--length", "128"]


@pytest.fixture
def quick(monkeypatch):
    """One kernel, as exact calls on a processor have it, whose last shape is found best."""
    monkeypatch.setattr(tuning, "KERNELS", ("forward",))
    monkeypatch.setattr(tuning, "computing_device", processor)
    monkeypatch.setattr(tuning, "choose", lambda times: len(times) - 1)


def test_tune_keeps_what_it_chose(quick, capsys):
    kept = FORWARD._replace(dtype="bfloat16", planned=True)
    before = {kept: tuning.shapes_of(device(), kept)[1]}
    tuning.set_tuning(device(), before)
    first, *_, last = tuning.shapes_of(device(), FORWARD)
    assert main(ARGUMENTS) == 0
    printed = capsys.readouterr().out
    times = r"\d+\.\d{3} +\d+\.\d{3}"
    assert re.search(rf"forward +float32 +32 +exact +{times} +{re.escape(str(last))}", printed)
    file = tuning.file_of(device())
    assert f"1 of 1 kernels have a better shape on {device().name}; kept in {file}" in printed
    assert tuning.tuning(device()) == before | {FORWARD: last}
    assert shape_that_runs(FORWARD) == last
    assert tuning_after_a_restart() == before | {FORWARD: last}

    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"tuning: {file}\n" in printed
    assert re.search(rf"forward +float32 +32 +exact +{re.escape(str(last))}\n", printed)

    assert main(["tune", "--reset"]) == 0
    assert f"{device().name} is not tuned any more" in capsys.readouterr().out
    assert not file.exists()
    assert shape_that_runs(FORWARD) == first
    assert main(["tune", "--reset"]) == 0
    capsys.readouterr()
    assert main(["info"]) == 0
    assert f"tuning: none, python -m jax_aat tune would write {file}" in capsys.readouterr().out


def test_a_dry_run_keeps_nothing(quick, capsys):
    assert main([*ARGUMENTS, "--dry-run"]) == 0
    assert "1 of 1 kernels have a better shape" in capsys.readouterr().out
    assert tuning.tuning(device()) == {}
    assert not tuning.file_of(device()).exists()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda out: out * 1.001, "it computes wrong results (relative error 1.0e-03, 2.0e-05"),
        (lambda out: out * np.nan, "it computes wrong results (relative error inf"),
        (lambda out: out[:, :, :, :, :], "it fails: "),
    ],
    ids=["error", "not a number", "raises"],
)
def test_a_shape_that_computes_wrongly_is_refused(fault, words, quick, monkeypatch, capsys):
    shapes = tuning.shapes_of(device(), FORWARD)
    call = tuning._call

    def make_call(kernel, length):
        run = call(kernel, length)
        return lambda: fault(run()) if shape_that_runs(FORWARD) == shapes[-1] else run()

    monkeypatch.setattr(tuning, "_call", make_call)
    assert main(ARGUMENTS) == 1
    printed = capsys.readouterr().out
    assert f"refused for forward float32 32 exact: {shapes[-1]}: {words}" in printed
    # The last one of the others.
    assert tuning.tuning(device()) == {FORWARD: shapes[-2]}


def test_what_is_measured_on_a_device():
    gpu = dataclasses.replace(device(), kind="discrete")
    every = tune.kernels_for(gpu, None, [64])
    # float16 and bfloat16 have several shapes, too, of whichever kernels.
    assert {kernel.dtype for kernel in every} == set(jax_aat.vulkan.DTYPES)
    assert {kernel.name for kernel in every if not kernel.planned} == set(tuning.KERNELS)
    planned = {kernel.name for kernel in every if kernel.planned}
    assert planned == {"forward", "backward_dq", "backward_dkv"}
    narrow = dataclasses.replace(gpu, traits={**gpu.traits, "storage_16bit": False})
    assert {kernel.dtype for kernel in tune.kernels_for(narrow, None, [64])} == {"float32"}
    kernels = tune.kernels_for(processor(), None, [64, 128])
    assert {(kernel.dtype, kernel.planned) for kernel in kernels} == {("float32", False)}
    assert {kernel.head_dim for kernel in kernels} == {64, 128}
    asked = tune.kernels_for(processor(), ["float16"], [64])
    assert {kernel.dtype for kernel in asked} == {"float16"}


def test_length_grows_while_calls_are_short(monkeypatch):
    def timed(run, kernel):
        return None, (run.args[0].shape[1] / 512) ** 2  # milliseconds

    monkeypatch.setattr(tuning, "_timed", timed)
    assert tuning.representative_length(device(), "float32", 4) == 2048
    monkeypatch.setattr(tuning, "_timed", lambda run, kernel: (None, 0.001))
    assert tuning.representative_length(device(), "float32", 4) == 4096
    monkeypatch.setattr(tuning, "_timed", lambda run, kernel: (None, 1000.0))
    assert tuning.representative_length(device(), "float32", 4) == 128


def test_vulkan_that_cannot_be_used(monkeypatch, capsys):
    monkeypatch.setenv("JAX_AAT_DISABLE", "1")
    assert main(["tune"]) == 1
    assert "Vulkan cannot be used: JAX_AAT_DISABLE=1 switches Vulkan off" in capsys.readouterr().err


def test_a_device_without_timestamps(quick, monkeypatch, capsys):
    class Untimed:
        kernel_milliseconds = None

    monkeypatch.setattr(tuning.vulkan, "last_dispatch", Untimed)
    assert main(ARGUMENTS) == 1
    assert "the device has no timestamps" in capsys.readouterr().err
    assert tuning.tuning(device()) == {}


def test_without_a_folder_nothing_is_measured(quick, monkeypatch, capsys):
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_AAT_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    assert main(ARGUMENTS) == 1
    printed = capsys.readouterr()
    assert "there is no folder to keep it in: set JAX_AAT_CACHE_DIR" in printed.err
    assert "forward" not in printed.out
    assert main(["tune", "--reset"]) == 0


def test_a_kernel_that_fails_does_not_lose_the_others(quick, monkeypatch, capsys):
    measure = tuning.measure

    def fails_once(device, kernel, length, step):
        if kernel.dtype == "float32":
            raise jax.errors.JaxRuntimeError("no room for it")
        return measure(device, kernel, length, step)

    monkeypatch.setattr(tuning, "measure", fails_once)
    arguments = ["float32", "bfloat16", *ARGUMENTS[3:]]
    assert main(["tune", "--dtype", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "refused for forward float32 32 exact: JaxRuntimeError: no room for it" in printed
    assert set(tuning.tuning(device())) == {FORWARD._replace(dtype="bfloat16")}
