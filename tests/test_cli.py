"""``python -m jax_aat``: every command but ``selftest``, which has a file of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import assert_same_bits, normal

import jax_aat
from jax_aat.__main__ import main
from jax_aat.commands import bench, contenders
from jax_aat.commands.contenders import Case, Pass, WrongPathError
from jax_aat.commands.show import text_map
from jax_aat.levels import pack_levels, unpack_levels


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jax_aat", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_info_names_device_kernels_and_caches() -> None:
    done = run("info")
    assert done.returncode == 0, done.stderr
    device = jax_aat.default_device()
    assert device is not None
    assert f"device {device.index}: {device.name}" in done.stdout
    assert device.driver in done.stdout
    assert "bufferDeviceAddress" in done.stdout
    for kernel in ("attend_forward", "attend_tangent", "attend_backward_dq"):
        assert kernel in done.stdout
    assert "pipeline cache: " in done.stdout
    assert "JAX_AAT_VALIDATION" in done.stdout


def test_info_says_why_a_kernel_is_chosen() -> None:
    lines = [re.split(" {2,}", line.strip()) for line in run("info").stdout.splitlines()]
    float32 = [line for line in lines if line[:2] == ["forward", "float32"]]
    assert float32
    assert all(line[-1] == "matrix units do not multiply float32" for line in float32)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_whoever_reads_may_stop(unbuffered) -> None:
    """As `| head` does."""
    with subprocess.Popen(
        [sys.executable, "-m", "jax_aat", "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 1
    assert "BrokenPipe" not in errors


def test_info_without_a_driver_says_what_to_install() -> None:
    done = run("info", VK_ICD_FILENAMES="/nowhere", VK_DRIVER_FILES="/nowhere")
    assert done.returncode == 1
    assert "Vulkan cannot be used: No Vulkan driver was found. Install" in done.stdout
    assert "implementation=None means 'xla' here" in done.stdout


def test_info_without_a_folder_for_caches() -> None:
    done = run("info", HOME="", XDG_CACHE_HOME="", JAX_AAT_CACHE_DIR="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("there is no folder to keep it in: set JAX_AAT_CACHE_DIR") == 2


def test_info_with_a_device_that_is_not_there() -> None:
    done = run("info", JAX_AAT_DEVICE="no such device")
    assert done.returncode == 1
    assert "JAX_AAT_DEVICE=no such device" in done.stdout


def test_info_with_vulkan_switched_off() -> None:
    done = run("info", JAX_AAT_DISABLE="1")
    assert done.returncode == 1
    assert "JAX_AAT_DISABLE=1 switches Vulkan off: unset it" in done.stdout


def test_no_command_prints_the_usage() -> None:
    done = run()
    assert done.returncode == 2
    assert "usage: python -m jax_aat" in done.stderr


@pytest.mark.parametrize("command", ["info", "selftest", "bench", "show", "tune"])
def test_help_has_examples_and_exit_codes(command, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"examples:\n  python -m jax_aat {command}\n" in printed
    assert "exit codes:\n  0  good\n  1  a verdict is bad" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "argument COMMAND: invalid choice: 'fly'"),
        (["selftest", "--seed", "-1"], "--seed: got -1, expected an integer of at least 0"),
        (["bench", "--queries", "0"], "--queries: got '0', expected an integer of at least 1"),
        (["bench", "--heads", "3", "--kv-heads", "2"], "expected a multiple of --kv-heads, 2"),
        (["bench", "--head-dim", "257"], "--head-dim: got 257, expected at most 256"),
        (["bench", "--budget", "1.5"], "--budget: got 1.5, expected a fraction of at most 1"),
        (["bench", "--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
        (["tune", "--head-dim", "64", "257"], "--head-dim: got 257, expected at most 256"),
        (["tune", "--length", "127"], "--length: got 127, expected at least 128"),
        (["tune", "--reset", "--dry-run"], "--dry-run: not allowed with argument --reset"),
    ],
)
def test_wrong_usage(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "usage: python -m jax_aat" in printed


def test_without_the_extra_commands_name_it_and_info_works(monkeypatch, capsys) -> None:
    for module in ("rich", "rich.console", "tqdm"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["info"]) == 0
    capsys.readouterr()
    for command in ("selftest", "bench", "show", "tune"):
        assert main([command]) == 1
        error = f"python -m jax_aat {command}: rich is not installed: pip install rich\n"
        assert capsys.readouterr().err == error


def test_bench_measures_every_contender(tmp_path, capsys) -> None:
    file = tmp_path / "bench.json"
    sizes = ["--queries", "70", "--keys", "90", "--heads", "2", "--head-dim", "16"]
    options = ["--causal", "--budget", "1", "--repeats", "3", "--json", str(file)]
    assert main(["bench", *sizes, *options]) == 0
    figures = json.loads(file.read_text())
    assert figures["case"]["queries"] == 70
    rows = figures["contenders"]
    assert list(rows)[:5] == [
        "jax_aat exact, vulkan",
        "jax_aat exact, xla",
        "jax_aat adaptive, vulkan",
        "jax_aat adaptive, xla",
        "jax.nn, xla",
    ]
    for name, row in rows.items():
        first, median, third = row["milliseconds"]
        assert 0 < first <= median <= third
        # A budget of 1 is exact attention.
        assert row["errors"]["out"] < 2e-5
        assert row["path"].startswith("Vulkan " if "vulkan" in name else name[:6])
    assert rows["jax_aat exact, vulkan"]["device_milliseconds"][1] > 0
    assert rows["jax.nn, xla"]["device_milliseconds"] is None
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    assert "q [1, 70, 2, 16], k and v [1, 90, 1, 16], float32, causal, forward, 3 calls" in printed
    assert f"by its report: {figures['relative_flops']:.1%} of those of exact" in printed


def test_bench_takes_turns_and_goes_on_without_what_fails() -> None:
    case = Case(1, 2, 1, 5, 6, 4, False, "float32")
    started = []

    def contender(name, fails_at=None):
        def make(case, arrays, direction):
            def start():
                started.append(name)
                if len([x for x in started if x == name]) == fails_at:
                    raise RuntimeError("out of memory\nat the device")
                return contenders.jax_nn("xla", case, arrays, direction).start()

            return Pass(start, lambda x: x, np.asarray, lambda: name, lambda: None)

        return make

    makers = {"a": contender("a"), "b": contender("b", 1), "c": contender("c", 4)}
    rows = bench.measure(case, makers, "backward", repeats=3)
    assert started == [*"aabcc", *"ac", *"ac", *"a"]
    assert rows["a"]["errors"].keys() == {"out", "dq", "dk", "dv"}
    assert max(rows["a"]["errors"].values()) < 1e-6
    assert rows["b"] == {"failed": "RuntimeError: out of memory"}
    assert rows["c"]["failed"] == "RuntimeError: out of memory"


def test_bench_fails_where_vulkan_cannot_be_used(monkeypatch, capsys) -> None:
    monkeypatch.setenv("JAX_AAT_DISABLE", "1")
    monkeypatch.setattr(bench, "_relative_flops", lambda *_: 0.5)
    sizes = {"queries": 8, "keys": 8, "head-dim": 4, "budget": 1, "repeats": 1}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    assert main(["bench", *arguments]) == 1
    printed = capsys.readouterr().out
    assert printed.count("failed: RuntimeError: implementation='vulkan' cannot be used") == 2
    assert "jax_aat xla" in printed


def test_a_contender_that_takes_another_path_is_refused(monkeypatch) -> None:
    def attention(*args, implementation, **options):
        other = {"vulkan": "xla", "xla": "vulkan"}[implementation]
        return jax_aat.tiled_attention(*args, implementation=other, **options)

    monkeypatch.setattr(contenders, "tiled_attention", attention)
    case = Case(1, 1, 1, 4, 4, 4, False, "float32")
    for implementation in ("vulkan", "xla"):
        with pytest.raises(WrongPathError, match=f"did not compile to {implementation}"):
            contenders.ours(case, case.arrays(0), "forward", implementation)


@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5), (7, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_operations_are_those_of_visible_pairs(queries, keys, causal) -> None:
    pairs = np.tri(queries, keys).sum() if causal else queries * keys
    case = Case(2, 4, 2, queries, keys, 8, causal, "float32")
    assert case.floating_point_operations() == 4 * 2 * 4 * pairs * 8


def made_plan(adaptation) -> jax_aat.TilePlan:
    """Causal: 8 tiles of 16 queries and 2 heads, 8 granules."""
    generator = np.random.default_rng(0)
    q, k = normal(generator, 1, 128, 4, 8), normal(generator, 1, 128, 2, 8)
    choose = partial(
        jax_aat.plan_tiles, adaptation=adaptation, is_causal=True, implementation="xla"
    )
    return jax.jit(choose)(q, k, k)


@pytest.fixture(scope="module")
def plan() -> jax_aat.TilePlan:
    """One in which everything is exact."""
    return made_plan(jax_aat.Adaptation(threshold=0.0, query_tile=32))


def test_show_prints_a_saved_plan(plan, tmp_path, capsys) -> None:
    file = tmp_path / "plan"
    plan.save(file)
    assert_same_bits(jax_aat.TilePlan.load(file), plan)
    assert jax_aat.TilePlan.load(file).adaptation == plan.adaptation
    assert main(["show", str(file), "--head", "3"]) == 0
    printed = capsys.readouterr().out
    assert str(plan) in printed
    assert re.search(r"2, 3 +100.0% +0.0% +0.0% +100.0%", printed)
    lines = printed[printed.index("head 3: ") :].splitlines()
    assert "a character stands for 16 queries x 16 keys" in lines[0]
    assert lines[1:] == [f"{16 * i:>7} |{'#' * (i + 1)}" for i in range(8)]


def test_a_map_joins_what_does_not_fit(plan) -> None:
    level = np.full((1, 2, 8, 8), 3)
    level[0, 1] = [
        [0, 1, 2, 3, 0, 0, 1, 1],
        *[[3, 3, 3, 3, 3, 3, 3, 2]] * 6,
        [2, 2, 2, 2, 1, 1, 1, 0],
    ]
    drawn = dataclasses.replace(plan, levels=pack_levels(jnp.asarray(level)))
    lines = list(text_map(drawn, 2, width=100))[1:]
    assert lines[0] == "      0 |#+. ##++"
    assert lines[7] == "    112 |....+++#"
    # Four granules a character, of which the finest quarter decides.
    heading, *lines = text_map(drawn, 2, width=9 + 2)
    assert "16 queries x 64 keys" in heading
    assert lines[0] == "      0 |##"
    assert lines[1] == "     16 | ."
    assert lines[7] == "    112 |.#"
    lines = list(text_map(drawn, 2, width=9 + 1))[1:]
    assert [lines[i] for i in (0, 1, 7)] == ["      0 |#", "     16 |", "    112 |+"]


def test_show_tells_what_is_left_out(tmp_path, capsys) -> None:
    adaptation = jax_aat.Adaptation(threshold=1e9, levels=(0,), query_tile=32)
    plan = made_plan(adaptation)
    plan.save(tmp_path / "plan")
    assert main(["show", str(tmp_path / "plan")]) == 0
    level = np.asarray(unpack_levels(plan.levels, plan.grid.granules))
    exact = (level[0, 0] == 0).sum()
    assert 8 <= exact < 36
    # Tiles see 36 granules; of the 8 on the diagonal 136 of 256 pairs, of 8,256 in all.
    flops = (256 * (exact - 8) + 136 * 8) / 8256
    printed = capsys.readouterr().out
    expected = f"0, 1 +{exact / 36:.1%} +0.0% +0.0% +{1 - exact / 36:.1%} +{flops:.1%}"
    assert re.search(expected, printed)


def test_the_demonstration_is_a_plan_of_all_levels(capsys) -> None:
    assert main(["show"]) == 0
    printed = capsys.readouterr().out
    assert "a plan for synthetic keys in clusters" in printed
    level = {c: printed[printed.index("head 0: ") :].count(c) for c in "#+."}
    assert min(level.values()) > 50


def test_show_of_what_is_not_a_plan(plan, tmp_path, capsys) -> None:
    def refused(path, message):
        assert main(["show", str(path)]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith(f"python -m jax_aat show: {path}: ")
        assert message in printed.err
        assert not printed.out

    file = tmp_path / "plan"
    refused(file, "No such file or directory")
    file.write_text("text")
    refused(file, "is not a plan that TilePlan.save wrote: File is not a zip file")
    with file.open("wb") as stream:
        np.savez(stream, levels=np.zeros(3))
    refused(file, "is not a plan that TilePlan.save wrote")
    level = np.array(unpack_levels(plan.levels, plan.grid.granules))
    level[0, 0, 0, 7] = 0
    dataclasses.replace(plan, levels=pack_levels(jnp.asarray(level))).save(file)
    refused(file, "a level that causality or window forbids")


def test_show_of_a_head_that_is_not_there(plan, tmp_path, capsys) -> None:
    plan.save(tmp_path / "plan")
    with pytest.raises(SystemExit) as stopped:
        main(["show", str(tmp_path / "plan"), "--head", "4"])
    assert stopped.value.code == 2
    assert "--head: got 4, the plan has heads 0 to 3" in capsys.readouterr().err


@pytest.mark.parametrize("module", [None, object()], ids=["no matplotlib", "no function"])
def test_show_without_pictures(module, plan, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "jax_aat.plot", module)
    plan.save(tmp_path / "plan")
    assert main(["show", str(tmp_path / "plan"), "--output", str(tmp_path / "plan.png")]) == 1
    assert "python -m jax_aat show: --output: " in capsys.readouterr().err
