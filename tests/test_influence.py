"""Scores against autograd and finite differences: sums, invariance, alignment, sign; with controls that must fail."""

import dataclasses

import pytest
import tiny
import torch
from transformers import GPT2LMHeadModel

from helpers import causal_lm, fit_ekfac, influence, linear_layers, self_influence, top_k
from helpers.gradients import fast_paths, token_gradients
from helpers.influence import sequence_gradients
from helpers.layers import frozen

QUIET = {"progress": False}
EXAMPLES = tiny.stories(9, prompt=1)
QUERIES = tiny.stories(3, seed=1, prompt=2)


@pytest.fixture(scope="module", params=tiny.MODELS)
def fitted(request):
    model = tiny.MODELS[request.param]()
    layers = linear_layers(model, tiny.LAYERS)
    return model, layers, fit_ekfac(model, tiny.batches(EXAMPLES), layers, **QUIET)


def autograd_gradients(model, layers, examples):
    losses = [tiny.loss_of(model, *example) for example in examples]
    return {name: torch.stack([tiny.weight_gradient(model, name, loss) for loss in losses]) for name in layers}


def test_token_gradients_sum_to_the_weight_gradient(fitted):
    model, layers, _ = fitted
    ours = sequence_gradients(model, tiny.batches(EXAMPLES), layers)
    expected = autograd_gradients(model, layers, EXAMPLES)
    for name in layers:
        assert tiny.close(model, ours[name], expected[name])


def test_scores_are_their_definition_and_sum_over_tokens_and_layers(fitted):
    model, layers, factors = fitted
    train, queries = autograd_gradients(model, layers, EXAMPLES), autograd_gradients(model, layers, QUERIES)
    P = factors.ihvp(queries)
    by_layer = torch.stack([torch.einsum("qoi,moi->qm", P[name], train[name]) for name in layers])
    score = lambda per: influence(model, factors, tiny.batches(QUERIES, 2), tiny.batches(EXAMPLES, 4, 2), per=per,
                                  **QUIET)
    close = lambda x, y: tiny.close(model, x, y)
    assert close(score("sequence"), by_layer.sum(0))
    assert close(score("layer"), by_layer)
    assert close(score("token").sum(-1), by_layer.sum(0))
    assert close(score(("layer", "token")).sum(-1), by_layer)
    assert score("token").shape == (3, 9, max(len(ids) for ids, _ in EXAMPLES) + 2)
    for m, (ids, _) in enumerate(EXAMPLES):
        assert bool((score("token")[:, m, len(ids):] == 0).all())


def test_rank_is_a_truncated_svd(fitted):
    model, layers, factors = fitted
    queries, train = tiny.batches(QUERIES), tiny.batches(EXAMPLES)
    P, G = factors.ihvp(sequence_gradients(model, queries, layers)), sequence_gradients(model, train, layers)
    expected = 0
    for name in layers:
        U, sizes, W = torch.linalg.svd(P[name], full_matrices=False)
        expected = expected + torch.einsum("qoi,moi->qm", (U[..., :2] * sizes[:, None, :2]) @ W[:, :2], G[name])
    for per in ("sequence", "token"):
        got = influence(model, factors, queries, train, rank=2, per=per, **QUIET)
        assert tiny.close(model, got if per == "sequence" else got.sum(-1), expected)
    full = influence(model, factors, queries, train, rank=100, **QUIET)
    assert tiny.close(model, full, influence(model, factors, queries, train, **QUIET))


def test_scores_do_not_depend_on_batches_pads_or_order(fitted):
    model, _, factors = fitted
    reference = influence(model, factors, tiny.batches(QUERIES, 1), tiny.batches(EXAMPLES, 1), **QUIET)
    for size, pads in ((2, 0), (9, 4)):
        got = influence(model, factors, tiny.batches(QUERIES, size, pads), tiny.batches(EXAMPLES, size, pads), **QUIET)
        assert tiny.close(model, got, reference)
    turned = influence(model, factors, tiny.batches(QUERIES), tiny.batches(EXAMPLES[::-1]), **QUIET).flip(1)
    assert tiny.close(model, turned, reference)


