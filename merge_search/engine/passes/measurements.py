"""What does not depend on the candidate, measured once and kept: activity, reductions, tables, stored scores."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from merge_search.engine.contracts import SHORT_RANKS, Numbers, Pass, Source, Structure, Tensors, is_vector
from merge_search.engine.execute.runner import Runner, scalars
from merge_search.engine.kernels.numerics import log
from merge_search.engine.kernels.ranks import delta_ranks, row_ranks
from merge_search.engine.methods.assess import AssessContext, load, measure_of
from merge_search.engine.passes.byte_cache import ByteCache, room
from merge_search.engine.passes.order_statistics import Table, TableBuilder
from merge_search.engine.passes.scope import Scope
from merge_search.errors import NonFiniteError
from merge_search.recipe import Assess, Scalar

__all__ = ["ByteCache", "Facts", "Scope"]

_CHUNK = 2**20


class Facts:
    """Measures tensors on demand and remembers.

    Args:
        cache_bytes: For scores and ranks that are stored per element; None: `room`. runner: Makes scores; None: in chunks.
    """

    def __init__(self, tensors: Tensors, *, cache_bytes: int | None = None, runner: Runner | None = None) -> None:
        self.tensors = tensors
        self._runner = runner or Runner(tensors.device, compile=False)
        self.stored = ByteCache(room(tensors.device) if cache_bytes is None else cache_bytes)
        self._largest: dict[tuple[str, str], float] = {}
        self._largest_base: dict[str, float] = {}
        self._reduced: dict[Hashable, list[tuple[float, ...]]] = {}
        self._tables: dict[Hashable, dict[str, Table]] = {}
        self._offsets: dict[bool, dict[str, int]] = {}
        self._asked: set[Hashable] = set()
        self._made_at: dict[Hashable, tuple[float, ...]] = {}  # coefficients that stored scores depend on

    def flats(self, name: str, experts: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """Base and experts of a tensor, flattened (views where the pool's tensors are contiguous)."""
        return self.tensors.base(name).reshape(-1), [self.tensors.expert(e, name).reshape(-1) for e in experts]

    def active(self, name: str, experts: Sequence[str]) -> tuple[str, ...]:
        """Those of `experts` whose delta is not zero everywhere.

        Raises:
            NonFiniteError: a weight of the base or an expert is NaN or infinite where they differ.
        """
        return tuple(e for e in experts if self.largest_delta(e, name) > 0)

    def largest_base(self, name: str) -> float:
        """max |base|, finite.

        Raises:
            NonFiniteError: it is not.
        """
        if name not in self._largest_base:
            base = self.tensors.base(name).reshape(-1).to(self.tensors.device)
            largest = max((float(b.abs().max()) for b in torch.split(base, _CHUNK)), default=0.0)
            if not math.isfinite(largest):
                raise NonFiniteError(
                    f"the weights of the base must be finite, found NaN or infinity in tensor {name!r}; download it again"
                )
            self._largest_base[name] = largest
        return self._largest_base[name]

    def largest_delta(self, expert: str, name: str) -> float:
        """max |delta|, finite.

        Raises:
            NonFiniteError: it is not.
        """
        key = (expert, name)
        if key not in self._largest:
            base, (mine,) = self.flats(name, [expert])
            largest = 0.0
            if mine.data_ptr() != base.data_ptr():  # a pool may share frozen tensors
                for b, e in zip(torch.split(base, _CHUNK), torch.split(mine, _CHUNK), strict=True):
                    delta = e.to(self.tensors.device, torch.float32) - b.to(self.tensors.device, torch.float32)
                    this = float(delta.abs().max()) if delta.numel() else 0.0
                    largest = max(largest, this) if this == this else math.nan
                    if not math.isfinite(largest):
                        break
            if not math.isfinite(largest):
                raise NonFiniteError(
                    f"the weights of base and experts must be finite, found NaN or infinity in tensor {name!r} of expert "
                    f"{expert!r} or of the base; repair the checkpoint or leave the expert out"
                )
            self._largest[key] = largest
        return self._largest[key]

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

    # --- scores

    def source(self, assess: Assess) -> Source:
        """How a pass gets the scores of a measure; numeric options become numbers, the others part of its structure."""
        measure = measure_of(assess)
        if not measure.cheap:
            return Source("given", assess.measure, tuple(sorted(assess.options.items())))
        load(assess.measure)
        options = self.options(assess)
        return Source("cheap", assess.measure, tuple(sorted((k, v) for k, v in options.items() if isinstance(v, str))))

    @staticmethod
    def options(assess: Assess) -> dict[str, Scalar]:
        return measure_of(assess).completed(assess.options)

    def numbers(self, assess: Assess, scope: Scope, name: str) -> list[float]:
        """Scalars of a cheap measure for one tensor."""
        module = load(assess.measure)
        if not hasattr(module, "numbers"):
            return []
        reduced: list[tuple[float, ...]] = []
        if hasattr(module, "reduce"):
            pooled = (
                scope.select.scope == "model" and hasattr(module, "pool") and scope.covers(self.tensors.shape(name))
            )
            reduced = self._pooled(assess, scope, name) if pooled else self._reduction(assess, scope, name)
        active = len(self.active(name, scope.experts))
        values: list[float] = module.numbers(self.options(assess), reduced, len(scope.experts), active)
        return values

    def _reduction(self, assess: Assess, scope: Scope, name: str) -> list[tuple[float, ...]]:
        measure, options = measure_of(assess), self.options(assess)
        key = (assess.measure, tuple(options[k] for k in measure.reduce_options), scope.key(), name)
        if key not in self._reduced:
            self._reduced[key] = self._made_reduction(assess, scope, name)
        return self._reduced[key]

    def _made_reduction(self, assess: Assess, scope: Scope, name: str) -> list[tuple[float, ...]]:
        """In parts, where the measure can put them together: memory that is used again costs no page faults."""
        module, n = load(assess.measure), math.prod(self.tensors.shape(name))
        if not hasattr(module, "pool") or n <= _CHUNK:
            whole: list[tuple[float, ...]] = module.reduce(self.context(assess, scope, name))
            return whole
        slices = [slice(start, start + _CHUNK) for start in range(0, n, _CHUNK)]
        parts = [module.reduce(self.context(assess, scope, name, part=part)) for part in slices]
        return [module.pool(mine) for mine in zip(*parts, strict=True)]

    def _pooled(self, assess: Assess, scope: Scope, name: str) -> list[tuple[float, ...]]:
        key = (assess.measure, "pooled", scope.key())
        if key not in self._reduced:
            parts: dict[str, list[tuple[float, ...]]] = {e: [] for e in scope.experts}
            for other in self.tensors.groups:
                if scope.covers(self.tensors.shape(other)):
                    for e, part in zip(
                        self.active(other, scope.experts), self._reduction(assess, scope, other), strict=True
                    ):
                        parts[e].append(part)
            self._reduced[key] = [load(assess.measure).pool(parts[e]) if parts[e] else () for e in scope.experts]
        active = self.active(name, scope.experts)
        return [r for e, r in zip(scope.experts, self._reduced[key], strict=True) if e in active]

    def context(
        self,
        assess: Assess,
        scope: Scope,
        name: str,
        coefficients: tuple[float, ...] = (),
        *,
        part: slice | None = None,
    ) -> AssessContext:
        """A measure's view of a tensor, or of a part of it, flat; active experts only."""
        active = self.active(name, scope.experts)
        base = self.tensors.base(name)
        experts = [self.tensors.expert(e, name) for e in active] if measure_of(assess).reads_weights else []
        if part is not None:
            base, *experts = (t.reshape(-1)[part] for t in (base, *experts))
        base = base.to(self.tensors.device)
        raw: list[Tensor] = []
        if reads := measure_of(assess).reads_weights:
            base = base.to(torch.float32)
            raw = [t.to(base.device, torch.float32) - base for t in experts]
        deltas = raw
        clip = self.clip(scope, name) if reads else {}
        if clip:
            n = scalars(clip, base.device)
            deltas = [
                torch.sign(t) * torch.clamp(t.abs(), n["clip_low"][i], n["clip_high"][i]) for i, t in enumerate(raw)
            ]
        group = self.tensors.groups[name]
        return AssessContext(
            base,
            deltas,
            raw,
            (),
            self.options(assess),
            len(scope.experts),
            active,
            group,
            scope.seed if measure_of(assess).is_random else 0,
            self.depends_on(assess, coefficients),
            self.tensors,
        )

    def scores(
        self, assess: Assess, scope: Scope, name: str, coefficients: tuple[float, ...] = (), *, logarithm: bool = False
    ) -> list[Tensor]:
        """Stored scores of a measure, or their logarithms: flat float32, one per active expert.

        Of a measure that depends on the coefficients only the last scores are stored.
        """
        key, at = self.scores_key(assess, scope, name, logarithm=logarithm), self.depends_on(assess, coefficients)
        if self._made_at.get(key, at) != at:
            self.stored.drop(key)
        found = self.stored.get(key)
        if found is None:
            if logarithm and measure_of(assess).cheap:
                found = self.made(*self.assessment(assess, scope, name), form="log")
            else:
                found = self._made_scores(assess, scope, name, coefficients)
                if logarithm:
                    found = [torch.cat([log(part) for part in torch.split(t, _CHUNK)]) for t in found]
            self.store(key, name, found)
            if at:
                self._made_at[key] = at
        return found

    def scores_key(self, assess: Assess, scope: Scope, name: str, *, logarithm: bool) -> Hashable:
        """Where `scores` are stored."""
        options = tuple(sorted(self.options(assess).items()))
        seed = scope.seed if measure_of(assess).is_random else 0
        return ("scores", assess.measure, options, scope.key(), seed, name, logarithm)

    def depends_on(self, assess: Assess, coefficients: tuple[float, ...]) -> tuple[float, ...]:
        """The coefficients, where the scores of a measure depend on them."""
        return coefficients if measure_of(assess).depends_on_coefficients(assess.options) else ()

    def _made_scores(self, assess: Assess, scope: Scope, name: str, coefficients: tuple[float, ...]) -> list[Tensor]:
        if measure_of(assess).cheap:
            return self.made(*self.assessment(assess, scope, name))
        context = self.context(assess, scope, name, coefficients)
        scores = load(assess.measure).scores(context)
        return [t.to(torch.float32).broadcast_to(context.base.shape).reshape(-1) for t in scores]

    def made(self, p: Pass, base: Tensor, experts: Sequence[Tensor], form: str = "") -> list[Tensor]:
        """Scores of a pass over a whole tensor, in a form of `stages.assessed`: flat float32, new."""
        made = [torch.empty(base.numel(), device=self.tensors.device) for _ in p.experts]
        for start, part in self._runner.scores(p, base, experts, form):
            for out, a in zip(made, part, strict=True):
                out[start : start + a.numel()] = a
        return made

    def has_room(self, name: str, experts: int, itemsize: int = 4) -> bool:
        """Whether values per element of this tensor and of all before it can be stored: as many tensors as fit are kept."""
        end = self.offset(name, vectors=True) + math.prod(self.tensors.shape(name))
        return itemsize * end * experts <= self.stored.limit

    def store(self, key: Hashable, name: str, found: list[Tensor]) -> None:
        """What is made for every tensor: stored where there is room, else held until it is another tensor's turn."""
        if self.has_room(name, len({id(t) for t in found}), max((t.itemsize for t in found), default=0)):
            self.stored.put(key, found)
        else:
            self.stored.hold(key, found, name)

    def keeps(self, assess: Assess, scope: Scope, name: str) -> bool:
        """Whether a cheap measure's scores are worth storing: dear, asked for before, and with room."""
        if not measure_of(assess).dear or not self.has_room(name, len(scope.experts)):
            return False
        key = (assess.measure, tuple(sorted(self.options(assess).items())), scope.key(), name)
        if key in self._asked:
            return True
        self._asked.add(key)
        return False

    def whole_scores(
        self, assess: Assess, scope: Scope, name: str, coefficients: tuple[float, ...] = ()
    ) -> list[Tensor]:
        """Scores of any measure over a whole tensor, flat float32, not stored if cheap."""
        if self.source(assess).kind == "given":
            return self.scores(assess, scope, name, coefficients)
        return self._made_scores(assess, scope, name, coefficients)

    def assessment(self, assess: Assess, scope: Scope, name: str) -> tuple[Pass, Tensor, list[Tensor]]:
        """The pass that makes a measure's scores, and the flat tensors that it reads."""
        active = self.active(name, scope.experts)
        clip = self.clip(scope, name)
        source = self.source(assess)
        numbers: Numbers = {**clip}
        if source.kind == "cheap" and (values := self.numbers(assess, scope, name)):
            numbers["a"] = values
        base, experts = self.flats(name, active)
        structure = Structure(experts=len(active), winsorise=bool(clip), assess=source)
        return Pass(name, tuple(base.shape), structure, active, numbers), base, experts

    # --- order statistics

    def clip(self, scope: Scope, name: str) -> Numbers:
        """Winsorising limits of the active experts, {} where nothing is clipped."""
        if not scope.winsorise or not scope.covers(self.tensors.shape(name)):
            return {}
        plain = Scope(scope.experts, scope.select, 0.0, scope.seed)
        tables = self.tables(Assess(), plain, name)
        low, high = [], []
        for e in self.active(name, scope.experts):
            below = math.floor(scope.winsorise * (tables[e].n - 1))
            low.append(tables[e].value(tables[e].n - below))
            high.append(tables[e].value(1 + below))
        return {"clip_low": low, "clip_high": high}

    def tables(self, assess: Assess, scope: Scope, name: str, coefficients: tuple[float, ...] = ()) -> dict[str, Table]:
        """Tables of the active experts of a tensor, or of the whole model if that is what is ranked together."""
        model = scope.select.scope == "model"
        options, at = json.dumps(self.options(assess), sort_keys=True), self.depends_on(assess, coefficients)
        key = (
            assess.measure,
            options,
            scope.key(),
            scope.seed if measure_of(assess).is_random else 0,
            "" if model else name,
            at,
        )
        if key not in self._tables:
            names = [n for n in self.tensors.groups if scope.covers(self.tensors.shape(n))] if model else [name]
            self._tables[key] = self._make_tables(assess, scope, names, coefficients)
        return self._tables[key]

    def _make_tables(
        self, assess: Assess, scope: Scope, names: Sequence[str], coefficients: tuple[float, ...]
    ) -> dict[str, Table]:
        sizes = dict.fromkeys(scope.experts, 0)
        for name in names:
            for e in self.active(name, scope.experts):
                sizes[e] += math.prod(self.tensors.shape(name))
        builders = {e: TableBuilder(n) for e, n in sizes.items()}
        shared = measure_of(assess).shared
        for name in names:
            active = self.active(name, scope.experts)
            if not active:
                continue
            start = self.offset(name, vectors=scope.select.vectors) if scope.select.scope == "model" else 0
            if assess.measure == "magnitude" and not self.clip(scope, name):
                base, experts = self.flats(name, active)
                for e, own in zip(active, experts, strict=True):
                    builders[e].add_deltas(base, own, self.largest_delta(e, name), start)
                continue
            for at, scores in self._score_chunks(assess, scope, name, coefficients):
                for e, a in zip(active, scores, strict=True):
                    if e == active[0] or not shared or len(names) > 1:
                        builders[e].add(a, start + at)
        if shared and len(names) == 1 and (active := self.active(names[0], scope.experts)):
            return dict.fromkeys(active, builders[active[0]].finish())
        return {e: b.finish() for e, b in builders.items()}

    def _score_chunks(
        self, assess: Assess, scope: Scope, name: str, coefficients: tuple[float, ...]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        if self.source(assess).kind == "given":
            yield 0, self.scores(assess, scope, name, coefficients)
            return
        p, base, experts = self.assessment(assess, scope, name)
        yield from self._runner.scores(p, base, experts)

    def ranks(self, assess: Assess, scope: Scope, name: str, coefficients: tuple[float, ...] = ()) -> list[Tensor]:
        """Rank of every score within its row (scope ``row``) or tensor, 0 the largest. Flat, stored.

        Up to `SHORT_RANKS` a row they are int16, half as much to keep and to read; else float32.
        """
        options, at = json.dumps(self.options(assess), sort_keys=True), self.depends_on(assess, coefficients)
        key = ("ranks", assess.measure, options, scope.key(), scope.select.scope, scope.seed, name, at)
        found = self.stored.get(key)
        if found is None:
            found = self._made_ranks(assess, scope, name, coefficients)
            self.store(key, name, found)
        return found

    def _made_ranks(self, assess: Assess, scope: Scope, name: str, coefficients: tuple[float, ...]) -> list[Tensor]:
        shape = self.tensors.base(name).shape if scope.select.scope == "row" else torch.Size((-1,))
        length = shape[-1] if scope.select.scope == "row" and shape else math.prod(self.tensors.shape(name))
        dtype = torch.int16 if length <= SHORT_RANKS else torch.float32
        if assess.measure == "magnitude" and not self.clip(scope, name):
            base, own = self.flats(name, self.active(name, scope.experts))
            rows = [t.to(self.tensors.device).reshape(shape) for t in (base, *own)]
            return [delta_ranks(rows[0], t, dtype).reshape(-1) for t in rows[1:]]
        scores = self.whole_scores(assess, scope, name, coefficients)
        made = {id(a): row_ranks(a.reshape(shape), dtype).reshape(-1) for a in {id(a): a for a in scores}.values()}
        return [made[id(a)] for a in scores]
