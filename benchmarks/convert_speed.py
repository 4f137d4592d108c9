"""Speed and memory of `farskip convert` beside `cp`, and of `farskip.load` beside transformers' own load.

    python benchmarks/convert_speed.py --gigabytes 10 --rounds 5 --folder /a/disk

Writes a Qwen3-MoE of about that size in bfloat16, one tensor per expert, in files of an eighth of it. Then, in turn:

    convert     `farskip convert IN OUT --wiring farskip`, a fresh process; it brings its files to the disk by itself
    cp          `cp` of the same files, then fsync of each and of the folder

Each starts with nothing of the source in memory (its pages are dropped with posix_fadvise, no root needed) unless
--warm says otherwise, and with nothing left to be written. The time of convert includes Python's start, its imports and
its end, about two seconds whatever the size; the imports are given beside it. Its peak memory is the kernel's (VmHWM;
pages of the file cache do not count), less what it was when everything was imported and planned, in units of one file
of tensors.

Load: `farskip.load` of the converted checkpoint and `from_pretrained` of the plain one by transformers, in turn, each
in a fresh process, timed after the imports, from warm file pages. transformers maps files, so both are timed once as
they return and once more after every parameter was read.

Prints every measurement and the medians; with --out it also writes everything as JSON.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, EXPERT_WIDTH, NUM_EXPERTS, VOCABULARY, NUM_FILES = 1024, 512, 64, 32_000, 8

CONVERT = """
import json, sys, time
from pathlib import Path
started = time.perf_counter()
from farskip.launch.main import main
import farskip.models.convert as converting
imported = time.perf_counter() - started
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
planned = []
plan = converting.plan_conversion
def noted(*arguments):
    conversion = plan(*arguments)
    planned.append(peak())
    return conversion
converting.plan_conversion = noted
code = main(["convert", *sys.argv[1:], "--wiring", "farskip"])
print(json.dumps({"imports_s": imported, "copying_bytes": peak() - planned[0], "peak_bytes": peak()}))
sys.exit(code)
"""
LOAD = """
import json, sys, time
import torch, transformers, farskip
from farskip.models import pretrained
from transformers import Qwen3MoeForCausalLM
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
started = time.perf_counter()
if sys.argv[1] == "farskip":
    model = farskip.load(sys.argv[2])
else:
    model = Qwen3MoeForCausalLM.from_pretrained(sys.argv[2], dtype="auto")
returned = time.perf_counter() - started
for parameter in model.parameters():
    parameter.detach().view(torch.int16).amax()
