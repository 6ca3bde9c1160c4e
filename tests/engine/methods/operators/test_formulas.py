"""Tensor operators and post rules: published values on a toy, formulas, identities."""

from __future__ import annotations

import pytest
import torch
from operator_runs import TAU_1, TAU_2, TOY, grams, near, random_deltas, run, total
from torch import Tensor

from merge_search.engine.methods.operators.arcee_fusion import importance
from merge_search.engine.methods.operators.iso_cts import split_ranks
from merge_search.errors import NotMeasuredError, RecipeError
from merge_search.recipe import Group

# --- published formulas worked by hand on a 2 x 4 toy (four printed digits)


def test_iso_c_flattens_the_toy_as_published() -> None:
    near(total(run("iso_c", TOY)), [0.6610, -0.0624, 0.0116, 0.3154, -0.1289, -0.7112, 0.0408, 0.1279], atol=6e-5)


def test_tsv_m_merges_the_toy_as_published() -> None:
    near(total(run("tsv_m", TOY)), [0.7074, -0.1533, 0.0622, -0.1360, -0.2095, -0.7205, 0.0867, 0.0609], atol=6e-5)


def test_svc_on_the_sum_of_the_toy_gives_the_published_weights_and_gammas() -> None:
    combined = TAU_1 + TAU_2
    merged = run("svc", TOY, combined=combined)
    near(merged, [1.0515, -0.2325, 0.0264, 0.5366, -0.0220, -0.8039, 0.0476, 0.2006], atol=6e-5)
    u, s, vh = torch.linalg.svd(combined, full_matrices=False)
    near((u.T @ merged @ vh.T).diagonal() / s, [0.7821, 2.5891], atol=6e-5)


def test_model_stock_without_clamp_leads_away_from_the_average_of_the_toy() -> None:
    parts = run("model_stock", TOY, options={"clamp": False})
    near(total(parts), -0.099674 * (TAU_1 + TAU_2) / 2, atol=1e-6)
    near(total(run("model_stock", TOY)), torch.zeros(2, 4))  # cos -0.047 is clamped to 0


def wudi_loss(d: Tensor) -> float:
    return float(sum((((d - t) @ t.T) ** 2).sum() / (t**2).sum() for t in TOY))


def test_wudi_closed_form_without_ridge_reaches_the_published_optimum_of_loss_zero() -> None:
    assert wudi_loss(TAU_1 + TAU_2) == pytest.approx(0.151426, abs=1e-6)
    assert wudi_loss((TAU_1 + TAU_2) / 2) == pytest.approx(0.329528, abs=1e-6)
    optimum = total(run("wudi", TOY, options={"solver": "closed", "ridge": 0.0}))
    near(optimum, [0.5804, -0.2768, -0.7750, 0.4875, -0.0446, -0.8518, 0.7250, 0.9625], atol=6e-5)
    assert wudi_loss(optimum) < 1e-12


# --- WUDI


@pytest.mark.parametrize("norm", ["squared", "plain"])
def test_wudi_steps_are_those_of_adam_on_its_loss(norm: str) -> None:
    deltas = random_deltas(3, (5, 8))
    d = total(deltas).double().requires_grad_()
    optimiser = torch.optim.Adam([d], lr=1e-3)
    power = 2 if norm == "squared" else 1
    for _ in range(20):
        optimiser.zero_grad()
        loss = total([(((d - t) @ t.T) ** 2).sum() / t.norm() ** power for t in (x.double() for x in deltas)])
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    found = total(run("wudi", deltas, options={"steps": 20, "lr": 1e-3, "norm": norm}))
    near(found, d.detach(), atol=1e-7)


def test_wudi_with_a_relative_step_scales_with_the_deltas() -> None:
    deltas = random_deltas(2, (5, 8))
    options = {"steps": 5, "lr": 1e-2, "relative_lr": True}
    small, large = (total(run("wudi", [c * d for d in deltas], options=options)) for c in (100.0, 400.0))
    near(large, 4 * small, atol=1e-4)


