"""Influence against three meanings of "without this point": `python tests/benchmarks/fragility.py`.

Writes fragility.csv beside this file, which notebook 04 shows: one row for every network, weight decay, seed and test
point, with the correlation over the left-out points between predicted and measured changes of the test point's loss.
Also, of the measured ones, with those of other seeds, of half of the point left out, and of another order of batches.
Measured by (a) retraining from scratch, (b) continuing from θ*, (c) the proximal Bregman response; predicted with the
damped Gauss-Newton matrix and with the damped Hessian. Seeded; a network whose rows are in the table is skipped, so
that a run that was stopped goes on with the next one. Six minutes on one core.
"""

import argparse
import math
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.func import functional_call, grad, stack_module_state, vmap

from helpers import classification
from helpers.exact import ggn, hessian

TABLE = Path(__file__).with_suffix(".csv")
NETWORKS = ((1, 0), (2, 16), (2, 64), (4, 16))  # layers of weights, units in each hidden one
DECAYS, LAMBDA, SEEDS = (0.0, 0.01), 0.01, (0, 1, 2)  # λ = LAMBDA in all: damping without decay, the decay itself with
N, N_QUERIES, N_REMOVED = 320, 8, 32
BATCH, EPOCHS, MORE, RATE, MOMENTUM = 40, 300, 120, 0.1, 0.9
ITERATIONS, TOLERANCE = 500, 1e-6  # of the proximal Bregman response: ‖gradient‖ relative to that at θ*


def digits():
    """(train x, y), (queries x, y), indices of points to leave out; 4 × 4 pictures, chosen by an unrelated model."""
    images, labels = load_digits(return_X_y=True)
    x = images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)  # means over squares of 2 × 2 pixels
    rows = np.random.default_rng(0).permutation(len(x))
    x = (x - x[rows[:N]].mean(0)) / x[rows[:N]].std()
    judge = LogisticRegression(max_iter=5000).fit(x[rows[:N]], labels[rows[:N]])
    loss = -judge.predict_log_proba(x[rows])[np.arange(len(x)), labels[rows]]
    queries, removed = N + spread(loss[N:], N_QUERIES), spread(loss[:N], N_REMOVED)
    x, labels = torch.as_tensor(x[rows]), torch.as_tensor(labels[rows])
    return (x[:N], labels[:N]), (x[queries], labels[queries]), torch.as_tensor(removed)


def spread(values, k):
    """Indices of k values at evenly spaced ranks, smallest first."""
    return np.argsort(values)[np.linspace(0, len(values) - 1, 2 * k + 1).round().astype(int)[1::2]]


def mlp(depth, width, seed):
    """`depth` linear layers with tanh between them, float64; depth 1 is softmax regression."""
    torch.manual_seed(seed)
    sizes = [16, *[width] * (depth - 1), 10]
    layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (torch.nn.Linear(i, o), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers[:-1]).double()


def orders(seed, epochs):
    """[steps, BATCH] indices: another permutation in every epoch."""
    rng = np.random.default_rng(seed)
    return torch.as_tensor(np.concatenate([rng.permutation(N).reshape(-1, BATCH) for _ in range(epochs)]))


def logits_of(net, params, x, x_dim=None):
    """[model, example, class] of stacked parameters; x is shared, or has a leading model axis where x_dim is 0."""
    return vmap(lambda p, x: functional_call(net, p, (x,)), in_dims=(0, x_dim))(params, x)


def cross_entropy(logits, y):
    """[model, example]; y [example], or [model, example]."""
    return F.cross_entropy(logits.flatten(0, 1), y.expand(logits.shape[:2]).flatten(), reduction="none").view_as(
        logits[..., 0])


