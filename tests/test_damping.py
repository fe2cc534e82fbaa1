"""The damping sweep against one call of `influence` at a time, its limit, and correlations that cannot be taken."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import tiny
import torch

from helpers import damping_sweep, fit_ekfac, influence, linear_layers
from helpers.damping import damping_correlations
from helpers.influence import sequence_gradients

QUIET = {"progress": False}
DAMPINGS = [1e-9, 1e-6, 1e-3, 1e-1, 10.0]
EXAMPLES, QUERIES = tiny.stories(9, prompt=1), tiny.stories(3, seed=1, prompt=2)
TRAIN, ASKED = tiny.batches(EXAMPLES), tiny.batches(QUERIES, 2)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def fitted(request):
    model = tiny.MODELS[request.param]()
    factors = fit_ekfac(model, TRAIN, linear_layers(model, tiny.LAYERS), **QUIET)
    return model, factors


def as_array(sweep):
    """[damping, layer, query, train], by the values in the columns and not by the order of the rows."""
    index = ["damping", "layer", "query", "train"]
    shape = [sweep[name].nunique() for name in index]
    return torch.tensor(sweep.sort_values(index)["score"].to_numpy().reshape(shape))


@pytest.mark.parametrize("relative", [True, False])
def test_the_sweep_is_influence_at_every_damping(fitted, relative):
    model, factors = fitted
    sweep = damping_sweep(model, factors, ASKED, TRAIN, DAMPINGS, relative, **QUIET)
    scores, layers = as_array(sweep), list(factors.A)
    assert list(sweep.columns) == ["damping", "layer", "query", "train", "score"]
    assert list(sweep["layer"].cat.categories) == [*layers, "all"] and not sweep.isna().any().any()
    assert torch.equal(torch.tensor(sweep["score"].to_numpy().reshape(scores.shape)), scores)  # as promised
    for number, damping in enumerate(DAMPINGS):
        for layer, name in enumerate(layers):
            alone = dataclasses.replace(factors, A={name: factors.A[name]}, fingerprint="")
            added = damping * float(factors.Lambda[name].mean()) if relative else damping
            expected = influence(model, alone, ASKED, TRAIN, damping=added, **QUIET)
            assert torch.allclose(scores[number, layer], expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    if not relative:
        expected = influence(model, factors, ASKED, TRAIN, damping=DAMPINGS[2], **QUIET)
        assert torch.allclose(scores[2, -1], expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    assert torch.allclose(scores[:, :-1].sum(1), scores[:, -1], rtol=1e-10)


def test_the_usual_damping_is_a_tenth_of_the_mean(fitted):
    model, factors = fitted
    sweep = as_array(damping_sweep(model, factors, ASKED, TRAIN, [0.1], **QUIET))
    usual = influence(model, factors, ASKED, TRAIN, per="layer", **QUIET)
    assert torch.allclose(sweep[0, :-1], usual, rtol=1e-10, atol=1e-12 * float(usual.abs().max()))


def test_large_dampings_end_at_the_gradient_dot_product(fitted):
    """score × damping → Σ over layers of ⟨∇L_q, ∇L_m⟩, relative: each layer's over its mean eigenvalue."""
    model, factors = fitted
    G, H = (sequence_gradients(model, batches, list(factors.A)) for batches in (ASKED, TRAIN))
    dot = {name: torch.einsum("qoi,moi->qm", G[name], H[name]) for name in factors.A}
    ends = {True: sum(dot[name] / factors.Lambda[name].mean() for name in dot), False: sum(dot.values())}
    largest = max(float(value.max() / value.mean()) for value in factors.Lambda.values())
    highest = max(float(value.max()) for value in factors.Lambda.values())
    for relative, scale in ((True, largest), (False, highest)):
        values = [scale * 10.0**power for power in (2, 4, 6, 8)]
        scores = as_array(damping_sweep(model, factors, ASKED, TRAIN, values, relative, **QUIET))[:, -1]
        errors = [float((value * got - ends[relative]).norm() / ends[relative].norm())
                  for value, got in zip(values, scores)]
        assert errors[-1] < 1e-7 and all(after < 0.02 * before for before, after in zip(errors, errors[1:]))
        control = ends[not relative]  # unweighted where it should be weighted: another ranking, whatever the scale
        got = values[-1] * scores[-1]
        assert float((got / got.norm() - control / control.norm()).norm()) > 1e-2