def test_wudi_ridge_leads_from_the_optimum_to_the_sum() -> None:
    losses = [wudi_loss(total(run("wudi", TOY, options={"solver": "closed", "ridge": r}))) for r in (1e-3, 0.1, 10.0)]
    assert losses == sorted(losses)
    near(total(run("wudi", TOY, options={"solver": "closed", "ridge": 1e9})), TAU_1 + TAU_2)


# --- identities


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 4, 6), (40, 33)])
def test_tsv_m_of_one_expert_is_that_expert(shape: tuple[int, ...]) -> None:
    (delta,) = random_deltas(1, shape)
    near(run("tsv_m", [delta])[0], delta)


def test_an_expert_alone_on_a_tensor_keeps_its_delta_under_tsv_m_and_model_stock() -> None:
    delta, zero = random_deltas(1, (6, 6))[0], torch.zeros(6, 6)
    for name in ("tsv_m", "model_stock"):
        parts = run(name, [zero, delta])
        near(parts[1], delta)
        assert not parts[0].any()


def test_tsv_m_makes_the_frames_of_the_experts_orthogonal() -> None:
    parts = run("tsv_m", random_deltas(3, (12, 15)))
    assert [int(torch.linalg.matrix_rank(p, rtol=1e-4)) for p in parts] == [4, 4, 4]
    for i in range(3):
        for j in range(i):
            near(parts[i].T @ parts[j], torch.zeros(15, 15))
            near(parts[i] @ parts[j].T, torch.zeros(12, 12))


def test_tsv_m_keeps_the_leading_singular_values_of_every_expert() -> None:
    deltas = random_deltas(2, (8, 11))
    for part, delta in zip(run("tsv_m", deltas), deltas, strict=True):
        near(torch.linalg.svdvals(part)[:4], torch.linalg.svdvals(delta)[:4])


def test_tsv_m_keeps_the_share_of_ranks_that_the_option_names_and_at_least_one() -> None:
    """0.58 x 50 is 29, and 28.999999999999996 in floating point."""
    (delta,) = random_deltas(1, (50, 50))
    for share, rank in ((0.58, 29), (1e-3, 1)):
        (part,) = run("tsv_m", [delta], options={"rank_share": share})
        near(torch.linalg.svdvals(part)[:rank], torch.linalg.svdvals(delta)[:rank])
        assert float(torch.linalg.svdvals(part)[rank]) < 1e-5


def test_tsv_m_of_identical_experts_does_not_invent_directions() -> None:
    (delta,) = random_deltas(1, (6, 9))
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    near(total(run("tsv_m", [delta, delta])), (u[:, :3] * s[:3]) @ vh[:3])


def test_iso_with_power_one_is_task_arithmetic_and_with_power_zero_has_a_flat_spectrum() -> None:
    deltas = random_deltas(3, (9, 6))
    for part, delta in zip(run("iso_c", deltas, options={"power": 1.0}), deltas, strict=True):
        assert torch.equal(part, delta)
    near(run("iso_spectrum", deltas, combined=deltas[0], options={"power": 1.0}), deltas[0])
    values = torch.linalg.svdvals(total(deltas))
    for power in (0.0, 0.5):
        found = torch.linalg.svdvals(total(run("iso_c", deltas, options={"power": power})))
        near(found, values**power * values.sum() / (values**power).sum())
        near(found, torch.linalg.svdvals(run("iso_spectrum", deltas, combined=total(deltas), options={"power": power})))