def sgd(net, params, x, y, keep, decay, steps):
    """All models at once: params stacked [K, ...], keep [K, N] of 0 and 1, decay [K], steps [T, K, BATCH] of indices.

    A left-out example keeps its place in the batch and counts nothing: the factor 1/N stays. The rate falls to zero.
    """
    params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    speed = [torch.zeros_like(p) for p in params.values()]
    models = torch.arange(len(keep))[:, None]
    for t, rows in enumerate(steps):
        losses = cross_entropy(logits_of(net, params, x[rows], 0), y[rows]) * keep[models, rows]
        gradients = torch.autograd.grad(losses.sum() / BATCH, list(params.values()))
        rate = RATE * (1 + math.cos(math.pi * t / len(steps))) / 2
        with torch.no_grad():
            for p, v, g in zip(params.values(), speed, gradients):
                v.mul_(MOMENTUM).add_(g).add_(decay.view(-1, *[1] * (p.dim() - 1)) * p)
                p.sub_(rate * v)
    return {name: p.detach() for name, p in params.items()}


def named(theta, net):
    """Stacked parameters from the rows of theta [K, P]."""
    parts = theta.split([p.numel() for p in net.parameters()], 1)
    return {name: part.view(-1, *p.shape) for (name, p), part in zip(net.named_parameters(), parts)}


def gradients_of(net, theta, x, y):
    """[example, P]: the gradient of every example's loss at theta [P]."""
    loss = lambda theta, x, y: F.cross_entropy(logits_of(net, named(theta[None], net), x[None])[0, 0], y)
    return vmap(grad(loss), in_dims=(None, 0, 0))(theta, x, y)


