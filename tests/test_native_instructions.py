"""The extension runs on any x86-64 processor: wide instructions stand only where a check has been made before."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest
from native_cases import needs_extension

#: What runs once the processor has been asked: a namespace of a variant, and the entry points of the files for AMX,
#: which the bindings guard by ``has_tiles()`` and ``takes...()`` of csrc/tile_support.cpp.
GUARDED = re.compile(
    r"flexlam::(amx|avx2|avx512|avx512_bf16)::"
    r"|flexlam::(tiles_attend|linear_gradients|SequenceEngine::append|EncoderEngine::run)\("
    r"|flexlam::\(anonymous namespace\)::Encoding::"
)
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
#: AVX and later begin with v (verr and verw are older), masks with k, matrix tiles with t.
_WIDE = re.compile(r"\t(v(?!er[rw])\w+|k\w+[bwdq]|tile\w+|tdp\w+)\s")


def wide_functions() -> set[str]:
    """Names of the extension's functions that hold an instruction of AVX or later."""
    from flexlam_fast import _C

    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", "--section=.text", _C.__file__]
    found, name = set(), ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if match := _FUNCTION.match(line):
            name = match[1]
        elif _WIDE.search(line):
            found.add(name)
    return found


@needs_extension
@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
def test_no_wide_instruction_runs_before_the_processor_was_asked() -> None:
    wide = wide_functions()
    assert not {name for name in wide if not GUARDED.search(name)}
    assert bool(wide) == (platform.machine() == "x86_64")  # else nothing has been looked at
