"""Builds small Kineto traces for tests and large ones for benchmarks: by hand, to the nanosecond, without torch.

A builder writes what the profiler writes: kernels with their launches, operators, ranges, steps. Every kernel has its
own correlation id and, unless told otherwise, a launch on the main thread shortly before its start.
"""

import gzip
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAIN_THREAD = 100
AUTOGRAD_THREAD = 101
WORKER_THREAD = 102
PROCESS = 100
COMPUTE_STREAM = 7
COMMUNICATION_STREAM = 20
HOST_LEAD_NS = 60_000

GEMM = "void cutlass::Kernel<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128>(Params)"
ALL_TO_ALL = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


class TraceBuilder:
    """One rank's trace, event by event; all stamps are integer nanoseconds.

    Args:
        rank: of the default group; None leaves distributedInfo out.
        world_size: of the default group.
        backend: of the default group.
        base_ns: added to every stamp when writing.
        correlation: the last correlation id already in use.
    """

    def __init__(
        self,
        *,
        rank: int | None = 0,
        world_size: int = 2,
        backend: str = "nccl",
        base_ns: int = 0,
        correlation: int = 0,
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self.meta: dict[str, Any] = {"schemaVersion": 1, "deviceProperties": []}
        if rank is not None:
            self.meta["distributedInfo"] = {"backend": backend, "rank": rank, "world_size": world_size}
        self._base_ns = base_ns
        self._correlation = correlation

    def add(self, category: str, name: str, start: int, end: int, *, pid: Any, tid: Any, **args: Any) -> None:
        """One complete event."""
        self.events.append(
            {
                "ph": "X",
                "cat": category,
                "name": name,
                "pid": pid,
                "tid": tid,
                "ts": start + self._base_ns,
                "dur": end - start,
                "args": args,
            }
        )

    def kernel(
        self,
        name: str,
        start: int,
        end: int,
        *,
        stream: int = COMPUTE_STREAM,
        launch: int | None = None,
        thread: int = MAIN_THREAD,
        device: int = 0,
        launched: bool = True,
        category: str = "kernel",
        runtime: str = "cudaLaunchKernel",
        **args: Any,
    ) -> int:
        """A device row and, if ``launched``, its launch at ``launch`` (by default right before it).

        Returns:
            The correlation id.
        """
        self._correlation += 1
        at = start - 2 if launch is None else launch
        if launched:
            self.add("cuda_runtime", runtime, at, at + 1, pid=PROCESS, tid=thread, correlation=self._correlation)
        self.add(
            category,
            name,
            start,
            end,
            pid=device,
            tid=stream,
            device=device,
            stream=stream,
            correlation=self._correlation,
            grid=[8, 1, 1],
            block=[128, 1, 1],
            **args,
        )
        return self._correlation

    def copy(self, start: int, end: int, *, name: str = "Memcpy DtoD (Device -> Device)", **options: Any) -> int:
        """A copy."""
        return self.kernel(name, start, end, category="gpu_memcpy", runtime="cudaMemcpyAsync", **options)

    def operator(self, name: str, start: int, end: int, *, thread: int = MAIN_THREAD, **args: Any) -> None:
        """An operator of the host."""
        self.add("cpu_op", name, start, end, pid=PROCESS, tid=thread, **args)

    def range(self, name: str, start: int, end: int, *, thread: int = MAIN_THREAD, **args: Any) -> None:
        """A range of the host."""
        self.add("user_annotation", name, start, end, pid=PROCESS, tid=thread, **args)

    def step(self, number: int, start: int, end: int) -> None:
        """A step range."""
        self.range(f"ProfilerStep#{number}", start, end)

    def stream_wait(self, at: int, *, stream: int, waits_on: int) -> None:
        """A row that says that one stream waits for another."""
        self._correlation += 1
        self.add(
            "cuda_sync",
            "Stream Wait Event",
            at,
            at,
            pid=0,
            tid=stream,
            cuda_sync_kind="Stream Wait Event",
            wait_on_stream=waits_on,
            stream=stream,
            correlation=self._correlation,
        )

    def event_texts(self) -> list[str]:
        """The events as JSON texts, for a writer that does not want to hold a whole trace."""
        return [_event_text(event, whole_microseconds=False) for event in self.events]

    def text(self, *, whole_microseconds: bool = False, metadata_last: bool = False) -> bytes:
        """The trace as the profiler would write it: microseconds with three digits behind the point."""
        events = ",\n  ".join(_event_text(event, whole_microseconds=whole_microseconds) for event in self.events)
        meta = json.dumps(self.meta)[1:-1]
        body = f'"traceEvents": [\n  {events}\n  ]'
        return (f"{{\n  {body},\n {meta}}}\n" if metadata_last else f"{{\n {meta},\n  {body}\n}}\n").encode()

    def write(self, path: Path, **options: Any) -> Path:
        """Writes the trace; gzip if the name ends in .gz."""
        data = self.text(**options)
        path.write_bytes(gzip.compress(data, 1, mtime=0) if path.name.endswith(".gz") else data)
        return path


def _event_text(event: Mapping[str, Any], *, whole_microseconds: bool) -> str:
    values = {key: json.dumps(value) for key, value in event.items()}
    for key in ("ts", "dur"):
        nanoseconds = event[key]
        if whole_microseconds:
            values[key] = str(nanoseconds // 1000)
        else:
            values[key] = f"{'-' if nanoseconds < 0 else ''}{abs(nanoseconds) // 1000}.{abs(nanoseconds) % 1000:03d}"
    return "{\n    " + ", ".join(f'"{key}": {value}' for key, value in values.items()) + "\n  }"


def training_trace(
    *,
    rank: int = 0,
    world_size: int = 8,
    steps: int = 2,
    layers: int = 4,
    kernels: int = 20,
    seed: int = 0,
    start: int = 1_000_000,
    first_step: int = 0,
    correlation: int = 0,
) -> TraceBuilder:
    """A training run of our kind, for benchmarks and end-to-end tests: per layer dispatch and combine under compute.

    Args:
        rank: of the default group.
        world_size: of the default group.
        steps: how many steps.
        layers: how many layers per step.
        kernels: compute kernels per layer.
        seed: of the lengths; one seed gives all ranks the same program, shifted by small random delays.
        start: when the first step starts, nanoseconds.
        first_step: number of the first step.
        correlation: the last correlation id already in use.

    Returns:
        The builder.
    """
    details: dict[str, Any] = {"Collective name": "all_to_allv", "Process Group Name": "ep", "Group size": world_size}
    sizes: dict[str, Any] = {"Input Dims": [[4096, 2048], [2048, 1408]]}
    lengths, jitter = random.Random(seed), random.Random(1000 * seed + rank)
    trace = TraceBuilder(rank=rank, world_size=world_size, correlation=correlation)
    now = start
    for step in range(first_step, first_step + steps):
        step_start = now
        for layer in range(layers):
            for stage in ("dispatch", "combine"):
                length = lengths.randrange(100_000, 400_000)
                start = now + jitter.randrange(0, 20_000)
                # The host runs ahead of the device, as it does in a run that is not bound by it.
                host = now - HOST_LEAD_NS
                trace.range(f"farskip::L{layer:03d}::{stage}::launch", host - 3_000, host - 500)
                trace.operator("c10d::alltoall_base_", host - 2_500, host - 600)
                trace.range("nccl:all_to_all", host - 2_300, host - 700)
                trace.kernel(
                    ALL_TO_ALL,
                    start,
                    start + length,
                    stream=COMMUNICATION_STREAM,
                    launch=host - 2_000,
                    **details,
                )
                trace.range(f"farskip::L{layer:03d}::attention_core::run", host - 400, host + 2_000)
                for _ in range(kernels // 2):
                    busy = lengths.randrange(5_000, 30_000)
                    host = now - HOST_LEAD_NS
                    trace.operator("aten::mm", host - 300, host - 100, **sizes)
                    trace.kernel(GEMM, now, now + busy, launch=host - 250)
                    now += busy + lengths.randrange(500, 4_000)
                now += 5_000
        trace.step(step, step_start - HOST_LEAD_NS - 10_000, now - HOST_LEAD_NS)
        now += 50_000
    return trace
