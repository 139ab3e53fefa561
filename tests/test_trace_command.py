"""``python -m jax_aat trace``."""

from __future__ import annotations

import json
import sys

import pytest

import jax_aat
from jax_aat.__main__ import main

SCRIPT = """
import sys
import jax
from helper import SIZE
from jax_aat import tiled_attention

assert __name__ == "__main__"
x = jax.random.normal(jax.random.key(0), (1, SIZE, 2, 8))
for _ in range(int(sys.argv[1])):
    tiled_attention(x, x, x, implementation=sys.argv[2]).block_until_ready()
sys.exit(sys.argv[3] if len(sys.argv) > 3 else 0)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "helper.py").write_text("SIZE = 32\n")
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    yield file
    sys.modules.pop("helper", None)


def test_a_script_is_run_and_told_of(script, tmp_path, capsys):
    trace, calls = tmp_path / "trace.json", tmp_path / "calls.json"
    argv, path = list(sys.argv), list(sys.path)
    options = ["--output", str(trace), "--json", str(calls)]
    assert main(["trace", *options, str(script), "3", "vulkan"]) == 0
    assert (sys.argv, sys.path) == (argv, path)
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("attend_forward.f32") == 3
    assert len(json.loads(calls.read_text())["calls"]) == 3
    printed = capsys.readouterr().out
    assert f"3 calls on {jax_aat.default_device().name}" in printed
    assert "attend_forward.f32" in printed
    assert f"written: {trace}" in printed


def test_by_call(script, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    assert main(["trace", "--by-call", "--output", str(trace), str(script), "2", "vulkan"]) == 0
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    # Of the host and of the device.
    assert names.count("forward") == 4
    assert "attend_forward.f32" not in names


def test_without_custom_calls(script, tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "trace.json"), str(script), "1", "xla"]
    assert main(["trace", *arguments]) == 0
    assert "made no custom calls" in capsys.readouterr().out


def test_the_script_gives_the_exit_code(script, tmp_path, capsys):
    options = ["trace", "--output", str(tmp_path / "trace.json"), str(script), "0", "xla"]
    assert main([*options, "gone wrong"]) == 1
    assert "gone wrong" in capsys.readouterr().err
    script.write_text("raise SystemExit(7)")
    assert main(options) == 7


def test_an_exception_of_the_script_is_its_own(script, tmp_path):
    script.write_text("raise KeyError('mine')")
    with pytest.raises(KeyError, match="mine"):
        main(["trace", "--output", str(tmp_path / "trace.json"), str(script)])
    with jax_aat.profile():
        pass


def test_what_cannot_be_used(script, tmp_path, capsys, monkeypatch):
    assert main(["trace", str(tmp_path / "none.py")]) == 1
    assert "none.py: there is no such file" in capsys.readouterr().err
    assert main(["trace", "--output", str(tmp_path), str(script), "0", "xla"]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    monkeypatch.setenv("JAX_AAT_DISABLE", "1")
    assert main(["trace", str(script), "0", "xla"]) == 1
    assert "JAX_AAT_DISABLE" in capsys.readouterr().err
