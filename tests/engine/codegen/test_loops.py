"""Functions as C loops: the bits of torch, whatever the length and the threads."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from merge_search.engine.codegen.compiler import TARGET_VARIABLE, compile_flags, find_compiler, library
from merge_search.engine.codegen.kernel import Unsupported, compile_kernel
from merge_search.engine.engine import MergeEngine
from merge_search.engine.execute.runner import has_compiler
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.presets import PRESETS, preset

pytestmark = pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="needs a C++ compiler")
PLAIN = [n for n, p in PRESETS.items() if not p.needs_data and not {"operator", "post"} & set(p.settings)]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "loops"))
        yield


def models(dtype, shapes=((301, 130), (1000,), (70, 513))):
    generator = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(s, generator=generator).to(dtype) for i, s in enumerate(shapes)}
    base["w0"][0, :5] = 0.0
    base["w0"][1, :5] = -0.0
    experts = {
        e: {n: (t.float() + 0.1 * torch.randn(t.shape, generator=generator)).to(dtype) for n, t in base.items()}
        for e in ("a", "b", "c")
    }
    for e in experts:
        experts[e]["w0"][:2, :3] = base["w0"][:2, :3]
    return MemoryTensors(base, experts)


@pytest.mark.parametrize("name", PLAIN)
def test_loops_give_the_bits_of_the_chunks_for_every_preset(name):
    tensors = models(torch.bfloat16)
    compiled, plain = MergeEngine(tensors, compile=True), MergeEngine(tensors, compile=False)
    for settings in ({}, {"coefficients": {"a": 0.5, "b": -0.25, "c": 0.0}}):
        made = preset(name, tensors.models, **settings)
        expected = dict(plain.merged(made))
        for n, out in compiled.merged(made):
            assert torch.equal(out.view(torch.int16), expected[n].view(torch.int16)), (n, settings)
    assert not compiled._runner._graphs  # none was left to the general compiler


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["ties", "dare_ties", "pcb"])
def test_loops_give_the_bits_of_the_chunks_in_other_dtypes(name, dtype):
    tensors = models(dtype)
    made = preset(name, tensors.models)
    expected = dict(MergeEngine(tensors, compile=False).merged(made))
    for n, out in MergeEngine(tensors, compile=True).merged(made):
        assert torch.equal(out, expected[n]), n


def test_a_compiler_that_refuses_a_flag_of_gcc_is_used_without_it(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    refuse = 'case "$*" in *-fno-thread-jumps*) echo unknown argument >&2; exit 1;; esac'
    compiler.write_text(f'#!/bin/sh\n{refuse}\nexec {find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert library('extern "C" int seven() { return 7; }\n').seven() == 7


# ------------------------------------------------------------------------------------------------ vector instructions

CROSS = {"x86-64-v3": "x86_64-linux-gnu-g++", "x86-64-v4": "x86_64-linux-gnu-g++", "armv8.2-a": "aarch64-linux-gnu-g++"}
SOME = ["ties", "ties_sum", "dare_ties", "della", "pcb", "sce", "ram_plus"]
MACHINES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "armv8.2-a", "arm64": "armv8.2-a"}


def compiler_for(target: str) -> str:
    """A gcc, which says what it vectorised, for a named processor; the test is skipped where there is none."""
    is_native = target.startswith(MACHINES.get(platform.machine().lower(), "?"))
    compiler = (find_compiler() if is_native else shutil.which(CROSS[target])) or ""
    if not compiler:
        pytest.skip(f"needs {CROSS[target]} to compile for {target} (a cross compiler, not the processor)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    if "Free Software Foundation" not in version.stdout:
        pytest.skip(f"needs gcc, which says what it vectorises, and found {compiler}")
    return compiler


def scalar_loops(source: str, target: str, folder: Path) -> list[str]:
    """Heads of the loops over elements that do not take a whole vector of them at a time."""
    (folder / "loop.cpp").write_text(source)
    command = [
        compiler_for(target),
        *compile_flags(target),
        "-fopt-info-vec-optimized",
        "-S",
        "loop.cpp",
        "-o",
        "loop.s",
    ]
    report = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stderr
    taken = {int(line) for line in re.findall(r"loop\.cpp:(\d+):\d+: optimized:\s+loop vectorized", report)}
    lines = list(enumerate(source.splitlines(), 1))
    is_paired = "#define IS_PAIRED 1" in source
    heads = [(at, line.strip()) for at, line in lines if "for (int32_t i = 0; i < n" in line]
    heads = [(at, line) for at, line in heads if ("n / 2" in line) == is_paired]  # the other one is not compiled
    assert len(heads) == 1
    if "#define N_SUMS 0" not in source:
        heads += [(at, line.strip()) for at, line in lines if "lanes[l] += " in line]
    return [head for at, head in heads if at not in taken]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """(preset, dtype) of the loops that presets run, by source: of all presets in bfloat16, of some in other dtypes."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensors = models(dtype, shapes=((70, 130), (300,)))
        for name in PLAIN if dtype == torch.bfloat16 else SOME:
            engine = MergeEngine(tensors, compile=True)
            for coefficient in (0.5, 0.6):  # the second candidate finds scores that are kept
                list(engine.merged(preset(name, tensors.models, coefficients=coefficient)))
            assert all(engine._runner._loops.values()), name
            found |= {loop.source: (name, str(dtype)) for loop in engine._runner._loops.values()}
    assert len(found) > 50
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", CROSS)
def test_every_loop_is_vectorised(target: str, sources: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """For named processors, whatever the machine at hand: most users have AVX2 (x86-64-v3)."""
    scalar = {label: heads for text, label in sources.items() if (heads := scalar_loops(text, target, tmp_path))}
    assert not scalar


@pytest.mark.parametrize("target", CROSS)
def test_a_loop_that_cannot_be_vectorised_is_told_apart(target: str, tmp_path: Path) -> None:
    source = compile_kernel(lambda t, f, i, at: [t[0] * f[0]], [torch.float32], torch.float32, 1, 0).source
    chained = source.replace("out0[i] = ", "out0[i] = (i ? out0[i - 1] : 0) + ")
    assert chained != source
    assert scalar_loops(source, target, tmp_path) == []
    assert len(scalar_loops(chained, target, tmp_path)) == 1


def test_a_target_of_the_environment_takes_the_place_of_this_machines_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(TARGET_VARIABLE, raising=False)
    assert "-march=native" in compile_flags() or "-mcpu=native" in compile_flags()
    monkeypatch.setenv(TARGET_VARIABLE, "x86-64-v3")
    assert "-march=x86-64-v3" in compile_flags()
    assert "-march=armv8.2-a" in compile_flags("armv8.2-a")


def test_halves_are_loaded_and_stored_as_torch_does():
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    wide = torch.empty(halves.numel())
    body = lambda t, f, i, at: [t[0].to(torch.float32) * f[0]]  # noqa: E731
    compile_kernel(body, [torch.float16], torch.float32, 1, 0)([wide, halves], [1.0], [], 0)
    expected = halves.float()
    finite = expected.isfinite()
    assert torch.equal(wide.view(torch.int32)[finite], expected.view(torch.int32)[finite])
    assert torch.equal(wide[~finite].nan_to_num(7.0), expected[~finite].nan_to_num(7.0))
    ordered = expected[finite].sort().values
    middle = (ordered[1:] + ordered[:-1]) / 2  # exact in float32: ties of the rounding, and their neighbours
    edges = [middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))]
    numbers = torch.cat(
        [*edges, torch.tensor([65504.0, 65519.996, 65520.0, -65520.0, torch.inf, 1e-40, 3e-8, 2.0**-25])]
    )
    out = torch.empty(numbers.numel(), dtype=torch.float16)
    compile_kernel(body, [torch.float32], torch.float16, 1, 0)([out, numbers], [1.0], [], 0)
    assert torch.equal(out.view(torch.int16), numbers.half().view(torch.int16))


