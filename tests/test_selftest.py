"""``python -m jax_aat selftest``: what it finds where a result, a path or bits are wrong."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_aat
from jax_aat.__main__ import main
from jax_aat.adaptation import Adaptation
from jax_aat.commands import selftest
from jax_aat.commands.selftest import CASES, Case, cases_for

SMALL = Case("small", "float32", 9, 7, heads=2, kv_heads=1, head_dim=4, on_processors=("forward",))
OTHER = dataclasses.replace(SMALL, name="other", dtype="float16", causal=True)
ADAPTIVE = dataclasses.replace(
    SMALL, name="adaptive", queries=80, keys=80, adaptation=Adaptation(budget=0.5, query_tile=16)
)


def run(monkeypatch, capsys, *cases, attention=None, arguments=()):
    """(exit code, what is printed) of a self-test of some cases, with some attention."""
    monkeypatch.setattr(selftest, "CASES", cases)
    if attention is not None:
        monkeypatch.setattr(selftest, "tiled_attention", attention)
    code = main(["selftest", *arguments])
    return code, capsys.readouterr().out


def changed(change, of=lambda query: True):
    """`tiled_attention` by Vulkan with its output changed where `of` says."""

    def attention(query, *args, **options):
        results = jax_aat.tiled_attention(query, *args, **options)
        # One query: the device is tried.
        if options["implementation"] != "vulkan" or query.shape[1] == 1 or not of(query):
            return results
        return change(results[0]), results[1]

    return attention


def line_of(printed, name):
    return next(line for line in printed.splitlines() if f" {name} " in line)


def test_a_good_device_passes(monkeypatch, capsys):
    every_pass = dataclasses.replace(SMALL, name="passes", on_processors=SMALL.passes, bias=True)
    conditions = dataclasses.replace(
        *(SMALL,),
        name="conditions",
        **dict(lengths=True, segments=True, mask=True, window=(5, 2), soft_cap=3.0),
    )
    before = jax_aat.last_dispatch()
    cases = [
        dataclasses.replace(case, passes=case.on_processors)  # as many on every device
        for case in (OTHER, every_pass, conditions, ADAPTIVE)
    ]
    code, printed = run(monkeypatch, capsys, *cases, arguments=["--seed", "3"])
    assert code == 0, printed
    assert jax_aat.last_dispatch().sequence - (before.sequence if before else 0) >= 2 * 6
    assert all("good" in line_of(printed, name) for name in ("other", "conditions", "adaptive"))
    assert all(name in printed for name in ("forward", "tangent", "gradients"))
    assert f"GOOD: {jax_aat.default_device().name} computed 6 passes rightly" in printed
    assert "(seed 3, " in printed


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda out: out * 1.0001, "error too large"),
        (lambda out: out.at[0, 0, 0, 0].set(jnp.nan), "error too large"),
    ],
    ids=["error", "not a number"],
)
def test_a_wrong_result_fails_its_case(change, fault, monkeypatch, capsys):
    attention = changed(change, of=lambda query: query.dtype == jnp.float32)
    code, printed = run(monkeypatch, capsys, SMALL, OTHER, attention=attention)
    assert code == 1
    assert fault in line_of(printed, "small")
    assert "good" in line_of(printed, "other")
    assert f"FAILED on {jax_aat.default_device().name}: float32, small (" in printed


def test_an_error_within_the_tolerance_may_be_too_large_beside_the_naive_one(monkeypatch, capsys):
    """1e-5 is half the tolerance of float32, and many times the error of dense attention."""
    attention = changed(lambda out: out * (1 + 1e-5))
    code, printed = run(monkeypatch, capsys, SMALL, attention=attention)
    assert code == 1
    assert "error too large" in line_of(printed, "small")


def test_other_bits_the_second_time_fail(monkeypatch, capsys):
    calls = itertools.count()

    def noise(_):
        return np.float32(1e-7 * next(calls))

    def noisy(out):
        return out + jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32), out[0, 0, 0])

    code, printed = run(monkeypatch, capsys, SMALL, attention=changed(noisy))
    assert code == 1
    assert "other bits the second time" in line_of(printed, "small")


def test_what_vulkan_did_not_compute_fails(monkeypatch, capsys):
    def attention(query, *args, implementation, **options):
        # One query: the device is tried.
        chosen = implementation if query.shape[1] == 1 else "xla"
        return jax_aat.tiled_attention(query, *args, implementation=chosen, **options)

    code, printed = run(monkeypatch, capsys, SMALL, attention=attention)
    assert code == 1
    assert "Vulkan did not run" in line_of(printed, "small")


def test_a_case_that_raises_hides_no_other(monkeypatch, capsys):
    def refuse(out):
        raise RuntimeError("no [memory]")

    attention = changed(refuse, of=lambda query: query.dtype == jnp.float32)
    code, printed = run(monkeypatch, capsys, SMALL, OTHER, attention=attention)
    assert code == 1
    assert "RuntimeError: no [memory]" in line_of(printed, "small")
    assert "good" in line_of(printed, "other")


def test_vulkan_that_cannot_be_used(monkeypatch, capsys):
    monkeypatch.setenv("JAX_AAT_DISABLE", "1")
    assert main(["selftest"]) == 1
    printed = capsys.readouterr()
    assert "Vulkan cannot be used: JAX_AAT_DISABLE=1 switches Vulkan off" in printed.err
    assert not printed.out


def test_a_device_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(selftest.vulkan, "devices", tuple)
    monkeypatch.setattr(selftest.vulkan, "problem", lambda: "No Vulkan driver was found.")
    assert main(["selftest", "--device", "0"]) == 1
    assert "Vulkan cannot be used: No Vulkan driver was found." in capsys.readouterr().err


def test_devices_by_index_and_by_a_part_of_the_name(monkeypatch, capsys):
    device = jax_aat.default_device()
    for wanted in (str(device.index), device.name[1:6].upper()):
        code, printed = run(monkeypatch, capsys, SMALL, arguments=["--device", wanted])
        assert code == 0
        assert device.name in printed
    with pytest.raises(SystemExit) as stopped:
        main(["selftest", "--device", "999"])
    assert stopped.value.code == 2
    assert (
        f"--device: got '999', expected the index or a part of the name of a device "
        f"({device.index}: {device.name}" in capsys.readouterr().err
    )


def test_the_sweep_covers_every_dtype_pass_and_condition():
    device = jax_aat.default_device()
    gpu = dataclasses.replace(device, kind="discrete")
    assert cases_for(gpu) == CASES
    processor = cases_for(dataclasses.replace(device, kind="cpu"))
    for cases in (CASES, processor):
        run = {(case.dtype, name) for case in cases for name in case.passes}
        assert {dtype for dtype, _ in run} == {"float32", "float16", "bfloat16"}
        assert {name for _, name in run} == {"forward", "tangent", "gradients"}
        for condition in ("causal", "window", "soft_cap", "lengths", "segments", "mask", "bias"):
            assert any(getattr(case, condition) for case in cases), condition
        assert {case.head_dim for case in cases} >= {16, 32, 64, 128, 256}
        assert {case.heads // case.kv_heads for case in cases} >= {2, 4}
        assert any(case.adaptation for case in cases)
    assert all(set(case.passes) <= {"forward", "tangent", "gradients"} for case in processor)
