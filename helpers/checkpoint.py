"""Running sums on disk that survive a kill at any moment: written aside, synced, renamed, and refused if foreign.

What a file belongs to is its `job`, a dict of JSON values (weights, data, layers, seed, ...) that is stored with it.
"""

import functools
import hashlib
import json
import logging
import math
import os
import re
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .examples import by_length, digest_tensors
from .ranks import rank, size

BLOCK = 32  # batches that are regrouped by length together, and after which a job can be taken up again
SHARE = 0.05  # of the time, at most, goes into writing checkpoints
log = logging.getLogger("helpers")


def replace(path, write):
    """write(temporary path), then sync it and rename it to `path`: there is either the old file or the new one."""
    temporary = path.with_name(path.name + ".partial")
    try:
        write(temporary)
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} could not be written ({error})") from error
    sync(temporary)
    temporary.replace(path)
    if os.name == "posix":
        sync(path.parent)


def make_folder(folder, argument):
    """Makes a folder where there is none; OSError that names the argument where it cannot be written in."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        cause = None if os.access(folder, os.W_OK) else "no permission"
    except OSError as error:
        cause = error.strerror
    if cause:
        raise OSError(f"{argument}: nothing can be written in {str(folder)!r} ({cause}); name a folder of your own")


@contextmanager
def alone(path, argument):
    """Inside, no other process writes `path`, whose folder is made; OSError that names the argument where one does.

    PATH.lock stays, but the operating system lets go of it when the process ends, however that ends.
    """
    make_folder(path.parent, argument)
    lock = FileLock(f"{path}.lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(f"{argument}: another job is writing {str(path)!r}; wait for it, or name another place"
                      ) from error
    except OSError as error:
        log.warning("%s: no lock to be had (%s); start no second job that writes there", path, error)
    try:
        yield
    finally:
        lock.release()


def sync(path):
    """Waits until the file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of(tensors):
    """A hexadecimal digest of {name: tensor}."""
    digest = hashlib.blake2b(digest_size=16)
    digest_tensors(tensors, digest)
    return digest.hexdigest()


def job_of(model, task, data, values):
    """The job: its model (all weights, for all of them shape the gradients), task, data (a hashlib object) and more."""
    named = task if hasattr(task, "__qualname__") else type(task)
    if named is functools.partial or "<lambda>" in named.__qualname__ or getattr(task, "__closure__", None):
        raise ValueError("task: what is saved must be told from another task's by its name: give a def, no lambda, "
                         "partial or function that closes over values")
    if hasattr(task, "__self__"):
        raise ValueError(f"task: {task!r:.60} is a method, and what it is bound to cannot be told from another: give a "
                         "def")
    code = task if hasattr(task, "__code__") else type(task).__call__
    told = repr([_code(getattr(code, "__code__", None)), vars(task) if named is type(task) else ""])
    told = re.sub(" at 0x[0-9a-f]+", "", told)  # where an object happens to lie
    return {"model": type(model).__name__, "weights": digest_of(model.state_dict()), "config": _config(model),
            "task": f"{named.__module__}.{named.__qualname__}", "task_code": _short(told), "data": data.hexdigest(),
            "ranks": size(), "block": BLOCK} | values


def _code(code):
    """What a function does, without line numbers: its bytecode, names and constants."""
    # a set of words has another order in every process
    plain = lambda part: sorted(map(repr, part)) if isinstance(part, frozenset) else part
    inner = [_code(part) if hasattr(part, "co_code") else plain(part) for part in getattr(code, "co_consts", ())]
    return [getattr(code, "co_code", b"").hex(), getattr(code, "co_names", ()), inner]


def _config(model):
    """A digest of a transformers configuration, but for where it came from and how attention is computed."""
    config = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return _short(repr(sorted((key, repr(value)) for key, value in values.items()
                              if not key.startswith("_") and key not in ("transformers_version", "dtype"))))


