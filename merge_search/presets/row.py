"""What a preset is. torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_search.rules import OPERATORS, Origin

__all__ = ["Preset"]


@dataclass(frozen=True)
class Preset:
    """One published method.

    Attributes:
        name: The name that study files and recipes use.
        summary: One line for lists.
        paper: Title, year and arXiv number or other place.
        settings: `Recipe` fields.
        differs: Where released code, or this pipeline, departs from the paper.
        coefficient: Coefficient of every expert; ``mean`` is 1 / number of experts.
        density: Density of every expert; None where the method keeps everything.
        scale: lambda_out.
        grid: Published or usual values: any of ``coefficient``, ``density``, ``scale``, and ``settings`` (merged over
            the preset's).
        fit: How its coefficients are fitted by gradient, from `coefficient` on (fields of `study_file.BaselineFit`);
            None: they are published numbers. A preset with a fit is a baseline and no choice of a space.
        needs_data: Whether statistics must be measured on data.
        experts: Smallest and largest number of experts; None for no bound.
        origin: Where a preset from outside was added; None for the published ones.
    """

    name: str
    summary: str
    paper: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    differs: str = ""
    coefficient: float | str = 1.0
    density: float | None = None
    scale: float = 1.0
    grid: tuple[Mapping[str, Any], ...] = ()
    fit: Mapping[str, Any] | None = None
    needs_data: bool = False
    experts: tuple[int, int | None] = (1, None)
    origin: Origin | None = None

    @property
    def is_linear(self) -> bool:
        """Whether it makes one processed delta per expert. A search or a learner can then choose any coefficients."""
        operator = self.settings.get("operator")
        return operator is None or ((row := OPERATORS.get(operator["name"])) is not None and row.decomposing)

    @property
    def statistic(self) -> str:
        """A statistic without which it cannot be merged, where it `needs_data`."""
        operator = self.settings.get("operator")
        row = None if operator is None else OPERATORS.get(operator["name"])
        return row.statistics_asked({})[0] if row is not None and row.statistics else "fisher"

    @property
    def needs_factors(self) -> bool:
        """Whether it merges LoRA pairs, so that every expert must be an adapter."""
        operator = self.settings.get("operator")
        return operator is not None and (row := OPERATORS.get(operator["name"])) is not None and row.needs_factors
