"""Jobs that are killed at any moment go on with the same numbers; what is damaged or foreign is refused."""

import inspect
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import (
    __main__,
    checkpoint,
    ekfac,
    fit_ekfac,
    influence,
    jobs,
    linear_layers,
    load_lm,
    load_stories,
    streaming,
    tokenize,
)
from helpers.ekfac import MATRICES
from helpers.tasks import causal_lm

VICTIM = Path(__file__).with_name("victim.py")
SMALL = ["--limit", "150", "--batch-size", "1", "--max-length", "48", "--layers", r"h\.3\.mlp"]  # five blocks
STORIES = tiny.stories(14)
BATCHES = tiny.batches(STORIES, 2)


class Stop(Exception):
    pass


class Dying:
    """causal_lm that stops at its n-th call, as a kill would; the first three decide on the fast paths.

    What is counted is no attribute, which would make it another task for each n.
    """

    left = {}

    def __init__(self, n=0):
        Dying.left[id(self)] = n

    def __call__(self, model, batch):
        Dying.left[id(self)] -= 1
        if Dying.left[id(self)] == 0:
            raise Stop
        return causal_lm(model, batch)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, request):
    if "kill_9" not in request.node.name:
        monkeypatch.setattr(checkpoint, "BLOCK", 2)
        monkeypatch.setattr(checkpoint, "SHARE", float("inf"))  # every block is saved
        monkeypatch.setattr(ekfac, "KEEP_BYTES", 0)  # and the second pass calls the model again
        monkeypatch.setattr(streaming, "BLOCK", 2)


def same(one, other):
    return all(torch.equal(getattr(one, m)[l], getattr(other, m)[l]) for m in MATRICES for l in one.A)


def fit(model, folder, task=causal_lm, batches=BATCHES, **changes):
    arguments = {"layers": linear_layers(model, "mlp"), "task": task, "progress": False} | changes
    return fit_ekfac(model, batches, checkpoint=folder, **arguments)


def score(model, factors, out, task=causal_lm, train=BATCHES, **changes):
    return influence(model, factors, BATCHES[:1], train, task=task, out=out, progress=False, **changes)


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_a_fit_that_is_stopped_anywhere_ends_with_the_same_numbers(kind, tmp_path):
    model = tiny.MODELS[kind]()
    whole = fit(model, None, Dying())
    for n in (6, 7, 8, 6):  # calls until the stop: in the first pass twice, in the second, and there again
        with pytest.raises(Stop):
            fit(model, tmp_path, Dying(n))
    factors = fit(model, tmp_path, Dying())
    assert same(factors, whole) and (factors.n_examples, factors.n_tokens) == (whole.n_examples, whole.n_tokens)
    last = Dying()
    assert same(fit(model, tmp_path, last), whole) and Dying.left[id(last)] == 0  # complete: nothing runs again


@pytest.mark.parametrize("per", ["sequence", "token", "output_token", "token_pair", "layer", ("layer", "token")])
def test_scores_on_disk_are_those_in_memory_also_after_stops(per, tmp_path):
    model, out = tiny.llama(), tmp_path / "new" / "scores.npy"
    factors = fit(model, None)
    expected = influence(model, factors, BATCHES[:1], BATCHES, per=per, progress=False)
    for n in [{"output_token": 7, "token_pair": 16}.get(per, 8)] * 2:  # each of the two stores one block
        with pytest.raises(Stop):
            score(model, factors, out, Dying(n), per=per)
        assert not out.exists()
    scores = score(model, factors, out, Dying(), per=per)
    atol = 1e-12 * float(expected.abs().max())
    assert scores.shape == expected.shape and torch.allclose(scores, expected, rtol=1e-10, atol=atol)
    other = score(model, factors, tmp_path / "whole.npy", Dying(), per=per)
    assert torch.equal(scores, other) and np.array_equal(np.load(out), other.numpy())
    assert sorted(path.name for path in out.parent.iterdir()) == ["scores.json", "scores.npy", "scores.npy.lock"]


