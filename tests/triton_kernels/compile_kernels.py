"""Compiles kernels for GPUs that are not there and reports what came out, as JSON on standard output.

Run as a script, in a process without TRITON_INTERPRET. A case names a kernel, its constants and the types of its other
arguments; all pointers are promised to be 16-byte aligned, as torch allocates them.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

TARGETS = {"sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


def compile_case(
    module: str, kernel: str, constants: dict[str, Any], types: dict[str, str], options: dict[str, Any]
) -> Any:
    """Compile one kernel for every target; returns its figures per target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = getattr(importlib.import_module(f"farskip.triton_kernels.{module}"), kernel)
    multiples = {name.removesuffix(":16") for name in types if name.endswith(":16")}
    types = {name.removesuffix(":16"): kind for name, kind in types.items()}
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(fn.arg_names):
        if name in types:
            signature[name] = types[name]
            if types[name].startswith("*") or name in multiples:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constexprs[(index,)] = constants[name]
    report = {}
    for target, words in TARGETS.items():
        source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget(*words), options=options)
        report[target] = nvidia_figures(compiled) if target.startswith("sm") else amd_figures(compiled)
        report[target]["reduce_layouts"] = reduce_layouts(compiled.asm["ttgir"])
        report[target]["narrow_products"] = narrow_products(compiled.asm["ttir"])
    return report


def nvidia_figures(compiled: Any) -> dict[str, Any]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    local = re.search(r"LOCAL:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    assert local is not None and stack is not None, usage
    return {
        "spill": int(local[1]) + int(stack[1]),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
        "wide_loads": len(re.findall(r"LDG\.E(?:\.\w+)*\.128", sass)),
        "wide_stores": len(re.findall(r"STG\.E(?:\.\w+)*\.128", sass)),
        "narrow_loads": len(re.findall(r"LDG\.E(?:\.\w+)*\.[US](?:8|16)", sass)),
        "atomics": len(re.findall(r"\b(?:RED|ATOM|ATOMG|REDG)\.", sass)),
    }


def amd_figures(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    spill = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    assert spill is not None, "no spill count in the assembly"
    return {
        "spill": int(spill[1]),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
        "atomics": len(re.findall(r"(?:global|buffer)_atomic", text)),
    }


def reduce_layouts(ttgir: str) -> list[str]:
    """Layout of every operand that is reduced: with the layout, the order of the additions is fixed."""
    names = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = set()
    for match in re.finditer(r"\}\) : \(tensor<([\dx]+f32), (#\w+)>\) ->", ttgir):
        found.add(f"{match[1]} {names[match[2]]}")
    return sorted(found)


def narrow_products(ttir: str) -> list[str]:
    """Products in 32 bits of a number of columns and something that is no constant: offsets that could wrap."""
    columns, found = {"%num_cols"}, []
    for line in ttir.splitlines():
        if splat := re.match(r"\s*(%\w+) = tt\.splat (%\w+) : i32 ->", line):
            columns |= {splat[1]} if splat[2] in columns else set()
        product = re.match(r"\s*(%\w+) = arith\.muli (%\w+), (%\w+)(?: overflow<\w+>)? : (?:tensor<[\dx]*)?i32", line)
        if product and columns & {product[2], product[3]}:
            (other,) = {product[2], product[3]} - columns or {"%num_cols"}
            if other.startswith("%c"):
                columns.add(product[1])
            else:
                found.append(line.strip())
    return found


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def main() -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    cases = json.loads(sys.stdin.read())
    report = {name: compile_case(**case) for name, case in cases.items()}
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
