"""Scores over many values of the damping, from gradients that are computed once."""

import numpy as np
import pandas as pd
import torch

from .examples import check_targets
from .gradients import fastest_gradients
from .influence import check_factors, collect, sequence_scores, sum_over_tokens
from .layers import frozen
from .tasks import causal_lm


def damping_sweep(model, factors, queries, train, dampings, relative=True, task=causal_lm, progress=True):
    """A tidy DataFrame (damping, layer, query, train, score): `influence` at every damping, by layer and for the sum.

    relative: `damping` × mean(Lambda) of each layer is added to its Lambda; else `damping` itself. layer is an ordered
    categorical, the layers of `factors` and then "all", their sum; rows run through train, query, layer and damping,
    the last slowest, so score.to_numpy().reshape(dampings, layers + 1, queries, train) has them as an array. Memory:
    P(∇L_q) for every damping and query, and 30 bytes a row. One pass over train; the division is float64.

    As the damping grows, score × damping tends to the gradient dot product ⟨∇L_q, ∇L_m⟩, where relative to the sum of
    the layers' dot products, each over its mean(Lambda). Raises ValueError for dampings that are not positive, finite
    and increasing, and as `influence` does.
    """
    dampings = check_dampings(dampings)
    check_factors(model, factors)
    check_targets(queries, task, "queries")
    check_targets(train, task, "train")
    layers = list(factors.A)
    with frozen(model):
        gradients = fastest_gradients(model, layers, task, train[0])
        asked = sum_over_tokens(gradients, queries, layers)
        directions = {name: torch.cat([_direction(factors, name, asked[name], damping, relative)
                                       for damping in dampings]) for name in layers}
        scores = collect(gradients, train, directions, sequence_scores, True, progress)
    scores = scores.unflatten(1, (len(dampings), -1)).transpose(0, 1)
    return _tidy(torch.cat([scores, scores.sum(1, keepdim=True)], 1).cpu().numpy(), dampings, [*layers, "all"])


def damping_correlations(sweep):
    """A DataFrame (layer, query, damping, other, pearson, spearman): how alike the scores at two dampings are.

    One correlation over the training examples for every layer, query and ordered pair of dampings of `damping_sweep`,
    so that an average over queries, which can hide a reversal, is taken afterwards or not at all. Raises ValueError
    for fewer than two dampings, queries or training examples, and for constant scores, whose correlation is undefined.
    """
    for column in ("damping", "query", "train"):
        if sweep[column].nunique() < 2:
            raise ValueError(f"sweep: a correlation between dampings, and how it varies over queries, needs at least "
                             f"two values of {column!r}, got {sweep[column].unique().tolist()}")
    parts = []
    for (layer, query), some in sweep.groupby(["layer", "query"], observed=True):
        table = some.pivot(index="train", columns="damping", values="score").astype(float)
        constant = table.columns[table.nunique() < 2]
        if len(constant):
            raise ValueError(f"sweep: the scores of query {query} in layer {layer!r} at damping {constant[0]:g} are "
                             f"the same for all {len(table)} training examples: their correlation is undefined")
        both = pd.concat({how: table.corr(how).rename_axis(columns="other").stack() for how in ("pearson", "spearman")},
                         axis=1)
        parts.append(both.reset_index().assign(layer=layer, query=query))
    out = pd.concat(parts, ignore_index=True)[["layer", "query", "damping", "other", "pearson", "spearman"]]
    return out.astype({"layer": sweep["layer"].dtype})


def check_dampings(dampings):
    """The values as a list of floats; raises ValueError where they are not positive, finite and increasing."""
    values = [float(value) for value in dampings]
    if not values or not all(0 < value < float("inf") for value in values):
        raise ValueError(f"dampings must be one or more positive, finite numbers, got {values}")
    if any(after <= before for before, after in zip(values, values[1:])):
        raise ValueError(f"dampings must increase, without repeats, got {values}: give sorted(set(dampings))")
    return values


def _direction(factors, name, gradient, damping, relative):
    """P(∇L_q) of one layer, [query, d_out, d_in (+1)]."""
    added = damping * factors.mean_eigenvalue(name) if relative else damping
    return factors.ihvp({name: gradient}, added)[name]


def _tidy(scores, dampings, layers):
    """scores [damping, layer, query, train] as one row each."""
    D, L, Q, M = scores.shape
    codes = np.tile(np.repeat(np.arange(L), Q * M), D)
    return pd.DataFrame({
        "damping": np.repeat(dampings, L * Q * M),
        "layer": pd.Categorical.from_codes(codes, layers, ordered=True),
        "query": np.tile(np.repeat(np.arange(Q, dtype=np.int32), M), D * L),
        "train": np.tile(np.arange(M, dtype=np.int32), D * L * Q),
        "score": scores.reshape(-1),
    })
