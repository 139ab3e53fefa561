"""The C++ runtime: devices, memory, pipeline cache, lost devices, concurrency, error words."""

import os
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_aat
from jax_aat import _native, vulkan

ATTRIBUTES = {
    "operands": np.uint64(0b111),
    "results": np.uint64(1 << 9 | 1 << 10),
    "soft_cap": np.float32(0),
    "causal": np.int32(0),
    "window_left": np.int32(-1),
    "window_right": np.int32(-1),
    "query_tile": np.uint32(0),
    "super_tile": np.uint32(0),
    "level_count": np.uint32(0),
    "candidate_share": np.float32(0),
    "floor_share": np.float32(0),
    "judged_key_tiles": np.uint32(0),
    "list_capacity": np.uint32(0),
    "corrects": np.uint32(0),
}

# What a failed call raises: the second comes from the C++ dispatch path of a jitted function that
# ran before.
CALL_FAILURES = (jax.errors.JaxRuntimeError, ValueError)

# What a fresh process does with the runtime, for tests of the environment.
PROLOGUE = """
import jax
jax.config.update("jax_platforms", "cpu")
import jax_aat
from test_runtime import CALL_FAILURES, _native, attend, inputs
"""


for _target, _capsule in _native.registrations("cpu").items():
    jax.ffi.register_ffi_target(f"test_{_target}", _capsule, platform="cpu")


@jax.jit
def attend(query, key, value):
    """Forward pass through the bare custom call."""
    return call(query, key, value)


def call(query, key, value, **attributes):
    batch, length, heads, head_dim = query.shape
    types = (
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct((batch, length, heads), jnp.float32),
    )
    scale = np.float32(head_dim**-0.5)
    return jax.ffi.ffi_call("test_jax_aat_forward", types)(
        query, key, value, scale=scale, **(ATTRIBUTES | attributes)
    )


def inputs(seed=0, length=40, heads=2, head_dim=32):
    generator = np.random.default_rng(seed)
    shape = (1, length, heads, head_dim)
    arrays = [generator.normal(size=shape).astype(np.float32) for _ in range(3)]
    return [jax.device_put(x, jax.devices("cpu")[0]) for x in arrays]


def reference(query, key, value):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, value)


def assert_right(arrays, out):
    expected = reference(*arrays)
    assert np.linalg.norm(out - expected) <= 2e-5 * np.linalg.norm(expected)


