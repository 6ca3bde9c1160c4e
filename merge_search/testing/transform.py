"""What every transform promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from merge_search.recipe import Models, Recipe, Transform
from merge_search.rules.table import Scalar

if TYPE_CHECKING:
    from merge_search.rules import Preview, Transformed

__all__ = ["TransformCase", "TransformConformance"]


@dataclass(frozen=True)
class TransformCase:
    """A transform to test, with models that it takes.

    Attributes:
        name: Its name.
        models: Folders of a base and experts.
        options: Its options.
        wrong: Options that its check must refuse.
    """

    name: str
    models: Models
    options: Mapping[str, Scalar] = field(default_factory=dict)
    wrong: Sequence[Mapping[str, Scalar]] = ()

    def preview(self, options: Mapping[str, Scalar] | None = None) -> Preview:
        """What its check says of the models."""
        from merge_search.engine.transforms.sources import Sources
        from merge_search.engine.transforms.store import preview

        chosen = dict(self.options if options is None else options)
        return preview(Transform(name=self.name, options=chosen), Sources(self.models))

    def made(self, folder: Path) -> Transformed:
        """What it writes below a folder."""
        from merge_search.engine.transforms.store import transformed

        transform = Transform(name=self.name, options=dict(self.options))
        return transformed(Recipe(models=self.models, transform=transform), folder)

    def hashes(self, folder: Path) -> dict[str, str]:
        """Hashes of what it writes below a folder, by name."""
        from merge_search.engine.checkpoints.hashing import hash_folder

        made = self.made(folder)
        return {"base": hash_folder(made.base), **{e: hash_folder(path) for e, path in made.experts.items()}}


class TransformConformance:
    """Inherit and define the fixture `case`, which returns a `TransformCase`."""

    def test_its_check_finds_nothing_wrong_with_models_that_it_takes(self, case: TransformCase) -> None:
        """The check reads headers alone and has no problem."""
        assert case.preview().problems == ()

    def test_wrong_options_are_refused_by_its_check(self, case: TransformCase) -> None:
        """Unknown options, values of another type and what the case names are problems, before a weight is read."""
        for options in ({"no_such_option": 1}, *case.wrong):
            assert case.preview(options).problems, options

    def test_it_returns_every_expert_or_none(self, case: TransformCase, tmp_path: Path) -> None:
        """The experts keep their names and their order; a result that is not merged has none."""
        from merge_search.rules import TRANSFORMS

        merges = TRANSFORMS[case.name].merges
        assert list(case.made(tmp_path).experts) == (list(case.models.experts) if merges else [])

    def test_what_it_makes_can_be_merged(self, case: TransformCase, tmp_path: Path) -> None:
        """Names and shapes of base and experts agree, whatever those of the sources were."""
        from merge_search.engine.checkpoints.compatibility import check_models

        made = case.made(tmp_path)
        assert check_models(made.base, made.experts) == []

    def test_its_check_knows_the_base_that_it_writes(self, case: TransformCase, tmp_path: Path) -> None:
        """The preview has the config and the tensors of the written base."""
        from merge_search.engine.checkpoints.headers import read_checkpoint
        from merge_search.engine.checkpoints.layout import layout

        preview, written = case.preview(), read_checkpoint(case.made(tmp_path).base)
        base = read_checkpoint(case.models.base)
        assert dict(preview.config or base.config) == dict(written.config)
        assert set(preview.names or layout(base)) == set(layout(written))

    def test_the_base_that_it_writes_can_be_scored(self, case: TransformCase, tmp_path: Path) -> None:
        """It loads as a live model, whose bits are those of the files."""
        from merge_search.engine.checkpoints.hashing import hash_folder
        from merge_search.engine.resident.live_model import LiveModel

        made = case.made(tmp_path)
        live = LiveModel.load(made.base)
        names = {*live.views, *live.absent}
        assert live.hash() == hash_folder(made.base, names)

    def test_equal_models_and_options_give_equal_bits(self, case: TransformCase, tmp_path: Path) -> None:
        """It depends on its models and options alone."""
        assert case.hashes(tmp_path / "one") == case.hashes(tmp_path / "two")

    def test_its_sources_and_the_global_generators_are_left_alone(self, case: TransformCase, tmp_path: Path) -> None:
        """It reads and never writes the models, and draws no number from torch's generator."""
        import torch

        places = [Path(p) for p in (case.models.base, *case.models.experts.values())]
        before = [(f, f.stat().st_mtime_ns) for p in places for f in sorted(p.iterdir())], torch.get_rng_state()
        case.made(tmp_path)
        assert [(f, f.stat().st_mtime_ns) for p in places for f in sorted(p.iterdir())] == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
