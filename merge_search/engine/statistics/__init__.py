"""Statistics: numbers measured on data, once per study. `rules.statistics` has their rows, torch-free.

There is one file a statistic. A statistic is a module with

    measure(work: Work, **options) -> dict[str, Tensor]     tensor name on disk -> float32

It runs while the live model holds the weights of its row's point, on rows that a learner may fit on, never on scored
questions.

    provider.py   DataStatistics: chooses rows and weights, borrows the live model, caches the results
    store.py      files: named by the hash of all that matters, written whole or not at all, checked when read
    rows.py       what a statistic may read, and which rows it gets
    outside.py    one measurement, with checks of what a statistic from outside returns
    backward.py, forward.py   one pass per row: gradients, inputs of matrices
"""