def test_a_checkpoint_of_another_job_is_refused_by_what_differs(tmp_path):
    model, batches = tiny.gpt2(), [dict(batch) for batch in BATCHES]
    fit(model, tmp_path)
    for changes, named in (({"seed": 1}, "seed is '0' there and '1' here"), ({"labels": "true"}, "labels is 'sampled'"),
                           ({"layers": linear_layers(model, "attn")}, "layers is"), ({"task": Dying()}, "task is"),
                           ({"batches": batches[::-1]}, r"data \(the batches"),
                           ({"batches": batches[:-1]}, r"data \(the batches")):
        with pytest.raises(ValueError, match=f"(?s)another job: [^;]*{named}.*Name another place, or delete it"):
            fit(model, tmp_path, **changes)
    with torch.no_grad():
        model.transformer.ln_f.bias += 1e-9  # not a studied layer, but every gradient depends on it
    with pytest.raises(ValueError, match="another job: weights is"):
        fit(model, tmp_path)


def test_scores_of_another_job_are_refused_by_what_differs(tmp_path):
    model, out = tiny.gpt2(), tmp_path / "scores.npy"
    factors = fit(model, None)
    score(model, factors, out)
    before = out.read_bytes()
    for changes, named in (({"damping": 0.5}, "damping is None there and 0.5 here"), ({"rank": 2}, "rank is None"),
                           ({"per": "layer"}, "per is 'sequence'"), ({"train": BATCHES[::-1]}, r"data \(the batches"),
                           ({"factors": fit(model, None, seed=3)}, "Lambda is")):
        with pytest.raises(ValueError, match=f"another job: [^;]*{named}"):
            score(model, **({"factors": factors, "out": out} | changes))
    with pytest.raises(ValueError, match=r"queries \(their batches\) is"):
        influence(model, factors, BATCHES[1:2], BATCHES, out=out, progress=False)
    assert out.read_bytes() == before
    out.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="no .json beside it"):
        score(model, factors, out)
    with pytest.raises(ValueError, match="ends in .npy"):
        score(model, factors, tmp_path / "scores.pt")


@pytest.mark.parametrize("damage", ["half", "header", "empty", "flipped", "pickle", "foreign"])
def test_a_damaged_checkpoint_is_never_half_loaded(damage, tmp_path):
    model = tiny.gpt2()
    fit(model, tmp_path)
    path = tmp_path / "second_moments.0.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes({"half": data[:len(data) // 2], "header": data[:20], "empty": b"", "flipped": data,
                      "pickle": pickle.dumps({"sums": 1}), "foreign": foreign()}[damage])
    with pytest.raises(ValueError, match="is damaged.*delete it|not written by this package"):
        fit(model, tmp_path)
    path.unlink()
    assert same(fit(model, tmp_path), fit(model, None))


def foreign():
    from safetensors.torch import save

    return save({"sums": torch.zeros(3)})


@pytest.mark.parametrize("damage", ["half", "gone", "dtype", "note", "list", "pickle"])
def test_damaged_scores_are_never_half_loaded(damage, tmp_path):
    model, out = tiny.gpt2(), tmp_path / "scores.npy"
    factors = fit(model, None)
    with pytest.raises(Stop):
        score(model, factors, out, Dying(11))
    partial, note = tmp_path / "scores.npy.partial", out.with_suffix(".json")
    assert json.loads(note.read_text())["blocks"] > 0
    {"half": lambda: partial.write_bytes(partial.read_bytes()[:-40]), "gone": partial.unlink,
     "dtype": lambda: partial.write_bytes(partial.read_bytes().replace(b"<f8", b"<i8")),
     "note": lambda: note.write_text(note.read_text()[:50]), "list": lambda: note.write_text("[1, 2]"),
     "pickle": lambda: partial.write_bytes(pickle.dumps([1]))}[damage]()
    with pytest.raises(ValueError, match="out: .*(damaged|holds int64).*(begin again|delete it)"):
        score(model, factors, out, Dying())