def test_left_pads_do_not_count_where_positions_are_relative():
    model = tiny.llama()
    layers = linear_layers(model, tiny.LAYERS)
    right, left = (sequence_gradients(model, tiny.batches(EXAMPLES, 9, left=left), layers) for left in (False, True))
    for name in layers:
        assert torch.allclose(right[name], left[name], rtol=1e-4, atol=1e-4)  # Llama's rotary angles are float32
    sampled = [fit_ekfac(model, tiny.batches(EXAMPLES, 9, left=left), layers, **QUIET) for left in (False, True)]
    for name in layers:
        assert torch.allclose(sampled[0].Lambda[name], sampled[1].Lambda[name], rtol=1e-3, atol=1e-4)


def test_loss_is_the_hugging_face_loss_times_targets(fitted):
    model, layers, _ = fitted
    batch = tiny.batches(EXAMPLES, 9)[0]
    targets = int((batch["labels"][:, 1:] != -100).sum())
    logits, labels = causal_lm(model, batch)
    ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert torch.allclose(ours, model(**batch).loss.double() * targets, rtol=1e-6)  # transformers' loss is float32
    twice = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert not torch.allclose(twice, ours, rtol=1e-2)  # control: a second shift
    expected = sum(tiny.loss_of(model, *example) for example in EXAMPLES)
    assert tiny.close(model, ours, expected)


def test_a_step_along_P_lowers_the_query_loss_by_the_score(fitted):
    """θ ← θ − η P(∇L_m) changes L_q by −η I(q, m) to first order: central differences in float64."""
    model, layers, factors = fitted
    scores = influence(model, factors, tiny.batches(QUERIES), tiny.batches(EXAMPLES), **QUIET)
    direction = factors.ihvp(sequence_gradients(model, tiny.batches(EXAMPLES[4:5]), layers))
    slopes = torch.tensor([finite_difference(model, direction, query) for query in QUERIES], dtype=torch.float64)
    rounding = 1e-7 if isinstance(model, GPT2LMHeadModel) else 1e-3  # the others compute parts of themselves in float32
    assert torch.allclose(slopes, -scores[:, 4], rtol=rounding)
    assert not torch.allclose(slopes, scores[:, 4], rtol=1e-1)  # control: the sign reversed


def finite_difference(model, direction, query, step=2e-5):
    """dL_q/dη along θ − η direction, by the five-point stencil."""
    losses = []
    for eta in (2 * step, step, -step, -2 * step):
        with torch.no_grad():
            before = {}
            for name, V in direction.items():
                module = model.get_submodule(name)
                before[name] = (module.weight.clone(), None if module.bias is None else module.bias.clone())
                d_in = V.shape[2] - (module.bias is not None)
                weight = V[0, :, :d_in]
                module.weight -= eta * (weight.T if type(module).__name__ == "Conv1D" else weight)
                if module.bias is not None:
                    module.bias -= eta * V[0, :, -1]
            losses.append(float(tiny.loss_of(model, *query)))
            for name, (weight, bias) in before.items():
                model.get_submodule(name).weight.copy_(weight)
                if bias is not None:
                    model.get_submodule(name).bias.copy_(bias)
    return (-losses[0] + 8 * losses[1] - 8 * losses[2] + losses[3]) / (12 * step)


def test_gradient_dot_product_and_kfac_through_replace(fitted):
    model, layers, factors = fitted
    queries, train = tiny.batches(QUERIES), tiny.batches(EXAMPLES)
    zero = dataclasses.replace(factors, Lambda={name: torch.zeros_like(x) for name, x in factors.Lambda.items()})
    G, Q = (autograd_gradients(model, layers, x) for x in (EXAMPLES, QUERIES))
    dot = sum(torch.einsum("qoi,moi->qm", Q[name], G[name]) for name in layers)
    assert tiny.close(model, influence(model, zero, queries, train, damping=1.0, **QUIET), dot)
    with pytest.raises(ValueError, match="zero eigenvalues"):
        influence(model, zero, queries, train, damping=0.0, **QUIET)


