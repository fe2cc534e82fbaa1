"""LiSSA on several processes against one, and its sampled Gauss-Newton products against dense algebra."""

import os
import tempfile

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from helpers import classification, ggn, lissa, regression
from helpers.distributed_lissa import distributed_lissa, sampled_ggn

DAMPING, SCALE = 0.1, 8.0


def problem(task=classification, n=12):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    labels = torch.randint(3, (n,)) if task is classification else torch.randn(n, 3, dtype=torch.float64)
    train = {"input": torch.randn(n, 3, dtype=torch.float64), "labels": labels}
    return model, train, torch.randn(31, 2, dtype=torch.float64)


def refuse(model, batch):
    raise RuntimeError("this task refuses")


@pytest.mark.parametrize("task", [classification, regression])
def test_sampled_products_are_those_of_the_dense_matrix_on_the_drawn_batch(task):
    model, train, v = problem(task)
    rows = torch.randint(12, (5,), generator=torch.Generator().manual_seed(3))
    G = ggn(model, {key: value[rows] for key, value in train.items()}, task)
    product = sampled_ggn(model, train, task, 5)
    torch.testing.assert_close(product(v, torch.Generator().manual_seed(3)), G @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(product(v[:, 0], torch.Generator().manual_seed(3)), G @ v[:, 0], rtol=1e-10, atol=1e-12)
    other = product(v, torch.Generator().manual_seed(4))  # negative control: another batch, another matrix
    assert (other - G @ v).norm() > 1e-3 * v.norm()


def test_the_number_of_processes_changes_nothing_and_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, train, v = problem()
    alone = lissa(sampled_ggn(model, train, classification, 2), v, DAMPING, SCALE, 20, repeats=3, seed=7).x
    shared, seconds = distributed_lissa(model, train, v, classification, DAMPING, SCALE, 20, 3, 2, 7, 2, 120)
    torch.testing.assert_close(shared, alone, rtol=1e-12, atol=1e-14)
    assert seconds > 0 and not os.listdir(tmp_path)
    another = lissa(sampled_ggn(model, train, classification, 2), v, DAMPING, SCALE, 20, repeats=2, seed=7).x
    assert (another - alone).norm() > 1e-6 * alone.norm()  # negative control: one run dropped is seen


def test_errors_come_back_and_time_is_limited(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, train, v = problem()
    with pytest.raises(ValueError, match="processes=3 with repeats=2"):
        distributed_lissa(model, train, v, classification, DAMPING, SCALE, 5, 2, processes=3)
    with pytest.raises(ProcessRaisedException, match="this task refuses"):
        distributed_lissa(model, train, v, refuse, DAMPING, SCALE, 5, 1, processes=1, timeout=120)
    with pytest.raises(TimeoutError, match="timeout=0.5"):
        distributed_lissa(model, train, v, classification, DAMPING, SCALE, 10**9, 1, processes=1, timeout=0.5)
    assert not os.listdir(tmp_path)
