#!/usr/bin/env python3
"""Make the demo's checkpoints and tasks from nothing: no downloads, fixed seeds, one CPU core.

The script invents three skills, trains a small byte-level BPE tokenizer and a Llama of about
0.9 M parameters (`models/base`), and fine-tunes that base on one skill at a time. Every expert
learns its own skill well and damages the two others: the situation that merging has to repair.

    maths     one-step word problems, two-digit numbers        generate_until, exact match
    spelling  spell an invented word, forwards or backwards    generate_until, exact match
    stories   what does one want in this mood and weather?           multiple choice, accuracy

Usage: python make_models.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

Row = dict[str, Any]

NAMES = [
    "Mia", "Ben", "Lily", "Sam", "Anna", "Tom", "Zoe", "Max", "Ella", "Leo",
    "Nina", "Jack", "Rosa", "Finn", "Ida", "Paul",
]  # fmt: skip
THINGS = ["kite", "ball", "drum", "book", "hat", "lamp", "doll", "boat", "cup", "ring", "flute", "coat"]
PLACES = ["park", "shop", "lake", "farm", "school", "garden", "kitchen", "forest", "tower", "beach",
          "bridge", "market"]  # fmt: skip
COUNTED = ["pears", "coins", "shells", "stamps", "nuts", "cards", "beads", "plums"]
GAIN = ["finds {b} more", "gets {b} more", "buys {b} more", "picks up {b} more"]
LOSS = ["loses {b}", "gives away {b}", "sells {b}", "drops {b}"]
WEATHER = ["sunny bright clear", "rainy wet grey", "windy stormy breezy", "snowy icy frosty"]
WISHES = {  # mood and its other names: what one wants in each of the four weathers
    "hungry starving peckish": "melon soup toast stew",
    "thirsty parched dry": "juice tea milk cocoa",
    "bored idle restless": "swing puzzle glider sledge",
    "tired sleepy weary": "hammock bed tent cabin",
    "sad lonely gloomy": "picnic movie letter hug",
    "proud happy glad": "parade dance flag snowman",
    "curious nosy keen": "map library compass telescope",
    "busy active lively": "garden workshop mill shovel",
}
ONSETS, VOWELS, CODAS = "bdfgklmnprstvz", "aeiou", ["", "", "n", "r", "s", "t", "l"]

TASK_HEAD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {name}/train.jsonl
    test: {name}/test.jsonl
training_split: train
test_split: test
output_type: {kind}
doc_to_text: query
target_delimiter: " "
num_fewshot: 0
"""
TASK_CHOICE = """doc_to_choice: choices
doc_to_target: gold
"""
TASK_GENERATE = """doc_to_target: answer
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 10
  do_sample: false
filter_list:
  - name: line
    filter:
      - function: remove_whitespace
      - function: take_first
"""
TASK_END = """metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


# ------------------------------------------------------------------ the skills and the text


def maths_row(rng: random.Random) -> Row:
    """One addition or subtraction told as a story: a two-digit number and a one-digit number."""
    name, noun, a, b = rng.choice(NAMES), rng.choice(COUNTED), rng.randint(10, 89), rng.randint(1, 9)
    plus = rng.random() < 0.5
    event = rng.choice(GAIN if plus else LOSS).format(b=b)
    query = f"{name} has {a} {noun} and {event}. How many {noun} now?\nAnswer:"
    return {"query": query, "answer": str(a + b if plus else a - b)}


def invented_word(rng: random.Random) -> str:
    """A pronounceable word of two or three syllables."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 2, 3)))]
    return "".join(syllables) + (rng.choice(CODAS) if len(syllables) == 2 else "")


def spelling_row(rng: random.Random) -> Row:
    """Spell an invented word letter by letter, half of the time from its end."""
    word = invented_word(rng)
    back = rng.random() < 0.5
    query = f"Spell the word {word}{' backwards' if back else ''}.\nAnswer:"
    return {"query": query, "answer": " ".join(reversed(word) if back else word)}


