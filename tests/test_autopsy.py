"""The flat curve must not come back: token influence follows the story, not the query (see notebooks/A3_autopsy).

Per-token gradients of the query, printed beside the story's tokens, stand still from the query's length on. The control
makes such a curve on purpose, and the same tests that hold for ours refuse it.
"""

import pytest
import tiny
import torch

from helpers import (
    causal_lm,
    completions,
    fit_ekfac,
    influence,
    linear_layers,
    load_facts,
    load_lm,
    load_stories,
    tokenize,
)
from helpers.gradients import token_gradients
from helpers.layers import frozen

WIDTH = 38
QUERIES = tiny.stories(3, seed=1)  # 4 to 11 tokens


def sequence(n, seed):
    ids = torch.randint(6, tiny.VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))
    return ids, ids.clone()


STORIES = [sequence(n, seed) for seed, n in enumerate((26, 30, 30, 34))]  # all longer than every query


def still_from(curve, part=0.01):
    """The first position from which the curve never again takes a step of more than `part` of its range."""
    steps = curve.diff().abs() > part * (curve.max() - curve.min())
    return 1 + int(steps.nonzero().max()) if bool(steps.any()) else 0


@pytest.fixture(scope="module", params=tiny.MODELS)
def fitted(request):
    model = tiny.MODELS[request.param]()
    factors = fit_ekfac(model, tiny.batches(STORIES), linear_layers(model, tiny.LAYERS), progress=False)
    return model, factors


def curves_of(model, factors, queries, stories):
    train = tiny.batches(stories, extra_pads=WIDTH - max(len(ids) for ids, _ in stories))
    return influence(model, factors, tiny.batches(queries), train, per="token", progress=False)


@pytest.fixture(scope="module")
def curves(fitted):
    return curves_of(*fitted, QUERIES, STORIES)


def flat_curve(model, factors, query, story, summed=True):
    """The mistake on purpose: per-token gradients of the padded query, one activation vector for all positions."""
    layers = list(factors.A)
    with frozen(model):
        ours, other = (token_gradients(model, tiny.batches([x])[0], layers, causal_lm) for x in (query, story))
        P = factors.ihvp({name: other.outputs[name].transpose(1, 2) @ other.inputs[name] for name in layers})
        a = {name: x.sum(1, keepdim=True) if summed else x for name, x in ours.inputs.items()}
        curve = sum((ours.outputs[name] @ P[name][0] * a[name]).sum(2)[0] for name in layers)
    return torch.nn.functional.pad(curve, (0, WIDTH - len(curve)))


def test_a_curve_stands_still_only_where_its_story_ends(curves):
    for of_query in curves:
        for curve, (ids, _) in zip(of_query, STORIES):
            assert len(ids) - 4 <= still_from(curve) < len(ids)  # the last position predicts nothing


def test_a_curve_is_as_lively_beyond_the_query_as_before(curves):
    for of_query, (query, _) in zip(curves, QUERIES):
        for curve, (ids, _) in zip(of_query, STORIES):
            beyond, whole = curve[len(query) : len(ids) - 1], curve[: len(ids) - 1]
            assert beyond.std() > 0.1 * whole.std()
            assert len(beyond.unique()) == len(beyond)  # no two positions share a value


def test_pads_have_none_and_real_positions_have_some(curves):
    for of_query in curves:
        for curve, (ids, _) in zip(of_query, STORIES):
            assert bool((curve[: len(ids) - 1] != 0).all()) and bool((curve[len(ids) - 1 :] == 0).all())


def test_another_story_has_another_curve(curves):
    one, other = curves[:, 1], curves[:, 2]  # as long as each other
    for x, y in zip(one, other):
        assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 0.9


def test_a_change_of_the_story_beyond_the_query_changes_the_curve_there(fitted):
    model, factors = fitted
    ids, at = STORIES[3][0].clone(), 20
    assert at > max(len(query) for query, _ in QUERIES)
    ids[at] = (ids[at] + 1) % tiny.VOCABULARY
    before, after = (curves_of(model, factors, QUERIES, [story]) for story in (STORIES[3], (ids, ids.clone())))
    for x, y in zip(before[:, 0], after[:, 0]):
        assert (x - y)[at : at + 2].abs().max() > 0.01 * x.abs().max()


def test_the_query_and_the_story_are_not_exchanged(fitted):
    """I(q, m) = I(m, q), so the sums agree and only the curves tell whose tokens they belong to."""
    model, factors = fitted
    query, story = STORIES[0], STORIES[3]
    ours, swapped = (curves_of(model, factors, [x], [y])[0, 0] for x, y in ((query, story), (story, query)))
    assert tiny.close(model, ours.sum(), swapped.sum())
    assert int(ours.nonzero().max()) == len(story[0]) - 2 and int(swapped.nonzero().max()) == len(query[0]) - 2


@pytest.mark.parametrize("summed", [True, False])
def test_control_the_mistake_is_seen_as_flat(fitted, summed):
    model, factors = fitted
    for query in QUERIES:
        n = len(query[0])
        for story in STORIES:
            curve = flat_curve(model, factors, query, story, summed)
            assert still_from(curve) <= n < len(story[0]) - 4  # what the first test refuses
            assert bool((curve[n:] == curve[n]).all())         # and the second


def test_control_the_flat_curve_without_its_mistakes_is_the_right_one(fitted, curves):
    """The control fails for its mistakes, not for its arithmetic: without them it agrees with ours."""
    model, factors = fitted
    for q, query in enumerate(QUERIES):
        for m, story in enumerate(STORIES):
            assert tiny.close(model, flat_curve(model, factors, story, query, summed=False), curves[q, m])


def test_real_stories_on_the_bundled_model():
    lm = load_lm()
    texts = load_stories(limit=8)["text"]
    fact = load_facts().iloc[0]
    queries = completions([(fact.prompt, fact.completion)], lm.tokenizer)
    train = tokenize(texts, lm.tokenizer)
    factors = fit_ekfac(lm.model, train, linear_layers(lm.model, "mlp"), progress=False)
    curves = influence(lm.model, factors, queries, train, per="token", progress=False)[0]
    n = queries[0]["input_ids"].shape[1]
    for curve, length in zip(curves, train[0]["attention_mask"].sum(1).tolist()):
        assert n < length - 20 < still_from(curve) < length and bool((curve[length - 1 :] == 0).all())
        assert curve[n : length - 1].std() > 0.1 * curve[: length - 1].std()
    assert torch.corrcoef(curves[:, : n + 40]).fill_diagonal_(0).abs().max() < 0.95