def test_iso_does_not_lift_noise_directions_of_low_rank_deltas() -> None:
    a, b = torch.randn(2, 10, 2, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(total(run("iso_c", [a @ b.T, a @ b.T])))
    near(values[:2] / values[0], [1.0, 1.0])
    assert float(values[2]) < 1e-5 * float(values[0])


def test_iso_cts_is_isotropic_and_its_parts_share_what_the_released_rule_gives() -> None:
    deltas = [d.double() for d in random_deltas(2, (10, 12))]
    n_common, n_own = split_ranks(10, 2, 0.8)
    assert (n_common, n_own) == (8, 1)
    u, s, vh = torch.linalg.svd(total(deltas), full_matrices=False)
    lefts, values, rights = [u[:, :8]], [s[:8]], [vh[:8]]
    for d in deltas:
        own = torch.linalg.svd(d - u[:, :8] @ u[:, :8].T @ d, full_matrices=False)
        lefts.append(own[0][:, :1])
        values.append(own[1][:1])
        rights.append(own[2][:1])
    pu, _, qu = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False)
    pv, _, qv = torch.linalg.svd(torch.cat(rights, 0), full_matrices=False)
    merged = total(run("iso_cts", [d.float() for d in deltas]))
    near(merged, torch.cat(values).mean() * (pu @ qu) @ (pv @ qv))
    near(torch.linalg.svdvals(merged), torch.cat(values).mean().expand(10))


@pytest.mark.parametrize(("n", "n_experts", "common"), [(10, 3, 0.8), (5, 3, 0.0), (2, 4, 0.5), (64, 8, 1.0)])
def test_iso_cts_ranks_add_up(n: int, n_experts: int, common: float) -> None:
    shared, own = split_ranks(n, n_experts, common)
    assert shared >= 0
    assert own >= 0
    assert shared + own * n_experts == n


def test_iso_cts_ranks_of_the_experts_are_rounded() -> None:
    assert split_ranks(20, 3, 0.15) == (2, 6)  # 17 / 3
    assert split_ranks(8, 3, 0.0) == (2, 2)  # 8 / 3, of which there are not three times three


def test_iso_cts_takes_the_mean_over_directions_that_are_no_noise() -> None:
    one, two = torch.zeros(6, 6), torch.zeros(6, 6)
    one[0, 0], two[1, 1] = 2.0, 4.0
    near(total(run("iso_cts", [one, two], options={"common": 0.0})), torch.diag(torch.tensor([3.0, 3.0, 0, 0, 0, 0])))
    a, b = random_deltas(2, (6,))
    same = torch.outer(a, b)  # nothing of an expert is its own
    near(total(run("iso_cts", [same, 2 * same], options={"common": 0.5})), 3 * same, atol=1e-5)


def test_iso_parts_sum_to_a_flat_spectrum_with_coefficients_one_and_follow_coefficients_otherwise() -> None:
    deltas = random_deltas(2, (6, 8))
    parts = run("iso_c", deltas)
    u, s, vh = torch.linalg.svd(total(deltas), full_matrices=False)
    near(total(parts), s.mean() * u @ vh)
    near(parts[0], u @ torch.diag(s.mean() / s) @ u.T @ deltas[0])


def test_regmean_with_equal_gram_matrices_is_the_average() -> None:
    deltas = random_deltas(3, (5, 7))
    parts = run("regmean", deltas, statistic=grams(3, 7, equal=True))
    for part, delta in zip(parts, deltas, strict=True):
        near(part, delta / 3)


def test_regmean_solves_the_least_squares_problem_on_the_experts_outputs() -> None:
    base, deltas, statistic = (
        torch.randn(5, 7, generator=torch.Generator().manual_seed(9)),
        random_deltas(2, (5, 7)),
        grams(2, 7),
    )
    merged = (
        base + total(run("regmean", deltas, base, statistic=statistic, options={"alpha": 1.0, "ridge": 0.0}))
    ).double()
    residual = total(
        [(merged - (base + d).double()) @ statistic("gram", f"e{i}").double() for i, d in enumerate(deltas)]
    )
    near(residual, torch.zeros(5, 7), atol=1e-6)  # the gradient vanishes


