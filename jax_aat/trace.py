"""Profiles in the Chrome trace event format (Trace Event Format, Google, 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_aat.profiling import Profile, ProfiledCall

_HOST, _DEVICE = 1, 2
_ANNOTATIONS = 0
"""Row of the host; handlers have those from 1 on."""


def trace_events(profile: Profile) -> list[dict[str, Any]]:
    """Events of the host's rows, then of the device's, with names of the rows."""
    events = [_name("process_name", _HOST, 0, "host")]
    device = profile.device.name if profile.device is not None else "device"
    events.append(_name("process_name", _DEVICE, 0, device))
    events.append(_name("thread_name", _HOST, _ANNOTATIONS, "annotations"))
    for thread in sorted({call.thread for call in profile.calls}):
        events.append(_name("thread_name", _HOST, thread + 1, f"handlers of thread {thread}"))
    for queue in sorted({call.queue for call in profile.calls}):
        events.append(_name("thread_name", _DEVICE, queue, f"queue {queue}"))
    for annotation in profile.annotations:
        events.append(
            _slice(annotation.name, _HOST, _ANNOTATIONS, annotation.start, annotation.seconds)
        )
    for call in profile.calls:
        events += _events_of(call)
    return events


def _events_of(call: ProfiledCall) -> Iterator[dict[str, Any]]:
    about = {
        "sequence": call.sequence,
        "problem": call.problem,
        "path": call.path,
        "imported bytes": call.imported_bytes,
        "staged bytes": call.staged_bytes,
    }
    row = (_HOST, call.thread + 1)
    yield _slice(call.direction, *row, call.host_start, call.host_seconds, about)
    if call.start != call.start:
        return
    if call.stream_seconds == call.stream_seconds:
        about["CUDA stream ms"] = 1e3 * call.stream_seconds
    if call.exact_pairs is not None:
        about |= {"exact pairs": call.exact_pairs, "coarse pairs": call.coarse_pairs}
    yield _slice(call.direction, _DEVICE, call.queue, call.start, call.seconds, about)
    end = call.start + call.seconds
    for kernel in call.kernels:
        start = max(kernel.start, call.start)
        seconds = min(kernel.seconds, end - start)
        known = {"FLOPs": kernel.flops, "bytes": kernel.bytes}
        yield _slice(
            kernel.name,
            _DEVICE,
            call.queue,
            start,
            seconds,
            {name: value for name, value in known.items() if value == value},
        )
    flow = {"name": "submit", "cat": "submit", "id": call.sequence}
    yield flow | _at(*row, call.submitted) | {"ph": "s"}
    yield flow | _at(_DEVICE, call.queue, call.start) | {"ph": "f", "bp": "e"}


def _slice(
    name: str,
    process: int,
    thread: int,
    start: float,
    seconds: float,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    event = {"name": name, "cat": "jax_aat", "ph": "X", "dur": 1e6 * seconds, "args": about or {}}
    return event | _at(process, thread, start)


def _at(process: int, thread: int, seconds: float) -> dict[str, Any]:
    return {"pid": process, "tid": thread, "ts": 1e6 * seconds}


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
