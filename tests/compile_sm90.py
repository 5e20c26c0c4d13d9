"""Compiles every variant of the kernels for sm_90, without a GPU, and prints what came out as JSON.

A process of its own, because Triton decides at import whether it interprets: ``python tests/compile_sm90.py``. An
argument is a pattern: only variants whose name it matches. The variants are in ``variants_*.py``.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from variants import Variant

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PARTS = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("variants_*.py"))]


def compiled(v: Variant) -> tuple[Any, str, str]:
    names = v.kernel.arg_names
    types = {name: f"*{v.pointers[name]}" for name in v.pointers} | v.scalars | dict.fromkeys(v.constants, "constexpr")
    signature = {name: types[name] for name in names}
    even = {**v.pointers, **dict.fromkeys(v.aligned)}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in even}
    source = ASTSource(v.kernel, signature, v.constants, attrs=attributes)
    options = {"num_warps": v.warps} | ({"num_stages": v.stages} if v.stages else {})
    out = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(out.asm["cubin"])
        file.flush()
        usage, sass = (run("cuobjdump", flag, file.name) for flag in ("-res-usage", "-sass"))
    return out, usage, sass


def run(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


def facts(wanted: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name, variant in (pair for part in PARTS for pair in part.variants() if re.search(wanted, pair[0])):
        out, usage, sass = compiled(variant)
        number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
        found[name] = {
            "registers": number["REG"],
            "spilled": len(re.findall(r"\b(STL|LDL)\b", sass)),
            "shared": out.metadata.shared,
            "wide_loads": len(re.findall(r"LDG\.E\.[^ ]*128|LDG\.E\.128", sass)),
            "wide_stores": len(re.findall(r"STG\.E\.[^ ]*128|STG\.E\.128", sass)),
            "loads": len(re.findall(r"\bLDG\b", sass)),
            "stores": len(re.findall(r"\bSTG\b", sass)),
            "tensor_cores": len(re.findall(r"\b(HGMMA|HMMA)\b", sass)),
            "tanh": "tanh" in out.asm["ptx"] or "MUFU.TANH" in sass,
        }
    return found


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1] if len(sys.argv) > 1 else ""), indent=1))
