"""Long jobs, the same from Python and from the command line (`python -m helpers`): stories that are read as needed."""

import contextlib
import io
import json
import logging
import os
import re
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import torch
from datasets.distributed import split_dataset_by_node

from . import ranks, sources
from .batches import check_unicode, completions, tokenize
from .checkpoint import BLOCK, make_folder
from .checkpoint import replace as replace_file
from .ekfac import MATRICES, EKFACFactors, fit_ekfac
from .influence import influence
from .layers import linear_layers
from .queries import MAX_LENGTH, asked, printable

TOLD = (2, 8, 16)  # planted facts that are asked about where no query is given
log = logging.getLogger("helpers")


@dataclass(frozen=True)
class StoryBatches:
    """A sequence of batches as `tokenize` makes them of a Dataset's texts, made when asked for and then forgotten."""

    stories: datasets.Dataset
    tokenizer: object
    max_length: int = MAX_LENGTH
    batch_size: int = 16
    device: str = "cpu"

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be 1 or more")

    def __len__(self):
        return -(-len(self.stories) // self.batch_size)

    def __getitem__(self, at):
        first, last, step = at.indices(len(self)) if isinstance(at, slice) else (range(len(self))[at], None, 1)
        if step != 1:
            raise ValueError(f"batches: they are read in steps of 1, got {at}")
        found, _ = self._read(first, first + 1 if last is None else last)
        return found if isinstance(at, slice) else found[0]

    def __iter__(self):
        """All batches, one after the other; how many stories were cut goes to the log at the end."""
        cuts = 0
        for first in range(0, len(self), BLOCK):
            found, cut = self._read(first, first + BLOCK)
            cuts += cut
            yield from found
        if cuts:
            log.info("%s of %s stories are cut to %d tokens", f"{cuts:,}", f"{len(self.stories):,}", self.max_length)

    def _read(self, first, last):
        """(batches first .. last - 1, how many of their texts `tokenize` says that it cut)."""
        texts = self.stories[first * self.batch_size:last * self.batch_size]["text"]
        if not texts:
            return [], 0
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                found = tokenize(texts, self.tokenizer, self.max_length, self.batch_size)
            except ValueError as error:
                raise ValueError(f"stories from {first * self.batch_size} on: {error}") from error
        cut = re.search(r"cut ([\d,]+) of", said.getvalue())
        return ([{name: value.to(self.device) for name, value in batch.items()} for batch in found],
                int(cut[1].replace(",", "")) if cut else 0)


def stories_on_disk(source, folder, limit=None):
    """The texts of `load_stories(source, limit=limit)`, through an Arrow file in `folder` and mapped from it.

    A story at a time, so that memory does not grow with their number; the file, whose name no other job has, is gone
    when this returns, and stays only where the process is killed before. Raises what load_stories raises.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be 1 or more, or None")
    texts = _texts(source, limit)
    make_folder(folder, "out")
    path = Path(folder) / f"stories.{ranks.rank()}.{os.getpid()}.arrow"
    schema = pa.schema([("text", pa.large_string())])
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            while some := list(islice(texts, 1000)):
                writer.write_batch(pa.record_batch([pa.array(some, pa.large_string())], schema=schema))
        stories = datasets.Dataset.from_file(str(path))
    finally:
        if os.name == "posix":
            path.unlink(missing_ok=True)  # what is mapped stays readable
    if not len(stories):
        raise ValueError(f"stories={str(source)!r} holds no story with a text")
    return stories


def _texts(source, limit):
    """The texts of a source that are not blank, one by one."""
    place = sources.BUNDLED if source == "bundled" else sources._locate(source, sources.HUB_STORIES)
    if not isinstance(place, Path):
        yield from sources.load_stories(source, limit=limit)["text"]
        return
    rows = _rows(sources._files(place, "stories_train" if source == "bundled" else "train"))
    for index, row in enumerate(islice(rows, limit)):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"row {index} of {place} has no string in a column 'text': {row!r:.200}")
        check_unicode(row["text"], f"row {index} of {place}")
        if row["text"].strip():
            yield row["text"]


def _rows(files):
    for file in files:
        with sources._explained("rows", file):
            yield from sources._rows(file)


def fit(model="bundled", stories=None, out="out/job", layers="mlp", labels="sampled", seed=0, limit=None,
        max_length=MAX_LENGTH, batch_size=16, device=None, progress=True):  # fmt: skip
    """fit_ekfac on a source's stories, with its checkpoint in `out`/checkpoint and the factors saved in `out`.

    model, stories: sources as in load_lm and load_stories, the stories the model's own if None; layers: a pattern.
    Returns the factors. The same call after a kill goes on. Raises ValueError or OSError, as what it calls does.
    """
    stories, lm = _own(model, stories), sources.load_lm(model)
    names, checkpoint = linear_layers(lm.model, layers), Path(out) / "checkpoint"
    _, batches = _batches(lm, stories, checkpoint, limit, max_length, batch_size, device)
    factors = fit_ekfac(lm.model, batches, names, labels=labels, seed=seed, checkpoint=checkpoint, progress=progress)
    ranks.from_first(lambda: factors.save(out))
    log.info("factors of %s stories, %s tokens", f"{factors.n_examples:,}", f"{factors.n_tokens:,}")
    return factors


def score(model="bundled", stories=None, factors="out/job", out="out/job/scores.npy", query=None, per="sequence",
          damping=None, rank=None, limit=None, max_length=MAX_LENGTH, batch_size=16, device=None, top=0,
          progress=True):  # fmt: skip
    """influence of a source's stories on queries, with the scores in the file `out`.

    factors: the folder that `fit` wrote; query: a list of (prompt, completion) or (prompt,), whose continuation the
    model chooses; None with the bundled model and stories: planted facts. top: print so many of the most helpful
    stories. Beside `out`, a file .axes.json says what its axes are: the queries' texts, the source of the stories (in
    their order), the layers. Returns the scores, mapped from the file (None off rank 0). The same call after a kill
    goes on.
    """
    stories, lm, found = _own(model, stories), sources.load_lm(model), EKFACFactors.load(factors)
    if top and per != "sequence":
        raise ValueError(f"top={top} ranks stories by their scores: it needs per='sequence', got {per!r}")
    queries = asked(lm, query, [], TOLD if model == stories == "bundled" else (), len(TOLD))
    if not queries:
        raise ValueError("query: none given; give one or more, each a prompt and a completion, or a prompt")
    pairs = [(q.prompt, q.completion) for q in queries]
    everything, batches = _batches(lm, stories, Path(out).parent, limit, max_length, batch_size, device)
    given = _moved(completions(pairs, lm.tokenizer, max_length=max_length), batches.device)
    matrices = _moved([{name: getattr(found, name) for name in MATRICES}], batches.device)
    scores = influence(lm.model, replace(found, **matrices[0]), given, batches, damping=damping, rank=rank, per=per,
                       out=out, progress=progress)  # fmt: skip
    if scores is not None:
        axes = {"queries": pairs, "stories": str(stories), "model": str(model), "per": per, "layers": list(found.A)}
        told = json.dumps(axes, ensure_ascii=False, indent=1)
        replace_file(Path(out).with_suffix(".axes.json"), lambda path: path.write_text(told, "utf-8"))
        if top:
            report(pairs, scores, everything, top)
    return scores


def report(pairs, scores, stories, k):
    """Prints the k most helpful stories of every query: their number, score and beginning."""
    for (prompt, completion), row in zip(pairs, scores):
        print(f"\n{printable(prompt)}[{printable(completion)}]")
        best = row.topk(min(k, len(row)))
        for value, number in zip(best.values.tolist(), best.indices.tolist()):
            print(f"{value:+12.4g}  story {number:<7d} {printable(stories[number]['text'][:80])}")


def _own(model, stories):
    """The source of the stories: the model's own where none is named."""
    if stories is None and model not in ("bundled", "hub"):
        raise ValueError(f"stories: {str(model)!r} names a model; name its stories as well: a folder, a file or hub")
    return stories or model


def _batches(lm, source, folder, limit, max_length, batch_size, device):
    """(all stories, StoryBatches of this rank's share), and the model on its device."""
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    stories = stories_on_disk(source, folder, limit)
    if len(stories) < ranks.size():
        raise ValueError(f"{len(stories)} stories for {ranks.size()} ranks: start at most one rank a story")
    share = split_dataset_by_node(stories, ranks.rank(), ranks.size())
    lm.model.to(device)
    log.info("%s on %s: %s of %s stories", lm.name, device, f"{len(share):,}", f"{len(stories):,}")
    return stories, StoryBatches(share, lm.tokenizer, max_length, batch_size, device)


def _check_device(device):
    """ValueError that says which devices there are where no tensor can be had on this one."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch without CUDA
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise ValueError(f"device={str(device)!r} cannot be used here ({str(error).splitlines()[0]:.60}); give one of: "
                         f"{there}") from error


def _moved(parts, device):
    """The dicts of tensors, or of dicts of them, on `device`."""
    return [{name: value.to(device) if torch.is_tensor(value) else _moved([value], device)[0]
             for name, value in part.items()} for part in parts]
