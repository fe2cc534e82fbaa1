"""Tasks that are no language model: Gaussian and categorical targets, pooled layers, and the draws of pseudo-labels."""

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from helpers import classification, fit_ekfac, influence, linear_layers, regression
from helpers.tasks import draw_targets, keyed_uniforms

QUIET = {"progress": False}


def test_gaussian_targets_give_the_gauss_newton_matrix():
    """With constant activations EK-FAC of ½‖y − Wx‖² is āāᵀ ⊗ I, up to Monte-Carlo error."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4)).double()
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64).expand(20_000, -1).clone()
    x[:, 0] += torch.arange(len(x)) * 1e-13  # the key of a draw is the input
    batch = {"input": x, "labels": torch.zeros(len(x), 4)}
    factors = fit_ekfac(model, [batch], ["0"], task=regression, **QUIET)
    Q = torch.kron(factors.Q_A["0"], factors.Q_S["0"])
    dense = Q @ torch.diag(factors.Lambda["0"].T.flatten()) @ Q.T
    ones = torch.cat([x[0], x.new_ones(1)])
    expected = torch.kron(torch.outer(ones, ones), torch.eye(4, dtype=torch.float64))
    assert float((dense - expected).norm() / expected.norm()) < 0.03
    assert float((dense - 0.5 * expected).norm() / expected.norm()) > 0.3  # control: a lost factor of two


def test_regression_scores_are_residual_products():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    batch = {"input": x, "labels": y}
    factors = fit_ekfac(model, [batch], ["0"], task=regression, **QUIET)
    residual, ones = (model(x) - y).detach(), torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], 1)
    G = torch.einsum("no,ni->noi", residual, ones)
    expected = torch.einsum("qoi,moi->qm", factors.ihvp({"0": G})["0"], G)
    assert torch.allclose(influence(model, factors, [batch], [batch], task=regression, **QUIET), expected, rtol=1e-10)


def classifier():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=20, max_position_embeddings=40, num_labels=3,
                         pad_token_id=5)  # the pad of tiny.batches
    return LlamaForSequenceClassification(config).double().eval()


def test_a_classifier_with_token_layers_and_a_pooled_head():
    model, batches = classifier(), tiny.batches(tiny.stories(8), 4)
    for batch in batches:
        batch["labels"] = torch.arange(4) % 3
    layers = linear_layers(model, "mlp.down_proj|score")
    factors = fit_ekfac(model, batches, layers, task=classification, labels="true", **QUIET)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert (factors.n_examples, factors.n_tokens) == (8, tokens)
    scores = influence(model, factors, batches, batches, task=classification, **QUIET)
    G = {name: [] for name in layers}
    for batch in batches:
        for row in range(4):
            mask = batch["attention_mask"][row].bool()
            logits = model(input_ids=batch["input_ids"][row, mask][None]).logits
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"][row][None])
            for name in layers:
                G[name].append(tiny.weight_gradient(model, name, loss))
    G = {name: torch.stack(some) for name, some in G.items()}
    expected = sum(torch.einsum("qoi,moi->qm", factors.ihvp(G)[name], G[name]) for name in layers)
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_draws_keep_the_mask_and_depend_on_seed_position_and_input():
    (batch,) = tiny.batches(tiny.stories(5, prompt=2), 5)
    targets = batch["labels"][:, 1:]
    uniforms = keyed_uniforms(batch, targets, 0)
    assert uniforms.shape == targets.shape and bool(((uniforms > 0) & (uniforms < 1)).all())
    assert len(uniforms[batch["attention_mask"][:, :-1].bool()].unique()) == int(batch["attention_mask"][:, :-1].sum())
    assert not torch.equal(uniforms, keyed_uniforms(batch, targets, 1))
    logits = torch.randn(*targets.shape, tiny.VOCABULARY, dtype=torch.float64)
    drawn = draw_targets(logits, targets, uniforms)
    assert torch.equal(drawn == -100, targets == -100) and int(drawn.max()) < tiny.VOCABULARY
    other = {**batch, "input_ids": batch["input_ids"] + (torch.arange(5) == 3)[:, None]}
    changed = keyed_uniforms(other, targets, 0)
    assert torch.equal((changed != uniforms).any(1), torch.arange(5) == 3)


@pytest.mark.parametrize("kind", sorted(tiny.MODELS))
def test_a_mask_of_ones_is_as_good_as_none(kind):
    model, train = tiny.MODELS[kind](), tiny.batches(tiny.stories(5), 1, extra_pads=2)
    bare = [{name: value[:, batch["attention_mask"][0].bool()] for name, value in batch.items()
             if name != "attention_mask"} for batch in train]
    layers = linear_layers(model, tiny.LAYERS)
    with_mask, without = (fit_ekfac(model, batches, layers, progress=False) for batches in (train, bare))
    other = fit_ekfac(model, bare, layers, seed=1, progress=False)
    for name in layers:
        assert tiny.close(model, without.Lambda[name].sum(), with_mask.Lambda[name].sum())
        assert not tiny.close(model, other.Lambda[name].sum(), with_mask.Lambda[name].sum())
