"""hessian, ggn, hvp, exact_influence and leave_one_out against closed forms, loops and autograd, in float64."""

import re

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from helpers import causal_lm, exact, exact_influence, ggn, hessian, hvp, leave_one_out
from helpers.tasks import IGNORED


def classify(model, batch):
    return model(batch["x"]), batch["labels"]


def mlp(*sizes, seed=0):
    torch.manual_seed(seed)
    layers = [module for i, o in zip(sizes, sizes[1:]) for module in (torch.nn.Linear(i, o), torch.nn.Tanh())][:-1]
    return torch.nn.Sequential(*layers).double()


def data(n=11, d=4, c=3, kind="classes", seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=g)
    labels = torch.randint(c, (n,), generator=g) if kind == "classes" else torch.randn(n, c, generator=g).double()
    return {"x": x, "labels": labels}


def small_lm(kind):
    """A language model with few enough parameters that require gradients, and batches with pads and a prompt."""
    model = tiny.MODELS[kind]()
    for name, parameter in model.named_parameters():  # above and below attention, matrices and vectors
        parameter.requires_grad_(bool(re.search(r"1\.mlp\.(c_proj|down_proj)|0\.(ln_1|input_layernorm)", name)))
    return model, tiny.batches(tiny.stories(3, prompt=2), 2)


def studied(model):
    return [p for p in model.parameters() if p.requires_grad]


def mean_loss(model, batch, task=classify):
    """Written from the definitions, without the helpers' own loss."""
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no second derivative
        outputs, targets = task(model, batch)
    n = len(batch["labels"])
    if targets.is_floating_point():
        return ((targets - outputs) ** 2).sum() / 2 / n
    taken = targets != IGNORED
    return -outputs.log_softmax(-1)[taken].gather(1, targets[taken][:, None]).sum() / n


def hessian_by_loop(model, batch, task=classify):
    """Reverse over reverse, a row at a time."""
    first = torch.autograd.grad(mean_loss(model, batch, task), studied(model), create_graph=True)
    rows = [torch.autograd.grad(entry, studied(model), retain_graph=True, allow_unused=True)
            for gradient in first for entry in gradient.flatten()]
    zero = lambda row: [torch.zeros_like(p) if g is None else g for g, p in zip(row, studied(model))]
    return torch.stack([torch.cat([g.flatten() for g in zero(row)]) for row in rows])


def ggn_by_loop(model, batch, task=classify):
    """(1/N) Σ Jᵀ H_out J, J by one backward pass an output and H_out by autograd, one target at a time."""
    outputs, targets = task(model, batch)
    total = 0
    for index in torch.cartesian_prod(*[torch.arange(s) for s in outputs.shape[:-1]]).reshape(-1, outputs.dim() - 1):
        out, target = outputs[tuple(index)], targets[tuple(index)]
        if not targets.is_floating_point() and target == IGNORED:
            continue
        J = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(o, studied(model), retain_graph=True)])
                         for o in out])
        loss = ((lambda f, y=target: (y - f).square().sum() / 2) if targets.is_floating_point() else
                (lambda f, y=target: -f.log_softmax(-1)[y]))
        total = total + J.T @ torch.autograd.functional.hessian(loss, out.detach()) @ J
    return total / len(batch["labels"])


def close(x, y, rtol=1e-10):
    return x.shape == y.shape and x.dtype == torch.float64 and bool((x - y).abs().max() <= rtol * y.abs().max())


@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_hessian_and_ggn_against_loops(kind):
    model, batch = mlp(4, 5, 3), data(kind=kind)
    H, G = hessian(model, batch, classify), ggn(model, batch, classify)
    assert close(H, hessian_by_loop(model, batch)) and close(G, ggn_by_loop(model, batch))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    swapped = lambda w: mean_loss(lambda x: torch.func.functional_call(model, w, (x,)), batch)
    blocks = torch.func.jacfwd(torch.func.grad(swapped))(weights)  # forward over reverse
    assert close(H, torch.cat([torch.cat([blocks[i][j].reshape(weights[i].numel(), -1) for j in weights], 1)
                               for i in weights]))
    assert torch.linalg.eigvalsh(H)[0] < -1e-4 and torch.linalg.eigvalsh(G)[0] > -1e-12 and not close(H, G, 0.01)
    for matrix in (hessian, ggn):
        damped = matrix(model, batch, classify, damping=0.3) - matrix(model, batch, classify)
        assert close(damped, 0.3 * torch.eye(len(H), dtype=torch.float64))


def test_logistic_regression_closed_form():
    """Two classes and one column of logits differences: Xᵀ diag(p (1 − p)) X / N, for both matrices."""
    X = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Linear(6, 1, bias=False).double()
    pair = lambda model, batch: (torch.cat([0 * model(batch["x"]), model(batch["x"])], 1), batch["labels"])
    batch = {"x": X, "labels": (X[:, 0] > 0).long()}
    p = model(X).sigmoid().detach()
    expected = X.T @ (p * (1 - p) * X) / 40
    assert close(hessian(model, batch, pair), expected) and close(ggn(model, batch, pair), expected)
    assert not close(hessian(model, batch, pair), 40 * expected, 0.01)  # control: a sum over examples


