"""Measurements that do not depend on the candidate, made once: activity, reductions, thresholds, stored scores."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from merge_search.engine.contracts import SHORT_RANKS, Numbers, Pass, Source, Structure, Tensors, is_vector
from merge_search.engine.execute.runner import Runner, scalars
from merge_search.engine.kernels.numerics import log
from merge_search.engine.kernels.ranks import delta_ranks, row_ranks
from merge_search.engine.methods.assess import AssessContext
from merge_search.engine.passes.byte_cache import ByteCache
from merge_search.engine.passes.order_statistics import EXACT_LIMIT, OrderStatisticsBuilder, Thresholds
from merge_search.engine.passes.settings import Assessment
from merge_search.errors import NonFiniteError
from merge_search.memory import MemoryBudget

__all__ = ["Measurements"]

_CHUNK = 2**20


class Measurements:
    """Measures tensors on demand and keeps the results.

    Args:
        budget: Shared with other caches; None: one of its own, of the free memory.
        cache_bytes: Most bytes of scores and ranks that are stored per element; None: what the budget allows one cache.
        runner: Makes scores; None: in chunks.
    """

    def __init__(
        self,
        tensors: Tensors,
        *,
        budget: MemoryBudget | None = None,
        cache_bytes: int | None = None,
        runner: Runner | None = None,
    ) -> None:
        self.tensors = tensors
        self._runner = runner or Runner(tensors.device, compile=False)
        self.budget = budget or MemoryBudget.of_free_memory(tensors.device, at_least=cache_bytes or 0)
        self.stored = ByteCache(self.budget, cache_bytes)
        self._active: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}
        self._largest: dict[tuple[str, str], float] = {}
        self._largest_base: dict[str, float] = {}
        self._reductions: dict[Hashable, list[tuple[float, ...]]] = {}
        self._thresholds: dict[Hashable, dict[str, Thresholds]] = {}
        self._limits: dict[Hashable, dict[str, tuple[float, float]]] = {}
        self._offsets: dict[bool, dict[str, int]] = {}
        self._asked_for: set[Hashable] = set()
        self._stored_at: dict[Hashable, tuple[float, ...]] = {}  # coefficients that stored scores depend on

    def flats(self, name: str, experts: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """Base and experts of a tensor, flattened (views where the pool's tensors are contiguous)."""
        return self.tensors.base(name).reshape(-1), [self.tensors.expert(e, name).reshape(-1) for e in experts]

    def active(self, name: str, experts: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `experts` whose delta is not zero everywhere.

        Raises:
            NonFiniteError: A weight of the base or an expert is NaN or infinite where they differ.
        """
        key = (name, experts)
        if key not in self._active:
            self._active[key] = tuple(e for e in experts if self.largest_delta(e, name) > 0)
        return self._active[key]

    def largest_base(self, name: str) -> float:
        """max |base|, finite.

        Raises:
            NonFiniteError: It is not.
        """
        if name not in self._largest_base:
            base = self.tensors.base(name).reshape(-1).to(self.tensors.device)
            largest = max((float(b.abs().max()) for b in torch.split(base, _CHUNK)), default=0.0)
            if not math.isfinite(largest):
                raise NonFiniteError(
                    f"the weights of the base must be finite, found NaN or infinity in tensor {name!r}; "
                    "download it again"
                )
            self._largest_base[name] = largest
        return self._largest_base[name]

    def largest_delta(self, expert: str, name: str) -> float:
        """max |delta|, finite.

        Raises:
            NonFiniteError: It is not.
        """
        key = (expert, name)
        if key not in self._largest:
            base, (own,) = self.flats(name, [expert])
            largest = 0.0
            if own.data_ptr() != base.data_ptr():  # a pool may share frozen tensors
                for b, e in zip(torch.split(base, _CHUNK), torch.split(own, _CHUNK), strict=True):
                    delta = e.to(self.tensors.device, torch.float32) - b.to(self.tensors.device, torch.float32)
                    this = float(delta.abs().max()) if delta.numel() else 0.0
                    largest = max(largest, this) if this == this else math.nan
                    if not math.isfinite(largest):
                        break
            if not math.isfinite(largest):
                raise NonFiniteError(
                    f"the weights of base and experts must be finite, found NaN or infinity in tensor {name!r} of "
                    f"expert {expert!r} or of the base; repair the checkpoint or leave the expert out"
                )
            self._largest[key] = largest
        return self._largest[key]

    def largest_deltas(self, experts: Sequence[str], name: str) -> list[float]:
        """`largest_delta` of each expert."""
        return [self.largest_delta(e, name) for e in experts]

    def offset(self, name: str, *, vectors: bool) -> int:
        """Position of a tensor's first element in the whole model, as ranked together."""
        if vectors not in self._offsets:
            total, offsets = 0, {}
            for other in self.tensors.groups:
                offsets[other] = total
                shape = self.tensors.shape(other)
                total += math.prod(shape) if vectors or not is_vector(shape) else 0
            self._offsets[vectors] = offsets
        return self._offsets[vectors][name]

    # --- numbers of a measure

    def numbers(self, assessment: Assessment, name: str) -> list[float]:
        """Scalars of a cheap measure for one tensor."""
        if assessment.numbers is None:
            return []
        scope, reductions = assessment.scope, list[tuple[float, ...]]()
        if assessment.reduce is not None:
            is_pooled = scope.is_model and assessment.pool is not None and scope.covers(self.tensors.shape(name))
            reductions = self._pooled(assessment, name) if is_pooled else self._reduction(assessment, name)
        active = len(self.active(name, scope.experts))
        return assessment.numbers(assessment.options, reductions, len(scope.experts), active)

    def _reduction(self, assessment: Assessment, name: str) -> list[tuple[float, ...]]:
        key = (assessment.reduction_key, name)
        if key not in self._reductions:
            self._reductions[key] = self._make_reduction(assessment, name)
        return self._reductions[key]

    def _make_reduction(self, assessment: Assessment, name: str) -> list[tuple[float, ...]]:
        """Reductions of a tensor, in parts where the measure can pool them: reused memory costs no page faults."""
        assert assessment.reduce is not None
        n = math.prod(self.tensors.shape(name))
        if assessment.pool is None or n <= _CHUNK:
            return assessment.reduce(self.context(assessment, name))
        slices = [slice(start, start + _CHUNK) for start in range(0, n, _CHUNK)]
        parts = [assessment.reduce(self.context(assessment, name, part=part)) for part in slices]
        return [assessment.pool(of_expert) for of_expert in zip(*parts, strict=True)]

    def _pooled(self, assessment: Assessment, name: str) -> list[tuple[float, ...]]:
        """Reductions over the whole model, for the experts that are active on one tensor."""
        assert assessment.pool is not None
        scope, key = assessment.scope, ("pooled", assessment.reduction_key)
        if key not in self._reductions:
            parts: dict[str, list[tuple[float, ...]]] = {e: [] for e in scope.experts}
            for other in self.tensors.groups:
                if scope.covers(self.tensors.shape(other)):
                    active = self.active(other, scope.experts)
                    for e, part in zip(active, self._reduction(assessment, other), strict=True):
                        parts[e].append(part)
            self._reductions[key] = [assessment.pool(parts[e]) if parts[e] else () for e in scope.experts]
        active = self.active(name, scope.experts)
        return [r for e, r in zip(scope.experts, self._reductions[key], strict=True) if e in active]

    # --- scores

    def context(
        self, assessment: Assessment, name: str, coefficients: tuple[float, ...] = (), *, part: slice | None = None
    ) -> AssessContext:
        """A measure's view of a tensor, or of a part of it, flat; active experts only."""
        scope, reads_weights = assessment.scope, assessment.measure.reads_weights
        active = self.active(name, scope.experts)
        base = self.tensors.base(name)
        experts = [self.tensors.expert(e, name) for e in active] if reads_weights else []
        if part is not None:
            base, *experts = (t.reshape(-1)[part] for t in (base, *experts))
        base = base.to(self.tensors.device)
        raw: list[Tensor] = []
        if reads_weights:
            base = base.to(torch.float32)
            raw = [t.to(base.device, torch.float32) - base for t in experts]
        deltas = raw
        clip = self.clip(assessment, name) if reads_weights else {}
        if clip:
            n = scalars(clip, base.device)
            deltas = [
                torch.sign(t) * torch.clamp(t.abs(), n["clip_low"][i], n["clip_high"][i]) for i, t in enumerate(raw)
            ]
        return AssessContext(
            base=base,
            deltas=deltas,
            raw=raw,
            numbers=(),
            options=assessment.options,
            n_experts=len(scope.experts),
            experts=active,
            every_expert=scope.experts,
            group=self.tensors.groups[name],
            seed=scope.seed if assessment.measure.is_random else 0,
            coefficients=assessment.at(coefficients),
            tensors=self.tensors,
        )

    def give_scores(self, p: Pass, slot: str, assessment: Assessment, coefficients: tuple[float, ...]) -> Source:
        """Put the scores of a measure, or what a pass needs to make them, into a pass.

        Args:
            slot: ``a`` for selection scores, ``b`` for mixing scores.
        Returns:
            Where the pass finds its scores.
        """
        logarithm = slot == "b" and p.structure.splice == "softmax"
        if assessment.source.kind == "cheap" and not (
            self._runner.compile and self._is_worth_storing(assessment, p.name)
        ):
            if values := self.numbers(assessment, p.name):
                p.numbers[slot] = values
            return assessment.source
        added = assessment.measure.added
        if slot == "b" and added and not logarithm:
            p.numbers[slot] = [float(assessment.options[added])]
            assessment = assessment.without_added
        p.given[slot] = self.scores(assessment, p.name, coefficients, logarithm=logarithm)
        return Source("given log" if logarithm else "given")

    def scores(
        self, assessment: Assessment, name: str, coefficients: tuple[float, ...] = (), *, logarithm: bool = False
    ) -> list[Tensor]:
        """Stored scores of a measure, or their logarithms: flat float32, one per active expert.

        Of a measure that depends on the coefficients only the last scores are stored.
        """
        key, at = self.scores_key(assessment, name, logarithm=logarithm), assessment.at(coefficients)
        if self._stored_at.get(key, at) != at:
            self.stored.drop(key)
        scores = self.stored.get(key)
        if scores is None:
            if logarithm and assessment.measure.cheap:
                scores = self.made(*self.score_pass(assessment, name), form="log")
            else:
                scores = self._make_scores(assessment, name, coefficients)
                if logarithm:
                    scores = [torch.cat([log(part) for part in torch.split(t, _CHUNK)]) for t in scores]
            self.store(key, name, scores)
            if at:
                self._stored_at[key] = at
        return scores

    def scores_key(self, assessment: Assessment, name: str, *, logarithm: bool) -> Hashable:
        """Where `scores` are stored."""
        return ("scores", assessment.key, name, logarithm)

    def whole_scores(self, assessment: Assessment, name: str, coefficients: tuple[float, ...] = ()) -> list[Tensor]:
        """Scores of any measure over a whole tensor, flat float32, not stored if cheap."""
        if assessment.measure.cheap:
            return self._make_scores(assessment, name, coefficients)
        return self.scores(assessment, name, coefficients)

    def _make_scores(self, assessment: Assessment, name: str, coefficients: tuple[float, ...]) -> list[Tensor]:
        if assessment.measure.cheap:
            return self.made(*self.score_pass(assessment, name))
        context = self.context(assessment, name, coefficients)
        scores = assessment.scores(context)
        return [t.to(torch.float32).broadcast_to(context.base.shape).reshape(-1) for t in scores]

    def score_pass(self, assessment: Assessment, name: str) -> tuple[Pass, Tensor, list[Tensor]]:
        """The pass that makes a measure's scores, and the flat tensors that it reads."""
        active = self.active(name, assessment.scope.experts)
        clip = self.clip(assessment, name)
        numbers: Numbers = {**clip}
        if assessment.measure.cheap and (values := self.numbers(assessment, name)):
            numbers["a"] = values
        base, experts = self.flats(name, active)
        structure = Structure(experts=len(active), winsorise=bool(clip), assess=assessment.source)
        return Pass(name, tuple(base.shape), structure, active, numbers), base, experts

    def made(self, p: Pass, base: Tensor, experts: Sequence[Tensor], form: str = "") -> list[Tensor]:
        """Scores of a pass over a whole tensor, in a form of `stages.assessed`: flat float32, new."""
        scores = [torch.empty(base.numel(), device=self.tensors.device) for _ in p.experts]
        for start, part in self._runner.scores(p, base, experts, form):
            for out, a in zip(scores, part, strict=True):
                out[start : start + a.numel()] = a
        return scores

    # --- stored per element

    def has_room(self, name: str, experts: int, itemsize: int = 4) -> bool:
        """Whether values per element fit for this tensor and all before it: the first tensors are kept."""
        end = self.offset(name, vectors=True) + math.prod(self.tensors.shape(name))
        return itemsize * end * experts <= self.stored.limit

    def store(self, key: Hashable, name: str, tensors: list[Tensor]) -> None:
        """Store values per element where there is room; else hold them until it is another tensor's turn."""
        if self.has_room(name, len({id(t) for t in tensors}), max((t.itemsize for t in tensors), default=0)):
            self.stored.put(key, tensors)
        else:
            self.stored.hold(key, tensors, name)

    def _is_worth_storing(self, assessment: Assessment, name: str) -> bool:
        """Whether a cheap measure's scores are worth storing: slow to make, asked for before, and with room."""
        if not assessment.measure.is_costly or not self.has_room(name, len(assessment.scope.experts)):
            return False
        key = (assessment.key, name)
        if key in self._asked_for:
            return True
        self._asked_for.add(key)
        return False

    # --- order statistics

    def clip(self, assessment: Assessment, name: str) -> Numbers:
        """Winsorising limits of the active experts, {} where nothing is clipped."""
        scope = assessment.scope
        if not scope.winsorise or not scope.covers(self.tensors.shape(name)):
            return {}
        if scope.limits == "released":
            limits = self._released_limits(assessment, name)
            active = self.active(name, scope.experts)
            return {"clip_low": [limits[e][0] for e in active], "clip_high": [limits[e][1] for e in active]}
        thresholds = self.thresholds(assessment.of_deltas, name)
        low, high = [], []
        for e in self.active(name, scope.experts):
            n = thresholds[e].n
            below = math.floor(scope.winsorise * (n - 1))
            low.append(thresholds[e].value(n - below))
            high.append(thresholds[e].value(1 + below))
        return {"clip_low": low, "clip_high": high}

    def _released_limits(self, assessment: Assessment, name: str) -> dict[str, tuple[float, float]]:
        """Sorted |delta| numbers int(n q) and int(n (1 - q) - 1), from 0, of each expert that has a delta."""
        scope = assessment.scope
        key = (scope.key(), "" if scope.is_model else name)
        if key not in self._limits:
            names = (
                [n for n in self.tensors.groups if scope.covers(self.tensors.shape(n))] if scope.is_model else [name]
            )
            limits = dict[str, tuple[float, float]]()
            for e, t in self.thresholds(assessment.of_deltas, name).items():
                if t.n:
                    numbers = int(t.n * scope.winsorise), max(0, int(t.n * (1 - scope.winsorise) - 1))
                    low, high = (self._kth_delta(names, e, t, t.n - number) for number in numbers)
                    limits[e] = (low, high)
            self._limits[key] = limits
        return self._limits[key]

    def _kth_delta(self, names: Sequence[str], expert: str, thresholds: Thresholds, k: int) -> float:
        """The k-th largest |delta| over some tensors, exactly: a histogram's bin is read again and sorted."""
        if thresholds.n <= EXACT_LIMIT or k >= thresholds.n:
            return thresholds.value(k)
        cut = thresholds.cut(k)
        above, inside = 0, list[Tensor]()
        for name in names:
            if not self.active(name, (expert,)):
                continue
            base, (own,) = self.flats(name, [expert])
            for b, t in zip(torch.split(base, _CHUNK), torch.split(own, _CHUNK), strict=True):
                sizes = (t.to(self.tensors.device, torch.float32) - b.to(self.tensors.device, torch.float32)).abs()
                above += int((sizes >= cut.high).sum())
                inside.append(sizes[(sizes >= cut.low) & (sizes < cut.high)])
        return float(torch.cat(inside).sort(descending=True).values[k - above - 1])

    def thresholds(
        self, assessment: Assessment, name: str, coefficients: tuple[float, ...] = ()
    ) -> dict[str, Thresholds]:
        """Those of the active experts of a tensor, or of the whole model if that is what is ranked together."""
        scope = assessment.scope
        key = (assessment.key, "" if scope.is_model else name, assessment.at(coefficients))
        if key not in self._thresholds:
            names = [name]
            if scope.is_model:
                names = [n for n in self.tensors.groups if scope.covers(self.tensors.shape(n))]
            self._thresholds[key] = self._make_thresholds(assessment, names, coefficients)
        return self._thresholds[key]

    def _make_thresholds(
        self, assessment: Assessment, names: Sequence[str], coefficients: tuple[float, ...]
    ) -> dict[str, Thresholds]:
        scope, is_shared = assessment.scope, assessment.measure.shared
        sizes = dict.fromkeys(scope.experts, 0)
        for name in names:
            for e in self.active(name, scope.experts):
                sizes[e] += math.prod(self.tensors.shape(name))
        builders = {e: OrderStatisticsBuilder(n) for e, n in sizes.items()}
        for name in names:
            active = self.active(name, scope.experts)
            if not active:
                continue
            start = self.offset(name, vectors=scope.select.vectors) if scope.is_model else 0
            if assessment.is_plain_delta and not self.clip(assessment, name):
                base, experts = self.flats(name, active)
                for e, own in zip(active, experts, strict=True):
                    builders[e].add_deltas(base, own, self.largest_delta(e, name), start)
                continue
            for at, scores in self._score_chunks(assessment, name, coefficients):
                for e, a in zip(active, scores, strict=True):
                    if e == active[0] or not is_shared or len(names) > 1:
                        builders[e].add(a, start + at)
        if is_shared and len(names) == 1 and (active := self.active(names[0], scope.experts)):
            return dict.fromkeys(active, builders[active[0]].finish())
        return {e: b.finish() for e, b in builders.items()}

    def _score_chunks(
        self, assessment: Assessment, name: str, coefficients: tuple[float, ...]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        if not assessment.measure.cheap:
            yield 0, self.scores(assessment, name, coefficients)
            return
        p, base, experts = self.score_pass(assessment, name)
        yield from self._runner.scores(p, base, experts)

    def ranks(self, assessment: Assessment, name: str, coefficients: tuple[float, ...] = ()) -> list[Tensor]:
        """Rank of every score within its row (scope ``row``) or tensor, 0 the largest. Flat, stored.

        Up to `SHORT_RANKS` a row they are int16, half as much to keep and to read; else float32.
        """
        key = ("ranks", assessment.key, assessment.scope.select.scope, name, assessment.at(coefficients))
        ranks = self.stored.get(key)
        if ranks is None:
            ranks = self._make_ranks(assessment, name, coefficients)
            self.store(key, name, ranks)
        return ranks

    def _make_ranks(self, assessment: Assessment, name: str, coefficients: tuple[float, ...]) -> list[Tensor]:
        by_row = assessment.scope.select.scope == "row"
        shape = self.tensors.base(name).shape if by_row else torch.Size((-1,))
        length = shape[-1] if by_row and shape else math.prod(self.tensors.shape(name))
        dtype = torch.int16 if length <= SHORT_RANKS else torch.float32
        if assessment.is_plain_delta and not self.clip(assessment, name):
            base, own = self.flats(name, self.active(name, assessment.scope.experts))
            rows = [t.to(self.tensors.device).reshape(shape) for t in (base, *own)]
            return [delta_ranks(rows[0], t, dtype).reshape(-1) for t in rows[1:]]
        scores = self.whole_scores(assessment, name, coefficients)
        ranks = {id(a): row_ranks(a.reshape(shape), dtype).reshape(-1) for a in {id(a): a for a in scores}.values()}
        return [ranks[id(a)] for a in scores]
