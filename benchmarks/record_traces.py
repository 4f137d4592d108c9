"""Records the small CPU traces that the tests of the inspector read: two ranks, gloo, an emulated link, two steps.

    python benchmarks/record_traces.py tests/farskip/data

Needs torch. The ranges carry the names that our executor gives them; the layers do just enough work to overlap. What
says where the recording was made (host name, ids) is taken out, so two recordings differ in their stamps only.
"""

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile, record_function, schedule

WORLD_SIZE = 2
LAYERS = 2
STEPS = 2
ELEMENTS = 1 << 12
TRANSFER_S = 0.002
PRIVATE_KEYS = ("host_name", "trace_id", "traceName", "baseTimeNanoseconds")
KEPT_ARGUMENTS = ("External id", "Input Dims", "Sequence number", "Fwd thread id", "name", "labels", "sort_index")


class _Link:
    """A paced exchange: gloo carries the bytes, a helper thread sleeps as long as the wire would have taken."""

    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._pool = ThreadPoolExecutor(1)

    def launch(self) -> tuple[dist.Work, object]:
        out, data = torch.empty(ELEMENTS), torch.ones(ELEMENTS)
        half = ELEMENTS // WORLD_SIZE
        work = dist.all_to_all_single(out, data, [half] * WORLD_SIZE, [half] * WORLD_SIZE, async_op=True)
        return work, self._pool.submit(self._pace)

    @staticmethod
    def _pace() -> None:
        with record_function("farskip::emulated_link::all_to_all"):
            time.sleep(TRANSFER_S)


def _exchange(link: _Link, layer: int, stage: str, cover: str, weight: torch.Tensor, backward: str) -> None:
    with record_function(f"farskip::L{layer:03d}::{stage}::launch{backward}"):
        work, paced = link.launch()
    with record_function(f"farskip::L{layer:03d}::{cover}::run{backward}"):
        value = weight
        for _ in range(3):
            value = torch.tanh(value @ weight)
    with record_function(f"farskip::L{layer:03d}::{stage}::wait{backward}"):
        work.wait()
        paced.result()  # type: ignore[attr-defined]


def _step(link: _Link, weight: torch.Tensor, rank: int) -> None:
    for layer in range(LAYERS):
        _exchange(link, layer, "dispatch", "attention_core", weight, "")
        _exchange(link, layer, "combine", "shared", weight, "")
    for layer in reversed(range(LAYERS)):
        _exchange(link, layer, "combine", "shared", weight, "::backward")
        _exchange(link, layer, "dispatch", "attention_core", weight, "::backward")
    data = torch.ones(ELEMENTS)
    dist.all_reduce(data)
    dist.reduce_scatter_tensor(torch.empty(ELEMENTS // WORLD_SIZE), data)
    dist.all_gather_into_tensor(torch.empty(ELEMENTS * WORLD_SIZE), data)
    dist.broadcast(data, 0)
    if rank == 0:
        dist.send(data, 1)
    else:
        dist.recv(data, 0)
    dist.barrier()


def _rank(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    link, weight = _Link(), torch.eye(160)

    def export(profiler: profile) -> None:
        path = Path(folder) / f"gloo_rank{rank}.json"
        profiler.export_chrome_trace(str(path))
        _shrink(path)

    threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    plan = schedule(wait=0, warmup=1, active=STEPS, repeat=1)
    options = {"schedule": plan, "on_trace_ready": export, "record_shapes": True, "experimental_config": threads}
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        for _ in range(STEPS + 1):
            _step(link, weight, rank)
            profiler.step()
    dist.destroy_process_group()


def _shrink(path: Path) -> None:
    """Drops what the tests do not read, so that the committed file is small and says nothing about the machine."""
    document = json.loads(path.read_text())
    path.unlink()
    for key in PRIVATE_KEYS:
        document.pop(key, None)
    for event in document["traceEvents"]:
        arguments = event.get("args", {})
        event["args"] = {key: value for key, value in arguments.items() if key in KEPT_ARGUMENTS}
    text = json.dumps(document, indent=1).encode()
    path.with_suffix(".json.gz").write_bytes(gzip.compress(text, 9, mtime=0))


def main() -> None:
    """Records into the folder given."""
    parser = argparse.ArgumentParser(description="Record small CPU traces of two ranks.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(_rank, (f"{scratch}/store", str(folder.resolve())), nprocs=WORLD_SIZE)


if __name__ == "__main__":
    main()