def test_linear_regression_closed_form():
    batch, model = data(9, 4, 1, "regression"), torch.nn.Linear(4, 1).double()
    X = torch.cat([batch["x"], torch.ones(9, 1).double()], 1)
    assert close(hessian(model, batch, classify), X.T @ X / 9) and close(ggn(model, batch, classify), X.T @ X / 9)


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_language_models(kind):
    model, batches = small_lm(kind)
    H, G = hessian(model, batches, causal_lm), ggn(model, batches, causal_lm)
    loops = [(hessian_by_loop(model, b, causal_lm), ggn_by_loop(model, b, causal_lm), len(b["labels"]))
             for b in batches]
    rtol = 1e-10 if kind == "gpt2" else 1e-5  # the others round to float32 inside attention and norms
    for got, index in ((H, 0), (G, 1)):
        assert close(got, sum(loop[index] * loop[2] for loop in loops) / 3, rtol)
    whole = tiny.batches(tiny.stories(3, prompt=2), 3, extra_pads=3)[0]  # one batch, more pads: the same matrix
    assert close(hessian(model, whole, causal_lm), H, rtol) and close(ggn(model, whole, causal_lm), G, rtol)
    unmasked = {**whole, "attention_mask": torch.ones_like(whole["input_ids"]),
                "labels": whole["labels"].where(whole["labels"] != IGNORED, whole["input_ids"])}
    assert not close(ggn(model, unmasked, causal_lm), G, 0.01)  # control: pads and prompts with a loss


def test_blocks_do_not_matter(monkeypatch):
    model, batches = small_lm("gpt2")
    reference = [f(model, batches, causal_lm) for f in (hessian, ggn)]
    influence = exact_influence(model, batches, batches, causal_lm, 0.1, "ggn")
    monkeypatch.setattr(exact, "NUMBERS", 100 * len(reference[0]))
    monkeypatch.setattr(exact, "VECTORS", 50)
    assert all(close(f(model, batches, causal_lm), x) for f, x in zip((hessian, ggn), reference))
    assert close(exact_influence(model, batches, batches, causal_lm, 0.1, "ggn"), influence)


def test_hvp_is_h_times_v():
    model, batch = mlp(4, 5, 3), data()
    H, generator = hessian(model, batch, classify), torch.Generator().manual_seed(2)
    V = torch.randn(3, len(H), dtype=torch.float64, generator=generator)
    assert close(hvp(model, batch, V, classify), V @ H) and close(hvp(model, batch, V[0], classify), H @ V[0])
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 3), slice(3, None))]
    assert close(hvp(model, halves, V[0], classify), H @ V[0])  # a mean over examples, not over batches
    named = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    got, flat = hvp(model, batch, named, classify), torch.cat([x.flatten() for x in named.values()])
    assert list(got) == list(named) and all(got[name].shape == named[name].shape for name in named)
    assert close(torch.cat([x.flatten() for x in got.values()]), H @ flat)


def test_hvp_of_a_language_model_is_a_finite_difference():
    model, batches = small_lm("gpt2")
    theta = parameters_to_vector(studied(model)).detach()
    v = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def gradient(shift):
        vector_to_parameters(theta + shift * v, studied(model))
        total = sum(mean_loss(model, b, causal_lm) * len(b["labels"]) for b in batches) / 3
        return parameters_to_vector(torch.autograd.grad(total, studied(model))).detach()

    finite = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    vector_to_parameters(theta, studied(model))
    assert close(hvp(model, batches, v, causal_lm), finite, 1e-6)
    assert not close(hvp(model, batches[:1], v, causal_lm), finite, 1e-2)  # control: another batch


@pytest.mark.parametrize("curvature, loop", [("hessian", hessian_by_loop), ("ggn", ggn_by_loop)])
def test_exact_influence_is_the_dense_formula(curvature, loop):
    model, train, queries = mlp(4, 5, 3), data(), data(3, seed=7)
    single = lambda batch, i: {key: value[i:i + 1] for key, value in batch.items()}
    gradient = lambda batch, i: torch.cat([g.flatten() for g in torch.autograd.grad(
        mean_loss(model, single(batch, i)), studied(model))])
    Q, M = (torch.stack([gradient(batch, i) for i in range(n)]) for batch, n in ((queries, 3), (train, 11)))
    C = loop(model, train) + 2.0 * torch.eye(Q.shape[1], dtype=torch.float64)
    got = exact_influence(model, queries, train, classify, 2.0, curvature)
    assert close(got, Q @ torch.linalg.solve(C, M.T))
    split = [[single(batch, i) for i in range(n)] for batch, n in ((queries, 3), (train, 11))]
    assert close(exact_influence(model, *split, classify, 2.0, curvature), got)
    assert not close(exact_influence(model, queries, train, classify, 3.0, curvature), got, 0.01)  # control


