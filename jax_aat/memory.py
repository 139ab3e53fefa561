"""Device memory that the Vulkan runtime holds: how much, what for, and giving it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, TypeVar

from jax_aat import vulkan
from jax_aat.vulkan import Device

with suppress(ImportError):  # without it there are no devices
    from jax_aat import _native

_Statistics = TypeVar("_Statistics", "PoolStatistics", "SharedStatistics")

PURPOSES = ("state", "transfer", "parameters", "staging", "metrics")


@dataclass(frozen=True)
class PoolStatistics:
    """Memory of one pool, or of all of them together.

    A pool holds chunks, each one allocation of the driver, and cuts blocks from them for calls.

    Attributes:
      reserved_bytes: Bytes of the chunks.
      in_use_bytes: Bytes of the blocks that calls hold or that the device still uses.
      peak_reserved_bytes: Largest `reserved_bytes` since the device's context was made.
      peak_in_use_bytes: Largest `in_use_bytes` since then.
      largest_free_bytes: Bytes of the largest range without a block. Of several pools: the sum of
        each one's.
      blocks: Number of blocks in use.
      allocations: Number of chunks.
      total_allocations: Number of chunks that the driver was asked for since the context was made.
    """

    reserved_bytes: int = 0
    in_use_bytes: int = 0
    peak_reserved_bytes: int = 0
    peak_in_use_bytes: int = 0
    largest_free_bytes: int = 0
    blocks: int = 0
    allocations: int = 0
    total_allocations: int = 0

    @property
    def fragmentation(self) -> float:
        """1 - `largest_free_bytes` / bytes without a block; 0 where there are none.

        0: all that is free in a pool lies in one piece. Free ranges of different chunks are apart.
        """
        free = self.reserved_bytes - self.in_use_bytes
        return 1 - self.largest_free_bytes / free if free else 0.0


@dataclass(frozen=True)
class SharedStatistics:
    """Memory of one kind that is shared with others and lies in no pool.

    Attributes:
      live: Number of shared allocations now.
      live_bytes: Their bytes.
      total: Number since the device's context was made.
    """

    live: int = 0
    live_bytes: int = 0
    total: int = 0


@dataclass(frozen=True)
class MemoryStatistics:
    """Memory of one device, or the sums over several.

    A sum of peaks is no peak: those of several devices may be of different times.

    Attributes:
      devices: Names of the devices that have memory here: those that were used.
      total: All pools together. Its peaks are those of the sum, not the sum of the pools' peaks.
      pools: The pools by purpose: 'state' (scratch of calls), 'transfer' (operands brought to a
        device with memory of its own), 'parameters' (of kernels), 'staging' (the host's side of a
        transfer), 'metrics' (results of timestamps).
      host_imports: Host memory that calls use where it lies.
      cuda_imports: Allocations of CUDA, such as XLA's arena, that calls use where they lie. They
        stay imported as long as the context lives.
      cuda_exports: Staging memory for buffers of CUDA that cannot be imported.
      limit_bytes: What all pools together may hold at most (JAX_AAT_MEMORY_LIMIT).
      heap_bytes: Size of the largest device-local heap.
      heap_budget_bytes: What the driver lets this process use of that heap; None where a device has
        no VK_EXT_memory_budget.
      heap_usage_bytes: What this process uses of it, by whatever API; None likewise.
    """

    devices: tuple[str, ...]
    total: PoolStatistics
    pools: Mapping[str, PoolStatistics]
    host_imports: SharedStatistics
    cuda_imports: SharedStatistics
    cuda_exports: SharedStatistics
    limit_bytes: int
    heap_bytes: int
    heap_budget_bytes: int | None
    heap_usage_bytes: int | None

    def __str__(self) -> str:
        titles = ["", "reserved", "in use", "peak reserved", "peak in use"]
        titles += ["blocks", "chunks", "chunks so far", "fragmentation"]
        rows = [titles]
        for name, pool in {**self.pools, "total": self.total}.items():
            sizes = [pool.reserved_bytes, pool.in_use_bytes]
            sizes += [pool.peak_reserved_bytes, pool.peak_in_use_bytes]
            counts = [pool.blocks, pool.allocations, pool.total_allocations]
            share = f"{pool.fragmentation:.0%}"
            rows.append([name, *map(_readable, sizes), *map(str, counts), share])
        lines = [f"memory on {', '.join(self.devices) or 'no device: none was used yet'}"]
        for name, *cells in rows:
            padded = [cell.rjust(len(title)) for cell, title in zip(cells, titles[1:], strict=True)]
            lines.append("  ".join([f"{name:10}", *padded]))
        for words, shared in (
            ("host imports", self.host_imports),
            ("CUDA imports", self.cuda_imports),
            ("CUDA exports", self.cuda_exports),
        ):
            live = f"{shared.live} live, {_readable(shared.live_bytes)}"
            lines.append(f"{words}: {live}; {shared.total} since the start")
        heap = f"heap: {_readable(self.heap_bytes)}"
        if self.heap_budget_bytes is not None and self.heap_usage_bytes is not None:
            heap += f", {_readable(self.heap_usage_bytes)} used by this process of a budget of "
            heap += _readable(self.heap_budget_bytes)
        else:
            heap += ", budget unknown (no VK_EXT_memory_budget)"
        return "\n".join([*lines, f"bound: {_readable(self.limit_bytes)}; {heap}"])


def memory_stats(device: Device | int | None = None) -> MemoryStatistics:
    """What the Vulkan runtime holds of device memory, beside JAX's own.

    Nobody waits for it: blocks that the device still uses are in use.

    Args:
      device: One of `jax_aat.devices`, itself or by index; None: the sums over all devices that
        calls ran on. Zeros stand for what was not used yet.

    Raises:
      TypeError: `device` is something else.
      ValueError: There is no device of this index.
      RuntimeError: The device was lost.
    """
    names: list[str] = []
    found: list[Any] = []
    for each in _devices(device):
        statistics = _native.memory_stats(each.index)
        if statistics is not None:
            names.append(each.name)
            found.append(statistics)
    pools = {
        purpose: _sum(PoolStatistics, [each["pools"][purpose] for each in found])
        for purpose in PURPOSES
    }
    return MemoryStatistics(
        devices=tuple(names),
        total=_sum(PoolStatistics, [each["total"] for each in found]),
        pools=MappingProxyType(pools),
        host_imports=_sum(SharedStatistics, [each["host_imports"] for each in found]),
        cuda_imports=_sum(SharedStatistics, [each["cuda_imports"] for each in found]),
        cuda_exports=_sum(SharedStatistics, [each["cuda_exports"] for each in found]),
        limit_bytes=sum(each["limit_bytes"] for each in found),
        heap_bytes=sum(each["heap_bytes"] for each in found),
        heap_budget_bytes=_sum_known([each["heap_budget_bytes"] for each in found]),
        heap_usage_bytes=_sum_known([each["heap_usage_bytes"] for each in found]),
    )


def trim_memory(device: Device | int | None = None) -> int:
    """Gives the chunks that hold no block back to the driver; returns their bytes.

    Nobody waits for it: what calls or the device still use stays.

    Args:
      device: One of `jax_aat.devices`, itself or by index; None: all devices.

    Raises:
      TypeError: `device` is something else.
      ValueError: There is no device of this index.
      RuntimeError: The device was lost.
    """
    return sum(_native.trim_memory(each.index) for each in _devices(device))


def _devices(device: Device | int | None) -> Sequence[Device]:
    """The devices that an argument means; none without a native module."""
    return vulkan.devices() if device is None else (vulkan.find_device(device),)


def _sum(kind: type[_Statistics], parts: Sequence[Any]) -> _Statistics:
    return kind(**{each.name: sum(part[each.name] for part in parts) for each in fields(kind)})


def _sum_known(parts: Sequence[int | None]) -> int | None:
    """The sum; None of nothing or with a part that is unknown."""
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None


def _readable(count: int) -> str:
    """A number of bytes in the largest unit of 1024 that leaves at least 1."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
