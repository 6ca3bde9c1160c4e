"""An evaluator of a user: likelihood of fixed rows of tokens under a language model of any shape, with a loss."""

import numpy as np
import torch

from merge_search.evaluation import Cost, Evaluation, MetricInfo, Scores, Split

N, LENGTH = 12, 8


class TokenJudge:
    """One task, ``rows``: exp of the mean log-likelihood of each row, in [0, 1]."""

    def __init__(self, options, *, shares, seed):
        draw = torch.Generator().manual_seed(17)
        self.rows = {s: torch.randint(4, 21, (N, LENGTH), generator=draw) for s in Split}
        self.n_asked = 0
        self.model = None
        self.bound = []

    def metrics(self):
        scored = (Split.SEARCH, Split.VALIDATION, Split.TEST)
        return [MetricInfo("rows", "likelihood", True, dict.fromkeys(scored, N))]

    def fingerprint(self):
        return "rows"

    def bind(self, model, tokenizer, *, folder):
        self.model = model
        self.bound.append(folder)

    def nll(self, rows):
        logits = self.model(input_ids=rows).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)

    def evaluate(self, split, fidelity=1.0, *, after=0.0):
        with torch.no_grad():
            values = np.exp(-self.nll(self.rows[split]).double().numpy())
        self.n_asked += N
        scores = Scores((), values, float(values.mean()), float(values.std() / N**0.5))
        return Evaluation(split, fidelity, {"rows/likelihood": scores}, Cost(questions=N))

    def fit_tasks(self):
        return {"rows": N}

    def losses(self, task):
        return ("gold",)

    def predict(self, task, rows):
        return [0] * len(rows)

    def set_pseudo_labels(self, task, labels):
        pass

    def loss(self, task, rows, kind="gold"):
        return self.nll(self.rows[Split.FIT][list(rows)]).mean()