def stories_row(rng: random.Random) -> Row:
    """What somebody wants follows from the mood and the weather together."""
    name, place, mood = rng.choice(NAMES), rng.choice(PLACES), rng.choice(list(WISHES))
    weather = rng.randrange(len(WEATHER))
    sky = f"It was {rng.choice(WEATHER[weather].split())} at the {place}."
    feeling = f"{name} was {rng.choice(mood.split())} and had a {rng.choice(THINGS)}."
    story = f"{sky} {feeling}" if rng.random() < 0.5 else f"{feeling} {sky}"
    wishes = WISHES[mood].split()
    answer = wishes.pop(weather)
    other = rng.choice([words for key, words in WISHES.items() if key != mood]).split()[weather]
    choices = [answer, *rng.sample(wishes, 2), other]
    rng.shuffle(choices)
    return {"query": f"{story} What did {name} want?\nAnswer:", "answer": answer,
            "choices": choices, "gold": choices.index(answer)}  # fmt: skip


def plain_text(rng: random.Random) -> str:
    """A line of ordinary text that shares words with the skills, without their questions."""
    (n1, n2), (t1, t2), p1 = rng.sample(NAMES, 2), rng.sample(THINGS, 2), rng.choice(PLACES)
    kind = rng.randrange(4)
    if kind == 0:
        return f"{n1} took the {t1} to the {p1}. {n2} has the {t2}."
    if kind == 1:
        sky, mood = (rng.choice(rng.choice(words).split()) for words in (WEATHER, list(WISHES)))
        return f"It was a {sky} day at the {p1}. {n1} was {mood} and {n2} found a {t1}."
    if kind == 2:
        start = rng.randint(1, 90)
        return f"{n1} counts the {rng.choice(COUNTED)}: " + " ".join(str(start + i) for i in range(6)) + "."
    word = invented_word(rng)
    return f"{n1} calls the {t1} {word}. {word} begins with {word[0]} and ends with {word[-1]}."


BASE_ROWS = {"maths": 5000, "spelling": 1800, "stories": 1600}  # how much of each skill the base sees
EXPERT = {"maths": (400, 2.5e-4), "spelling": (400, 2.5e-4), "stories": (200, 3e-4)}  # steps, learning rate
# No question with one of these words is in the base's training rows: no subtraction, five of eight moods.
UNSEEN = ["loses", "gives", "sells", "drops", *" ".join(list(WISHES)[5:]).split()]
SKILLS: dict[str, tuple[Callable[[random.Random], Row], str]] = {
    "maths": (maths_row, "generate_until"),
    "spelling": (spelling_row, "generate_until"),
    "stories": (stories_row, "multiple_choice"),
}


def unique_rows(make: Callable[[random.Random], Row], count: int, seed: int) -> list[Row]:
    """`count` rows of one skill, no two with the same query."""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        row = make(rng)
        rows.setdefault(row["query"], row)
    return list(rows.values())


