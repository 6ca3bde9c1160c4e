"""The published methods: one row each, with its paper and where this pipeline or released code departs from it.

torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_search.presets.row import Preset

__all__ = ["PUBLISHED"]

_TASK_ARITHMETIC = "Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv 2212.04089"
_TIES = "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708"
_DARE = "Yu et al. 2024, Language Models are Super Mario (DARE), arXiv 2311.03099"
_PCB = "Du et al. 2024, Parameter Competition Balancing, arXiv 2410.02396"
_CKI = "Compatibility-aware Knowledge Integration, AAAI 2025, arXiv 2501.07596"
_APL = "Activated Parameter Locating, 2024, arXiv 2408.09485"
_COPA = "Zeng et al. 2025, RobustMerge (CoPA-Merging), arXiv 2502.17159"
_RAM = "RAM / RAM+, arXiv 2601.13572"
_ADAMERGING = "Yang et al. 2024, AdaMerging, arXiv 2310.02575"

_SUM_SIGN = {"kind": "sum", "tie": "majority"}
_TOP_MODEL = {"kind": "top_k", "scope": "model"}
_MAGNITUDE = {"measure": "magnitude"}


def _each(key: str, *values: float) -> tuple[Mapping[str, Any], ...]:
    return tuple({key: v} for v in values)


def _regmean_parts(**options: float) -> Mapping[str, Any]:
    return {"name": "regmean_parts", "options": options}


def _ada(name: str, per: str, *, trimmed: bool = False) -> Preset:
    """AdaMerging: coefficients of least entropy; `study_file.BaselineFit` has the release's settings."""
    what = "one coefficient per expert" if per == "expert" else "one coefficient per expert and tensor"
    deltas = "TIES-trimmed deltas" if trimmed else "deltas"
    return Preset(
        name, f"sum of {deltas}, {what}, fitted to the least entropy of the answers", _ADAMERGING,
        {"assess": _MAGNITUDE, "select": _TOP_MODEL, "resolve": _SUM_SIGN} if trimmed else {},
        differs=(
            "Each task's entropy is divided by log of its number of answers. A coefficient is moved back onto [0, 1] "
            "after a step; in the release it stays outside and only counts as 0 or 1."
        ),
        coefficient=0.3, density=0.2 if trimmed else None, fit={"per": per},
    )  # fmt: skip


def _cki_learned(splice: str, **options: Any) -> Mapping[str, Any]:
    return {"kind": splice, "score": {"measure": "cki_learned", "options": dict(options)}}


def _cki(splice: str, **options: Any) -> Mapping[str, Any]:
    return {"kind": splice, "score": {"measure": "cki", "options": {"standardise": "all", **options}}}


def _apl(form: str) -> Mapping[str, Any]:
    options = {"form": form, "partition": "block"}
    return {
        "allocate": {
            "kind": "importance", "measure": "causal_effect", "options": options,
            "spread": 0.4, "floor": 0.01, "coefficient_power": 0.5,
        },
        "select": {"kind": "bernoulli", "vectors": False}, "rescale": {"kind": "inverse_density"},
    }  # fmt: skip


