"""Scores written to a .npy file block by block: they need not fit in memory, and a killed run goes on where it was."""

import json
import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .checkpoint import BLOCK, alone, check_job, replace, sync
from .ranks import collected, from_first, gathered, rank

log = logging.getLogger("helpers")


@dataclass(frozen=True)
class ScoreFile:
    """NAME.npy, which is NAME.npy.partial until it is complete, and NAME.json, which says whose it is and how far.

    shape: that of all scores; axis: the one of the training examples. A block is written and synced before NAME.json
    counts it, so what is counted is there.
    """

    path: Path
    job: dict
    shape: tuple
    axis: int
    dtype: str

    @property
    def partial(self):
        """Where the scores are until they are complete."""
        return self.path.with_name(self.path.name + ".partial")

    def start(self):
        """(blocks, examples of each rank) that are there; (0, None) with an empty file. ValueError where not ours."""
        done = self._counted()
        if done[0]:
            self._check(self.path if self.path.exists() else self.partial)
            log.info("%s: going on after %d examples", self.path, sum(done[1]))
            return done
        if self.path.exists():
            raise ValueError(f"out: {str(self.path)!r} exists, and no .json beside it says whose it is: name another "
                             "file, or delete it")
        self.count(0, None)
        np.lib.format.open_memmap(self.partial, "w+", self.dtype, self.shape)
        return done

    def _counted(self):
        note = self.path.with_suffix(".json")
        if not note.exists():
            return 0, None
        try:
            there = json.loads(note.read_text("utf-8"))
            done = there.pop("blocks"), there.pop("examples")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"out: {str(note)!r} is damaged or not of this package ({error!r}); delete it with the "
                             "scores, or name another file") from error
        check_job(note, there, self._description(), "out")
        return done

    def _check(self, path):
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            fits = found.shape == self.shape and found.dtype == self.dtype
        except (OSError, ValueError) as error:
            raise ValueError(f"out: {str(path)!r} is missing or damaged ({error}); delete {self.path.stem}.json to "
                             "begin again") from error
        if not fits:
            raise ValueError(f"out: {str(path)!r} holds {found.dtype} {found.shape}, not {self.dtype} {self.shape}; "
                             f"delete {self.path.stem}.json to begin again")

    def _description(self):
        return self.job | {"shape": list(self.shape), "dtype": self.dtype}

    def count(self, blocks, examples):
        """Says in NAME.json that so many blocks are there, and how many examples of each rank these are."""
        text = json.dumps(self._description() | {"blocks": blocks, "examples": examples}, indent=1)
        replace(self.path.with_suffix(".json"), lambda path: path.write_text(text, "utf-8"))

    def write(self, pieces):
        """Writes [(number of the first example, scores)], by ordinary writes: a mapped page would count as memory."""
        before, after = math.prod(self.shape[:self.axis]), math.prod(self.shape[self.axis + 1:])
        with open(self.partial, "r+b") as file:
            header = file.seek(0, 2) - math.prod(self.shape) * np.dtype(self.dtype).itemsize
            for at, values in pieces:
                for row, part in enumerate(values.reshape(before, -1)):
                    start = (row * self.shape[self.axis] + at) * after
                    file.seek(header + start * part.itemsize)
                    file.write(part.tobytes())
        sync(self.partial)

    def finish(self):
        """Gives the complete file its name."""
        if not self.path.exists():
            self.partial.replace(self.path)
            sync(self.path.parent)


def stream_scores(scored, train, examples, width, axis, path, job, progress):
    """Scores of all training batches in the file `path`, in the order given; a Tensor mapped onto it (None off rank 0).

    scored(batches) -> Tensor whose axis `axis` is that of the examples; width: the positions of those with a last axis
    of tokens, else 0. Under torch.distributed `train` is this rank's share, and rank 0 writes for all.
    """
    if Path(path).suffix != ".npy":
        raise ValueError(f"out={str(path)!r}: scores are written in numpy's format: give a name that ends in .npy")
    file, counts = _file(scored(train[:1]), examples, width, axis, path, job)
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(alone(file.path, "out")))
        done, ends = from_first(file.start)
        at, first = ends[rank()] if done else 0, sum(counts[:rank()])
        bar = stack.enter_context(tqdm(desc="influence", total=examples, initial=at, unit=" examples",
                                       disable=not progress))
        for number in range(done, max(collected(-(-len(train) // BLOCK)))):
            batches, piece = train[number * BLOCK:(number + 1) * BLOCK], None
            if len(batches):
                values = _array(scored(batches), file.shape, axis, file.dtype)
                piece, at = (first + at, values), at + values.shape[axis]
                bar.update(values.shape[axis])
            found = gathered((at, piece))
            from_first(lambda found=found, number=number: _store(file, found, number + 1))
        from_first(file.finish)
    return torch.from_numpy(np.load(file.path, mmap_mode="c", allow_pickle=False)) if rank() == 0 else None


def _file(some, examples, width, axis, path, job):
    """(ScoreFile, examples of each rank), from the scores of one batch and what every rank says of its share."""
    everyone = collected((examples, width, job["data"]))
    counts = [examples for examples, _, _ in everyone]
    shape = [*some.shape[:axis], sum(counts), *some.shape[axis + 1:]]
    if len(shape) > axis + 1:
        shape[-1] = max(shape[-1], *(width for _, width, _ in everyone))
    dtype = "float64" if some.dtype is torch.float64 else "float32"
    return ScoreFile(Path(path), job | {"data": [data for _, _, data in everyone], "counts": counts}, tuple(shape),
                     axis, dtype), counts


def _array(values, shape, axis, dtype):
    """The scores in numpy, with zeros up to the widest example of all."""
    if values.dim() > axis + 1:
        if values.shape[-1] > shape[-1]:
            raise ValueError(f"train: scores of {values.shape[-1]} positions where the first batch and input_ids have "
                             f"{shape[-1]}: with out= put the widest batch first")
        values = F.pad(values, (0, shape[-1] - values.shape[-1]))
    return values.cpu().to(getattr(torch, dtype)).numpy()


def _store(file, found, blocks):
    file.write([piece for _, piece in found if piece is not None])
    file.count(blocks, [end for end, _ in found])
    log.info("%s: %s examples, saved", file.path, f"{sum(end for end, _ in found):,}")