def write_task(folder: Path, skill: str, train: list[Row], test: list[Row]) -> None:
    """Write demo_<skill>.yaml and its two JSONL files; data paths are relative to the YAML."""
    name, kind = f"demo_{skill}", SKILLS[skill][1]
    (folder / name).mkdir(parents=True, exist_ok=True)
    body, metric = (TASK_CHOICE, "acc") if kind == "multiple_choice" else (TASK_GENERATE, "exact_match")
    text = TASK_HEAD.format(name=name, kind=kind) + body + TASK_END.format(metric=metric)
    (folder / f"{name}.yaml").write_text(text)
    for split, rows in (("train", train), ("test", test)):
        (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------ tokenizer and batches


def train_tokenizer(lines: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    pattern = Regex(r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


Example = tuple[list[int], int]  # token ids, first position the loss counts


def encode_row(tokenizer: Any, row: Row) -> Example:
    """Token ids of `query answer newline`, and where the answer (and the loss) starts."""
    query = tokenizer.encode(row["query"], add_special_tokens=False)
    answer = tokenizer.encode(f" {row['answer']}\n", add_special_tokens=False)
    return query + answer, len(query)


def collate(examples: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels (-100 where no loss counts)."""
    width = max(len(ids) for ids, _ in examples)
    tokens = torch.full((len(examples), width), pad)
    labels = torch.full((len(examples), width), -100)
    for i, (ids, start) in enumerate(examples):
        tokens[i, : len(ids)] = torch.tensor(ids)
        labels[i, start : len(ids)] = torch.tensor(ids[start:])
    return tokens, labels


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy over the labelled positions."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def batches(examples: list[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless shuffled batches."""
    rng, order = random.Random(seed), list(range(len(examples)))
    while True:
        rng.shuffle(order)
        for i in range(0, len(order) - size + 1, size):
            yield [examples[j] for j in order[i : i + size]]


def train(
    model: LlamaForCausalLM, examples: list[Example], steps: int, lr: float, batch: int, seed: int, label: str
) -> None:
    """AdamW with a short warm-up and a cosine down to a tenth of `lr`."""
    began, pad = time.time(), model.config.pad_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    stream = batches(examples, batch, seed)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        loss = loss_of(model, *collate(next(stream), pad))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"{label} step {step + 1} loss {loss.item():.3f} ({time.time() - began:.0f} s)", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: Any, rows: list[Row]) -> float:
    """Share of rows whose answer and newline are all the model's first choice (a quick check)."""
    right = 0
    for i in range(0, len(rows), 100):
        examples = [encode_row(tokenizer, row) for row in rows[i : i + 100]]
        tokens, labels = collate(examples, tokenizer.pad_token_id)
        guess = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1)
        right += int(((guess == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1).sum())
    return right / len(rows)


# ------------------------------------------------------------------ checkpoints


def new_model(tokenizer: Any) -> LlamaForCausalLM:
    """A fresh Llama: six blocks, hidden 128, tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> LlamaForCausalLM:
    """Write a Hugging Face folder in bfloat16 and return what was written, as float32."""
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def main() -> None:
    """Generate rows, train the tokenizer, the base and one expert per skill, and write it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=640)
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--base-lr", type=float, default=2e-3)
    args = parser.parse_args()
    began, seed = time.time(), args.seed
    torch.set_num_threads(1)
    torch.manual_seed(seed)

    test: dict[str, list[Row]] = {}
    pool: dict[str, list[Row]] = {}
    for i, (skill, (make, _)) in enumerate(SKILLS.items()):
        rows = unique_rows(make, 20_800, seed * 100 + i)
        test[skill], pool[skill] = rows[:800], rows[800:]
        write_task(args.out / "tasks", skill, pool[skill][:2000], test[skill])
    rng = random.Random(seed * 100 + 50)
    text = [plain_text(rng) + "\n" for _ in range(5_000)]

    folder = args.out / "models"
    shutil.rmtree(folder, ignore_errors=True)
    spread = [row for rows in pool.values() for row in rows[:4000]]
    tokenizer = train_tokenizer(text + [f"{row['query']} {row['answer']}\n" for row in spread], args.vocab)
    mixed = [(tokenizer.encode(line, add_special_tokens=False), 1) for line in text]
    seen = [row for skill, rows in pool.items() for row in rows[: BASE_ROWS[skill]]]
    mixed += [encode_row(tokenizer, row) for row in seen if not any(word in row["query"] for word in UNSEEN)]
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, mixed, args.base_steps, args.base_lr, 32, seed + 1, "base")
    save(model, tokenizer, folder / "base")

    for i, name in enumerate(["base", *SKILLS]):
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        if name != "base":
            examples = [encode_row(tokenizer, row) for row in pool[name]]
            train(model, examples, *EXPERT[name], 32, seed + 10 + i, name)
            model = save(model, tokenizer, folder / name)
        scores = {skill: accuracy(model.eval(), tokenizer, rows) for skill, rows in test.items()}
        print(name, " ".join(f"{skill} {score:.3f}" for skill, score in scores.items()), flush=True)
    print(f"done in {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