PUBLISHED: tuple[Preset, ...] = (
    Preset("base", "the base itself", "-", {"operator": {"name": "passthrough"}}),
    Preset(
        "expert", "one expert itself: preset('expert', models, expert='math')", "-",
        {"operator": {"name": "passthrough"}},
    ),
    Preset(
        "average", "mean of the experts (uniform soup)", "Wortsman et al. 2022, Model Soups, arXiv 2203.05482",
        differs="An expert that left a tensor as it is pulls it towards the base, as in a mean of weights.",
        coefficient="mean", grid=({"coefficient": "mean"},),
    ),
    Preset(
        "linear", "weighted mean of the experts; only the ratios of the coefficients matter",
        "Wortsman et al. 2022, Model Soups, arXiv 2203.05482", {"splice": {"kind": "coefficient"}},
        differs="Experts that left a tensor as it is do not count in its denominator.", grid=_each("coefficient", 1.0),
    ),
    Preset(
        "task_arithmetic", "base plus a scaled sum of deltas", _TASK_ARITHMETIC, coefficient=0.3,
        grid=_each("coefficient", 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    ),
    Preset(
        "ties", "trim over the model, elect signs, mean of those that agree", _TIES,
        {"assess": _MAGNITUDE, "select": _TOP_MODEL, "resolve": _SUM_SIGN, "splice": {"kind": "count"}},
        differs="The majority sign of exact ties is taken per tensor. Vectors (norms, biases) are not trimmed.",
        density=0.2, grid=_each("scale", 0.7, 1.0, 1.3),
    ),
    Preset(
        "ties_sum", "TIES with the sum in place of the mean, as fusion_bench has it", _TIES,
        {"assess": _MAGNITUDE, "select": _TOP_MODEL, "resolve": _SUM_SIGN, "splice": {"kind": "sum"}},
        differs="As `ties`.", density=0.2, scale=0.3, grid=_each("scale", 0.2, 0.3, 0.5),
    ),
    Preset(
        "ties_mergekit",
        "TIES trimmed per tensor, coefficients in the election and the denominator, as mergekit has it", _TIES,
        {
            "assess": _MAGNITUDE, "select": {"kind": "top_k", "vectors": True},
            "resolve": {"kind": "sum", "weighted": True, "tie": "plus"}, "splice": {"kind": "coefficient"},
        },
        differs="mergekit keeps everything unless a density is given.", density=0.5,
        grid=({"density": 0.2}, {"density": 0.5}, {"density": 0.8}),
    ),
    _ada("adamerging", "expert"), _ada("adamerging_layer", "tensor"),
    _ada("adamerging_pp", "expert", trimmed=True), _ada("adamerging_layer_pp", "tensor", trimmed=True),
    Preset(
        "dare", "drop deltas at random, rescale the rest by 1 / density, sum", _DARE,
        {"select": {"kind": "bernoulli"}, "rescale": {"kind": "inverse_density"}},
        differs=(
            "mergekit rescales to the old L1 norm of the tensor: rescale match_l1. Masks are keyed, not drawn. Norms "
            "and biases stay whole unless `vectors` is set."
        ),
        coefficient=0.3, density=0.5, grid=({"density": 0.5}, {"density": 0.1}, {"density": 0.5, "coefficient": 0.5}),
    ),
    Preset(
        "dare_ties", "random drop and 1 / density, then sign election and mean of those that agree", _DARE,
        {
            "select": {"kind": "bernoulli"}, "rescale": {"kind": "inverse_density"}, "resolve": _SUM_SIGN,
            "splice": {"kind": "count"},
        },
        differs=(
            "TIES trimming after the drop is left out, as in mergekit; fusion_bench sums with scale 0.5. Norms and "
            "biases stay whole unless `vectors` is set."
        ),
        density=0.5, grid=({"scale": 0.5}, {"scale": 1.0}, {"density": 0.2, "scale": 0.5}),
    ),
    Preset(
        "della", "random drop whose keep probability rises with the rank in the row, sign election, mean",
        "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617",
        {
            "assess": _MAGNITUDE, "select": {"kind": "rank_probability", "scope": "row", "epsilon": 0.07},
            "rescale": {"kind": "inverse_probability"}, "resolve": {"kind": "sum"}, "splice": {"kind": "count"},
        },
        differs=(
            "epsilon is cut to what the density leaves room for. mergekit: epsilon 0.15, rescale match_l1. Norms and "
            "biases stay whole unless `vectors` is set."
        ),
        density=0.7, scale=1.1,
        grid=({"density": 0.7, "scale": 1.1}, {"density": 0.5, "scale": 1.0}, {"density": 0.3, "scale": 1.1}),
    ),
    Preset(
        "breadcrumbs", "drop the smallest and the very largest deltas of each tensor, sum",
        "Davari and Belilovsky 2024, Model Breadcrumbs, arXiv 2312.06795",
        {"assess": _MAGNITUDE, "select": {"kind": "band", "gamma": 0.01}}, coefficient=0.3, density=0.85,
        differs="Norms and biases stay whole unless `vectors` is set.",
        grid=({"coefficient": 0.3}, {"coefficient": 0.5}, {"coefficient": 0.3, "density": 0.5}),
    ),
    Preset(
        "magmax", "at every entry the delta of largest magnitude", "Marczak et al. 2024, MagMax, arXiv 2407.06322",
        {"assess": _MAGNITUDE, "splice": {"kind": "argmax", "ties": "last"}}, scale=0.5,
        grid=_each("scale", 0.4, 0.5, 0.6, 0.8),
        differs="Exact ties go to the later expert, as in fusion_bench.",
    ),
    Preset(
        "emr_unified", "elected sign with the largest agreeing magnitude: the unified part of EMR",
        "Huang et al. 2024, EMR-Merging, arXiv 2405.17461",
        {"assess": _MAGNITUDE, "resolve": {"kind": "sum", "tie": "minus"}, "splice": {"kind": "argmax"}},
        differs="The per-task masks and rescalers, which need the task at inference, are left out.",
        grid=_each("scale", 0.5, 0.8, 1.0),
    ),
    Preset(
        "consensus", "keep entries that at least two experts need (TALL masks), sum",
        "Wang et al. 2024, Localizing Task Information (TALL masks), ICML 2024, OpenReview DWT9uiGjxT",
        {
            "assess": {"measure": "tall_ratio"},
            "select": {"kind": "threshold", "threshold": 0.4, "gate": 2, "vectors": True},
        },
        differs="One threshold for all tasks; fusion_bench compares with the base in place of zero.", coefficient=0.3,
        grid=({"coefficient": 0.3}, {"coefficient": 0.5}, {"coefficient": 1.0}), experts=(2, None),
    ),
    Preset(
        "pcb", "competition-balanced scores as soft masks, mask-weighted mean: the released code", _PCB,
        {
            "winsorise": 0.01, "winsorise_limits": "released", "assess": {"measure": "pcb"},
            "select": {"kind": "soft_threshold", "scope": "model"},
            "splice": {"kind": "mask"},
        },
        differs=(
            "The paper's form is `pcb_paper`; the three released inter terms are the option `inter`. Norms and biases "
            "stay whole and take no part in the scores' threshold unless `vectors` is set."
        ),
        density=0.1, scale=1.2,
        grid=({"density": 0.05, "scale": 1.2}, {"density": 0.1, "scale": 1.0}, {"density": 0.2, "scale": 1.4}),
    ),
    Preset(
        "pcb_paper", "softmax competition scores, top fraction, score-weighted mean: the paper's form", _PCB,
        {
            "assess": {"measure": "pcb_paper", "options": {"scope": "model", "centred": True}},
            "select": {"kind": "top_k", "scope": "model", "vectors": True},
            "splice": {"kind": "score", "score": {"measure": "pcb_paper", "options": {"scope": "model"}}},
        },
        differs="The paper's scope, the whole model, is how we read it; a re-implementation takes tensor by tensor.",
        density=0.1, grid=({"density": 0.1}, {"density": 0.2}),
    ),
    Preset(
        "fisher", "Fisher-weighted mean of the experts",
        "Matena and Raffel 2022, Fisher-Weighted Averaging, arXiv 2111.09832",
        {"splice": {"kind": "score", "score": {"measure": "fisher", "options": {"normalise": True}}}},
        differs="Written on deltas, which is the same since the weights sum to one; norms per tensor.", needs_data=True,
        grid=_each("coefficient", 1.0),
    ),
    Preset(
        "df_merge", "Fisher-weighted sum of scaled deltas, times the number of experts",
        "Lee et al. 2025, DF-Merge, arXiv 2504.18992",
        {"splice": {"kind": "score", "score": {"measure": "fisher", "options": {"at": "scaled", "floor": 1e-12}}}},
        differs="Coefficients come from the search. An expert with coefficient 0 still counts in the denominator.",
        coefficient="mean", needs_data=True, grid=({"coefficient": "mean"}, {"coefficient": 0.5}),
    ),
    Preset(
        "cki_soft", "compatibility-weighted mean, local and global view", _CKI,
        {"splice": _cki("score")},
        differs=(
            "The learned map, for which see `cki_learned`, is replaced by standardised disagreement; all tensors, not "
            "the head alone (`only: head`). More than two experts, which the release has not, are weighed by their "
            "distance from their mean. Where one of two experts left a tensor as it was, the other's is taken whole."
        ),
        grid=({}, {"settings": {"splice": _cki("score", sign=-1.0)}}),
    ),
    Preset(
        "cki_hard", "at every entry the more compatible expert", _CKI,
        {"splice": _cki("argmax")},
        differs=(
            "As `cki_soft`. Two experts have different roles: the second one gives an entry only where they agree "
            "closely, in tensors where the first one has the larger entropy. The first one gives 93 to 99 % of the "
            "entries on our models, so try both orders (`order: reversed`, in the grid)."
        ),
        grid=tuple(
            {"settings": {"splice": _cki("argmax", **options)}}
            for options in ({}, {"sign": -1.0}, {"order": "reversed"}, {"sign": -1.0, "order": "reversed"})
        ),
    ),
    Preset(
        "cki_recommender", "softmax of dual compatibilities: the recommender code, close to averaging", _CKI,
        {"splice": _cki("softmax", kind="recommender")},
        differs="The rule of the training-time forward; deployment in the release uses another one.", grid=({},),
    ),
    Preset(
        "cki_learned", "compatibility-weighted mean whose local map is trained on fit rows", _CKI,
        {"splice": _cki_learned("score")},
        differs=(
            "The map starts at the rule of `cki_soft` and sees standardised disagreement; `inputs: raw, start: xavier` "
            "is the release, whose map hardly moves. All tensors, not the head alone (`only: head`). One map is "
            "trained for all tasks. `map: diagonal` is for wide models and few rows. Where one of two experts left "
            "a tensor as it was, the other's is taken whole."
        ),
        needs_data=True, experts=(2, None), grid=({},),
    ),
    Preset(
        "cki_learned_hard", "at every entry the more compatible expert by a map trained on fit rows", _CKI,
        {"splice": _cki_learned("argmax")},
        differs=(
            "As `cki_learned` and `cki_hard`: try both orders. The map is trained at soft splicing, because no "
            "gradient passes a hard choice; the release leaves it untrained there."
        ),
        needs_data=True, experts=(2, None),
        grid=({}, {"settings": {"splice": _cki_learned("argmax", order="reversed")}}),
    ),
    Preset(
        "apl", "density and coefficient of each tensor from its causal effect on the expert's loss",
        _APL,
        {
            "allocate": {"kind": "importance", "measure": "apl", "spread": 0.4, "coefficient_power": 0.5},
            "select": {"kind": "bernoulli"}, "rescale": {"kind": "inverse_density"},
        },
        differs=(
            "No code was released: dividing importance by both norms and its map to density are ours. The parts are "
            "single tensors; `apl_paper` has the paper's product and its parts. Norms and biases stay whole."
        ),
        coefficient=0.3, density=0.5,
        needs_data=True, grid=({"coefficient": 0.3}, {"coefficient": 0.5}),
    ),
    Preset(
        "apl_paper", "density and coefficient of each block from its effect on the expert's loss, to first order",
        _APL, _apl("gradient"),
        differs=(
            "No code was released: the map from importance to density and coefficient is ours. The parts are blocks; "
            "`partition` takes model, block_kind or tensor. Norms and biases stay whole unless `vectors` is set."
        ),
        coefficient=0.3, density=0.5,
        needs_data=True, grid=({"coefficient": 0.3}, {"coefficient": 0.5}),
    ),
    Preset(
        "apl_exact", "as apl_paper, by putting each block of the expert into the base and asking again", _APL,
        _apl("activation"),
        differs=(
            "As `apl_paper`. `form: ablation` takes each block out of the expert; `average: rows` averages |change|. "
            "It asks every fit row of an expert once for each block and once more."
        ),
        coefficient=0.3, density=0.5,
        needs_data=True, grid=({"coefficient": 0.3}, {"coefficient": 0.5}),
    ),
    Preset(
        "trust_region", "task arithmetic without the one per cent of parameters where tasks interfere most",
        "Sun et al. 2025, Task Arithmetic in Trust Region, arXiv 2501.15065",
        {"assess": {"measure": "trust_region"}, "select": {"kind": "band", "scope": "model", "gamma": 0.01}},
        differs=(
            "Gradients are kept per task, which fusion_bench does not. `zero_shot` needs no data. Norms and biases "
            "stay whole unless `vectors` is set."
        ),
        coefficient=0.3,
        density=0.99,
        needs_data=True, grid=({"coefficient": 0.3},), experts=(2, None),
    ),
    Preset(
        "sce", "select by variance, weigh by energy, erase minority signs",
        "Wan et al. 2024, FuseChat (SCE), arXiv 2408.07990",
        {
            "assess": {"measure": "variance"}, "select": {"kind": "top_k", "nonzero": True},
            "resolve": {"kind": "sum", "tie": "plus"},
            "splice": {"kind": "score", "score": {"measure": "energy"}},
        },
        differs=(
            "Energies count by their ratio; mergekit treats small ones as equal. Norms and biases stay whole unless "
            "`vectors` is set."
        ),
        density=0.5,
        grid=({"density": 0.1}, {"density": 0.5}, {"density": 1.0}), experts=(2, None),
    ),
    Preset(
        "ram", "mean of shared entries, unique ones whole", _RAM,
        {
            "assess": _MAGNITUDE, "select": {"kind": "threshold", "threshold": 1e-5, "vectors": True},
            "splice": {"kind": "count"},
        },
        grid=({},),
    ),
    Preset(
        "ram_plus", "RAM with unique entries raised by the share of shared ones", _RAM,
        {
            "assess": _MAGNITUDE, "select": {"kind": "threshold", "threshold": 1e-5, "vectors": True},
            "splice": {"kind": "count", "unique_boost": 0.1, "boost_cap": 0.2},
        },
        differs="The ratio of shared to unique entries is taken per tensor.", grid=({},),
    ),
    Preset(
        "cabs", "n:m masks that do not overlap, expert after expert, sum", "Yang et al. 2025, CABS, arXiv 2503.01874",
        {"assess": _MAGNITUDE, "select": {"kind": "n_m", "block_size": 4, "exclusive": True}},
        differs=(
            "Blocks do not straddle rows. The order of the experts in the recipe is the order of the method. Norms and "
            "biases stay whole unless `vectors` is set."
        ),
        density=0.25,
        grid=({"density": 0.25}, {"density": 0.5}),
    ),
    Preset(
        "external", "keep what a file of scores calls important (LRP, any attribution), weighted mean",
        "mergekit's LRP branch; any attribution",
        {"assess": {"measure": "external"}, "select": {"kind": "top_k"}},
        differs=(
            "Scores of another shape are an error, not a silent fallback to magnitude. Norms and biases stay whole "
            "unless `vectors` is set."
        ),
        coefficient="mean",
        density=0.7,
        needs_data=True, grid=({"density": 0.7},),
    ),
    Preset(
        "magnitude_soft", "magnitude-weighted mean of the deltas", "soft splicing (CKI) with |delta| as compatibility",
        {"assess": _MAGNITUDE, "splice": {"kind": "score"}}, grid=_each("scale", 0.7, 1.0, 1.3),
    ),
    Preset(
        "magnitude_hard", "at every entry the delta of largest magnitude, ties to the first",
        "hard splicing (CKI) with |delta| as compatibility",
        {"assess": _MAGNITUDE, "splice": {"kind": "argmax"}}, grid=_each("scale", 0.5, 0.8, 1.0),
    ),
    Preset(
        "tsv_m", "low-rank deltas with directions made orthogonal between experts",
        "TSV-Merge, Gargiulo et al. 2024, arXiv 2412.00081",
        {"operator": {"name": "tsv_m"}}, grid=_each("scale", 0.6, 0.8, 1.0, 1.2, 1.5),
    ),
    Preset(
        "iso_c", "summed delta with a flat spectrum", "Iso-C, Marczak et al. 2025, arXiv 2502.04959",
        {"operator": {"name": "iso_c"}}, grid=_each("scale", 0.6, 1.0, 1.5, 2.0),
    ),
    Preset(
        "iso_cts", "flat spectrum over common and task-specific directions",
        "Iso-CTS, Marczak et al. 2025, arXiv 2502.04959",
        {"operator": {"name": "iso_cts"}}, experts=(2, None), grid=_each("scale", 0.6, 1.0, 1.5, 2.0),
    ),
    Preset(
        "wudi", "least interference with every expert's delta, taken as its own data",
        "WUDI-Merging, Cheng et al. 2025, arXiv 2503.08099",
        {"operator": {"name": "wudi"}}, grid=_each("scale", 1.0),
    ),
    Preset(
        "copa", "LoRA pairs pruned, rescaled and balanced between experts, then multiplied as sums: the paper's form",
        _COPA, {"operator": {"name": "copa"}},
        differs=(
            "The kept fraction is the release's. alpha / r is folded into B, so that adapters may differ in it. An "
            "adapter counts with scale 1 in the ranks that it lacks. Tensors without pairs are averaged."
        ),
        density=0.2, grid=({}, {"density": 0.5}, {"density": 1.0}, {"scale": 0.5}, {"scale": 1.5}),
    ),
    Preset(
        "copa_released", "as `copa`, with the release's clipped scales and its doubled strength", _COPA,
        {"operator": {"name": "copa", "options": {"strength": 4.0, "clip": 0.8}}},
        differs="The release doubles both factors, which is strength 4, and clips four fifths of the scales to one.",
        density=0.2, grid=({}, {"density": 0.5}, {"scale": 0.5}),
    ),
    Preset(
        "core", "TSV-M, Iso-C or Iso-CTS on the small cores of LoRA pairs: the result is an adapter again",
        "Core Space, 2025, arXiv 2509.17786", {"operator": {"name": "core"}},
        differs="Rules on singular values alone; the paper's entry-wise rules depend on the choice of frames.",
        grid=_each("scale", 0.6, 0.8, 1.0, 1.2, 1.5),
    ),
    Preset(
        "model_stock", "average, shrunk towards the base by the angle between the deltas",
        "Model Stock, Jang et al. 2024, arXiv 2403.19522",
        {"operator": {"name": "model_stock"}}, experts=(2, None), grid=_each("scale", 1.0),
    ),
    Preset(
        "karcher", "Karcher mean of the experts' directions times their mean norm",
        "Karcher 1977; mergekit, arXiv 2403.13257",
        {"operator": {"name": "karcher"}}, experts=(2, None), grid=_each("scale", 1.0),
    ),
    Preset(
        "multislerp", "mean direction of all experts times their mean norm",
        "mergekit, Goddard et al. 2024, arXiv 2403.13257",
        {"operator": {"name": "multislerp"}}, experts=(2, None), grid=_each("scale", 1.0),
    ),
    Preset(
        "slerp", "along the great circle between two experts, or from the base to one",
        "Shoemake 1985; mergekit, arXiv 2403.13257",
        {"operator": {"name": "slerp"}}, experts=(1, 2), grid=_each("coefficient", 0.3, 0.5, 0.7), coefficient=0.5,
    ),
    Preset(
        "nuslerp", "great circle by tensor, row or column, of deltas or weights",
        "mergekit, Goddard et al. 2024, arXiv 2403.13257",
        {"operator": {"name": "nuslerp"}}, experts=(1, 2), grid=_each("coefficient", 0.3, 0.5, 0.7), coefficient=0.5,
    ),
    Preset(
        "nearswap", "the expert's value where it is close to the base's",
        "mergekit, Goddard et al. 2024, arXiv 2403.13257",
        {"operator": {"name": "nearswap"}},
    ),
    Preset(
        "arcee_fusion", "only changes with outstanding |delta| x KL of their row",
        "mergekit, Goddard et al. 2024, arXiv 2403.13257",
        {"operator": {"name": "arcee_fusion"}},
    ),
    Preset(
        "regmean", "least-squares match of every linear layer's outputs", "RegMean, Jin et al. 2022, arXiv 2212.09849",
        {"operator": {"name": "regmean"}}, needs_data=True, grid=_each("scale", 1.0),
    ),
    Preset(
        "regmean_parts", "least-squares match of layer outputs on few prompts, experts weighted by their effect",
        "after RegMean, Jin et al. 2022, arXiv 2212.09849",
        {"operator": _regmean_parts()}, needs_data=True,
        differs="Experts count by 1 / their own change of outputs; embeddings, norms and biases are matched, too.",
        grid=({}, *({"settings": {"operator": _regmean_parts(gain=p)}} for p in (0.5, 0.75, 1.0))),
    ),
    Preset(
        "svc", "task arithmetic whose shared singular directions are shrunk", "SVC, arXiv 2602.05536",
        {"post": [{"name": "svc"}]}, grid=_each("scale", 1.0),
    ),
)  # fmt: skip
"""Methods in the order of lists, relatives beside each other."""
