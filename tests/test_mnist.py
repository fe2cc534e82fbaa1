"""Claims of notebooks 01 and 02 on MNIST's test images, where the files are at hand."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import exact_influence, hessian
from helpers.solvers import cg, lissa

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist_t10k"
pytestmark = pytest.mark.skipif(not MNIST.is_dir(), reason="the MNIST test images are not here")
N, N_QUERIES, WEIGHT_DECAY = 300, 8, 0.05


def read(name, header):
    return np.frombuffer(gzip.decompress((MNIST / f"{name}.gz").read_bytes()), np.uint8, offset=header)


def softmax_regression(model, batch):
    return model(batch["x"]), batch["labels"]


def loss(model, x, y, weights):
    decay = sum(p.square().sum() for p in model.parameters())
    each = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    return (weights * each).sum() / N + WEIGHT_DECAY / 2 * decay


def fit(x, y, weights, start=None):
    model = torch.nn.Linear(x.shape[1], 10).double()
    [p.data.zero_() for p in model.parameters()]
    if start is not None:
        model.load_state_dict(start.state_dict())
    optimizer = torch.optim.LBFGS(model.parameters(), 1, 500, tolerance_grad=1e-10, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(model, x, y, weights)
        value.backward()
        return value

    for _ in range(12):  # it stops where a line search gains nothing in rounding; with its memory cleared it goes on
        optimizer.step(closure)
        optimizer.state.clear()
        closure()
        if (left := torch.cat([p.grad.flatten() for p in model.parameters()]).norm()) < 1e-8:
            break
    assert left < 1e-8
    return model


@pytest.fixture(scope="module")
def fitted():
    images = torch.tensor(read("t10k-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28)[: N + N_QUERIES] / 255.0)
    x = torch.nn.functional.avg_pool2d(images, 4).flatten(1)  # 7 × 7 pixels: 500 parameters
    y = torch.tensor(read("t10k-labels-idx1-ubyte", 8)[: N + N_QUERIES].astype(np.int64))
    model = fit(x[:N], y[:N], torch.ones(N, dtype=torch.float64))
    return model, *({"x": x[rows], "labels": y[rows]} for rows in (slice(N), slice(N, None)))


def test_influence_is_what_leave_one_out_retraining_measures(fitted):
    model, train, queries = fitted
    x, y = train["x"], train["labels"]
    predicted = exact_influence(model, queries, train, softmax_regression, WEIGHT_DECAY) / N
    each = lambda m: torch.nn.functional.cross_entropy(m(queries["x"]), queries["labels"], reduction="none").detach()
    removed, measured = range(0, N, 12), []
    for i in removed:
        weights = torch.ones(N, dtype=torch.float64)
        weights[i] = 0
        measured.append(each(fit(x, y, weights, model)) - each(model))
    pair = lambda p: float(torch.corrcoef(torch.stack([p.flatten(), torch.stack(measured, 1).flatten()]))[0, 1])
    assert pair(predicted[:, list(removed)]) > 0.99
    assert abs(pair(predicted[:, [i + 1 for i in removed]])) < 0.5, "the neighbours' influence is another one"


def test_lissa_and_cg_give_the_exact_influence(fitted):
    model, train, queries = fitted
    H = hessian(model, train, softmax_regression)
    rows = torch.cat([train["x"], torch.ones(N, 1)], 1).double()
    p = model(train["x"]).detach().softmax(-1)
    V = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(
        torch.nn.functional.cross_entropy(model(queries["x"][[q]]), queries["labels"][[q]]), model.parameters())])
        for q in range(N_QUERIES)], 1)

    def of_batch(u, chosen):  # (1/B) Σ Jᵀ (diag p − p pᵀ) J u, written out for softmax regression
        a, q = rows[chosen], p[chosen]
        W = torch.cat([u[:490].reshape(10, 49, -1), u[490:].reshape(10, 1, -1)], 1)
        Ju = torch.einsum("na,cak->nck", a, W)
        z = q[:, :, None] * (Ju - (q[:, :, None] * Ju).sum(1, keepdim=True))
        out = torch.einsum("nck,na->cak", z, a) / len(chosen)
        return torch.cat([out[:, :49].reshape(490, -1), out[:, 49].reshape(10, -1)]).reshape(u.shape)

    everyone = torch.arange(N)
    torch.testing.assert_close(of_batch(V, everyone), H @ V, rtol=1e-10, atol=1e-12)
    exact = torch.linalg.solve(H + WEIGHT_DECAY * torch.eye(500, dtype=torch.float64), V)
    torch.testing.assert_close(cg(lambda u: of_batch(u, everyone), V, WEIGHT_DECAY).x, exact, rtol=1e-6, atol=1e-8)
    single = lambda u, generator: of_batch(u, torch.randint(N, (1,), generator=generator))
    scale = 0.5 * float(rows.square().sum(1).max()) + WEIGHT_DECAY  # no single example's curvature exceeds it
    found = lissa(single, V, WEIGHT_DECAY, scale, 1500, 8).x
    r = torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1]
    assert float(r) > 0.98
    with pytest.raises(ValueError, match="LiSSA diverged.*use scale="):
        lissa(single, V, WEIGHT_DECAY, 0.05, 1500)
