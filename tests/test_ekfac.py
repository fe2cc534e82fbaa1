"""Factors and P against dense algebra and autograd, with controls that must fail."""

import dataclasses

import pytest
import tiny
import torch

from helpers import EKFACFactors, ekfac, fit_ekfac, linear_layers
from helpers.gradients import fastest_gradients

QUIET = {"progress": False}


def random_factors(d_out=5, d_in=3, seed=0):
    """Factors of one layer with d_in ≠ d_out and eigenvectors that are not symmetric, so no transpose can hide."""
    generator = torch.Generator().manual_seed(seed)
    A, S = (x @ x.T for x in (torch.randn(d, 2 * d, dtype=torch.float64, generator=generator) for d in (d_in, d_out)))
    Lambda = torch.rand(d_out, d_in, dtype=torch.float64, generator=generator)
    return EKFACFactors({"l": A}, {"l": S}, {"l": torch.linalg.eigh(A)[1]}, {"l": torch.linalg.eigh(S)[1]},
                        {"l": Lambda}, 1, 1)


def dense(factors, damping, layer="l"):
    """(Q_A ⊗ Q_S) diag(vec(Lambda + damping)) (Q_A ⊗ Q_S)ᵀ for column-stacking vec."""
    Q = torch.kron(factors.Q_A[layer], factors.Q_S[layer])
    return Q @ torch.diag((factors.Lambda[layer] + damping).T.flatten()) @ Q.T


def vec(V):
    return V.T.flatten()


def test_ihvp_is_the_dense_solve():
    factors, damping = random_factors(), 0.03
    V = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.solve(dense(factors, damping), vec(V))
    assert torch.allclose(vec(factors.ihvp({"l": V}, damping)["l"]), expected, rtol=1e-10, atol=0)
    back = (dense(factors, damping) @ vec(V)).reshape(3, 5).T
    assert torch.allclose(factors.ihvp({"l": back}, damping)["l"], V, rtol=1e-10, atol=1e-12)


def test_default_damping_is_a_tenth_of_the_mean_eigenvalue():
    factors = random_factors()
    V = torch.randn(2, 5, 3, dtype=torch.float64)
    explicit = factors.ihvp({"l": V}, 0.1 * float(factors.Lambda["l"].mean()))["l"]
    assert torch.allclose(factors.ihvp({"l": V})["l"], explicit, rtol=1e-12)


@pytest.mark.parametrize("mistake", ["transposed Q", "multiplied", "row-stacked vec"])
def test_ihvp_control_each_mistake_is_seen(mistake):
    factors, damping = random_factors(), 0.03
    V = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    Q_A, Q_S, damped = factors.Q_A["l"], factors.Q_S["l"], factors.Lambda["l"] + damping
    wrong = {"transposed Q": Q_S.T @ ((Q_S @ V @ Q_A.T) / damped) @ Q_A,
             "multiplied": Q_S @ ((Q_S.T @ V @ Q_A) * damped) @ Q_A.T,
             "row-stacked vec": torch.linalg.solve(dense(factors, damping), V.flatten()).reshape(5, 3)}[mistake]
    expected = torch.linalg.solve(dense(factors, damping), vec(V))
    assert not torch.allclose(vec(wrong), expected, rtol=1e-2)


def softmax_layer(model, batch):
    return model(batch["inputs"]), batch["labels"]


def fit_one_layer(inputs, n, seed=0):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(inputs.shape[-1], 4)).double()
    batch = {"inputs": inputs.expand(n, -1).clone(), "labels": torch.zeros(n, dtype=torch.long)}
    batch["inputs"][:, -1] += torch.arange(n, dtype=torch.float64) * 1e-13  # distinct keys, constant activations
    factors = fit_ekfac(model, [batch], ["0"], task=softmax_layer, seed=seed, **QUIET)
    p = model(inputs).softmax(-1)[0]
    ones = torch.cat([inputs[0], inputs.new_ones(1)])
    gauss_newton = torch.kron(torch.outer(ones, ones), torch.diag(p) - torch.outer(p, p))
    return factors, gauss_newton.detach()


def test_constant_activations_ekfac_is_the_gauss_newton_matrix():
    x = torch.tensor([[0.7, -1.2, 0.4]], dtype=torch.float64)
    errors = {}
    for n in (400, 25_600):
        factors, gauss_newton = fit_one_layer(x, n)
        errors[n] = float((dense(factors, 0.0, "0") - gauss_newton).norm() / gauss_newton.norm())
    assert errors[400] < 0.2 and errors[25_600] < 0.2 / 8 * 1.6, errors  # Monte-Carlo: error falls as 1/√n
    assert factors.pooled == () and factors.n_tokens == factors.n_examples == 25_600


@pytest.fixture(scope="module", params=tiny.MODELS)
def model(request):
    return tiny.MODELS[request.param]()


def same(factors, others, rtol):
    return all(torch.allclose(getattr(factors, m)[name], getattr(others, m)[name], rtol=rtol,
                              atol=rtol * float(getattr(factors, m)[name].abs().max()))
               for m in ("A", "S", "Lambda") for name in factors.A)


@pytest.mark.parametrize("labels", ["sampled", "true"])
def test_factors_do_not_depend_on_batches_pads_or_order(model, labels):
    examples, layers = tiny.stories(32, prompt=2), linear_layers(model, tiny.LAYERS)
    fit = lambda batches: fit_ekfac(model, batches, layers, labels=labels, **QUIET)
    factors = fit(tiny.batches(examples, 1))
    for batches in (tiny.batches(examples, 7), tiny.batches(examples, 32), tiny.batches(examples, 7, extra_pads=3),
                    tiny.batches(examples[::-1], 7)):
        assert same(factors, fit(batches), tiny.rtol(model))
    assert factors.n_examples == 32 and factors.n_tokens == sum(len(ids) for ids, _ in examples)
    unmasked = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
                for batch in tiny.batches(examples, 7, extra_pads=3)]
    assert not same(factors, fit(unmasked), rtol=1e-2)  # control: a missing mask


