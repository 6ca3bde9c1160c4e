"""Options and rows of labelled images: everything that is known before a weight is loaded. Imports no torch.

A file of rows is either

- an ``.npz`` file with an array of images (n, height, width), (n, height, width, channels) or (n, channels, height,
  width), an array of labels (n,), whole numbers or names, and an array of groups (n,) where the task has groups; or
- a ``.jsonl`` file whose objects name an image file, ``.npy`` or, with Pillow, ``.png``, beside label and group.

Pixels are whole numbers from 0 to 255 (uint8) or floats from 0 to 1. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from evaluators.classification.rows import HeadReader, HeadTask, HeadTaskOptions, TaskName, class_of, group_of
from evaluators.labelled.rows import json_lines, read_all
from merge_search.errors import nearest
from merge_search.evaluation import SplitShares
from merge_search.options import PathList

__all__ = ["ImageOptions", "ImageRow", "ImageTaskOptions", "read_image_tasks"]

CHANNELS = (1, 3, 4)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


Positive = Annotated[float, Field(gt=0)]


class ImageTaskOptions(HeadTaskOptions):
    """One task of images.

    Attributes:
        image: The field of the image: the array's name in an ``.npz`` file, the key of the path in a ``.jsonl`` file.
    """

    image: str = "image"


class ImageOptions(BaseModel):
    """An ``evaluate`` entry of the study file, without ``evaluator``.

    Attributes:
        tasks: Options of each task by its name.
        include_path: Folders of the tasks' files; none: the folder of the study file.
        batch_size: Images of one forward pass.
        mean, std: Pixels of [0, 1] are normalised as (pixel - mean) / std: one number, or one per channel. None: those
            of the base's ``preprocessor_config.json``, and 0.5 where it has none.
        limit: Most documents per task: the first in the order of questions.
        fit: The source of the rows to fit on. ``auto``: `TaskOptions.train`, without it the fit share. ``test_inputs``:
            the questions of the test split without their labels, as in test-time adaptation (AdaMerging).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: Annotated[dict[TaskName, ImageTaskOptions], Field(min_length=1)]
    include_path: PathList = []
    batch_size: Annotated[int, Field(ge=1)] = 64
    mean: Annotated[list[float], BeforeValidator(_as_list), Field(min_length=1)] | None = None
    std: Annotated[list[Positive], BeforeValidator(_as_list), Field(min_length=1)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    fit: Literal["auto", "test_inputs"] = "auto"


@dataclass(frozen=True, eq=False)
class ImageRow:
    """A question.

    Attributes:
        image: Shape (channels, height, width), uint8 or float32.
        question: The hash of the image.
        label: The number of its class.
        hash: The hash of image and label, and of the group where there is one.
        group: Its group; '' if the task has none.
        where: The file and place of the image, for messages.
    """

    image: NDArray[Any]
    question: str
    label: int
    hash: str
    group: str
    where: str

    def pixels(self) -> NDArray[np.float32]:
        """The image in [0, 1]."""
        pixels: NDArray[np.float32] = self.image.astype(np.float32)
        return pixels / np.float32(255) if self.image.dtype == np.uint8 else pixels


def read_image_tasks(options: ImageOptions, shares: SplitShares, folder: Path | None = None) -> list[HeadTask]:
    """Read the headers of all heads and all images, and split them.

    Args:
        options: The evaluator's options.
        shares: Shares of the splits.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: Every problem of every task.
    """
    return read_all(_ImageReader, options, shares, folder, test_inputs=options.fit == "test_inputs")


class _ImageReader(HeadReader):
    task: ImageTaskOptions

    def rows_of(
        self, field: str, path: Path, names: list[str] | None, n_classes: int | None
    ) -> tuple[list[ImageRow], list[str]]:
        read = {".npz": self._arrays, ".jsonl": self._named_files}.get(path.suffix)
        if read is None:
            return [], [f"{path} must be an .npz file of arrays or a .jsonl file that names image files"]
        rows, wrong = [], []
        for where, item in read(path):
            row = item if isinstance(item, str) else self._row(where, item, names, n_classes)
            if isinstance(row, ImageRow):
                rows.append(row)
            else:
                wrong.append(f"{where}: {row}")
        return rows, wrong

    @property
    def _fields(self) -> list[str]:
        return [self.task.image, self.task.label, *([] if self.task.group is None else [self.task.group])]

    def _arrays(self, path: Path) -> list[tuple[str, Mapping[str, Any] | str]]:
        """The rows of an ``.npz`` file: a place, and the values of the fields or what is wrong."""
        try:
            with np.load(path, allow_pickle=False) as file:
                known = list(file.files)
                if absent := [f for f in self._fields if f not in known]:
                    return [(str(path), f"no array {f!r}{nearest(f, known)}") for f in absent]
                arrays = {f: file[f] for f in self._fields}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            return [(str(path), f"is not a readable .npz file of arrays: {error}")]
        counts = {f: len(a) if a.ndim else 0 for f, a in arrays.items()}
        if len(set(counts.values())) > 1:
            return [(str(path), f"its arrays must have one entry per image, got {counts}")]
        n = counts[self.task.image]
        return [(f"{path}, image {i}", {f: _plain(a[i]) for f, a in arrays.items()}) for i in range(n)]

    def _named_files(self, path: Path) -> list[tuple[str, Mapping[str, Any] | str]]:
        """The rows of a ``.jsonl`` file; images lie relative to it or to ``include_path``."""
        out: list[tuple[str, Mapping[str, Any] | str]] = []
        for line, item in json_lines(path):
            where = f"{path}, line {line}"
            if not isinstance(item, str):
                absent = next((f for f in self._fields if f not in item), None)
                if absent is not None:
                    item = f"no field {absent!r}{nearest(absent, item)}"
                else:
                    image = _read_image([path.parent, *self.folders], item[self.task.image])
                    item = image if isinstance(image, str) else {**item, self.task.image: image}
            out.append((where, item))
        return out

    def _row(
        self, where: str, item: Mapping[str, Any], names: list[str] | None, n_classes: int | None
    ) -> ImageRow | str:
        """The row, or a text that says what is wrong with it."""
        image = _channels_first(item[self.task.image])
        if isinstance(image, str):
            return image
        label = class_of(item[self.task.label], self.task.label, names, n_classes)
        if isinstance(label, str):
            return label
        field = self.task.group
        group = "" if field is None else group_of(item[field])
        if group is None:
            return f"{field!r} must be a text or a whole number, got {item[field or '']!r}"
        head = f"{image.dtype} {image.shape}".encode()
        question = hashlib.sha256(head + np.ascontiguousarray(image).tobytes()).hexdigest()
        document = json.dumps([question, label, *([group] if group else [])])
        return ImageRow(image, question, label, hashlib.sha256(document.encode()).hexdigest(), group, where)


def _plain(value: Any) -> Any:
    """A numpy scalar as a Python number or text; an array as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _read_image(folders: list[Path], name: object) -> NDArray[Any] | str:
    """The pixels of an image file, or a text that says what is wrong with it."""
    if not isinstance(name, str):
        return f"the image must be the path of a file, got {name!r}"
    path = next((p for f in folders if (p := f / name).is_file()), None)
    if path is None:
        return f"no file {name} in {', '.join(map(str, dict.fromkeys(folders)))}"
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        if find_spec("PIL") is None:
            return f"{path} is no .npy file, and other formats need Pillow: pip install pillow"
        from PIL import Image

        with Image.open(path) as image:
            return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except (OSError, ValueError, EOFError) as error:
        return f"{path} is not a readable image: {error}"


def _channels_first(image: Any) -> NDArray[Any] | str:
    """The image as (channels, height, width), uint8 or float32, or a text that says what is wrong with it."""
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[2] in CHANNELS and array.shape[0] not in CHANNELS:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in CHANNELS or not array.size:
        return f"an image must be (height, width) with channels before or after them or none, got {array.shape}"
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        return f"pixels must be uint8 or floats of [0, 1], got {array.dtype}"
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        return f"pixels that are floats must lie in [0, 1], got {array.min():.3g} to {array.max():.3g}"
    return array.astype(np.float32)