def run_python(code, **environment):
    """Runs code in a fresh process that can import this file."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_succeeds(process):
    assert process.returncode == 0, process.stdout + process.stderr


def test_devices_and_the_default_one():
    devices = _native.devices()
    assert [device["index"] for device in devices] == list(range(len(devices)))
    default = devices[_native.default_device()]
    assert default["missing"] == []
    assert default["kind"] in {"discrete", "integrated", "virtual", "cpu", "other"}
    assert len(default["uuid"]) == 32
    assert default["features"]["bufferDeviceAddress"]
    assert default["traits"]["max_workgroup_invocations"] >= 128
    assert _native.problem() == ""
    with pytest.raises(ValueError, match="There is no Vulkan device 1000"):
        _native.set_default_device(1000)
    _native.set_default_device(default["index"])


def test_unknown_platform_is_refused():
    with pytest.raises(ValueError, match="'tpu'"):
        _native.registrations("tpu")


def test_dispatch_is_recorded():
    arrays = inputs()
    before = (_native.last_dispatch() or {"sequence": 0})["sequence"]
    out, logsumexp = attend(*arrays)
    assert_right(arrays, out)
    record = _native.last_dispatch()
    assert record["sequence"] == before + 1
    assert record["pass"] == "forward"
    assert record["platform"] == "cpu"
    assert record["device"] == _native.devices()[_native.default_device()]["name"]
    assert "attend_forward.f32" in record["shaders"]
    batch, length, heads, head_dim = out.shape
    products = [record["flops"][i] for i, x in enumerate(record["shaders"]) if "attend" in x]
    assert products == [4 * batch * heads * length**2 * head_dim]
    assert record["kernel_milliseconds"] is None
    operand_bytes = sum(x.nbytes for x in (*arrays, out, logsumexp))
    assert record["imported_bytes"] + record["staged_bytes"] == operand_bytes


def test_host_memory_is_used_in_place_on_a_cpu_device():
    device = _native.devices()[_native.default_device()]
    attend(*inputs())[0].block_until_ready()
    in_place = device["kind"] == "cpu" and device["features"]["VK_EXT_external_memory_host"]
    assert (_native.last_dispatch()["staged_bytes"] == 0) == in_place
    assert jax_aat.memory_stats().host_imports.live == 0


def test_operands_may_be_the_same_array():
    array = inputs(length=33)[0]
    assert_right([array] * 3, attend(array, array, array)[0])


def test_timing_gives_a_time_for_every_dispatch():
    arrays = inputs()
    _native.set_timing(True)
    try:
        attend(*arrays)[0].block_until_ready()
        record = _native.last_dispatch()
    finally:
        _native.set_timing(False)
    assert len(record["kernel_milliseconds"]) == len(record["shaders"])
    assert all(time >= 0 for time in record["kernel_milliseconds"])
    assert sum(record["kernel_milliseconds"]) > 0
    assert record["elapsed_milliseconds"] >= max(record["kernel_milliseconds"])


def test_timing_of_a_call_as_a_whole():
    arrays = inputs()
    _native.set_timing(True, by_kernel=False)
    try:
        attend(*arrays)[0].block_until_ready()
        record = _native.last_dispatch()
    finally:
        _native.set_timing(False)
    assert record["kernel_milliseconds"] is None
    assert record["elapsed_milliseconds"] > 0


def test_memory_is_reused_and_trimmed():
    arrays = inputs()
    attend(*arrays)[0].block_until_ready()
    first = jax_aat.memory_stats()
    assert first.total.in_use_bytes == first.total.blocks == 0
    held = first.total.reserved_bytes
    assert 0 < held <= first.total.peak_reserved_bytes <= first.limit_bytes
    assert first.total.peak_in_use_bytes > 0
    attend(*arrays)[0].block_until_ready()
    assert jax_aat.memory_stats().total.reserved_bytes == held
    assert jax_aat.trim_memory() == held
    assert jax_aat.memory_stats().total.reserved_bytes == 0
    assert_right(arrays, attend(*arrays)[0])
    assert jax_aat.memory_stats().total.reserved_bytes > 0


def test_memory_limit_is_an_error_that_the_next_call_survives():
    # Work lists and staging of the long call need more than the bound, those of the short one less.
    code = """
        import pytest
        with pytest.raises(CALL_FAILURES, match="RESOURCE_EXHAUSTED.*Out of") as error:
            attend(*inputs(length=4096, heads=1, head_dim=8))[0].block_until_ready()
        assert "JAX_AAT_MEMORY_LIMIT" in str(error.value)
        attend(*inputs(length=8, heads=1, head_dim=8))[0].block_until_ready()
        statistics = jax_aat.memory_stats()
        assert statistics.limit_bytes == 16384
        assert 0 < statistics.total.peak_reserved_bytes <= 16384
    """
    assert_succeeds(run_python(code, JAX_AAT_MEMORY_LIMIT="16384"))


def test_memory_limit_must_be_a_number():
    code = """
        import pytest
        with pytest.raises(CALL_FAILURES, match="INVALID_ARGUMENT.*'?8GB"):
            attend(*inputs())[0].block_until_ready()
    """
    assert_succeeds(run_python(code, JAX_AAT_MEMORY_LIMIT="8GB"))


def test_lost_device_is_reported_once_and_rebuilt():
    arrays = inputs()
    expected = np.asarray(attend(*arrays)[0])
    _native.mark_device_lost()
    with pytest.raises(CALL_FAILURES, match=r"UNAVAILABLE.*was lost"):
        attend(*arrays)[0].block_until_ready()
    np.testing.assert_array_equal(np.asarray(attend(*arrays)[0]), expected)


def test_losing_the_device_under_concurrent_calls():
    arrays = inputs()
    expected = np.asarray(attend(*arrays)[0])

    def run(index):
        if index % 20 == 10:
            _native.mark_device_lost()
        try:
            out = np.asarray(attend(*arrays)[0])
        except CALL_FAILURES as error:
            return str(error)
        return np.array_equal(out, expected)

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(run, range(200)))
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert 1 <= len(failures) < 200
    assert all("was lost" in failure for failure in failures)
    assert all(outcomes)
    _native.mark_device_lost()
    with pytest.raises(CALL_FAILURES, match="was lost"):
        attend(*arrays)[0].block_until_ready()
    np.testing.assert_array_equal(np.asarray(attend(*arrays)[0]), expected)


def test_a_thousand_concurrent_calls():
    variants = [
        inputs(seed, length) for seed, length in enumerate([1, 7, 16, 33, 64, 65, 100, 129])
    ]
    expected = [np.asarray(attend(*arrays)[0]) for arrays in variants]
    for arrays, out in zip(variants, expected, strict=True):
        assert_right(arrays, out)

    def run(index):
        variant = index % len(variants)
        return np.array_equal(np.asarray(attend(*variants[variant])[0]), expected[variant])

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(run, range(1000)))
    assert jax_aat.memory_stats().total.blocks == 0


def test_memory_does_not_grow_over_ten_thousand_calls():
    arrays = inputs(length=4, heads=1, head_dim=8)

    def run(count):
        for _ in range(count):
            out, _ = attend(*arrays)
        out.block_until_ready()

    run(100)
    before = jax_aat.memory_stats().total
    run(10_000)
    after = jax_aat.memory_stats()
    assert after.total.reserved_bytes == before.reserved_bytes
    assert after.total.total_allocations == before.total_allocations
    assert after.total.in_use_bytes == 0
    assert after.host_imports.live == 0


def test_pipeline_cache_is_written_used_and_survives_damage(tmp_path):
    code = """
        attend(*inputs())[0].block_until_ready()
        print(_native.cache_path())
    """
    environment = {"JAX_AAT_CACHE_DIR": str(tmp_path)}
    process = run_python(code, **environment)
    assert_succeeds(process)
    file = Path(process.stdout.strip())
    assert list(tmp_path.iterdir()) == [file]
    content = file.read_bytes()
    damaged = content[:-1] + bytes([content[-1] ^ 1])
    file.write_bytes(damaged)
    process = run_python(code, **environment)
    assert_succeeds(process)
    assert "damaged" in process.stderr
    assert file.read_bytes() != damaged
    process = run_python(code, **environment)
    assert_succeeds(process)
    assert "damaged" not in process.stderr


def test_no_pipelines_are_kept_where_no_folder_is_known(tmp_path):
    code = f"""
        import os
        os.chdir({str(tmp_path)!r})
        attend(*inputs())[0].block_until_ready()
        assert _native.cache_path() == ""
        assert os.listdir() == []
    """
    assert_succeeds(run_python(code, JAX_AAT_CACHE_DIR="", XDG_CACHE_HOME="", HOME=""))


def test_forked_process_is_told_and_ends():
    # What becomes of JAX itself in a process that was forked and exits is not the point.
    code = """
        import os, signal, sys
        arrays = inputs()
        attend(*arrays)[0].block_until_ready()

        def status_of(child):
            process = os.fork()
            if process == 0:
                signal.alarm(30)
                child()
            return os.waitpid(process, 0)[1]

        def call():
            try:
                attend(*arrays)[0].block_until_ready()
            except CALL_FAILURES as error:
                os._exit(0 if "UNAVAILABLE: This process was forked" in str(error) else 2)
            os._exit(3)

        assert status_of(call) == 0
        assert os.WTERMSIG(status_of(sys.exit)) != signal.SIGALRM
        attend(*arrays)[0].block_until_ready()
    """
    assert_succeeds(run_python(code))


def test_words_without_a_loader(tmp_path):
    (tmp_path / "libvulkan.so.1").touch()
    code = """
        import pytest
        assert _native.devices() == []
        assert _native.default_device() is None
        assert "apt install libvulkan1" in _native.problem()
        with pytest.raises(CALL_FAILURES, match="UNAVAILABLE.*libvulkan1"):
            attend(*inputs())[0].block_until_ready()
    """
    assert_succeeds(run_python(code, LD_LIBRARY_PATH=str(tmp_path)))


def test_words_without_a_driver(tmp_path):
    code = """
        assert _native.devices() == []
        assert "mesa-vulkan-drivers" in _native.problem()
    """
    nothing = str(tmp_path / "none.json")
    assert_succeeds(run_python(code, VK_ICD_FILENAMES=nothing, VK_DRIVER_FILES=nothing))


def test_a_device_that_is_named_and_not_there_is_told(monkeypatch):
    """Where None chooses: a call by Vulkan is refused anyway."""
    for variable in ("JAX_AAT_DEVICE", vulkan.SWITCH):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(vulkan, "_NO_NATIVE", "there is no such device")
    assert vulkan.choose_implementation(None, "float32", 64) == "xla"
    monkeypatch.setenv("JAX_AAT_DEVICE", "nonesuch")
    assert vulkan.choose_implementation(None, "float64", 64) == "xla"
    with pytest.warns(RuntimeWarning, match="leaves attention to XLA: there is no such device"):
        assert vulkan.choose_implementation(None, "float32", 64) == "xla"
    monkeypatch.delenv("JAX_AAT_DEVICE")
    monkeypatch.setenv(vulkan.SWITCH, "0")
    assert vulkan.choose_implementation(None, "float32", 64) == "xla"
    monkeypatch.setenv(vulkan.SWITCH, "yes")
    with pytest.warns(RuntimeWarning, match="JAX_AAT_DISABLE=yes is none of 1, true, 0 and false"):
        assert vulkan.choose_implementation(None, "float32", 64) == "xla"
    monkeypatch.setenv("JAX_AAT_DEVICE", "nonesuch")
    monkeypatch.setenv(vulkan.SWITCH, "True")
    with warnings.catch_warnings(action="error"):
        assert vulkan.choose_implementation(None, "float32", 64) == "xla"


def test_device_chosen_by_the_environment():
    name = _native.devices()[0]["name"]
    code = "assert _native.default_device() == 0"
    assert_succeeds(run_python(code, JAX_AAT_DEVICE="0"))
    assert_succeeds(run_python(code, JAX_AAT_DEVICE=name[:6].upper()))
    code = f"assert 'nonesuch' in _native.problem() and {name!r} in _native.problem()"
    assert_succeeds(run_python(code, JAX_AAT_DEVICE="nonesuch"))


@pytest.mark.parametrize(("vendor_id", "chosen"), [(0x10DE, "vulkan"), (0x8086, "xla")])
def test_cuda_is_served_only_where_vulkan_shows_an_nvidia_gpu(monkeypatch, vendor_id, chosen):
    device = _native.devices()[_native.default_device()]
    device |= {"index": 0, "kind": "discrete", "vendor_id": vendor_id}
    native = SimpleNamespace(devices=lambda: [device], default_device=lambda: 0, problem=lambda: "")
    monkeypatch.setattr(vulkan, "_native", native)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert vulkan.choose_implementation(None, "float32", 64) == chosen


def test_validation_layers_are_silent():
    code = """
        import sys
        if "is not installed" in _native.problem():
            sys.exit(77)
        _native.set_timing(True)
        for length in (1, 40, 100):
            attend(*inputs(length=length))[0].block_until_ready()
        jax_aat.trim_memory()
        _native.mark_device_lost()
        try:
            attend(*inputs())[0].block_until_ready()
        except CALL_FAILURES:
            attend(*inputs())[0].block_until_ready()
        assert "VkLayer_khronos_validation" in open("/proc/self/maps").read()
        assert _native.validation_messages() == []
    """
    process = run_python(code, JAX_AAT_VALIDATION="1")
    if process.returncode == 77:
        pytest.skip("VK_LAYER_KHRONOS_validation is not installed")
    assert_succeeds(process)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"operands": np.uint64(0b1111)}, "there are 3 arguments, the attribute says 4"),
        ({"operands": np.uint64(0b011)}, "v is missing among the arguments"),
        ({"operands": np.uint64(0b111 | 1 << 15)}, "slot 15 is not among the arguments"),
        ({"results": np.uint64(1 << 9)}, "logsumexp is missing among the results"),
        ({"window_left": np.int32(-2)}, "window"),
        ({"soft_cap": np.float32(-1)}, "soft_cap"),
    ],
)
def test_attributes_that_do_not_fit(attributes, words):
    with pytest.raises(CALL_FAILURES, match=f"INVALID_ARGUMENT.*{words}"):
        call(*inputs(), **attributes)[0].block_until_ready()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q, k.astype(jnp.float16), v), "k must have the dtype of q"),
        (lambda q, k, v: (q, k, v[:, 1:]), "axis 1 of v has size 39, 40 is expected"),
        (lambda q, k, v: (q, k[0], v), "k has 3 axes, 4 are expected"),
        (lambda q, k, v: (q[:, :, :1], k, v), "no multiple of the 2 heads"),
        (lambda q, k, v: (q.astype(jnp.int32), k, v), "q must be float32"),
    ],
)
def test_operands_that_do_not_fit(change, words):
    with pytest.raises(CALL_FAILURES, match=f"INVALID_ARGUMENT.*{words}"):
        call(*change(*inputs()))[0].block_until_ready()