def test_regmean_shrinks_the_off_diagonal_of_every_gram_matrix_by_alpha() -> None:
    """alpha 1/2: total [[3, 1/2], [1/2, 2]] with determinant 23/4, and (1, 0) G_0 = (2, 1/2)."""
    seen = {"e0": torch.tensor([[2.0, 1.0], [1.0, 1.0]]), "e1": torch.eye(2)}
    deltas = [torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), torch.zeros(2, 2)]
    wanted = {0.0: [2 / 3, 0.0], 0.5: [15 / 23, 2 / 23], 1.0: [3 / 5, 1 / 5]}
    for alpha, expected in wanted.items():
        options = {"alpha": alpha, "ridge": 0.0}
        found = total(run("regmean", deltas, statistic=lambda kind, expert: seen[expert], options=options))
        near(found, [expected, [-2 * x for x in expected]])


def test_regmean_averages_inputs_that_were_never_seen() -> None:
    deltas = random_deltas(2, (4, 3))
    seen = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    parts = run("regmean", deltas, statistic=lambda kind, expert: seen if expert == "e0" else 3 * seen)
    near(total(parts)[:, 2], (deltas[0] + deltas[1])[:, 2] / 2)
    near(total(parts)[:, 0], 0.25 * deltas[0][:, 0] + 0.75 * deltas[1][:, 0])


def test_regmean_refuses_gram_matrices_of_some_experts_alone_whatever_the_tensor_is() -> None:
    def of_the_first(kind: str, expert: str) -> Tensor:
        if expert == "e1":
            raise NotMeasuredError("never measured")
        return torch.eye(3)

    with pytest.raises(RecipeError, match="it was not measured for e1"):
        run("regmean", random_deltas(2, (4, 3)), statistic=of_the_first, group=Group("w", None, "embedding"))


def test_regmean_averages_a_matrix_whose_inputs_were_all_zero() -> None:
    deltas = random_deltas(2, (4, 3))
    for part, delta in zip(
        run("regmean", deltas, statistic=lambda kind, expert: torch.zeros(3, 3)), deltas, strict=True
    ):
        near(part, delta / 2)


def test_regmean_lets_an_unchanged_expert_vote_for_the_base() -> None:
    deltas = [random_deltas(1, (4, 3))[0], torch.zeros(4, 3)]
    near(run("regmean", deltas, statistic=lambda kind, expert: torch.eye(3))[0], deltas[0] / 2)


def test_regmean_names_the_experts_without_gram_matrices() -> None:
    deltas = random_deltas(2, (4, 3))
    with pytest.raises(RecipeError, match=r"'gram' of every expert for tensor 'w'.*measured for e0, e1"):
        run("regmean", deltas)
    with pytest.raises(RecipeError, match=r"must have shape \(3, 3\), expert 'e0' has \(4, 4\)"):
        run("regmean", deltas, statistic=lambda kind, expert: torch.eye(4))
    embedding = run("regmean", deltas, group=Group("w", None, "embedding"))
    near(embedding[0], deltas[0] / 2)


def test_svc_cancels_a_factor_on_the_combined_delta_above_its_floor() -> None:
    combined = total([0.5 * torch.eye(4), 0.5 * torch.eye(4)])
    same = [0.5 * torch.eye(4)] * 2
    near(run("svc", same, combined=combined), 0.5 * torch.eye(4))
    near(run("svc", same, combined=3 * combined), 0.5 * torch.eye(4))


def test_svc_gamma_obeys_its_cap() -> None:
    combined = TAU_1 + TAU_2
    capped = run("svc", TOY, combined=combined, options={"cap": 1.0})
    u, s, vh = torch.linalg.svd(combined, full_matrices=False)
    near((u.T @ capped @ vh.T).diagonal() / s, [0.7821, 1.0], atol=6e-5)


def test_norm_match_gives_the_mean_length_of_the_deltas_that_are_not_zero() -> None:
    deltas = [3.0 * torch.ones(4), torch.zeros(4), 5.0 * torch.ones(4)]
    near(run("norm_match", deltas, combined=torch.tensor([2.0, 0.0, 0.0, 0.0])), [8.0, 0.0, 0.0, 0.0])
    assert not run("norm_match", deltas, combined=torch.zeros(4)).any()


def test_model_stock_of_identical_experts_is_that_expert_and_of_orthogonal_ones_the_base() -> None:
    delta = random_deltas(1, (4, 5))[0]
    near(total(run("model_stock", [delta] * 3)), delta)
    near(total(run("model_stock", [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])), [0.0, 0.0])


