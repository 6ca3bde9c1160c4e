"""The system's C++ compiler: source in, loaded library out; what was compiled once is found again."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

__all__ = ["CompilerError", "library"]


class CompilerError(Exception):
    """There is no compiler, it failed, or its result cannot be loaded."""


_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fwrapv", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]  # fmt: skip


def _flags() -> list[str]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return [*_FLAGS, "-march=native", "-mprefer-vector-width=512"]
    return [*_FLAGS, "-mcpu=native"]


@functools.cache
def _target(compiler: str) -> str:
    """The compiler's version and what it takes this processor for."""
    command = [compiler, *_flags(), "-v", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def library(source: str) -> ctypes.CDLL:
    """Compile and load; what was compiled before for this processor by this compiler is found again.

    Raises:
        CompilerError: it could not be done.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        compiler = get_cpp_compiler()
        key = hashlib.sha256("\n".join([source, *_flags(), _target(compiler)]).encode()).hexdigest()
        file = Path(cache_dir(), "merge_search", f"{key}.so")
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent) as work:
                code, made = Path(work, "loop.cpp"), Path(work, "loop.so")
                code.write_text(source)
                subprocess.run([compiler, *_flags(), str(code), "-o", str(made)], capture_output=True, text=True, check=True)  # fmt: skip
                made.replace(file)
        return ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        raise CompilerError(f"the compiler failed: {error.stderr[-500:]}") from error
    except OSError as error:
        raise CompilerError(f"the loop could not be compiled or loaded: {error}") from error
