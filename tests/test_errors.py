"""Errors that the other tests leave out: labels outside the classes, changes in place, a LiSSA that grows slowly."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from helpers import (
    causal_lm,
    check_setup,
    classification,
    fit_ekfac,
    hessian,
    influence,
    jobs,
    linear_layers,
    lissa,
    self_influence,
    tokenize,
)
from helpers.gradients import token_gradients
from helpers.head import head_gradient
from helpers.layers import frozen

QUIET = {"progress": False}


class Bend(torch.nn.Module):
    """Two layers; the outputs of both are changed in place, and the input of the second where told."""

    def __init__(self, after):
        super().__init__()
        self.first, self.second, self.after = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2), after

    def forward(self, inputs):
        hidden = torch.relu_(self.first(inputs))
        outputs = self.second(hidden).add_(1.0)
        return outputs + hidden.mul_(2.0).sum() if self.after else outputs.mul_(3.0)


def test_changes_in_place():
    torch.manual_seed(0)
    batch = {"inputs": torch.randn(4, 3), "labels": torch.randn(4, 2)}
    task = lambda model, batch: (model(batch["inputs"]), batch["labels"])
    model = Bend(after=False)
    outputs = (torch.relu(model.first(batch["inputs"])) @ model.second.weight.T + model.second.bias) + 1.0
    loss = 0.5 * (3.0 * outputs - batch["labels"]).square().sum()
    with frozen(model):
        got = token_gradients(model, batch, ["first", "second"], task)
    for name in ("first", "second"):
        right = torch.autograd.grad(loss, model.get_submodule(name).weight, retain_graph=True)[0]
        assert torch.allclose((got.outputs[name].transpose(1, 2) @ got.inputs[name]).sum(0)[:, :-1], right, rtol=1e-5)
    with pytest.raises(ValueError, match="input of 'second' is changed in place after it, .*make that .* out of place"):
        fit_ekfac(Bend(after=True), [batch], ["first", "second"], task=task, **QUIET)


@pytest.mark.parametrize("task, told", [
    (lambda model, batch: model(batch["x"]).square().sum(1), "it returned a tensor of shape .*; it must return"),
    (lambda model, batch: None, "it returned NoneType"),
    (lambda model, batch: (model(batch["x"]), batch["y"][:, 0]), r"outputs ..*, 2. and .*float32 targets .* do not"),
    (lambda model, batch: (model(batch["x"])[:3], batch["y"][:3]), r"do not match for . examples"),
])
def test_a_task_that_does_not_return_outputs_and_targets(task, told):
    torch.manual_seed(0)
    model, good = torch.nn.Sequential(torch.nn.Linear(3, 2)), lambda model, batch: (model(batch["x"]), batch["y"])
    batch = {"x": torch.randn(4, 3), "y": torch.randn(4, 2)}
    factors = fit_ekfac(model, [batch], ["0"], task=good, **QUIET)
    for call in (lambda: fit_ekfac(model, [batch], ["0"], task=task, **QUIET), lambda: hessian(model, batch, task),
                 lambda: influence(model, factors, [batch], [batch], task=task, **QUIET),
                 lambda: self_influence(model, factors, [batch], task=task, **QUIET),
                 lambda: check_setup(model, [batch], ["0"], task)):
        with pytest.raises(ValueError, match=f"task: .*{told}"):
            call()


def test_layers_that_are_frozen_take_part_and_stay_frozen():
    """Influence is a derivative at the weights, whether or not a user would train them."""
    torch.manual_seed(0)
    model = tiny.gpt2()
    layers, batches = linear_layers(model, "mlp"), tiny.batches(tiny.stories(6), 2)
    wanted = influence(model, fit_ekfac(model, batches, layers, **QUIET), batches[:1], batches, **QUIET)
    model.requires_grad_(False)
    found = influence(model, fit_ekfac(model, batches, layers, **QUIET), batches[:1], batches, **QUIET)
    assert torch.equal(found, wanted) and float(found.abs().max()) > 0
    assert not any(p.requires_grad for p in model.parameters())


def test_lissa_that_grows_slowly_is_told_from_one_that_settles():
    H = torch.diag(torch.tensor([-0.7, 1.0, 2.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="slowly: its steps still grew after 500"):
        lissa(lambda u: H @ u, torch.ones(3, dtype=torch.float64), 0.0, scale=100.0, depth=500)


@pytest.mark.parametrize("label", [-1, tiny.VOCABULARY, 10_000])
@pytest.mark.parametrize("labels", ["sampled", "true"])
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_a_label_outside_the_vocabulary_is_refused_wherever_it_stands(kind, labels, label):
    """Not only in the first batch, which the general path looks at: a negative index would count from the end."""
    model = tiny.MODELS[kind]()
    layers, batches = linear_layers(model, "mlp"), tiny.batches(tiny.stories(8), 2)
    factors = fit_ekfac(model, batches, layers, **QUIET)
    batches[3]["labels"][1, 2] = label
    for task in (causal_lm, lambda model, batch: causal_lm(model, batch)):
        for call in (lambda task=task: fit_ekfac(model, batches, layers, task=task, labels=labels, **QUIET),
                     lambda task=task: influence(model, factors, batches[:1], batches, task=task, **QUIET),
                     lambda task=task: influence(model, factors, batches, batches[:1], task=task, **QUIET),
                     lambda task=task: self_influence(model, factors, batches, task=task, **QUIET)):
            with pytest.raises(IndexError, match=f"{label} is out of"):
                call()


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_is_refused(label):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3)).double()
    good = {"input": torch.randn(5, 4).double(), "labels": torch.tensor([0, 1, 2, 0, 1])}
    bad = {**good, "labels": torch.tensor([0, 1, label, 0, 1])}
    for labels in ("sampled", "true"):
        with pytest.raises(IndexError, match=f"{label} is out of"):
            fit_ekfac(model, [good, bad], ["0"], task=classification, labels=labels, **QUIET)
    with pytest.raises(IndexError, match=f"{label} is out of"):
        hessian(model, bad, classification)
    with pytest.raises(IndexError, match=f"labels: {label} is out of the classes 0 to 2; -100"):
        head_gradient(good["input"], model[0], bad["labels"])



def test_long_jobs_say_what_is_missing(tmp_path, monkeypatch):
    model = tiny.gpt2()
    fit_ekfac(model, tiny.batches(tiny.stories(4)), linear_layers(model, "c_fc"), **QUIET).save(tmp_path)
    (tmp_path / "train.txt").write_text("One dog.\n")
    with pytest.raises(ValueError, match="top=3 ranks stories by their scores: it needs per='sequence', got 'token'"):
        jobs.score(factors=tmp_path, out=tmp_path / "s.npy", per="token", top=3, progress=False)
    with pytest.raises(ValueError, match="query: none given; give one or more, each a prompt and a completion"):
        jobs.score(stories=tmp_path, factors=tmp_path, out=tmp_path / "s.npy", progress=False)
    monkeypatch.setattr(jobs, "ranks", SimpleNamespace(rank=lambda: 0, size=lambda: 2))
    with pytest.raises(ValueError, match="1 stories for 2 ranks: start at most one rank a story"):
        jobs.fit(stories=tmp_path, out=tmp_path / "fit", progress=False)


def test_arguments_of_another_kind_are_named():
    model, train = tiny.gpt2(), tiny.batches(tiny.stories(4))
    layers = linear_layers(model, "mlp")
    factors = fit_ekfac(model, train, layers, **QUIET)
    ask = lambda *given, **named: influence(*given, **named, **QUIET)
    cases = [
        (lambda: ask(model, "out/job", train, train), "factors must be EKFACFactors, .* got str"),
        (lambda: self_influence(model, train, factors), "factors must be EKFACFactors, .* got list"),
        (lambda: linear_layers("gpt2", "mlp"), "model must be a torch.nn.Module, got str"),
        (lambda: linear_layers(SimpleNamespace(model=model), "mlp"), "got SimpleNamespace: give its .model"),
        (lambda: ask(SimpleNamespace(model=model), factors, train, train), "got SimpleNamespace: give its .model"),
        (lambda: linear_layers(model, ["mlp"]), "the pattern is a list; give one regular expression"),
        (lambda: fit_ekfac(model, train, layers, task="causal_lm", **QUIET), "task must be a function"),
        (lambda: tokenize(SimpleNamespace(), ["text"]), "texts is a SimpleNamespace; give a list of strings"),
        (lambda: fit_ekfac(model, train, dict.fromkeys(layers), **QUIET), "layers must be a list of names, got {"),
        (lambda: ask(model, factors, train, train, damping="0.1"), "damping must be None or a number .* got 0.1"),
        (lambda: ask(model, factors, train, train, rank=4.0), "rank must be None or a whole number .* got 4.0"),
    ]
    for call, said in cases:
        with pytest.raises((TypeError, ValueError), match=said):
            call()


def test_batches_and_outputs_of_another_kind_are_named():
    model, (batch,) = tiny.gpt2(), tiny.batches(tiny.stories(4))
    layers = linear_layers(model, "mlp")
    for name in ("input_ids", "labels"):
        with pytest.raises(ValueError, match=f"batch 0: {name} must be integers, got torch.float32"):
            fit_ekfac(model, [batch | {name: batch[name].float()}], layers, **QUIET)
    with pytest.raises(ValueError, match=r"got Loader; give a list of batches, as list\(loader\) makes"):
        fit_ekfac(model, type("Loader", (), {"__iter__": lambda self: iter([batch])})(), layers, **QUIET)
    with pytest.raises(ValueError, match=r"it returned \(dict, Tensor\); it must return"):
        fit_ekfac(model, [batch], layers, lambda model, batch: ({"logits": 0}, batch["labels"]), **QUIET)
    with pytest.raises(ValueError, match="depend on none of the layers, as if they were detached"):
        fit_ekfac(model, [batch], layers, lambda *given: tuple(x.detach() for x in causal_lm(*given)), **QUIET)