def bregman_response(net, theta, x, y, removed, root):
    """([removed, P], worst ‖gradient‖): argmin mean KL(p* ‖ p) + ½λ ‖θ − θ*‖² − L_m / N of every removed point m.

    root: Cholesky factor of G + λI, the metric of the descent; a step that does not descend is halved.
    """
    start = logits_of(net, named(theta[None], net), x)[0].detach()
    own = torch.arange(len(removed))

    def objective(at):
        logits = logits_of(net, named(at, net), x)
        divergence = (start.softmax(-1) * (start.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean(1)
        return (divergence + LAMBDA / 2 * (at - theta).square().sum(1)
                - F.cross_entropy(logits[own, removed], y[removed], reduction="none") / len(x))

    at, step, first = theta.repeat(len(removed), 1), torch.ones(len(removed), 1).double(), None
    for _ in range(ITERATIONS):
        at.requires_grad_()
        value = objective(at)
        gradient = torch.autograd.grad(value.sum(), at)[0]
        first = gradient.norm(dim=1) if first is None else first
        left = float((gradient.norm(dim=1) / first).max())
        if left < TOLERANCE:
            break
        with torch.no_grad():
            new = at - step * torch.cholesky_solve(gradient.T, root).T
            down = (objective(new) <= value + 1e-15)[:, None]
            at, step = torch.where(down, new, at), torch.where(down, (1.5 * step).clamp(max=1), step / 2)
    return at.detach(), left


def correlations(x, y):
    """Pearson's r of every row, and Spearman's."""
    return (np.array([np.corrcoef(*pair)[0, 1] for pair in zip(x, y)]),
            np.array([spearmanr(*pair).statistic for pair in zip(x, y)]))


def measure(net, theta, decay, data, queries, removed, retrained, continued):
    """Columns of the table for one network: arrays [query] or numbers; retrained, continued [query, removed]."""
    (x, y), eye = data, torch.eye(len(theta)).double()
    net.load_state_dict({name: p[0] for name, p in named(theta[None], net).items()})
    batch = {"input": x, "labels": y}
    H, G = hessian(net, batch, classification), ggn(net, batch, classification) + LAMBDA * eye
    given, asked = gradients_of(net, theta, x, y), gradients_of(net, theta, *queries)
    root = torch.linalg.cholesky(G)
    response, left = bregman_response(net, theta, x, y, removed, root)
    change = lambda rows: cross_entropy(logits_of(net, named(rows, net), queries[0]), queries[1])
    pbrf = (change(response) - change(theta[None])).T.numpy()
    predicted = {"ggn": asked @ torch.cholesky_solve(given[removed].T, root) / N,
                 "hessian": asked @ torch.linalg.solve(H + LAMBDA * eye, given[removed].T) / N}
    measured = {"retrained": retrained, "continued": continued, "pbrf": pbrf}
    row = {"loss": float(cross_entropy(logits_of(net, named(theta[None], net), x), y).mean()),
           "gradient": float((given.mean(0) + decay * theta).norm()), "lowest": float(torch.linalg.eigvalsh(H)[0]),
           "unsolved": left, "query_loss": change(theta[None])[0].numpy()}
    for (truth, D), (curvature, I) in product(measured.items(), predicted.items()):
        row[f"{truth}_{curvature}"], row[f"{truth}_{curvature}_rank"] = correlations(I.numpy(), D)
    return row | {f"size_{truth}": np.abs(D).mean(1) for truth, D in measured.items()} | {
        "retrained_pbrf": correlations(pbrf, retrained)[0], "continued_pbrf": correlations(pbrf, continued)[0]}, pbrf


def one_network(depth, width):
    """Rows of the table: all seeds and weight decays of one network are trained together, each with all and without."""
    data, queries, removed = digits()
    cells, K = list(product(SEEDS, DECAYS)), 1 + N_REMOVED
    keep = torch.ones(K, N).double()
    keep[torch.arange(1, K), removed] = 0
    net, start = mlp(depth, width, 0), stack_module_state([mlp(depth, width, s) for s, _ in cells for _ in range(K)])[0]
    batches = lambda shift, epochs: torch.stack([orders(shift + s, epochs) for s, _ in cells], 1)
    train = lambda params, steps, keep=keep: sgd(net, params, *data, keep.repeat(len(cells), 1), torch.tensor(
        [decay for _, decay in cells]).double().repeat_interleave(K), steps.repeat_interleave(K, 1))
    scratch = train(start, batches(100, EPOCHS))
    half, reordered = train(start, batches(100, EPOCHS), (1 + keep) / 2), train(start, batches(300, EPOCHS))
    on = train({name: p[::K].repeat_interleave(K, 0) for name, p in scratch.items()}, batches(200, MORE))
    changes = []
    for params in (scratch, on, half, reordered):
        losses = cross_entropy(logits_of(net, params, queries[0]), queries[1]).view(len(cells), K, -1)
        changes.append((losses[:, 1:] - losses[:, :1]).transpose(1, 2).numpy())
    thetas = [torch.cat([p[c * K].flatten() for p in scratch.values()]) for c in range(len(cells))]
    found, responses = zip(*[measure(net, theta, decay, data, queries, removed, changes[0][c], changes[1][c])
                             for c, (theta, (_, decay)) in enumerate(zip(thetas, cells))])
    rows, r = [], lambda a, b: correlations(a, b)[0]
    for c, (seed, decay) in enumerate(cells):
        others = [k for k, (s, d) in enumerate(cells) if d == decay and s != seed]
        rows.append(pd.DataFrame({
            "depth": depth, "width": width, "decay": decay, "seed": seed, "query": range(N_QUERIES), **found[c],
            "other_seeds": np.mean([r(changes[0][c], changes[0][k]) for k in others], 0),
            "pbrf_other_seeds": np.mean([r(responses[c], responses[k]) for k in others], 0),
            "retrained_half": r(changes[2][c], changes[0][c]), "retrained_order": r(changes[3][c], changes[0][c])}))
    return pd.concat(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    table = pd.read_csv(args.out) if args.out.exists() else pd.DataFrame({"depth": [], "width": []})
    for depth, width in NETWORKS:
        if ((table.depth == depth) & (table.width == width)).any():
            continue
        start = time.time()
        rows = one_network(depth, width)
        table = pd.concat([table, rows]) if len(table) else rows
        table.to_csv(args.out, index=False, float_format="%.6g")
        print(f"depth {depth}, width {width}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
