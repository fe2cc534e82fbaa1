"""fit and score in several processes against one, uneven shares included; a rank that dies, and what is left then."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node

from helpers import EKFACFactors, __main__, checkpoint, fit_ekfac, influence, linear_layers, ranks, streaming
from helpers.ekfac import MATRICES

STORIES = tiny.stories(14)  # 5, 5 and 4 for three ranks: in batches of two, blocks of 3, 3 and 2
KINDS = ("sequence", "token", "output_token", "token_pair", "layer", ("layer", "token"))
SMALL = ["--limit", "151", "--batch-size", "1", "--max-length", "48"]
MORE = ["--limit", "600", *SMALL[2:]]  # ten blocks a rank


def score(model, factors, train, per, out=None):
    queries = tiny.batches(STORIES[:2], 2)
    return influence(model, factors, queries, train, per=per, progress=False, out=out)


def work(rank, size, folder):
    """What each of `size` processes does: its share of the fit, twice, and of the scores of every kind."""
    torch.set_num_threads(1)
    checkpoint.BLOCK = streaming.BLOCK = 1
    dist.init_process_group("gloo", (folder / "store").as_uri(), rank=rank, world_size=size)
    model = tiny.gpt2()
    share = split_dataset_by_node(datasets.Dataset.from_dict({"at": range(len(STORIES))}), rank, size)["at"]
    batches = tiny.batches([STORIES[at] for at in share], 2)
    layers = linear_layers(model, "mlp")
    factors = fit_ekfac(model, batches, layers, checkpoint=folder / "checkpoint", progress=False)
    again = fit_ekfac(model, batches, layers, checkpoint=folder / "checkpoint", progress=False)
    assert all(torch.equal(getattr(factors, m)[l], getattr(again, m)[l]) for m in MATRICES for l in layers)
    factors.save(folder / f"factors.{rank}")
    for number, per in enumerate(KINDS):
        scores = score(model, factors, batches, per, folder / f"{number}.npy")
        assert (scores is None) == (rank > 0)
    try:
        ranks.from_first(lambda: Path(folder / "nothing").stat())
    except OSError:
        (folder / f"told.{rank}").touch()  # an error of rank 0 reaches everyone
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_give_what_one_gives(size, tmp_path):
    torch.multiprocessing.spawn(work, (size, tmp_path), size)
    model, batches = tiny.gpt2(), tiny.batches(STORIES, 2)
    alone = fit_ekfac(model, batches, linear_layers(model, "mlp"), progress=False)
    found = [EKFACFactors.load(tmp_path / f"factors.{rank}") for rank in range(size)]
    for one in found:
        assert (one.n_examples, one.n_tokens) == (alone.n_examples, alone.n_tokens)
        for l in alone.A:
            torch.testing.assert_close(one.A[l], alone.A[l], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(one.S[l], alone.S[l], rtol=1e-12, atol=1e-14)
            assert torch.equal(one.Q_A[l], found[0].Q_A[l]) and torch.equal(one.Lambda[l], found[0].Lambda[l])
        queries = tiny.batches(STORIES[:2], 2)
        torch.testing.assert_close(influence(model, one, queries, batches, progress=False),
                                   influence(model, alone, queries, batches, progress=False), rtol=1e-8, atol=1e-8)
    for number, per in enumerate(KINDS):
        there, expected = np.load(tmp_path / f"{number}.npy"), score(model, found[0], batches, per)
        assert there.shape == expected.shape
        assert np.allclose(there, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max())), per
    part = fit_ekfac(model, batches[:-1], linear_layers(model, "mlp"), progress=False)  # control: a lost batch is seen
    assert not all(torch.allclose(part.A[l], alone.A[l], rtol=1e-6) for l in alone.A)
    assert len(list(tmp_path.glob("told.*"))) == size
    with pytest.raises(ValueError, match=f"ranks is {size} there and 1 here"):
        fit_ekfac(model, batches, linear_layers(model, "mlp"), checkpoint=tmp_path / "checkpoint", progress=False)


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "helpers"]
    return subprocess.Popen([*command, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_rank(parent, rank):
    """SIGKILL for the worker of this rank, by its id."""
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{pid}/environ').read_text()}":
            os.kill(int(pid), signal.SIGKILL)
            return
    raise AssertionError(f"no rank {rank} among the children of {parent}")


def dies(argv, ready):
    """Kills rank 1 of the command when ready(), which ends it with a message of the other one."""
    running, deadline = torchrun(*argv), time.monotonic() + 240
    while not ready():
        assert time.monotonic() < deadline and running.poll() is None, running.communicate()[1]
        time.sleep(0.02)
    kill_rank(running.pid, 1)
    said = running.communicate(timeout=120)[1]
    assert running.returncode and "rank 0 of 2: " in said and "goes on where it was" in said, said


def goes_on(argv):
    """The same command to its end."""
    running = torchrun(*argv)
    said = running.communicate(timeout=300)[1]
    assert not running.returncode and "going on after" in said, said


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the rank to kill in /proc")
def test_a_rank_that_dies_ends_the_job_which_then_goes_on(tmp_path):
    job, alone, fit = tmp_path / "job", tmp_path / "alone", ["fit", *SMALL, "--layers", r"h\.3\.mlp", "--out"]
    dies([*fit, str(job)], (job / "checkpoint" / "second_moments.1.safetensors").exists)
    assert not (job / "factors.safetensors").exists()
    goes_on([*fit, str(job)])
    assert __main__.main([*fit, str(alone), "--quiet"]) == 0
    one, two = EKFACFactors.load(alone), EKFACFactors.load(job)
    assert one.n_tokens == two.n_tokens
    for l in one.A:
        for m in ("A", "S", "Lambda"):  # float32 sums in other groups
            assert (getattr(one, m)[l] - getattr(two, m)[l]).norm() < 1e-5 * getattr(one, m)[l].norm(), (m, l)

    ask, note = ["score", *MORE, "--factors", str(job), "--query", "Tom was", " happy.", "--out"], job / "s.json"
    dies([*ask, str(job / "s.npy")], lambda: note.exists() and json.loads(note.read_text("utf-8"))["blocks"] > 0)
    assert not (job / "s.npy").exists()
    goes_on([*ask, str(job / "s.npy")])
    assert __main__.main([*ask, str(alone / "s.npy"), "--quiet"]) == 0
    there, expected = np.load(job / "s.npy"), np.load(alone / "s.npy")
    assert there.shape == expected.shape == (1, int(MORE[1]))
    assert np.abs(there - expected).max() < 1e-5 * np.abs(expected).max()