def test_several_results_are_stored_in_one_loop_and_only_as_float32():
    x = torch.rand(1001, generator=torch.Generator().manual_seed(2))
    one, other = torch.empty(2, 1001)
    both = compile_kernel(
        lambda t, f, i, at: [t[0].float() * f[0], 1.0 / t[0].float()], [torch.bfloat16], torch.float32, 1, 0
    )
    both([one, other, x.bfloat16()], [0.3], [], 0)
    assert torch.equal(one, x.bfloat16().float() * torch.tensor(0.3))
    assert torch.equal(other, 1.0 / x.bfloat16().float())
    with pytest.raises(Unsupported, match="several results"):
        compile_kernel(lambda t, f, i, at: [t[0], t[0]], [torch.float32], torch.bfloat16, 0, 0)


@pytest.mark.parametrize("name", ["cki_soft", "cki_hard", "cki_recommender"])
def test_two_experts_have_loops_too(name):
    tensors = models(torch.bfloat16)
    del tensors._experts["c"], tensors.models.experts["c"]
    engine = MergeEngine(tensors, compile=True)
    for coefficient in (0.5, 0.6, 0.7):
        made = preset(name, tensors.models, coefficients=coefficient)
        expected = dict(MergeEngine(tensors, compile=False).merged(made))
        assert all(torch.equal(out, expected[n]) for n, out in engine.merged(made))
    assert not engine._runner._graphs


