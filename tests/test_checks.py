"""pick and check_close: what must pass passes, and every kind of disagreement is refused."""

import math

import numpy as np
import pytest
import torch

from helpers.checks import check_close, pick


def test_pick_follows_the_environment(monkeypatch):
    for value, expected in ((None, 400), ("", 400), ("0", 400), ("1", 20)):
        monkeypatch.delenv("FAST", raising=False)
        if value is not None:
            monkeypatch.setenv("FAST", value)
        assert pick(400, fast=20) == expected
    monkeypatch.setenv("FAST", "yes")
    with pytest.raises(ValueError, match="FAST='yes'.*FAST=1"):
        pick(400, fast=20)


def test_agreement_prints_one_line(capsys):
    check_close("two halves", torch.tensor([1.0, 2.0 + 3e-12], dtype=torch.float64), np.array([1.0, 2.0]), rtol=1e-10)
    assert capsys.readouterr().out == "✓ two halves: max relative difference 1.5e-12 (rtol 1e-10)\n"
    check_close("scalars", 2, torch.tensor(2))
    check_close("a zero needs an absolute bound", [1e-9], [0.0], atol=1e-8)
    check_close("zero is zero", [0.0, 0.0], [0.0, 0.0])
    check_close("bfloat16 and gradients", torch.ones(2, dtype=torch.bfloat16, requires_grad=True), [1.0, 1.0])
    check_close("dicts", {"a": [1.0], "b": [[2.0]]}, {"b": [[2.0]], "a": [1.0]})
    check_close("one bound for each key", {"a": [1e-9], "b": [1e6]}, {"a": [0.0], "b": [1e6 + 1e-3]}, atol=1e-8)
    assert capsys.readouterr().out.count("\n") == 6


def test_the_measure_is_the_larger_of_two_norms(capsys):
    one_large = np.ones(10_000)
    one_large[7] += 1e-3  # Euclidean 1e-5, maximum 1e-3
    with pytest.raises(AssertionError, match=r"1\.0e-03.*at \(7,\)"):
        check_close("one entry off", one_large, np.ones(10_000), rtol=1e-4)
    reference = np.full(10_000, 1e-3)
    reference[0] = 1.0  # one outlier sets the maximum; the other entries are all wrong by their own size
    off = reference + 1e-3
    assert np.abs(off - reference).max() / reference.max() < 2e-3
    with pytest.raises(AssertionError, match="1.0e-01"):
        check_close("all entries off", off, reference, rtol=1e-2)


@pytest.mark.parametrize(
    "x, y, message",
    [
        ([1.0, 2.0], [1.0, 2.1], r"4\.8e-02 \(rtol 1e-06.*at \(1,\) of \(2,\): 2 against 2\.1"),
        ([1.0, -2.0], [1.0, 2.0], "2.0e"),
        ([1.0], [0.0], "inf"),
        ([1.0, math.nan], [1.0, 2.0], "1 of 2 entries of x are NaN"),
        ([1.0, 2.0], [math.nan, math.nan], "2 of 2 entries of y are NaN"),
        ([math.inf], [math.inf], "infinite"),
        ([[1.0, 2.0]], [1.0, 2.0], r"\(1, 2\) and \(2,\)"),
        (1.0, [1.0, 1.0], "cannot compare shapes"),
        ([], [], "not empty"),
        ({"a": [1.0]}, {"b": [1.0]}, "keys differ"),
        ({"a": [1.0]}, [1.0], "keys differ"),
        ({}, {}, "nothing to compare"),
        ({"small": [1e-9], "big": [1.0]}, {"small": [2e-9], "big": [1.0]}, r"off\['small'\].*5\.0e-01"),
    ],
)
def test_disagreement_raises_with_the_numbers(x, y, message, capsys):
    with pytest.raises(AssertionError, match=message):
        check_close("off", x, y)
    assert capsys.readouterr().out == ""
