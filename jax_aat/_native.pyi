"""Vulkan runtime of jax_aat, written in C++ (`csrc/ffi/module.cc`).

Functions raise RuntimeError, in words, where Vulkan cannot be used or the device fails, and
ValueError where an argument or an environment variable cannot be right.
"""

from collections.abc import Sequence
from typing import TypedDict

class Traits(TypedDict):
    """What decides which kernels run on a device."""

    subgroup_size: int
    min_subgroup_size: int
    max_subgroup_size: int
    max_shared_memory: int
    max_workgroup_invocations: int
    max_workgroup_count: int
    max_score_gradient_bytes: int
    storage_16bit: bool
    coopmat_float16: bool
    coopmat_bfloat16: bool
    coopmat_layout_known: bool
    coopmat_relays: bool

class Device(TypedDict):
    """A Vulkan device; `missing` names what the runtime requires and the device lacks."""

    index: int
    name: str
    kind: str
    vendor_id: int
    uuid: str
    driver_name: str
    driver_info: str
    api_version: str
    features: dict[str, bool]
    traits: Traits
    missing: list[str]

# What a record of a call tells by itself.
Record = TypedDict(
    "Record",
    {
        "sequence": int,
        "pass": str,
        "path": str,
        "platform": str,
        "device": str,
        "device_index": int,
        "shaders": list[str],
        "flops": list[float],
        "imported_bytes": int,
        "staged_bytes": int,
    },
)

class Dispatch(Record):
    """What a call ran; the milliseconds are None where it was not timed."""

    kernel_milliseconds: list[float] | None
    elapsed_milliseconds: float | None

class ProfiledCall(Record):
    """What a profile tells of a call.

    `stamps` are seconds of the host's monotonic clock, the start and the end of each kernel, or of
    the call. Pairs and rows are None where there is no plan.
    """

    bytes: list[float]
    scratch_bytes: int
    lent_bytes: int
    dtype: str
    batch: int
    queries: int
    keys: int
    query_heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    queue: int
    thread: int
    arrived: float
    submitted: float
    ended: float
    stamps: list[float]
    stream_seconds: float | None
    exact_pairs: float | None
    coarse_pairs: float | None
    most_rows: int | None

class PoolStatistics(TypedDict):
    """Memory of one pool, or of all of them; `jax_aat.PoolStatistics` says what is what."""

    reserved_bytes: int
    in_use_bytes: int
    peak_reserved_bytes: int
    peak_in_use_bytes: int
    largest_free_bytes: int
    blocks: int
    allocations: int
    total_allocations: int

class SharedStatistics(TypedDict):
    """Memory that is shared with others."""

    live: int
    live_bytes: int
    total: int

class MemoryStatistics(TypedDict):
    """Memory of a device; `jax_aat.MemoryStatistics` says what is what."""

    total: PoolStatistics
    pools: dict[str, PoolStatistics]
    host_imports: SharedStatistics
    cuda_imports: SharedStatistics
    cuda_exports: SharedStatistics
    limit_bytes: int
    heap_bytes: int
    heap_budget_bytes: int | None
    heap_usage_bytes: int | None

def registrations(platform: str) -> dict[str, object]:
    """The custom calls of a JAX platform, capsules by target name."""

def devices() -> list[Device]:
    """Every Vulkan device; none where `problem` says that Vulkan is not installed."""

def problem() -> str:
    """Why no device can be used and what to do about it; empty where one can."""

def default_device() -> int | None:
    """Index of the device that calls use; None where `problem` says why."""

def set_default_device(index: int) -> None:
    """Makes later calls use another device."""

def last_dispatch() -> Dispatch | None:
    """What the latest call of the process ran; waits for its kernels if they are timed."""

class Plan(TypedDict):
    """Family of kernels and shaders of a plan, and the specialisation constants of each."""

    path: str
    shaders: list[str]
    specializations: list[list[int]]

