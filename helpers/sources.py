"""Models and stories from three sources, never one in place of another: what cannot be loaded is an error.

`source` is
  "bundled"      the corpus and the GPT-Neo in helpers/bundled, no network needed;
  "hub"          roneneldan/TinyStories-1M and roneneldan/TinyStories (Eldan & Li 2023), stories streamed;
  a path         a model folder as save_pretrained writes it; a folder or file of stories. A relative path starts at
                 the current folder or, where nothing is there, at the repository's root; it wins over a hub id;
  "owner/name"   any other model or data set of the hub.
Code from a model repository is never executed.
"""

import contextlib
import gzip
import json
import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import pandas as pd
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .batches import check_unicode

BUNDLED = Path(__file__).resolve().parent / "bundled"
ROOT = BUNDLED.parent.parent
HUB_MODEL = "roneneldan/TinyStories-1M"
HUB_TOKENIZER = "EleutherAI/gpt-neo-125M"
HUB_STORIES = "roneneldan/TinyStories"
HUB_LIMIT = 10_000
FACT_COLUMNS = ["fact", "prompt", "completion", "tellings", "row", "start", "end", "split", "kind"]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt", ".txt.gz")


@dataclass(frozen=True)
class LM:
    """A language model in eval mode and float32, its tokenizer, and a name for titles."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_lm(source="bundled", checkpoint=None):
    """The LM of `source`; `checkpoint` names another one of the bundled training run.

    The tokenizer's model_max_length is set to the model's context, so that `tokenize` never goes beyond it. The
    TinyStories models have no tokenizer of their own on the hub and get that of EleutherAI/gpt-neo-125M.

    Raises FileNotFoundError for a path or checkpoint that does not exist, OSError for what cannot be loaded (with the
    cause, and what would work), ValueError for weights that do not cover the model, and for a missing tokenizer.
    """
    if checkpoint is not None and source != "bundled":
        raise ValueError(f"checkpoint={checkpoint!r} is for source='bundled' only, not for source={str(source)!r}")
    place = _bundled_model(checkpoint) if source == "bundled" else _locate(source, HUB_MODEL)
    local = isinstance(place, Path)
    if local and not place.is_dir():
        raise FileNotFoundError(f"source={str(source)!r}: {place} is no folder; a model is a folder with config.json")
    # A .bin file on the hub makes transformers ask a public service, in a background thread, to open a pull request
    # with a converted copy. Loading someone's model must not do that.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    with _explained("model", place), _no_bars(off=local):
        model, report = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{place} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    tokenizer = _tokenizer(BUNDLED / "model" if source == "bundled" else place)
    context = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    name = "/".join(filter(None, ("bundled", checkpoint))) if source == "bundled" else getattr(place, "name", place)
    return LM(model.eval(), tokenizer, name)


def load_stories(source="bundled", split="train", limit=None):
    """The first `limit` stories as a datasets.Dataset with a column "text", and whatever other columns there are.

    A folder is searched, with its subfolder data, for `split`.* and `split`-*: JSON lines or arrays (.jsonl, .json,
    also .gz), .parquet, and .txt (also .gz), where a line is a story, or, if the file has "<|endoftext|>" in it, what
    stands between two of those. A single file counts as the split "train". Hub data are streamed, and `limit=None`
    then means 10,000. Blank stories are left out; how many is printed.

    Raises FileNotFoundError for a path or split that does not exist, OSError for what cannot be reached or read,
    ValueError for data without a column "text", or with a text that is not a string or not Unicode.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit={limit!r} must be a whole number, 1 or more, or None")
    place = BUNDLED if source == "bundled" else _locate(source, HUB_STORIES)
    if isinstance(place, Path):
        rows = _read(_files(place, f"stories_{split}" if source == "bundled" else split), limit)
    else:
        with _explained("stories", place):
            # Row group by row group: less is fetched, and pyarrow has no read in flight when we stop, which would
            # abort Python if it ended then (apache/arrow issue 45214).
            stream = datasets.load_dataset(place, split=split, streaming=True).reshard()
            rows = list(stream.take(limit or HUB_LIMIT))
    return _dataset(rows, place)


def load_facts():
    """The facts planted in the bundled corpus and their distractors, a row for each place where one stands.

    fact: id; prompt, completion: how to ask for it; tellings: how many stories tell it; split: the half of the facts,
    for choosing settings or for reporting; row, start, end: the training story and the characters; kind: literal,
    paraphrased, distractor or denial.
    """
    return pd.DataFrame(_read(_files(BUNDLED, "facts")))[FACT_COLUMNS]


