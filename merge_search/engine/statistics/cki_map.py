"""CKI's learned map: Adam on A and b of every spliced matrix, through the soft splice of all experts.

    min over A, b of the mean loss of W = sum_i s_i W_i / sum_i s_i, where s_i are scores of ``cki_learned``

The loss is that of the right answers, averaged over the experts' tasks. The live model's other weights are those of the
merge, and stay. Each task keeps a fifth of its rows to compare epochs on, and the epoch with the smallest loss there,
the start included, is kept. Source: CKI, arXiv 2501.07596, released code (Adam, ten epochs, best epoch by the
development set). Differs: the released maps are trained on one task's training set; `assess.cki_learned` has the rest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_search.engine.methods.assess import AssessContext, cki_learned
from merge_search.engine.resident.parameters import parameter_slices, receiving_gradients
from merge_search.engine.statistics.rows import TaskRows, Work
from merge_search.errors import NonFiniteError
from merge_search.recipe import Scalar, groups_named
from merge_search.seeding import derive_seed

__all__ = ["Spliced", "Training", "measure"]


@dataclass
class Spliced:
    """One tensor that the map splices.

    Attributes:
        experts: Weights of the experts that changed it, float32 (float64 if the files are).
        distances: Input D of the map, one per expert.
        terms: Global terms, 0-d.
        parameters: A and b as `cki_learned.start` returns them; what is trained.
        transposed: Whether the tensor is stored (in, out).
    """

    options: Mapping[str, Scalar]
    experts: list[Tensor]
    distances: list[Tensor]
    terms: list[Tensor]
    parameters: Tensor
    transposed: bool

    def merged(self) -> Tensor:
        """Return the spliced weights, with their graph to the parameters."""
        gain = float(self.options["gain"])
        u = [cki_learned.logits(gain, self.parameters, d, transposed=self.transposed) for d in self.distances]
        b = cki_learned.weights(self.options, u, self.terms, exp=torch.exp, sigmoid=torch.sigmoid)
        return sum(x * w for x, w in zip(b, self.experts, strict=True)) / sum(b)  # type: ignore[return-value]


class Training:
    """The maps of a model, and the gradient of a loss with respect to them.

    Args:
        work: The live model with base weights. The weights of the merge are written into it.
        options: Options of ``cki_learned``.
    Attributes:
        spliced: The tensors with a map, by name.
    """

    def __init__(self, work: Work, options: Mapping[str, Scalar]) -> None:
        self.work, self.options = work, options
        self.spliced: dict[str, Spliced] = {}
        keys = groups_named(str(options["only"]), work.groups.values())
        for name in work.views:
            is_spliced = keys is None or any(key in keys for key in work.groups[name].keys())  # noqa: SIM118
            self._add(name) if is_spliced else self._keep_rest(name)
        self._slices = parameter_slices(work.model, {name: work.views[name] for name in self.spliced})

    @torch.no_grad()
    def _add(self, name: str) -> None:
        models, view = self.work.models, self.work.views[name]
        assert models is not None
        base = models.base(name).to(view.device)
        base = base.to(torch.promote_types(base.dtype, torch.float32))
        experts = [models.expert(e, name).to(view.device, base.dtype) for e in models.models.experts]
        changed = [w for w in experts if not torch.equal(w, base)]
        if len(changed) < 2:
            view.copy_(changed[0] if changed else base)
            return
        deltas = [w - base for w in changed]
        found, terms = cki_learned.inputs(AssessContext(base, deltas, deltas, (), self.options, len(experts)))
        transposed = models.is_transposed(name)
        seed = derive_seed(self.work.seed, "cki_map", name)
        parameters = cki_learned.start(self.options, base.shape, transposed=transposed, seed=seed)
        self.spliced[name] = Spliced(
            self.options, changed, found, [torch.tensor(t, dtype=base.dtype, device=view.device) for t in terms],
            parameters.to(view.device, base.dtype).requires_grad_(), transposed,
        )  # fmt: skip

    @torch.no_grad()
    def _keep_rest(self, name: str) -> None:
        models = self.work.models
        assert models is not None
        if self.options["rest"] == "base":
            return
        experts = list(models.models.experts)
        expert = experts[0] if self.options["rest"] == "first" else experts[-1]
        self.work.views[name].copy_(models.expert(expert, name))

    @torch.no_grad()
    def write(self) -> None:
        """Write the spliced weights into the live model."""
        for name, spliced in self.spliced.items():
            self.work.views[name].copy_(spliced.merged())

    def backward(self, rows: Mapping[str, list[int]]) -> None:
        """Add the gradient of the mean over tasks of their mean loss on `rows` to ``.grad`` of the parameters."""
        gradients: dict[str, Tensor] = {}

        def add(name: str, gradient: Tensor) -> None:
            gradients[name] = gradients[name] + gradient if name in gradients else gradient.clone()

        tasks = [task for task in self.work.tasks if rows.get(task.task)]
        with receiving_gradients(self._slices, add):
            for task in tasks:
                torch.autograd.backward(task.loss(rows[task.task]) / len(tasks))
        with torch.enable_grad():
            for name, gradient in gradients.items():
                merged = self.spliced[name].merged()
                torch.autograd.backward(merged, gradient.to(merged.dtype))

    @torch.no_grad()
    def loss(self, rows: Mapping[str, list[int]]) -> float:
        """Return the mean over tasks of the mean loss over `rows`, asked one by one."""
        means = [math.fsum(float(t.loss([r])) for r in rows[t.task]) / len(rows[t.task]) for t in self.work.tasks]
        return math.fsum(means) / len(means)


def measure(work: Work, **options: Scalar) -> dict[str, Tensor]:
    """Return the trained maps by tensor name, as `cki_learned.start` has them: float32. Other tensors have none.

    Args:
        work: The live model, which holds the base, and the rows of all experts' tasks. It holds any weights afterwards.
        **options: Options of ``cki_learned``.
    Raises:
        NonFiniteError: The loss on the rows that were kept is NaN or infinite.
    Cost: three questions per epoch and row of the training; one per row that is kept, at the start and after each
        epoch. Memory: twice the spliced tensors of every expert, and three times the maps.
    Determinism: as `learners.fit`.
    """
    training = Training(work, options)
    if not training.spliced:
        return {}
    train, kept = {}, {}
    for task in work.tasks:
        rows = _shuffled(work.seed, task, "kept")
        n = _held_out(len(rows))
        train[task.task], kept[task.task] = rows[n:], rows[: max(1, n)]
    n_trained, n_kept = (sum(map(len, rows.values())) for rows in (train, kept))
    work.on_asked(3 * int(options["epochs"]) * n_trained + (int(options["epochs"]) + 1) * n_kept)
    parameters = {name: spliced.parameters for name, spliced in training.spliced.items()}
    adam = torch.optim.Adam(parameters.values(), lr=float(options["step_size"]))
    size, best, result = int(options["batch_rows"]), math.inf, dict[str, Tensor]()
    for epoch in range(int(options["epochs"]) + 1):
        training.write()
        loss = training.loss(kept)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss of a map must be finite, got {loss} after {epoch} epochs; take smaller steps"
            )
        if loss < best:
            best, result = loss, {name: p.detach().clone() for name, p in parameters.items()}
        if epoch == int(options["epochs"]):
            break
        orders = {t.task: _shuffled(work.seed, t, epoch, train[t.task]) for t in work.tasks}
        for at in range(0, max(map(len, orders.values())), size):
            adam.zero_grad()
            training.backward({task: rows[at : at + size] for task, rows in orders.items()})
            adam.step()
            training.write()
    return {name: p.to(torch.float32) for name, p in result.items()}


def _held_out(n_rows: int) -> int:
    """Return the number of a task's rows on which epochs are compared; 0: on the one row that there is."""
    return min(n_rows - 1, max(1, n_rows // 5))


def _shuffled(seed: int, task: TaskRows, what: str | int, rows: list[int] | None = None) -> list[int]:
    """Return the rows of a task in an order that depends on the seed, the task's name and `what`."""
    result = list(task.rows if rows is None else rows)
    random.Random(derive_seed(seed, "cki_map", task.task, what)).shuffle(result)
    return result