def test_self_influence_is_the_diagonal(fitted):
    model, _, factors = fitted
    train = tiny.batches(EXAMPLES, 4)
    full = influence(model, factors, train, train, **QUIET)
    assert tiny.close(model, self_influence(model, factors, train, **QUIET), full.diag())
    assert tiny.close(model, full, full.T)


def test_top_k():
    scores = torch.tensor([[0.5, -2.0, 3.0, 1.0], [0.0, 1.0, -1.0, 2.0]])
    table = top_k(scores, 2)
    assert table.train.tolist() == [2, 3, 1, 0, 3, 1, 2, 0]
    assert table["rank"].tolist() == [1, 2, -1, -2] * 2
    assert table.score.tolist()[:2] == [3.0, 1.0]


# The fast output head.

@pytest.mark.parametrize("change", ["plain", "bias", "scaled", "soft-cap"])
def test_the_fast_head_is_taken_only_where_it_is_right(change):
    model = tiny.llama()
    head = model.get_output_embeddings()
    if change == "bias":
        head.bias = torch.nn.Parameter(torch.randn(tiny.VOCABULARY, dtype=torch.float64))
    if change in ("scaled", "soft-cap"):
        bend = {"scaled": lambda z: 0.5 * z, "soft-cap": lambda z: 3 * torch.tanh(z / 3)}[change]
        head.register_forward_hook(lambda module, inputs, output: bend(output))
    layers, train = linear_layers(model, "mlp"), tiny.batches(EXAMPLES)
    with frozen(model):
        assert ("head" in fast_paths(model, train[0], layers, causal_lm)) == (change in ("plain", "bias"))
    general = lambda model, batch: causal_lm(model, batch)  # not causal_lm itself, so autograd all the way
    fast, slow = (fit_ekfac(model, train, layers, task=task, **QUIET) for task in (causal_lm, general))
    for name in layers:
        assert torch.allclose(fast.Lambda[name], slow.Lambda[name], rtol=1e-10)
    for per in ("sequence", "token"):
        one, other = (influence(model, fast, tiny.batches(QUERIES), train, task=task, per=per, **QUIET)
                      for task in (causal_lm, general))
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def test_a_pattern_that_matches_the_head_goes_the_general_way():
    model = tiny.llama()
    layers = linear_layers(model, "lm_head|mlp")
    with frozen(model):
        assert "head" not in fast_paths(model, tiny.batches(EXAMPLES)[0], layers, causal_lm)
    ours = sequence_gradients(model, tiny.batches(EXAMPLES), layers)
    expected = autograd_gradients(model, layers, EXAMPLES)
    assert torch.allclose(ours["lm_head"], expected["lm_head"], rtol=1e-10, atol=1e-12)


def test_float32_agrees_with_float64_and_sums_within_rounding():
    model = tiny.gpt_neo()
    layers, queries, train = linear_layers(model, tiny.LAYERS), tiny.batches(QUERIES), tiny.batches(EXAMPLES)
    factors = fit_ekfac(model, train, layers, labels="true", **QUIET)
    double = influence(model, factors, queries, train, **QUIET)
    single = dataclasses.replace(factors, fingerprint="")
    tokens = influence(model.float(), single, queries, train, per="token", **QUIET)
    assert tokens.dtype == torch.float32
    whole = influence(model, single, queries, train, **QUIET)
    assert float((tokens.sum(-1) - whole).norm() / whole.norm()) < 1e-5
    assert float((whole.double() - double).norm() / double.norm()) < 1e-5


def test_the_models_state_comes_back_also_after_an_exception(fitted):
    model, layers, factors = fitted
    model.train()
    first = next(model.parameters())
    first.requires_grad_(False)
    labels = tiny.batches(EXAMPLES)[0]["labels"]
    bad = [{**tiny.batches(EXAMPLES)[0], "labels": labels.masked_fill(labels != -100, 10_000)}]
    influence(model, factors, tiny.batches(QUERIES), tiny.batches(EXAMPLES), **QUIET)
    with pytest.raises(IndexError, match="out of"):
        influence(model, factors, tiny.batches(QUERIES), bad, **QUIET)
    assert all(module.training for module in model.modules())
    assert not first.requires_grad and all(p.requires_grad for p in list(model.parameters())[1:])
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    first.requires_grad_(True)