def test_a_failing_disk_leaves_what_was_there(tmp_path, monkeypatch):
    model = tiny.gpt2()
    with pytest.raises(Stop):
        fit(model, tmp_path, Dying(11))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            fit(model, tmp_path, Dying())
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    assert same(fit(model, tmp_path, Dying()), fit(model, None, Dying()))


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="second_moments.*could not be written"):
            fit(tiny.gpt2(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_eigenvectors_that_differ_restart_the_second_pass(tmp_path, monkeypatch, caplog):
    model, whole = tiny.gpt2(), fit(tiny.gpt2(), None)
    with pytest.raises(Stop):
        fit(model, tmp_path, Dying(13))
    assert (tmp_path / "eigenvalues.0.safetensors").exists()
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
    factors = fit(model, tmp_path, Dying())
    assert "this pass begins again" in caplog.text
    assert all(torch.allclose(factors.Lambda[l], whole.Lambda[l], rtol=1e-10) for l in whole.A)


def test_batches_made_on_demand_are_those_of_tokenize(tmp_path):
    lm, texts = load_lm(), load_stories(limit=75)["text"]
    stories = jobs.stories_on_disk("bundled", tmp_path, 75)
    assert stories["text"] == texts and not list(tmp_path.iterdir())
    lazy, whole = jobs.StoryBatches(stories, lm.tokenizer, 64, 8), tokenize(texts, lm.tokenizer, 64, 8)
    assert len(lazy) == len(whole) == 10
    for some, other in ((list(lazy), whole), (lazy[3:5], whole[3:5]), ([lazy[-1]], whole[-1:]), (lazy[12:14], [])):
        assert len(some) == len(other)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(some, other) for name in b)


@pytest.mark.parametrize("rows,error", [('{"text": "a b c"}\n{"story": 1}\n', "row 1 of .* has no string"),
                                        ('{"text": " "}\n', "holds no story"), ('{"text": \n', "could not be loaded"),
                                        ('{"text": "\\ud83d"}\n', "row 0 of .* is the lone surrogate")])
def test_bad_stories_are_named(rows, error, tmp_path):
    (tmp_path / "train.jsonl").write_text(rows)
    with pytest.raises((ValueError, OSError), match=error):
        jobs.stories_on_disk(str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("argv,message", [
    (["fit", "--model", "nowhere"], "stories: 'nowhere' names a model"),
    (["fit", "--layers", "mpl", "--limit", "2"], "layers matched nothing for pattern 'mpl'"),
    (["score", "--factors", "nowhere"], "has no factors.safetensors"),
    (["fit", "--limit", "0"], "limit=0 must be 1 or more"),
    (["fit", "--limit", "3", "--batch-size", "0"], "batch_size=0 must be 1 or more"),
    (["fit", "--limit", "3", "--max-length", "1"], "stories from 0 on: max_length=1"),
    (["fit", "--limit", "3", "--device", "cuda:99"], "device='cuda:99' cannot be used here"),
    (["fit", "--limit", "3", "--device", "nonsense"], "device='nonsense' cannot be used here"),
    (["fit", "--limit", "3", "--out", "/dev/null/x"], "nothing can be written in '/dev/null/x/checkpoint'"),
])
def test_errors_on_the_command_line_are_one_line(argv, message, tmp_path, capsys):
    assert __main__.main([argv[0], "--out", str(tmp_path / "x.npy"), "--quiet", *argv[1:]]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said and said.startswith(f"{argv[0]}: ") and "\n" not in said
    assert "--device" not in argv or "give one of: cpu" in said


@pytest.mark.parametrize("command", ["fit", "explore"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_one_line(command, tmp_path, capsys):
    LlamaForCausalLM(LlamaConfig(
        vocab_size=37, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=64)).save_pretrained(tmp_path)  # fmt: skip
    load_lm().tokenizer.save_pretrained(tmp_path)
    more = {"fit": ["--quiet"], "explore": ["--query", "Tom", " ran.", "--shown", "2"]}[command]
    argv = [command, "--model", str(tmp_path), "--stories", "bundled", "--limit", "20", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert __main__.main([*argv, *more]) == 1
    *bars, said = capsys.readouterr().err.splitlines()
    assert said.startswith({"fit": "fit: batches: ", "explore": "explorer: batches: "}[command])
    assert "37 tokens: take its own tokenizer" in said and (command == "explore" or not bars)


@pytest.mark.parametrize("error,message", [
    (RuntimeError("Connection closed\nat gloo"), "another rank was lost, or this one failed: Connection closed. The"),
    (KeyboardInterrupt(), "stopped. The"),
    (signal.SIGTERM, "stopped by SIGTERM (under torchrun: another rank has died). The"),
])
def test_what_ends_a_rank_is_one_line_that_says_how_to_go_on(error, message, monkeypatch, capsys):
    def run(command, args):
        if error is signal.SIGTERM:
            signal.raise_signal(error)
        raise error

    monkeypatch.setattr(__main__, "run", run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert __main__.main(["fit", "--quiet", "--out", "here"]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"fit, rank 0 of 2: {message} same command") and "\n" not in said
    assert said.endswith("goes on where it was, from here.")


def test_a_stop_of_a_process_alone_speaks_of_no_ranks(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(__main__, "run", lambda command, args: signal.raise_signal(signal.SIGTERM))
    assert __main__.main(["fit", "--quiet", "--out", "here"]) == 1
    said = capsys.readouterr().err
    assert said == "fit: stopped by SIGTERM. The same command goes on where it was, from here.\n"


@pytest.mark.parametrize("command", ["fit", "score"])
def test_a_command_has_the_arguments_and_defaults_of_its_function(command, monkeypatch):
    given, parameters = {}, inspect.signature(getattr(jobs, command)).parameters
    for name in ("TINYSTORIES", "STORIES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jobs, command, lambda **arguments: given.update(arguments))
    assert __main__.main([command, "--quiet"]) == 0
    assert given.keys() == parameters.keys()
    del given["progress"]  # as there is a terminal or not
    assert given == {name: parameters[name].default for name in given}


def test_help_shows_every_command(capsys):
    for argv in (["--help"], ["fit", "--help"], ["score", "--help"]):
        with pytest.raises(SystemExit) as end:
            __main__.main(argv)
        assert end.value.code == 0
    said = capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        __main__.main(["explore", "--help"])
    assert end.value.code == 0 and "--shown" in capsys.readouterr().out
    assert all(word in said for word in ("torchrun", "explore", "checkpoint", "--query"))


def test_kill_9_twice_in_the_middle_of_writing(tmp_path):
    """fit and score as commands, each killed twice while a file is half written, against runs that were not."""
    job, alone = tmp_path / "job", tmp_path / "alone"
    run = lambda kind, n, *argv: subprocess.run([sys.executable, VICTIM, kind, str(n), *argv], capture_output=True,
                                                text=True, timeout=300)
    for n, code in ((3, -9), (6, -9), (0, 0)):
        done = run("checkpoint", n, "fit", *SMALL, "--out", str(job))
        assert done.returncode == code, done.stderr
    assert "going on after" in done.stderr
    assert __main__.main(["fit", *SMALL, "--out", str(alone), "--quiet"]) == 0
    assert (job / "factors.safetensors").read_bytes() == (alone / "factors.safetensors").read_bytes()
    some = [*SMALL[:-2], "--factors", str(job), "--query", "Tom was", " happy."]
    for n, code in ((2, -9), (2, -9), (0, 0)):
        done = run("scores", n, "score", *some, "--out", str(job / "s.npy"))
        assert done.returncode == code, done.stderr
    assert __main__.main(["score", *some, "--out", str(alone / "s.npy"), "--quiet"]) == 0
    assert (job / "s.npy").read_bytes() == (alone / "s.npy").read_bytes()
    assert sorted(path.name for path in job.iterdir()) == ["checkpoint", "factors.safetensors", "s.axes.json", "s.json",
                                                          "s.npy", "s.npy.lock"]
    axes = json.loads((job / "s.axes.json").read_text("utf-8"))
    assert axes["queries"] == [["Tom was", " happy."]] and axes["stories"] == "bundled" and len(axes["layers"]) == 2


@pytest.mark.parametrize("argument", ["checkpoint", "out"])
def test_two_jobs_do_not_write_in_one_place(argument, tmp_path):
    model = tiny.gpt2()
    layers = linear_layers(model, "mlp")
    factors = fit_ekfac(model, BATCHES, layers, progress=False)
    run = {"checkpoint": lambda: fit_ekfac(model, BATCHES, layers, checkpoint=tmp_path, progress=False),
           "out": lambda: influence(model, factors, BATCHES[:1], BATCHES, out=tmp_path / "s.npy", progress=False)}
    written = {"checkpoint": tmp_path / "second_moments.0.safetensors", "out": tmp_path / "s.npy"}[argument]
    with checkpoint.alone(written, argument), pytest.raises(OSError, match=f"^{argument}: another job is writing"):
        run[argument]()
    run[argument]()
    assert written.exists()


def test_where_there_are_no_locks_that_is_logged(tmp_path, monkeypatch, caplog):
    def acquire(self):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(checkpoint.FileLock, "acquire", acquire)
    with checkpoint.alone(tmp_path / "s.npy", "out"):
        pass
    assert "no lock to be had" in caplog.text