def example_plan(device: int, pass_name: str, dtype: str, head_dim: int) -> Plan:
    """The plan of a device for plain calls of a pass, 'forward', 'tangent' or 'backward'."""

def scratch_bytes(
    device: int,
    pass_name: str,
    dtype: str,
    sizes: Sequence[int],
    causal: bool = False,
    query_tile: int = 0,
    super_tile: int = 0,
    level_count: int = 0,
    candidate_share: float = 0.0,
    judged_key_tiles: int = 0,
    list_capacity: int = 0,
    corrects: bool = False,
) -> int:
    """Memory that a plain call takes besides operands and results.

    Args:
      device: Index.
      pass_name: As of `example_plan`, or 'plan'.
      dtype: Likewise.
      sizes: Batch entries, queries, keys, query heads, key/value heads, head_dim.
      causal: Whether it is.
      query_tile: Rows of a query tile of its plan; 0: it has none.
      super_tile: Keys of a super-tile of it.
      level_count: Of the plan that the pass makes, as `jax_aat.problem.Options` has it; so are the
        rest. 0: it is given one.
      candidate_share: See there.
      judged_key_tiles: See there.
      list_capacity: See there; 0 where the plan is kept.
      corrects: See there.
    """

def set_timing(enabled: bool, by_kernel: bool = True) -> None:
    """Times the kernels of later calls, or the calls as a whole, or no longer."""

def start_profile(by_kernel: bool) -> None:
    """Measures all calls from now on; RuntimeError where a profile is being taken."""

def stop_profile() -> list[ProfiledCall]:
    """What was measured; waits for the device. RuntimeError where no profile is being taken."""

class Ceilings(TypedDict):
    """FLOP/s, and bytes a second; 0 where the device has no such units."""

    bandwidth: float
    products: float
    float16_matrices: float
    bfloat16_matrices: float

def measure_ceilings(device: int) -> Ceilings:
    """What the device can do at most, by short runs; RuntimeError where it has no timestamps."""

def kernel_statistics(device: int) -> list[tuple[str, list[int], dict[str, float]]]:
    """Shader, specialisation and the driver's statistics of each pipeline so far."""

def memory_stats(device: int) -> MemoryStatistics | None:
    """Memory that a device's context holds; None where no call made one yet."""

def trim_memory(device: int) -> int:
    """Gives idle memory of a device back; returns the number of bytes."""

# Name of the kernel, dtype, head_dim, whether calls have a plan; a shape as `kernel_shapes` has it.
TuningEntry = tuple[str, str, int, bool, Sequence[int]]

def kernel_shapes(
    device: int, kernel: str, dtype: str, head_dim: int, planned: bool
) -> list[list[int]]:
    """Shapes that can run a kernel, the one that runs without a tuning first; few or none.

    Args:
      device: Index.
      kernel: 'forward', 'tangent', 'backward_dq' or 'backward_dkv'.
      dtype: As of `example_plan`.
      head_dim: Likewise.
      planned: Whether calls have a plan.

    Returns:
      Of each the rows of a tile, of a block and of a thread, the columns of a slice, the threads.
    """

def tuning(device: int) -> list[TuningEntry]:
    """The tuning that calls on a device use."""

def set_tuning(device: int, entries: Sequence[TuningEntry]) -> None:
    """Makes later calls use another tuning; ValueError where a shape is none of the kernel's."""

def save_tuning(device: int) -> None:
    """Keeps the tuning in use for later processes; removes the file where there is none in use."""

def tuning_path(device: int) -> str:
    """The file of a device's tuning, whether it exists or not."""

def validation_messages() -> list[str]:
    """What the validation layers said so far (`JAX_AAT_VALIDATION=1`)."""

def cache_path() -> str:
    """The file of compiled pipelines of the default device."""

def mark_device_lost() -> None:
    """Latches the default device as lost, as a driver's reset would. For tests."""

def hide_matrix_layout(hide: bool) -> None:
    """Whether later calls on the default device know no layout of matrices. For tests."""