print(json.dumps({"load_s": returned, "load_and_read_s": time.perf_counter() - started}))
"""


def write_checkpoint(folder: Path, num_bytes: int) -> int:
    """A Qwen3-MoE checkpoint of about this size, of random numbers; returns its size."""
    layer = 2 * (3 * HIDDEN * EXPERT_WIDTH * NUM_EXPERTS + NUM_EXPERTS * HIDDEN + 4 * HIDDEN * HIDDEN)
    num_layers = max(2, round((num_bytes - 4 * VOCABULARY * HIDDEN) / layer))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "moe_intermediate_size": EXPERT_WIDTH,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": HIDDEN // 8,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "tie_word_embeddings": False,
    }
    shapes = tensor_shapes(num_layers)
    total = sum(2 * rows * columns for rows, columns in shapes.values())
    folder.mkdir(parents=True)
    parts: list[dict[str, tuple[int, int]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size > total / NUM_FILES:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += 2 * shape[0] * shape[1]
    where = {}
    generator = torch.Generator().manual_seed(0)
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file(
            {name: random_tensor(shape, generator) for name, shape in part.items()}, folder / file, {"format": "pt"}
        )
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.iterdir())


def tensor_shapes(num_layers: int) -> dict[str, tuple[int, int]]:
    """Every tensor of the model; a vector has one row of 0."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        for projection in ("q", "k", "v", "o"):
            shapes[f"{prefix}self_attn.{projection}_proj.weight"] = (HIDDEN, HIDDEN)
        for norm in ("q_norm", "k_norm"):
            shapes[f"{prefix}self_attn.{norm}.weight"] = (1, HIDDEN // 8)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (1, HIDDEN)
        shapes[f"{prefix}mlp.gate.weight"] = (NUM_EXPERTS, HIDDEN)
        for expert in range(NUM_EXPERTS):
            for matrix, shape in (
                ("gate", (EXPERT_WIDTH, HIDDEN)),
                ("up", (EXPERT_WIDTH, HIDDEN)),
                ("down", (HIDDEN, EXPERT_WIDTH)),
            ):
                shapes[f"{prefix}mlp.experts.{expert}.{matrix}_proj.weight"] = shape
    return {**shapes, "model.norm.weight": (1, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}


def random_tensor(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Random bits without infinities, so that no file system finds anything to compress; one row becomes a vector."""
    bits = torch.randint(0, 1 << 14, shape, dtype=torch.int16, generator=generator)
    return bits.view(torch.bfloat16).squeeze(0)


def drop_pages(folder: Path) -> None:
    """Nothing of these files stays in memory."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def to_disk(folder: Path) -> None:
    """As `farskip convert` does before it gives the folder its name."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def run_python(program: str, *arguments: str) -> dict[str, float]:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-P", "-c", program, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_convert(source: Path, target: Path) -> dict[str, float]:
    """One run of the command, from the user's point of view."""
    started = time.perf_counter()
    found = run_python(CONVERT, str(source), str(target))
    return {"seconds": time.perf_counter() - started, **found}


def measure_cp(source: Path, target: Path) -> dict[str, float]:
    """`cp` of every file to new blocks, and to the disk."""
    started = time.perf_counter()
    target.mkdir()
    files = [str(path) for path in source.iterdir()]
    subprocess.run(["cp", "--reflink=never", *files, str(target)], check=True)
    to_disk(target)
    return {"seconds": time.perf_counter() - started}


def compare_copies(source: Path, folder: Path, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both in turn, each first in every second round."""
    rows: dict[str, list[dict[str, float]]] = {"convert": [], "cp": []}
    kinds = [("convert", measure_convert), ("cp", measure_cp)]
    for number in range(options.rounds):
        for name, measure in kinds if number % 2 == 0 else kinds[::-1]:
            target = folder / name
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            if not options.warm:
                drop_pages(source)
            row = measure(source, target)
            rows[name].append(row)
            print(f"round {number} {name}: {row['seconds']:.2f} s, {size / 1e6 / row['seconds']:.0f} MB/s", flush=True)
    times = {name: statistics.median(row["seconds"] for row in found) for name, found in rows.items()}
    copying = statistics.median(row["seconds"] - row["imports_s"] for row in rows["convert"])
    biggest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    memory = max(row["copying_bytes"] for row in rows["convert"])
    print(
        f"convert {times['convert']:.2f} s ({copying:.2f} s without imports), cp {times['cp']:.2f} s: "
        f"{times['convert'] / times['cp']:.2f} times ({copying / times['cp']:.2f} without imports); "
        f"memory for copying {memory / 1e6:.1f} MB, {memory / biggest:.3f} of the biggest file "
        f"(whole process {max(row['peak_bytes'] for row in rows['convert']) / 1e6:.0f} MB)",
        flush=True,
    )
    return {
        "rows": rows,
        "ratio": times["convert"] / times["cp"],
        "ratio_without_imports": copying / times["cp"],
        "copying_bytes": memory,
        "biggest_file_bytes": biggest,
    }


def compare_loads(plain: Path, rewired: Path, rounds: int) -> dict[str, Any]:
    """Both in turn, each first in every second round."""
    rows: dict[str, list[dict[str, float]]] = {"farskip": [], "transformers": []}
    kinds = [("farskip", rewired), ("transformers", plain)]
    for path in (plain, rewired):  # both from warm pages
        subprocess.run(["cat", *map(str, path.glob("*.safetensors"))], stdout=subprocess.DEVNULL, check=True)
    for number in range(rounds):
        for name, path in kinds if number % 2 == 0 else kinds[::-1]:
            row = run_python(LOAD, name, str(path))
            rows[name].append(row)
            print(
                f"round {number} load by {name}: {row['load_s']:.2f} s, read {row['load_and_read_s']:.2f} s", flush=True
            )
    ratios = {}
    for key in ("load_s", "load_and_read_s"):
        ours, theirs = (statistics.median(row[key] for row in rows[name]) for name in ("farskip", "transformers"))
        ratios[key] = ours / theirs
        print(f"{key}: farskip {ours:.2f}, transformers {theirs:.2f}: {ours / theirs:.2f} times", flush=True)
    return {"rows": rows, "ratios": ratios}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description="Speed of farskip convert beside cp, of farskip.load beside transformers."
    )
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary folder if left out")
    parser.add_argument("--warm", action="store_true", help="leave the source's pages in memory")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        free, needed = shutil.disk_usage(folder).free, 3.2e9 * options.gigabytes
        if free < needed:
            parser.error(f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; give --folder")
        size = write_checkpoint(folder / "source", int(options.gigabytes * 1e9))
        print(f"checkpoint of {size / 1e9:.2f} GB in {NUM_FILES} files or so", flush=True)
        copies = compare_copies(folder / "source", folder, size, options)
        shutil.rmtree(folder / "cp")
        loads = compare_loads(folder / "source", folder / "convert", options.rounds)
    result = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "torch": torch.__version__,
        "bytes": size,
        "warm": options.warm,
        "convert": copies,
        "load": loads,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
