"""On another device than the CPU all helpers work, give the CPU's numbers, and mix no devices (see pretend.py).

Run by test_devices.py in a process of its own: PyTorch cannot forget a device that was registered.
"""

from dataclasses import replace

import pytest
import torch
from pretend import DEVICE, Made, Pretend
from safetensors.torch import save_file

from helpers import (
    EKFACFactors,
    cg,
    check_setup,
    checkpoint,
    completions,
    damping_sweep,
    ekfac,
    exact_influence,
    fit_ekfac,
    hvp,
    influence,
    jobs,
    linear_layers,
    lissa,
    load_lm,
    load_stories,
    self_influence,
    sequence_gradients,
    tokenize,
    top_k,
)

QUIET = {"progress": False}
PER = ["sequence", "token", "output_token", "token_pair", "layer", ("layer", "token")]


@pytest.fixture(scope="module")
def problem():
    """(model on the CPU, its twin on the device, layers, training batches, queries), all small."""
    lm, twin = load_lm(), load_lm().model
    train = tokenize(load_stories(limit=6)["text"], lm.tokenizer, max_length=40, batch_size=3)
    queries = completions([("The cat sat on the", " mat."), ("One day, a", " girl ran.")], lm.tokenizer)
    with Made():
        twin.to(DEVICE).tie_weights()  # tensors written in Python lose the tie between embedding and head
        yield lm.model, twin, linear_layers(lm.model, r"h\.1\.(mlp|attn)"), train, queries


@pytest.fixture
def files(monkeypatch):
    """safetensors reads CUDA's memory, but not that of a device written in Python."""
    for module in (ekfac, checkpoint):
        monkeypatch.setattr(module, "save_file", lambda tensors, path, metadata: save_file(
            {name: value.cpu() for name, value in tensors.items()}, path, metadata))


def moved(batches):
    return [{name: value.to(DEVICE) for name, value in batch.items()} for batch in batches]


def close(x, y):
    assert isinstance(x, Pretend) and x.device == DEVICE
    return float((x.cpu() - y).norm()) <= 1e-4 * float(y.norm())  # attention goes by another path there


def test_the_device_refuses_what_cuda_refuses(problem):
    model, twin, layers, train, _ = problem
    x = torch.ones(2, 3).to(DEVICE)
    assert (x + 1).sum().item() == 12 and bool((x.cpu() == 1).all())
    assert type(x[torch.tensor([0])]) is type(torch.zeros(2, device=DEVICE)) is Pretend
    for mixed in (lambda: x + torch.ones(2, 3), lambda: x.mul_(torch.ones(3)), lambda: torch.ones(2, 2) @ x,
                  lambda: torch.ones(2)[x[0, :1].long()], lambda: fit_ekfac(twin, train, layers, **QUIET),
                  lambda: fit_ekfac(model, moved(train), layers, **QUIET)):
        with pytest.raises(RuntimeError, match="some on the CPU"):
            mixed()
    with pytest.raises(TypeError, match="no numpy form"):
        x.numpy()


def test_factors_and_all_kinds_of_scores(problem, files, tmp_path):
    model, twin, layers, train, queries = problem
    there, asked = moved(train), moved(queries)
    factors = fit_ekfac(model, train, layers, **QUIET)
    fitted = fit_ekfac(twin, there, layers, checkpoint=tmp_path / "fit", **QUIET)
    for matrix in ("A", "S", "Lambda"):
        assert all(close(getattr(fitted, matrix)[name], getattr(factors, matrix)[name]) for name in layers)
    again = fit_ekfac(twin, there, layers, checkpoint=tmp_path / "fit", **QUIET)  # from the sums on disk
    assert all(torch.equal(again.Lambda[name].cpu(), fitted.Lambda[name].cpu()) for name in layers)
    fitted.save(tmp_path)
    loaded = EKFACFactors.load(tmp_path)  # on the CPU; `influence` brings P(∇L) to the model
    for per in PER:
        expected = influence(model, loaded, queries, train, per=per, **QUIET)
        for matrices in (fitted, loaded):
            assert close(influence(twin, matrices, asked, there, per=per, **QUIET), expected), per
    expected = influence(model, loaded, queries, train, **QUIET)
    assert close(influence(twin, fitted, asked, there, rank=97, **QUIET), expected)  # the full rank
    streamed = influence(twin, fitted, asked, there, out=tmp_path / "scores.npy", **QUIET)
    assert float((streamed - expected).norm()) <= 1e-4 * float(expected.norm())
    assert close(self_influence(twin, fitted, there, **QUIET), self_influence(model, loaded, train, **QUIET))
    sweep, whole = (damping_sweep(*some, [0.1, 1.0], **QUIET)["score"].to_numpy()
                    for some in ((twin, fitted, asked, there), (model, loaded, queries, train)))
    assert abs(sweep - whole).max() <= 1e-4 * abs(whole).max()
    best = [top_k(scores, 2)["train"].tolist() for scores in (influence(twin, fitted, asked, there, **QUIET), expected)]
    assert best[0] == best[1]


def test_gradients_and_the_check_of_a_set_up(problem):
    model, twin, layers, train, _ = problem
    gradients, expected = sequence_gradients(twin, moved(train), layers), sequence_gradients(model, train, layers)
    assert all(close(gradients[name], expected[name]) for name in layers)
    found = check_setup(twin, moved(train), layers)
    assert found["passed"].all(), found.to_string()


def test_jobs(problem, files, tmp_path):
    about = {"query": [("The cat", " sat")], "limit": 6, "max_length": 40, "progress": False}
    jobs.fit(out=tmp_path, layers=r"h\.1\.mlp", limit=6, max_length=40, device="pretend", progress=False)
    scores = jobs.score(factors=tmp_path, out=tmp_path / "there.npy", device="pretend", **about)
    replace(EKFACFactors.load(tmp_path), fingerprint="").save(tmp_path)  # the tie is lost there (see above)
    expected = jobs.score(factors=tmp_path, out=tmp_path / "here.npy", device="cpu", **about)
    assert float((scores - expected).norm()) <= 1e-4 * float(expected.norm())


def test_exact_influence_and_solvers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    batch = {"x": torch.randn(8, 3).double(), "labels": torch.randint(3, (8,))}
    task = lambda model, batch: (model(batch["x"]), batch["labels"])
    how = {"task": task, "damping": 0.3, "curvature": "ggn"}
    expected = exact_influence(model, batch, batch, **how)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    product = hvp(model, batch, v, task)
    with Made():
        (there,), v = moved([batch]), {name: value.to(DEVICE) for name, value in v.items()}
        model.to(DEVICE)
        got = exact_influence(model, there, there, **how)
        assert torch.allclose(got.cpu(), expected, rtol=1e-8, atol=1e-10)
        got = hvp(model, there, v, task)
        assert all(torch.allclose(got[name].cpu(), product[name]) for name in product)
        H = torch.diag(torch.tensor([1.0, 2.0, 3.0]).double()).to(DEVICE)
        w = torch.ones(3).double().to(DEVICE)
        for solution in (cg(lambda x: H @ x, w, damping=0.5), lissa(lambda x: H @ x, w, 0.5, scale=4.0, depth=200)):
            assert torch.allclose(solution.x.cpu(), 1 / torch.tensor([1.5, 2.5, 3.5]).double(), rtol=1e-4)
