"""The system's C++ compiler: source in, loaded library out. Libraries are cached on disk.

torch has a compiler front of its own, but importing that module takes a second.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

__all__ = ["TARGET_VARIABLE", "CompilerError", "compile_flags", "find_compiler", "library", "read_source"]


class CompilerError(Exception):
    """No compiler was found, it failed, or its result cannot be loaded."""


_FLAGS = [
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fwrapv", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno",
]  # fmt: skip
# gcc's jump threading turns selections that depend on each other into branches, and the loop stays scalar. Clang
# refuses this flag.
_GCC_ALONE = "-fno-thread-jumps"

TARGET_VARIABLE = "MERGE_SEARCH_MARCH"
"""Environment variable: a processor to compile for in place of this machine's, such as ``x86-64-v3``."""


def compile_flags(target: str | None = None) -> list[str]:
    """Flags for one target.

    Args:
        target: A name that ``-march`` takes; None: the one of the environment, else this machine's processor.
    """
    target = target or os.environ.get(TARGET_VARIABLE) or "native"
    is_x86 = target.startswith("x86") or (
        not target.startswith("arm") and platform.machine().lower() in ("x86_64", "amd64")
    )
    if is_x86:
        return [*_FLAGS, _GCC_ALONE, f"-march={target}", "-mprefer-vector-width=512"]
    return [*_FLAGS, _GCC_ALONE, "-mcpu=native" if target == "native" else f"-march={target}"]


def find_compiler() -> str | None:
    """Path of the compiler that ``CXX`` names, else of the first usual one on this machine; None if there is none."""
    usual = ["clang++", "g++"] if sys.platform == "darwin" else ["g++", "clang++", "c++"]
    paths = (shutil.which(name) for name in ([os.environ["CXX"]] if os.environ.get("CXX") else usual))
    return next((path for path in paths if path), None)


@functools.cache
def _target(compiler: str, march: str | None) -> tuple[list[str], str]:
    """The flags that the compiler accepts, and its report: its version and the processor that it compiles for."""
    flags = compile_flags(march)
    try:
        return flags, _report(compiler, flags)
    except subprocess.CalledProcessError:
        flags.remove(_GCC_ALONE)
        return flags, _report(compiler, flags)


def _report(compiler: str, flags: list[str]) -> str:
    command = [compiler, *flags, "-v", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _cache() -> Path:
    """Folder of compiled libraries: beside torch's compiled graphs if their folder is set, else in the user's cache."""
    if place := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(place, "merge_search")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "merge-search")


def read_source(path: str) -> str:
    """A C++ file of the engine, with every header that it includes by a relative path written out.

    Args:
        path: From the engine's folder, such as ``kernels/ranks.cpp``.
    """
    text = resources.files("merge_search.engine").joinpath(path).read_text(encoding="utf-8")

    def included(match: re.Match[str]) -> str:
        return read_source(posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1])))

    return re.sub(r'^#include "(.*)"$', included, text, flags=re.MULTILINE)


def library(source: str) -> ctypes.CDLL:
    """Compile and load. A library that this compiler made before for this processor is loaded from the cache.

    Raises:
        CompilerError: The source could not be compiled or its library not loaded.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CompilerError("there is no C++ compiler (g++, clang++ or what CXX names)")
    try:
        flags, target = _target(compiler, os.environ.get(TARGET_VARIABLE))
        key = hashlib.sha256("\n".join([source, *flags, target]).encode()).hexdigest()
        file = _cache() / f"{key}.so"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent) as work:
                code, made = Path(work, "loop.cpp"), Path(work, "loop.so")
                code.write_text(source)
                command = [compiler, *flags, str(code), "-o", str(made)]
                subprocess.run(command, capture_output=True, text=True, check=True)
                made.replace(file)
        return ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        raise CompilerError(f"the compiler failed: {error.stderr[-500:]}") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise CompilerError(f"the loop could not be compiled or loaded: {error}") from error