def test_two_threads_give_the_bits_and_the_sums_of_one():
    x = torch.randn(2**19 + 77, generator=torch.Generator().manual_seed(1))

    def body(tensors, floats, integers, index):
        return [(tensors[0] * floats[0]).sum(dtype=torch.float64)]

    loop, before, found = compile_kernel(body, [torch.float32], None, 1, 0), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(loop([x], [0.5], [], 0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert float(found[0]) == pytest.approx(float((x * 0.5).double().sum()), rel=1e-12)


def test_positions_count_on_over_parts_and_wrap():
    def body(tensors, floats, integers, index):
        position = torch.arange(tensors[0].numel(), dtype=torch.int32) + index
        return [(position >> integers[0]).to(torch.float32)]

    n = 2**18 + 5
    out = torch.empty(n)
    compile_kernel(body, [torch.float32], torch.float32, 0, 1)([out, torch.zeros(n)], [], [4], 2**31 - 3)
    expected = (torch.arange(n, dtype=torch.int64) + 2**31 - 3).to(torch.int32) >> 4
    assert torch.equal(out, expected.float())


def test_numbers_that_are_not_finite_come_out_as_torch_has_them():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, -0.0, 1e-40])
    out = torch.empty(6, dtype=torch.bfloat16)
    compile_kernel(lambda t, f, i, at: [t[0] * f[0]], [torch.float32], torch.bfloat16, 1, 0)([out, x], [1.0], [], 0)
    assert torch.equal(out.view(torch.int16)[1:], x.bfloat16().view(torch.int16)[1:])
    assert bool(torch.isnan(out[0]))


def test_what_has_no_c_form_is_refused():
    with pytest.raises(Unsupported, match="sort"):
        compile_kernel(lambda t, f, i, at: [torch.sort(t[0])[0]], [torch.float32], torch.float32, 0, 0)
    with pytest.raises(Unsupported, match=r"torch\.complex64"):
        compile_kernel(lambda t, f, i, at: [t[0]], [torch.complex64], torch.float32, 0, 0)


def test_dear_scores_are_kept_from_the_second_candidate_on_where_they_fit():
    tensors = models(torch.bfloat16)
    roomy, tight = (MergeEngine(tensors, compile=True, cache_bytes=size) for size in (2**30, 2**10))
    for coefficient in (0.5, 0.6, 0.7):
        made = preset("pcb", tensors.models, coefficients=coefficient)
        pairs = zip(roomy.merged(made), tight.merged(made), strict=True)
        assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert roomy._measurements.stored.held > 0
    assert tight._measurements.stored.held == 0