def test_sampled_labels_follow_the_predictive_distribution():
    """Frequencies of drawn labels through both paths against p, and the draws of both against each other."""
    from helpers.head import _total_and_draw
    from helpers.tasks import draw_targets
    logits = torch.randn(1, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    uniforms = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    many = logits.expand(len(uniforms), -1)
    _, fast = _total_and_draw(many.exp(), uniforms)
    slow = draw_targets(many, torch.zeros(len(uniforms), dtype=torch.long), uniforms)
    assert torch.equal(fast, slow)
    frequencies = torch.bincount(fast, minlength=300) / len(uniforms)
    assert float((frequencies - logits.softmax(-1)[0]).abs().max()) <= 1 / len(uniforms) * 1.01


def test_token_gradients_of_a_prompt_are_not_zero():
    """A prompt position takes no loss, but through attention it has Ds ≠ 0."""
    model = tiny.gpt2()
    ids = torch.arange(8)
    batch = tiny.batches([(ids, torch.where(torch.arange(8) < 6, -100, ids))])[0]
    with frozen(model):
        ds = token_gradients(model, batch, ["transformer.h.0.mlp.c_fc"], causal_lm).outputs["transformer.h.0.mlp.c_fc"]
    assert bool((ds[0, :5].abs().sum(-1) > 0).all()) and bool((ds[0, 7] == 0).all())


def test_a_damping_for_every_layer_is_that_of_each(fitted):
    model, layers, factors = fitted
    queries, train = tiny.batches(QUERIES), tiny.batches(EXAMPLES)
    own = {name: 0.01 * (1 + n) * float(Lambda.mean()) for n, (name, Lambda) in enumerate(factors.Lambda.items())}
    damped = {name: Lambda + own[name] for name, Lambda in factors.Lambda.items()}
    expected = influence(model, dataclasses.replace(factors, Lambda=damped), queries, train, damping=0, **QUIET)
    assert tiny.close(model, influence(model, factors, queries, train, damping=own, **QUIET), expected)
    assert not tiny.close(model, influence(model, factors, queries, train, damping=own[layers[0]], **QUIET), expected)
    del own[layers[-1]]
    with pytest.raises(ValueError, match=f"lacks {layers[-1]!r}: give every layer's, or one number"):
        influence(model, factors, queries, train, damping=own, **QUIET)


def test_ihvp_names_the_gradient_that_does_not_fit(fitted):
    _, layers, factors = fitted
    shape = tuple(factors.Lambda[layers[0]].shape)
    for gradients in ({"no.such": torch.zeros(shape)}, {layers[0]: torch.zeros(shape[0] + 1, shape[1])}):
        with pytest.raises(ValueError, match="gradients: .*; the last two axes must be those of the factors, "):
            factors.ihvp(gradients)


def test_queries_in_batches_are_the_queries_together(fitted):
    model, layers, factors = fitted
    train = tiny.batches(EXAMPLES)
    for rank in (None, 2):
        one, three = (influence(model, factors, tiny.batches(QUERIES, size), train, rank=rank, **QUIET)
                      for size in (1, 3))
        assert tiny.close(model, one, three)


def test_fast_paths_are_found_once_and_on_the_stories(fitted, monkeypatch):
    model, _, factors = fitted
    train, queries, seen = tiny.batches(EXAMPLES), tiny.batches(QUERIES, 2), []
    monkeypatch.setattr("helpers.gradients.fast_paths", lambda *args: seen.append(args[1]) or fast_paths(*args))
    assert len(queries) > 1
    influence(model, factors, queries, train, **QUIET)
    assert len(seen) == 1 and seen[0] is train[0]
    more = [{**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)} for batch in queries]
    influence(model, factors, more, train, **QUIET)
    assert len(seen) == 3 and "position_ids" in seen[2]  # other keys, another look