def test_another_seed_or_true_labels_give_other_factors(model):
    batches, layers = tiny.batches(tiny.stories(8)), linear_layers(model, "mlp")
    sampled = fit_ekfac(model, batches, layers, **QUIET)
    assert same(sampled, fit_ekfac(model, batches, layers, **QUIET), tiny.rtol(model))
    assert not same(sampled, fit_ekfac(model, batches, layers, seed=1, **QUIET), rtol=1e-2)
    assert not same(sampled, fit_ekfac(model, batches, layers, labels="true", **QUIET), rtol=1e-2)


def test_factors_are_their_definitions(model):
    """A, S and Lambda with true labels, from loops over single unpadded sequences and autograd."""
    examples, layers = tiny.stories(5, prompt=2), linear_layers(model, tiny.LAYERS)
    factors = fit_ekfac(model, tiny.batches(examples, 3), layers, labels="true", **QUIET)
    for name in layers:
        A = S = Lambda = per_token = 0
        for ids, labels in examples:
            a, ds, gradient = by_autograd(model, name, ids, labels)
            A, S = A + a.T @ a, S + ds.T @ ds
            Lambda = Lambda + (factors.Q_S[name].T @ gradient @ factors.Q_A[name]).square()
            per_token = per_token + ((ds @ factors.Q_S[name]).square().T @ (a @ factors.Q_A[name]).square())
        tokens = sum(len(ids) for ids, _ in examples)
        for got, expected in ((factors.A, A / tokens), (factors.S, S / tokens), (factors.Lambda, Lambda / 5)):
            assert tiny.close(model, got[name], expected)
        for Q, matrix in ((factors.Q_A, factors.A), (factors.Q_S, factors.S)):
            rotated = Q[name].T @ matrix[name] @ Q[name]
            assert torch.allclose(rotated, rotated.diag().diag(), atol=1e-10 * float(rotated.abs().max()))
        assert not torch.allclose(factors.Lambda[name], per_token / 5, rtol=1e-1)  # control: squares token by token


def by_autograd(model, name, ids, labels):
    """ā [T, d_in (+1)], Ds [T, d_out] by a hook of its own and autograd, and the gradient of the weights."""
    seen, module = {}, model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, inputs, output: seen.update(a=inputs[0][0], s=output))
    loss = tiny.loss_of(model, ids, labels)
    handle.remove()
    ds = torch.autograd.grad(loss, seen["s"], retain_graph=True)[0][0]
    a = seen["a"].detach()
    a = a if module.bias is None else torch.cat([a, a.new_ones(len(a), 1)], 1)
    return a, ds, tiny.weight_gradient(model, name, loss)


def test_save_and_load(model, tmp_path):
    factors = fit_ekfac(model, tiny.batches(tiny.stories(4)), linear_layers(model, "mlp"), **QUIET)
    factors.save(tmp_path / "new")
    loaded = EKFACFactors.load(tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["factors.safetensors"]
    for field in dataclasses.fields(EKFACFactors):
        ours, theirs = getattr(factors, field.name), getattr(loaded, field.name)
        same_value = ours == theirs if not isinstance(ours, dict) else (
            list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours))
        assert same_value, field.name


def test_long_sequences_are_kept_as_their_sums_with_the_same_numbers(monkeypatch):
    model, kept = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double(), []
    compact, task = ekfac._compact, lambda model, batch: (model(batch["x"]), batch["labels"])
    monkeypatch.setattr(ekfac, "_compact", lambda a, ds: kept.append(compact(a, ds)) or kept[-1])
    for length, parts in ((4, [2, 2]), (5, [1, 2]), (6, [1, 1])):  # the second layer has 6 inputs with its bias
        generator = torch.Generator().manual_seed(length)
        batch = {"x": torch.randn(7, length, 3, generator=generator),
                 "labels": torch.randint(2, (7, length), generator=generator)}
        batch["x"] = batch["x"].double()
        results = []
        for budget in (1 << 30, 0):
            monkeypatch.setattr(ekfac, "KEEP_BYTES", budget)
            kept.clear()
            results.append(fit_ekfac(model, [batch], ["0", "2"], task, **QUIET))
            assert [len(part) for part in kept] == parts
        assert all(torch.equal(results[0].Lambda[name], results[1].Lambda[name]) for name in ("0", "2"))


def test_what_is_kept_between_the_passes_changes_nothing(model, monkeypatch):
    batches, layers = tiny.batches(tiny.stories(9), 2), linear_layers(model, tiny.LAYERS)
    calls, gradients = [], fastest_gradients(model, layers, ekfac.causal_lm)
    gradients(batches[0])  # the fast paths are decided here, and counted nowhere
    monkeypatch.setattr(ekfac, "fastest_gradients",
                        lambda *_: lambda batch, **kw: calls.append(kw) or gradients(batch, **kw))
    results, counts = [], []
    for budget in (1 << 30, 40_000, 3_000, 0):  # all; some whole, the rest at the head; only the head; nothing
        monkeypatch.setattr(ekfac, "KEEP_BYTES", budget)
        calls.clear()
        results.append(fit_ekfac(model, batches, layers, **QUIET))
        counts.append((len(calls), sum(call.get("hidden") is not None for call in calls)))
    assert all(same(results[0], other, 1e-12) for other in results)
    assert counts[0] == (5, 0) and counts[-1] == (10, 0) and 5 < counts[1][0] < 10 and counts[2][1] > 0, counts
