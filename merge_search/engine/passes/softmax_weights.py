"""Weights of a softmax over experts, kept while candidates ask for one temperature.

Where every expert takes part at every entry, the weights do not depend on coefficients: kept, they are read in place of the
scores that they are made from, and a candidate takes no exponential.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from torch import Tensor

from merge_search.engine.contracts import Pass, Source, Structure
from merge_search.engine.methods.assess import measure_of
from merge_search.engine.passes.measurements import Facts
from merge_search.engine.passes.scope import Scope
from merge_search.recipe import Assess

__all__ = ["Mixtures"]


class Mixtures:
    """Softmax weights by tensor and measure: those of the last sharpness (1 / temperature) alone."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._last: dict[Hashable, Hashable] = {}  # the sharpness last asked for

    def weights(
        self, assess: Assess, scope: Scope, p: Pass, coefficients: tuple[float, ...], sharpness: float
    ) -> list[Tensor] | None:
        """exp(sharpness log a_i - max_j sharpness log a_j) of the experts of `p`, flat float32: the bits a pass makes.

        Returns:
            None the first time that scores and sharpness are asked for, where experts drop out, and where there is no room.
        """
        s, name, facts = p.structure, p.name, self._facts
        is_open = s.select == "all" and s.resolve == "none" and not (s.exclusive or s.gate)
        if not is_open or measure_of(assess).after_mask or not facts.has_room(name, len(scope.experts)):
            return None
        made_from = facts.scores_key(assess, scope, name, logarithm=True)
        key, at = ("softmax", made_from), (sharpness, *facts.depends_on(assess, coefficients))
        if self._last.get(key) != at:
            self._last[key] = at
            facts.stored.drop(key)
            return None
        found = facts.stored.get(key)
        if found is None:
            found = self._made(assess, scope, name, coefficients, sharpness)
            if facts.stored.held + sum(w.nbytes for w in found) > facts.stored.limit:
                facts.stored.drop(made_from)  # rather than the scores of the next tensor
            facts.stored.put(key, found)
        return found

    def _made(
        self, assess: Assess, scope: Scope, name: str, coefficients: tuple[float, ...], sharpness: float
    ) -> list[Tensor]:
        """From stored scores where there are any; new ones are stored only where that is the rule without weights too."""
        facts = self._facts
        logits = facts.stored.get(facts.scores_key(assess, scope, name, logarithm=True))
        if logits is None and facts.source(assess).kind == "given":
            logits = facts.scores(assess, scope, name, coefficients, logarithm=True)
        if logits is None:
            p, base, experts = facts.assessment(assess, scope, name)
        else:
            active = facts.active(name, scope.experts)
            base, experts = facts.flats(name, active)
            structure = Structure(experts=len(active), assess=Source("given log"))
            p = Pass(name, tuple(base.shape), structure, active, {}, {"a": logits})
        return facts.made(replace(p, numbers={**p.numbers, "sharpness": [sharpness]}), base, experts, form="softmax")
