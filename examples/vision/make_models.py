#!/usr/bin/env python3
"""Make a small vision encoder, three experts with heads, and their images from nothing: no downloads, fixed seeds.

The script draws grey images of 24 x 24 pixels for three tasks and trains a ViT of about 0.15 M parameters on a part of
each task's classes (`models/base`). Every expert is a fine-tune of that base on one whole task, with a linear head of
its own, which stays fixed when encoders are merged. It learns its task well and damages the two others.

    shapes      disc, square, triangle, cross, ring, bar; on a dark or a light ground (the groups)
    digits      0 to 9, from a font of 3 x 5 pixels
    textures    stripes in four directions, wide or narrow

Usage: python make_models.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

SIDE = 24
GLYPHS = {  # rows of 3 pixels, as octal digits
    0: "75557", 1: "26227", 2: "71747", 3: "71717", 4: "55711",
    5: "74717", 6: "74757", 7: "71122", 8: "75757", 9: "75717",
}  # fmt: skip

Images = NDArray[np.float32]
Draw = Callable[[np.random.Generator, int], tuple[Images, int]]


def shape(rng: np.random.Generator, label: int) -> tuple[Images, int]:
    """A shape somewhere on the image; its group is the ground: 0 dark, 1 light."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    r = rng.uniform(4, 8)
    u, v = x - rng.uniform(r, SIDE - r), y - rng.uniform(r, SIDE - r)
    inside = [
        u**2 + v**2 < r**2,
        np.maximum(abs(u), abs(v)) < 0.85 * r,
        (v < 0.7 * r) & (v > 2 * abs(u) - r),
        (np.minimum(abs(u), abs(v)) < 0.3 * r) & (np.maximum(abs(u), abs(v)) < r),
        (u**2 + v**2 < r**2) & (u**2 + v**2 > (0.6 * r) ** 2),
        (abs(u) < r) & (abs(v) < 0.35 * r),
    ][label]
    group = int(rng.random() < 0.4)
    ground, ink = (0.7, rng.uniform(0.1, 0.5)) if group else (0.2, rng.uniform(0.4, 0.9))
    return np.where(inside, ink, ground).astype(np.float32), group


def digit(rng: np.random.Generator, label: int) -> tuple[Images, int]:
    """A digit, 9 to 12 pixels wide."""
    rows = np.array([[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in GLYPHS[label]], np.float32)
    wide, high = int(rng.integers(3, 5)), int(rng.integers(3, 5))
    glyph = np.kron(rows, np.ones((high, wide), np.float32))
    image = np.full((SIDE, SIDE), 0.3, np.float32)
    top, left = (int(rng.integers(0, SIDE - n + 1)) for n in glyph.shape)
    image[top : top + glyph.shape[0], left : left + glyph.shape[1]] += glyph * rng.uniform(0.25, 0.6)
    return image, 0


def texture(rng: np.random.Generator, label: int) -> tuple[Images, int]:
    """Stripes: the label is direction + 4 x (narrow)."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    angle = np.pi * (label % 4) / 4 + rng.normal(0, 0.12)
    length = (4.0 if label >= 4 else 8.0) * rng.uniform(0.85, 1.15)
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + rng.uniform(0, 2 * np.pi))
    return (0.5 + rng.uniform(0.1, 0.35) * wave).astype(np.float32), 0


TASKS: dict[str, tuple[Draw, int]] = {"shapes": (shape, 6), "digits": (digit, 10), "textures": (texture, 8)}
NOISE = 0.08


def rows(task: str, n: int, seed: int) -> dict[str, NDArray[np.generic]]:
    """`n` images as uint8 (n, 24, 24), with labels and groups."""
    draw, n_classes = TASKS[task]
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    drawn = [draw(rng, int(c)) for c in labels]
    noisy = np.stack([image for image, _ in drawn]) + rng.normal(0, NOISE, (n, SIDE, SIDE))
    images = (255 * noisy.clip(0, 1)).round().astype(np.uint8)
    return {"image": images, "label": labels, "group": np.array([group for _, group in drawn])}


def pixels(images: NDArray[np.generic]) -> Tensor:
    """Images as the judge gives them to the model: (n, 1, 24, 24) in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32) / np.float32(255))[:, None] * 2 - 1


def batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless random batches of numbers below `n`."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=draw).split(size)


def fit(model: ViTModel, heads: dict[str, nn.Linear], data: dict[str, dict], steps: int, lr: float, seed: int) -> None:
    """Train encoder and heads on all tasks of `data`, a batch of each in every step."""
    parts = {t: (pixels(d["image"]), torch.from_numpy(d["label"])) for t, d in data.items()}
    draws = {t: batches(len(y), 64 if len(data) == 1 else 32, seed) for t, (_, y) in parts.items()}
    parameters = [*model.parameters(), *(p for t in data for p in heads[t].parameters())]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(steps):
        loss = torch.zeros(())
        for task, (x, y) in parts.items():
            at = next(draws[task])
            hidden = model(pixel_values=x[at]).last_hidden_state.mean(1)
            loss = loss + functional.cross_entropy(heads[task](hidden), y[at])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: ViTModel, head: nn.Linear, data: dict) -> float:
    hidden = torch.cat([model(pixel_values=x).last_hidden_state.mean(1) for x in pixels(data["image"]).split(256)])
    return float((head(hidden).argmax(1) == torch.from_numpy(data["label"])).float().mean())


def make(
    out: Path,
    *,
    hidden: int = 64,
    layers: int = 4,
    n_train: int = 3000,
    n_test: int = 900,
    base_steps: int = 400,
    expert_steps: int = 500,
    lr: float = 2e-3,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Write ``data/TASK/{train,test}.npz``, ``models/{base,TASK}`` and ``models/TASK/head.safetensors``.

    Returns:
        Accuracy on the test images by model and task. Every task is scored with its expert's head.
    """
    torch.manual_seed(seed)
    train = {t: rows(t, n_train, 10 * seed + i) for i, t in enumerate(TASKS)}
    test = {t: rows(t, n_test, 10 * seed + 5 + i) for i, t in enumerate(TASKS)}
    for task in TASKS:
        (out / "data" / task).mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out / "data" / task / "train.npz", **train[task])
        np.savez_compressed(out / "data" / task / "test.npz", **test[task])
    shutil.rmtree(out / "models", ignore_errors=True)
    config = ViTConfig(
        image_size=SIDE, patch_size=6, num_channels=1, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=4, intermediate_size=2 * hidden, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    heads = {t: nn.Linear(hidden, n_classes) for t, (_, n_classes) in TASKS.items()}
    seen = {t: d["label"] < TASKS[t][1] // 2 for t, d in train.items()}  # the base sees half of the classes
    fit(model, heads, {t: {k: v[seen[t]] for k, v in d.items()} for t, d in train.items()}, base_steps, lr, seed)
    model.save_pretrained(out / "models" / "base")
    models = {"base": model}
    for i, task in enumerate(TASKS):
        models[task] = ViTModel.from_pretrained(out / "models" / "base", add_pooling_layer=False)
        fit(models[task], heads, {task: train[task]}, expert_steps, lr, seed + 1 + i)
        models[task].save_pretrained(out / "models" / task)
        save_file(
            {k: v.detach() for k, v in heads[task].state_dict().items()}, out / "models" / task / "head.safetensors"
        )
    return {name: {t: accuracy(m, heads[t], test[t]) for t in TASKS} for name, m in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    for name, scores in make(args.out, seed=args.seed).items():
        print(name, " ".join(f"{task} {score:.3f}" for task, score in scores.items()), flush=True)
    print(f"done in {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