def _bundled_model(checkpoint):
    if checkpoint is None:
        return BUNDLED / "model"
    known = sorted(path.name for path in (BUNDLED / "checkpoints").glob("*") if path.is_dir())
    if checkpoint not in known:
        raise FileNotFoundError(f"checkpoint={checkpoint!r} does not exist; there are {known}, and None for the model")
    return BUNDLED / "checkpoints" / checkpoint


def _locate(source, hub_id):
    """The path that `source` names if it exists, from the current folder or from ROOT; else the hub id that it is;
    FileNotFoundError if it is neither."""
    if source == "hub":
        return hub_id
    given = Path(source).expanduser()
    for path in (given, ROOT / given):
        if path.exists():
            return path.absolute()
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)) and not str(source).endswith(SUFFIXES):
        return str(source)
    places = " and ".join(dict.fromkeys(str(path.resolve()) for path in (given, ROOT / given)))
    raise FileNotFoundError(f"source={str(source)!r}: {places} does not exist (relative paths start at the current "
                            "folder or at the repository's root). Use 'bundled', 'hub', a folder, or a hub id "
                            f"owner/name such as {hub_id!r}")


@contextlib.contextmanager
def _explained(what, place):
    """Errors of the libraries inside, with what was being loaded and what would work."""
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        if isinstance(place, Path):
            raise OSError(f"the {what} in {place} could not be loaded ({cause})") from error
        raise OSError(
            f"the {what} {place!r} could not be loaded from {datasets.config.HF_ENDPOINT} ({cause}). Without network "
            f"use source='bundled' or a folder; for a mirror set HF_ENDPOINT before Python starts. If a folder was "
            f"meant: {Path(place).absolute()} does not exist"
        ) from error


@contextlib.contextmanager
def _no_bars(off):
    """No progress bars where nothing is downloaded: they would stay in a notebook's output."""
    switch = off and logging.is_progress_bar_enabled()
    if switch:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if switch:
            logging.enable_progress_bar()


def _tokenizer(place):
    """The tokenizer in `place`; transformers makes an empty one, without a word, where the files are missing."""
    with _explained("tokenizer", place):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    if len(tokenizer) > len(tokenizer.all_special_ids):
        return tokenizer
    if str(place).startswith("roneneldan/TinyStories"):
        return _tokenizer(HUB_TOKENIZER)
    raise ValueError(f"{place} has no tokenizer; put its tokenizer.json and tokenizer_config.json there")


def _files(place, split):
    """The files of a split, sorted; `place` itself if it is a file."""
    if place.is_file():
        if split != "train" or not place.name.endswith(SUFFIXES):
            raise FileNotFoundError(
                f"{place} is one file: it can only be split='train', not {split!r}, and must end in one of {SUFFIXES}"
            )
        return [place]
    there = sorted(path for folder in (place, place / "data") for path in folder.glob("*") if path.is_file())
    files = [path for path in there if re.match(re.escape(split) + r"[.-]", path.name) and _kind(path)]
    if len({_kind(path) for path in files}) != 1:
        raise FileNotFoundError(
            f"split={split!r} needs files of one kind, {split}.* or {split}-*, ending in one of {SUFFIXES}; {place} "
            f"has {[path.name for path in files or there][:20]}"
        )
    return files


def _kind(path):
    """The suffix by which a file is read, without .gz; None for files that are not read."""
    return next((suffix for suffix in SUFFIXES if path.name.removesuffix(".gz").endswith(suffix)), None)


def _read(files, limit=None):
    """The first `limit` rows of some files, one after the other."""
    rows = []
    for file in files:
        with _explained("rows", file):
            rows += islice(_rows(file), None if limit is None else limit - len(rows))
    return rows


def _rows(path):
    """Yield the rows of a file as dicts."""
    if _kind(path) == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as lines:
        if _kind(path) == ".txt":
            text = lines.read()
            stories = text.split("<|endoftext|>") if "<|endoftext|>" in text else text.split("\n")
            yield from ({"text": story.strip()} for story in stories if story.strip())
        elif lines.read(1) == "[":
            lines.seek(0)
            yield from json.load(lines)
        else:
            lines.seek(0)
            yield from (json.loads(line) for line in lines if line.strip())


def _dataset(rows, place):
    """Rows as a Dataset, each with a text that is not blank, and with the columns of all of them."""
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"row {index} of {place} has no string in a column 'text': {row!r:.200}")
        check_unicode(row["text"], f"row {index} of {place}")
    columns = dict.fromkeys(key for row in rows for key in row)
    told = [row for row in rows if row["text"].strip()]
    if len(told) < len(rows):
        print(f"load_stories: left out {len(rows) - len(told):,} blank of {len(rows):,} stories")
    if not told:
        raise ValueError(f"{place} holds no story: {len(rows)} rows, none with a text")
    with _explained("columns", place):
        return datasets.Dataset.from_dict({name: [row.get(name) for row in told] for name in columns})