def test_influence_predicts_ridge_leave_one_out():
    """Linear regression has an exact answer: sign, factor 1/N and weight decay are held at once."""
    n, wd, train, queries = 400, 0.05, data(400, 3, 1, "regression"), data(4, 3, 1, "regression", seed=5)
    model = torch.nn.Linear(3, 1, bias=False).double()

    def refit(i):
        keep = torch.arange(n) != (-1 if i is None else i)
        X, y = train["x"][keep], train["labels"][keep]
        return torch.linalg.solve(X.T @ X / n + wd * torch.eye(3).double(), X.T @ y / n)

    losses = lambda theta: ((queries["x"] @ theta - queries["labels"]) ** 2 / 2)[:, 0]
    with torch.no_grad():
        model.weight.copy_(refit(None).T)
    measured = leave_one_out(refit, losses, n)
    predicted = exact_influence(model, queries, train, classify, damping=wd) / n
    assert measured.shape == predicted.shape == (4, n)
    assert torch.corrcoef(torch.stack([measured.flatten(), predicted.flatten()]))[0, 1] > 0.999
    assert 0.98 < float((measured * predicted).sum() / predicted.square().sum()) < 1.05


def test_the_model_comes_back():
    model, batches = small_lm("gpt2")
    model.train()
    model.transformer.h[0].eval()
    state = lambda: ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
                     [p.grad for p in model.parameters()], model.config._attn_implementation,
                     [id(p) for p in model.parameters()], [float(p.detach().sum()) for p in model.parameters()])
    before, broken = state(), lambda model, batch: 1 / 0
    v = torch.zeros(sum(p.numel() for p in studied(model)))
    calls = [lambda task: hessian(model, batches, task), lambda task: ggn(model, batches, task),
             lambda task: exact_influence(model, batches, batches, task, 100.0),
             lambda task: hvp(model, batches, v, task)]
    for call in calls:
        call(causal_lm)
        assert state() == before
        with pytest.raises(ZeroDivisionError):
            call(broken)
        assert state() == before


def test_dropout_is_off_and_float32_is_reported_in_float64():
    model, batch = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5)).train(), data()
    batch["x"] = batch["x"].float()
    H = hessian(model, batch, classify)
    assert H.dtype == torch.float64 and torch.equal(H, hessian(model, batch, classify)) and model[1].training
    double = {**batch, "x": batch["x"].double()}
    assert close(H, hessian_by_loop(model.double().eval(), double), 1e-5)
    assert hvp(model.float(), batch, torch.ones(15).double(), classify).dtype == torch.float32


MODEL, BATCH = mlp(4, 5, 3), data()


@pytest.mark.parametrize("task, said", [
    (lambda model, batch: model(batch["x"]).sum(1), r"task: it returned a tensor of shape \(11,\); it must return"),
    (lambda model, batch: (model(batch["x"]), batch["labels"][:, None]), r"targets \(11, 1\) do not match"),
    (lambda model, batch: (model(batch["x"]), batch["x"]), r"outputs \(11, 3\) and torch.float64 targets \(11, 4\)"),
    (lambda model, batch: (model(batch["x"]).sum(0, keepdim=True), batch["labels"][:1]), "for 11 examples"),
])
def test_tasks_that_are_none(task, said):
    for call in (lambda: hessian(MODEL, BATCH, task), lambda: hvp(MODEL, BATCH, torch.zeros(43), task),
                 lambda: ggn(MODEL, BATCH, task)):
        with pytest.raises(ValueError, match=said):
            call()


def test_other_bad_input():
    fixed = mlp(4, 3).requires_grad_(False)
    for call in (lambda: hessian(fixed, BATCH, classify), lambda: exact_influence(fixed, BATCH, BATCH, classify)):
        with pytest.raises(ValueError, match="model: no parameter of Sequential requires gradients"):
            call()
    for v in (torch.zeros(42), torch.zeros(43, 1), {"0.weight": torch.zeros(5, 4)}):
        with pytest.raises(ValueError, match="v: got .*the parameters that require gradients are"):
            hvp(MODEL, BATCH, v, classify)
    with pytest.raises(ValueError, match="curvature must be 'hessian' or 'ggn', got 'fisher'"):
        exact_influence(MODEL, BATCH, BATCH, classify, curvature="fisher")
    for damping in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="damping must be a number of at least 0, got"):
            ggn(MODEL, BATCH, classify, damping)
    with pytest.raises(ValueError, match="queries: got no batches"):
        exact_influence(MODEL, [], BATCH, classify)
    for losses in (lambda refitted: torch.zeros(2, 3), lambda refitted: torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"losses: refit\(None\) gave losses of shape .*one a query"):
            leave_one_out(lambda i: i, losses, 3)


def test_singular_and_indefinite_curvature_name_a_damping_that_works():
    for curvature, kind in (("hessian", "indefinite"), ("ggn", "singular")):
        with pytest.raises(ValueError, match=f"the {curvature} .* is {kind}, its smallest eigenvalue") as error:
            exact_influence(MODEL, BATCH, BATCH, classify, curvature=curvature)
        enough = float(str(error.value).split("about ")[1].split(",")[0])
        assert exact_influence(MODEL, BATCH, BATCH, classify, enough, curvature).isfinite().all()
