"""Another implementation: scores and token scores of kronfluence 1.0.1 on the bundled model, from a committed table."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import fit_ekfac, influence, linear_layers, load_lm, load_stories, tokenize

TABLE = Path(__file__).parent / "kronfluence_scores.safetensors"
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def setting():
    lm = load_lm()
    train = tokenize(list(load_stories(limit=256)["text"]), lm.tokenizer)
    queries = tokenize(list(load_stories(split="validation", limit=8)["text"]), lm.tokenizer)
    factors = fit_ekfac(lm.model, train, linear_layers(lm.model, "mlp|attn"), labels="true", **QUIET)
    return lm.model, factors, queries, train


def disagreement(ours, theirs):
    """The largest ‖Δ‖/‖score‖ of a query."""
    ours, theirs = ours[..., : theirs.shape[-1]].flatten(1), theirs.flatten(1)
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


@pytest.mark.parametrize("per, stories", [("sequence", 64), ("token", 16)])
def test_scores_equal_kronfluences(setting, per, stories):
    model, factors, queries, train = setting
    theirs = load_file(TABLE)[per]
    ours = influence(model, factors, queries, train[: stories // 16], per=per, **QUIET)
    assert ours.shape[:2] == theirs.shape[:2] == (8, stories)
    assert disagreement(ours, theirs) <= 1e-5
    turned = dataclasses.replace(factors, Q_S={name: Q.T for name, Q in factors.Q_S.items()})
    assert disagreement(influence(model, turned, queries, train[: stories // 16], per=per, **QUIET), theirs) > 1e-2
    assert not torch.equal(ours, theirs)  # two implementations, not one read twice
