"""Merging from files to files: the same bits as from memory, in little memory, and nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge_search.cli import main
from merge_search.engine.engine import MergeEngine
from merge_search.engine.passes.order_statistics import OrderStatistics, order_statistics
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.streaming import thresholds
from merge_search.engine.streaming.engine import StreamingEngine
from merge_search.engine.streaming.thresholds import SweptThresholds, cut_of_deltas
from merge_search.merge_recipe import merge_recipe
from merge_search.presets import preset
from merge_search.recipe import Models, Recipe

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
NAMES = ("one", "two", "three")


def write_models(folder: Path, *, layers: int = 2, width: int = 320, dtype: torch.dtype = torch.bfloat16) -> Models:
    """Base and three experts; some entries, and one tensor of one expert, are left as they are."""
    generator = torch.Generator().manual_seed(1)
    base = {"model.embed_tokens.weight": torch.randn(100, width, generator=generator)}
    for i in range(layers):
        base[f"model.layers.{i}.self_attn.q_proj.weight"] = torch.randn(width, width, generator=generator)
        base[f"model.layers.{i}.mlp.up_proj.weight"] = torch.randn(width, width, generator=generator)
        base[f"model.layers.{i}.input_layernorm.weight"] = torch.randn(width, generator=generator)
    for number, name in enumerate(("base", *NAMES)):
        (folder / name).mkdir(parents=True)
        own = {k: t.to(dtype) for k, t in base.items()}
        if number:
            own = {k: (t + 0.1 * torch.randn(t.shape, generator=generator)).to(dtype) for k, t in base.items()}
        if name == "two":
            own["model.embed_tokens.weight"] = base["model.embed_tokens.weight"].to(dtype)
        save_file(own, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return Models(base=str(folder / "base"), experts={n: str(folder / n) for n in NAMES})


def write_file(folder: Path, method: str = "ties") -> Path:
    models = [{"model": str(folder / n), "parameters": {"weight": 0.5, "density": 0.3}} for n in NAMES]
    file = folder / "merge.yaml"
    document = {"merge_method": method, "base_model": str(folder / "base"), "models": models, "dtype": "bfloat16"}
    file.write_text(yaml.safe_dump(document))
    return file


def assert_same_bits(models: Models, recipe: Recipe) -> None:
    resident = dict(MergeEngine(ModelPool(models, device="cpu"), compile=False).merged(recipe))
    for threads in (1, 2):
        streamed = StreamingEngine(ModelPool(models, device="cpu", streaming=True), threads=threads).merged(recipe)
        found = dict(streamed)
        assert list(found) == list(resident)
        assert [n for n in found if not torch.equal(found[n], resident[n])] == []


# ------------------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("name", ["ties", "dare_ties", "breadcrumbs", "della", "pcb", "task_arithmetic"])
def test_streaming_gives_the_bits_of_a_resident_pool(tmp_path: Path, name: str) -> None:
    models = write_models(tmp_path)
    assert_same_bits(models, preset(name, models))


def test_streaming_gives_the_bits_of_a_resident_pool_where_the_whole_model_is_ranked_together(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    recipe = preset("ties", models)
    assert_same_bits(models, recipe.model_copy(update={"select": recipe.select.model_copy(update={"scope": "model"})}))


@pytest.mark.parametrize("density", [0.0001, 0.003, 0.1, 0.3, 0.77, 0.9999])
@pytest.mark.parametrize("kind", ["normal", "few values", "mostly zero", "sorted"])
def test_one_threshold_is_that_of_the_whole_histogram(kind: str, density: float) -> None:
    base = torch.randn(200_000, generator=torch.Generator().manual_seed(2)).bfloat16()
    step = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
    delta = {"normal": step, "few values": step.round(), "mostly zero": step * (step > 2), "sorted": step.sort().values}
    own = (base.float() + 0.1 * delta[kind]).bfloat16()
    size = (own.float() - base.float()).abs()
    k = round(density * size.numel())
    found = cut_of_deltas(base, own, k, float(size.max()))
    assert found is None or found == order_statistics(size).cut(k)
    assert found is not None  # these distributions are not too hard for the sample


@pytest.mark.parametrize("is_found", [True, False], ids=["cuts are found", "the bracket misses"])
def test_swept_thresholds_are_those_of_all_scores(is_found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_found:
        monkeypatch.setattr(thresholds, "cut_of_deltas", lambda *_: None)
    scores = torch.rand(100_000, generator=torch.Generator().manual_seed(4))
    whole, made = order_statistics(scores), []

    def make() -> OrderStatistics:
        made.append(1)
        return whole

    swept = SweptThresholds(len(scores), whole.maximum, lambda: (torch.zeros_like(scores), scores), make)
    assert [swept.cut(k) for k in (0, 1, 777, 99_999, 100_000)] == [whole.cut(k) for k in (0, 1, 777, 99_999, 100_000)]
    assert len(made) == (not is_found)
    assert (swept.n, swept.n_positive, swept.stride) == (whole.n, whole.n_positive, whole.stride)
    assert swept.maximum == whole.maximum
    assert swept.value(777) == whole.value(777)
    assert swept.count_for_mass(0.5) == whole.count_for_mass(0.5)
    assert swept.kappa(0.3) == whole.kappa(0.3)
    assert len(made) == 1


# ------------------------------------------------------------------------------------------------ memory

CHILD = """
import shutil, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from merge_search.merge_recipe import merge_recipe

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], private())
        time.sleep(0.002)