def test_model_stock_follows_its_formula_for_a_known_angle_and_pools_over_a_block() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    near(total(run("model_stock", [a, b])), (2 * 0.6 / 1.6) * (a + b) / 2)
    other = (torch.tensor([2.0]), torch.tensor([0.0]))  # pooled: <a,b> = 0.6, lengths sqrt(5) and 1
    cos = 0.6 / 5**0.5
    pooled = run("model_stock", [a, b], options={"scope": "layer"}, siblings=lambda: [(a, b), other])
    near(total(pooled), (2 * cos / (1 + cos)) * (a + b) / 2)
    with pytest.raises(RecipeError, match="use scope 'tensor'"):
        run("model_stock", [a, b], options={"scope": "layer"})


def test_model_stock_counts_the_experts_that_changed_a_tensor_or_all_of_them() -> None:
    """By hand for cos 0.6: t = 1.2 / 1.6 for two; with a third one that changed nothing cos is 0.2, t = 0.6 / 1.4."""
    a, b, nothing = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8]), torch.zeros(2)
    near(total(run("model_stock", [a, b, nothing])), 1.2 / 1.6 * (a + b) / 2)
    near(total(run("model_stock", [a, b, nothing], options={"count": "all"})), 0.6 / 1.4 * (a + b) / 3)
    rows = [torch.stack([t, s]) for t, s in ((a, a), (b, nothing), (nothing, nothing))]
    by_row = {"scope": "row"}
    near(total(run("model_stock", rows, options=by_row)), torch.stack([1.2 / 1.6 * (a + b) / 2, a]))
    near(
        total(run("model_stock", rows, options={**by_row, "count": "all"})),
        torch.stack([0.6 / 1.4 * (a + b) / 3, torch.zeros(2)]),
    )


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_model_stock_without_clamp_is_the_base_where_the_deltas_cancel(scope: str) -> None:
    """cos is -1 of two and -1/2 of three."""
    thirds = [torch.tensor([v]) for v in ([1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [-1.0, 0.0, 1.0])]
    for deltas in (thirds, [thirds[0], -thirds[0]]):
        parts = run("model_stock", deltas, options={"scope": scope, "clamp": False})
        assert all(float(p.abs().max()) < 1e-6 for p in parts)


def test_nearswap_clips_deltas() -> None:
    delta = torch.tensor([0.5e-3, -2e-3, 0.0, 1e-3])
    near(run("nearswap", [delta])[0], [0.5e-3, -1e-3, 0.0, 1e-3], atol=1e-9)
    tiny = torch.tensor([5e-8, 2e-6])  # below 1e-6 every entry counts as large as that
    near(run("nearswap", [tiny], options={"t": 1e-7})[0], [5e-9, 1e-7], atol=1e-12)


def test_arcee_fusion_weighs_a_change_by_the_divergence_of_its_row() -> None:
    """By hand: the softmax of (0, ln 2) is (1/3, 2/3), that of (ln 2, ln 2) halves: ln(3/2) / 2 + ln(3/4) / 2."""
    base, delta = torch.tensor([[0.0, 0.693147]]), torch.tensor([[0.693147, 0.0]])
    near(importance(base, delta), [0.693147 * 0.0588915, 0.0])


def test_arcee_fusion_keeps_only_outstanding_changes() -> None:
    base = torch.zeros(4, 8)
    delta = 1e-3 * torch.ones(4, 8)
    delta[2, 3] = 1.0
    part = run("arcee_fusion", [delta], base)[0]
    wanted = torch.zeros(4, 8)
    wanted[2, 3] = 1.0
    # a row moved by a constant has the same softmax: its importance is zero; the changed row stands out as a whole
    near(part[[0, 1, 3]], wanted[[0, 1, 3]], atol=1.1e-3)
    assert float(part[2, 3]) == 1.0
    assert not run("arcee_fusion", [delta], base, options={"multiple": 1e9})[0].any()