def _short(text):
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def check_job(path, there, here, argument):
    """Raises ValueError that names what differs between the job stored in a file and this one."""
    here = json.loads(json.dumps(here))
    if not isinstance(there, dict):
        raise ValueError(f"{argument}: {str(path)!r} was not written by this package; name another place")
    short = lambda value: text if len(text := repr(value)) <= 60 else text[:57] + "..."
    names = {"data": "data (the batches: their tokens, labels, lengths, order)", "queries": "queries (their batches)"}
    differs = [f"{names.get(key, key)} is {short(there.get(key))} there and {short(here.get(key))} here"
               for key in {**here, **there} if there.get(key) != here.get(key)]
    if differs:
        raise ValueError(f"{argument}: {str(path)!r} belongs to another job: {'; '.join(differs)}. Name another place, "
                         "or delete it")


def sums(shapes, device):
    """(flat, {key: view of it}) of float64 zeros: one tensor to save and to add up, many to work with."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    return flat, {key: part.view(shape) for (key, shape), part in zip(shapes.items(), flat.split(sizes))}


@dataclass(frozen=True)
class Checkpoint:
    """A folder with the running sums of one rank of one job."""

    folder: Path
    job: dict

    def path(self, name):
        """The file of the sums called `name`."""
        return Path(self.folder) / f"{name.replace(' ', '_')}.{rank()}.safetensors"

    def save(self, name, flat, done, examples, key):
        """Writes `flat`, the sums after `done` blocks of `examples` examples; `key`: what else they depend on."""
        state = {"job": self.job, "done": done, "examples": examples, "key": key, "digest": digest_of({"sums": flat})}
        replace(self.path(name), lambda path: save_file({"sums": flat}, path, {"state": json.dumps(state)}))

    def load(self, name, flat, key):
        """(done, examples), with `flat` filled; (0, 0) where there is nothing, or sums of another key.

        Raises ValueError for a file of another job and for one that is damaged.
        """
        path = self.path(name)
        if not path.exists():
            return 0, 0
        try:
            with safe_open(path, "pt") as file:
                state = json.loads((file.metadata() or {}).get("state", "null"))
                saved = file.get_tensor("sums") if state else None
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"checkpoint: {str(path)!r} is damaged ({error}); delete it") from error
        check_job(path, state["job"] if isinstance(state, dict) else None, self.job, "checkpoint")
        if saved.shape != flat.shape or digest_of({"sums": saved}) != state["digest"]:
            raise ValueError(f"checkpoint: {str(path)!r} is damaged (not the sums that were saved); delete it")
        if state["key"] != key:
            log.warning("%s: sums in other eigenvectors than now computed; this pass begins again", path)
            return 0, 0
        flat.copy_(saved)
        log.info("%s: going on after %s examples", path, f"{state['examples']:,}")
        return state["done"], state["examples"]


def accumulate(batches, examples, flat, add, checkpoint, name, progress, key=""):
    """add(rows, batch) for all groups of equal length, block by block, each block's sums in the same order every time.

    With a Checkpoint, `flat` begins where its file ends, and is saved as often as SHARE allows and at the end.
    """
    last, saved, cost = -(-len(batches) // BLOCK), time.monotonic(), 0.0
    with ExitStack() as stack:
        if checkpoint is not None:
            stack.enter_context(alone(checkpoint.path(name), "checkpoint"))
        done, start = (0, 0) if checkpoint is None else checkpoint.load(name, flat, key)
        bar = stack.enter_context(tqdm(desc=name, total=examples, initial=start, unit=" examples",
                                       disable=not progress))
        for number in range(done, last):
            groups = by_length(batches[number * BLOCK:(number + 1) * BLOCK])
            for rows, batch in groups:
                add(rows + start, batch)
                bar.update(len(rows))
            start += sum(len(rows) for rows, _ in groups)
            now = time.monotonic()
            if checkpoint is not None and (number + 1 == last or cost <= SHARE * (now - saved)):
                checkpoint.save(name, flat, number + 1, start, key)
                saved = time.monotonic()
                cost = saved - now
                log.info("%s: %s of %s examples, saved", name, f"{start:,}", f"{examples:,}")