def test_correlations_are_scipys_per_query_and_layer(fitted):
    model, factors = fitted
    sweep = damping_sweep(model, factors, ASKED, TRAIN, DAMPINGS, **QUIET)
    table, scores = damping_correlations(sweep), as_array(sweep)
    assert list(table.columns) == ["layer", "query", "damping", "other", "pearson", "spearman"]
    assert len(table) == (len(factors.A) + 1) * len(QUERIES) * len(DAMPINGS) ** 2 and not table.isna().any().any()
    for row in table.sample(40, random_state=0).itertuples():
        layer = list(sweep["layer"].cat.categories).index(row.layer)
        x, y = (scores[DAMPINGS.index(value), layer, row.query].numpy() for value in (row.damping, row.other))
        assert np.isclose(row.pearson, scipy.stats.pearsonr(x, y)[0], rtol=1e-9)
        assert np.isclose(row.spearman, scipy.stats.spearmanr(x, y)[0], rtol=1e-9)
    kept = (sweep["query"] != 1) | (sweep["damping"] != 10)
    flipped = sweep.assign(score=sweep["score"].where(kept, -sweep["score"]))
    one = damping_correlations(flipped).query("damping == 10 and other == 0.1 and layer == 'all'").set_index("query")
    assert one["pearson"][1] < 0 < one["pearson"][[0, 2]].min()  # an average would hide the query that turned over


@pytest.mark.parametrize("dampings", [[], [0.0, 1.0], [-1.0], [1.0, 0.1], [0.1, 0.1], [float("nan")], [float("inf")]])
def test_dampings_that_are_none(fitted, dampings):
    model, factors = fitted
    with pytest.raises(ValueError, match="dampings must"):
        damping_sweep(model, factors, ASKED, TRAIN, dampings, **QUIET)


def test_correlations_that_are_undefined(fitted):
    model, factors = fitted
    sweep = damping_sweep(model, factors, ASKED, TRAIN, DAMPINGS, **QUIET)
    for column, keep in (("query", 1), ("train", 1), ("damping", 0.1)):
        with pytest.raises(ValueError, match=f"needs at least two values of '{column}'"):
            damping_correlations(sweep[sweep[column] == keep])
    same = sweep.assign(score=sweep["score"].where((sweep["query"] != 2) | (sweep["damping"] != 1e-3), 7.0))
    with pytest.raises(ValueError, match="of query 2 in layer '.*' at damping 0.001 are the same for all 9 training"):
        damping_correlations(same)
    for queries, train, said in (([], TRAIN, "queries: got no batches"), (ASKED, [], "train: got no batches")):
        with pytest.raises(ValueError, match=said):
            damping_sweep(model, factors, queries, train, DAMPINGS, **QUIET)


def test_float32_divides_in_float64():
    """At a damping below float32's resolution of Lambda the single-precision sweep still follows the double one."""
    model = tiny.gpt2()
    factors = fit_ekfac(model, TRAIN, linear_layers(model, "mlp"), labels="true", **QUIET)
    double = as_array(damping_sweep(model, factors, ASKED, TRAIN, [1e-3, 1e-1], **QUIET))
    single = damping_sweep(model.float(), factors, ASKED, TRAIN, [1e-3, 1e-1], **QUIET)
    assert single["score"].dtype == np.float32 and isinstance(single["layer"].dtype, pd.CategoricalDtype)
    assert torch.allclose(as_array(single).double(), double, rtol=1e-3, atol=1e-4 * float(double.abs().max()))