for folder in map(Path, [sys.argv[1], *sys.argv[1:]]):  # once before, for all that is loaded once and stays
    shutil.rmtree(folder / "out", ignore_errors=True)
    peak, done = [0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    merge_recipe(folder / "recipe.json", folder / "out")
    done.set()
    thread.join()
    print(peak[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_memory_grows_by_a_small_part_of_what_the_model_grows(tmp_path: Path, scope: str) -> None:
    sizes = {}
    for layers in (8, 28):
        folder = tmp_path / str(layers)
        models = write_models(folder, layers=layers, width=1024)  # 4 MiB a layer and model
        recipe = preset("ties", models)
        recipe = recipe.model_copy(update={"select": recipe.select.model_copy(update={"scope": scope})})
        (folder / "recipe.json").write_text(recipe.to_json())
        sizes[folder] = (folder / "base" / "model.safetensors").stat().st_size
    inputs = 1 + len(models.experts)
    command = [sys.executable, "-c", CHILD, *map(str, sizes)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    few, many = map(int, result.stdout.split()[1:])
    assert many - few < inputs * (sizes[tmp_path / "28"] - sizes[tmp_path / "8"]) / 4
    for folder, size in sizes.items():
        assert (folder / "out" / "model.safetensors").stat().st_size == size


LIMITED = """
import resource, sys, threading
from pathlib import Path
import torch
import merge_search.merge_recipe
from merge_search.cli import main

torch.set_num_threads(1)
threading.stack_size(2**20)  # in place of 8 MiB for every core
room, file, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
lines = Path("/proc/self/status").read_text().splitlines()
used = 1024 * int(next(line for line in lines if line.startswith("VmData:")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
try:
    bytearray(room + 2**24)  # the stack counts as used, but is not limited
except MemoryError:
    main(["merge", file, out])
else:
    sys.exit("the limit does not hold")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not limit a process's own memory so")
def test_models_four_times_larger_than_the_memory_that_is_left_are_merged_to_the_same_bytes(tmp_path: Path) -> None:
    write_models(tmp_path, layers=16, width=1024)  # 64 MiB each
    file = write_file(tmp_path)
    models = sum(f.stat().st_size for f in tmp_path.glob("*/model.safetensors"))
    limited, free = tmp_path / "limited", tmp_path / "free"
    command = [sys.executable, "-c", LIMITED, str(models // 4), str(file), str(limited)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    merge_recipe(file, free)
    assert (limited / "model.safetensors").read_bytes() == (free / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ bad input


def truncate(folder: Path) -> None:
    file = folder / "one" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(folder: Path) -> None:
    file = folder / "one" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:16] = b"notjson!"
    file.write_bytes(data)


def change(folder: Path, edit: str) -> None:
    file = folder / "one" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if edit == "missing":
        del tensors[name]
    elif edit == "shape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors[name][3, 4] = float(edit)
    save_file(tensors, file, {"format": "pt"})


def pickle(folder: Path) -> None:
    (folder / "one" / "model.safetensors").rename(folder / "one" / "pytorch_model.bin")


def equal_the_base(folder: Path) -> None:
    (folder / "one" / "model.safetensors").write_bytes((folder / "base" / "model.safetensors").read_bytes())


PROBLEMS = {
    "cut off": (truncate, "cut off in tensor"),
    "corrupt": (corrupt, "must be JSON"),
    "missing tensor": (lambda f: change(f, "missing"), "model.layers.1.mlp.up_proj.weight"),
    "shape": (lambda f: change(f, "shape"), "[319, 320]"),
    "pickle": (pickle, "pickled weights"),
    "equal": (equal_the_base, "expert 'one' equals the base in every tensor"),
    "nan": (lambda f: change(f, "nan"), "found NaN or infinity in 1 of 102400 entries of expert 'one'"),
    "infinity": (lambda f: change(f, "inf"), "found NaN or infinity in 1 of 102400 entries of expert 'one'"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_bad_input_gives_one_sentence_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str
) -> None:
    folder, out = tmp_path / "models", tmp_path / "results" / "out"
    write_models(folder)
    spoil, said = PROBLEMS[problem]
    spoil(folder)
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(write_file(folder)), str(out)])
    message = capsys.readouterr().err
    assert stop.value.code != 0
    assert message.startswith("error: ")
    assert said in message
    assert "Traceback" not in message
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_a_sound_merge_is_written_whole(tmp_path: Path) -> None:
    write_models(tmp_path)
    merge_recipe(write_file(tmp_path), tmp_path / "out")
    merged, base = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "base"))
    assert merged.keys() == base.keys()
    assert not torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
