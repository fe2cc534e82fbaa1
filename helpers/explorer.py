"""The explorer: one self-contained HTML page of queries, their extreme stories, and what every token adds.

    python -m helpers.explorer                                   # the bundled model and corpus: figures/explorer.html
    python -m helpers.explorer --model path --stories path       # any other source: out/explorer.html
    python -m helpers.explorer --query "Tom's favorite food was" " jam" --query "One day, Lily"

The page opens from disk and asks the network for nothing. Its texts are JSON in the page; the token maps are int8 with
a scale for every row, gzipped, in base64.
"""

import argparse
import base64
import gzip
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from . import completions, fit_ekfac, influence, linear_layers, token_span, tokenize, top_k
from .heatmap import tokens_of
from .plots import output_folder
from .queries import MAX_LENGTH, asked, examples, load_sources, probability, tellings_found, what

TEMPLATE = Path(__file__).with_name("explorer.html")
TOLD = (2, 8, 16, 32, 64)  # planted facts to ask for: the best known of those told so many times
QUERIES = 8  # in all, the others being openings of held-out stories that the model continues
SHOWN = 40  # stories a query, half of them the most helpful and half the most harmful
MAX_FIT = 2000  # stories that the factors are fitted on
MAX_BLOCKS = 4  # groups of layers that can be looked at alone
LEVELS = 127  # steps of int8 on either side of zero
LARGE = 5_000_000  # bytes of a page from which on its maker is told


def main(argv=None):
    """The command line; returns the exit status. Errors of the input are one line on stderr and status 1."""
    began, args = time.perf_counter(), parser().parse_args(argv)
    try:
        stories_source = args.stories or (args.model if args.model in ("bundled", "hub") else None)
        path = writable(args.out or default_path(args.model, stories_source))
        lm, stories, held_out, bundled = load_sources(args.model, stories_source, args.limit, not args.query)
        check_shown(args.shown, len(stories))
        queries = asked(lm, args.query, held_out, TOLD if bundled else (), QUERIES)
        print(f"{lm.name}: {len(stories):,} stories, {len(queries)} queries", flush=True)
        train = tokenize(stories, lm.tokenizer, args.max_length)
        batches = completions([(q.prompt, q.completion) for q in queries], lm.tokenizer, max_length=args.max_length)
        layers = linear_layers(lm.model, args.layers)
        few = -(-MAX_FIT // len(train[0]["input_ids"]))
        factors = fit_ekfac(lm.model, train[:: max(1, len(train) // few)], layers)
        scores = influence(lm.model, factors, batches, train)
        page = explore(lm, factors, queries, stories, train, scores, args.shown, args.max_length, bundled)
        size = write_page(path, *page)
    except (OSError, ValueError, IndexError) as error:
        print(f"explorer: {error}", file=sys.stderr)
        return 1
    print(f"{os.path.relpath(path)}: {size / 1e6:.2f} MB, {time.perf_counter() - began:.0f} s. Open it in a browser.")
    if size > LARGE:
        print(f"That is more than {LARGE / 1e6:.0f} MB: fewer --shown or a smaller --max-length make it smaller.")
    return 0


def parser():
    """The options of the command line."""
    p = argparse.ArgumentParser(
        prog="python -m helpers.explorer",
        description="Write one self-contained HTML page: for every query its most helpful and most harmful training "
                    "stories with their scores, each story coloured by what its tokens add: as train tokens, for all "
                    "layers or for one of four groups of blocks, as output tokens, or through one token of the query.",
        epilog="The page needs no network and no server: it opens from disk.")  # fmt: skip
    say = p.add_argument
    say("--model", default=os.environ.get("TINYSTORIES") or "bundled",
        help="bundled, hub, a folder, or a hub id: %(default)s")  # fmt: skip
    say("--stories", default=os.environ.get("STORIES") or None,
        help="bundled, hub, a folder or file, or a dataset id; needed with a model folder; the model's own if left out")
    say("--query", nargs="+", action="append", metavar="TEXT",
        help="PROMPT COMPLETION: whose loss is asked about; PROMPT alone: the model goes on by itself. Repeat for "
             "more. Left out: planted facts (bundled) and openings of held-out stories")  # fmt: skip
    say("--shown", type=int, default=SHOWN, metavar="N", help="stories a query, half of them harmful: %(default)s")
    say("--limit", type=int, default=None, metavar="N",
        help="search only the first N stories; if left out, 3,000 of a folder and 1,000 of the hub. Without --query "
             "and without a validation split the last 8 of them are held out")  # fmt: skip
    say("--layers", default="mlp", metavar="PATTERN", help="a regular expression over names of layers: %(default)s")
    say("--max-length", type=int, default=MAX_LENGTH, metavar="N", help="most tokens of a story or query: %(default)s")
    say("--out", default=None, metavar="FILE",
        help="the page; figures/explorer.html for the bundled source and out/explorer.html for others if left out")
    return p


def default_path(model_source, stories_source):
    """figures/explorer.html where model and stories are the bundled ones and FAST is not set, else in out/."""
    own = model_source == stories_source == "bundled" and os.environ.get("FAST") != "1"
    return output_folder("figures" if own else "out") / "explorer.html"


def writable(path):
    """`path` with its folder made; OSError that names it where no file can be written there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(f"out={str(path)!r}: nothing can be written in {path.parent} ({error.strerror}); name a file in "
                      "a folder of your own") from error  # fmt: skip
    if path.is_dir():
        raise OSError(f"out={str(path)!r} is a folder; name a file in it, such as {path / 'explorer.html'}")
    return path


def check_shown(shown, n):
    """ValueError where `shown` stories a query cannot be had from `n`."""
    if not isinstance(shown, int) or shown < 2 or shown % 2 or shown > n:
        raise ValueError(f"shown={shown} stories a query were asked for, and there are {n:,}: give an even number "
                         f"from 2 to {n - n % 2:,}, half for the helpful ones, half for the harmful")  # fmt: skip


def explore(lm, factors, queries, stories, train, scores, shown=SHOWN, max_length=MAX_LENGTH, bundled=False):
    """(data, maps) for write_page: the extremes of `scores` [query, story] and their token maps.

    stories: the texts of the batches `train`, which tokenize cut at max_length. data: what becomes JSON; maps: int8
    [all rows of all stories], in the order of data: for each story of each query the train-token sum, the groups of
    layers and the output tokens, each as long as the story, then a row for each query token. A row's values are
    int8 × its scale. Raises ValueError for more stories than there are and for a query beyond max_length.
    """
    check_shown(shown, len(stories))
    groups = blocks(list(factors.A))
    data = {"model": str(lm.name), "bundled": bundled, "searched": len(stories), "fitted": factors.n_examples,
            "layers": len(factors.A), "views": list(groups), "queries": [], "stories": {}}  # fmt: skip
    maps = []
    for number, query in enumerate(queries):
        (batch,) = completions([(query.prompt, query.completion)], lm.tokenizer, max_length=max_length)
        ranking = top_k(scores[number : number + 1], shown // 2)
        found = examples(train, list(ranking["train"]))
        entry, length = asked_about(lm, query, batch, scores[number]), int(batch["attention_mask"].sum())
        rows = token_maps(lm.model, factors, batch, found, groups.values())
        real = [ids[mask.bool()] for one in found for ids, mask in zip(one["input_ids"], one["attention_mask"])]
        for line, ids, row in zip(ranking.itertuples(), real, rows):
            if str(line.train) not in data["stories"]:
                data["stories"][str(line.train)] = tokens_of(lm.tokenizer, ids)
            scale, packed = quantise(row[: len(groups) + 2 + length, : len(ids)])
            maps.append(packed)
            entry["items"].append({"story": line.train, "rank": line.rank, "score": digits(line.score),
                                   "kind": what(line.train, query.places), "scale": scale,
                                   "marks": planted(lm, stories, line.train, query.places, len(ids))})  # fmt: skip
        data["queries"].append(entry)
    return data, np.concatenate([packed.ravel() for packed in maps])


def blocks(layers):
    """{name: [index of a layer]}: at most MAX_BLOCKS groups of neighbouring blocks of the model, the first being 1.

    A layer's block is the first number in its name. Where there are no numbers, or all are the same, the layers
    themselves are grouped.
    """
    found = [re.search(r"(?<![^.])\d+(?![^.])", name) for name in layers]
    numbers = [int(match[0]) if match else -1 for match in found]
    word, numbers = ("block", numbers) if len(set(numbers)) > 1 else ("layer", list(range(len(layers))))
    every = sorted(set(numbers))
    groups = {}
    for part in np.array_split(every, min(MAX_BLOCKS, len(every))):
        first, last = part[0] + 1, part[-1] + 1
        name = f"{word} {first}" if first == last else f"{word}s {first}–{last}"
        groups[name] = [at for at, number in enumerate(numbers) if number in part]
    return groups


def token_maps(model, factors, batch, found, groups):
    """[story, row, token] as explore's maps are: sum, groups of layers, output tokens, query tokens."""
    get = lambda per: influence(model, factors, [batch], found, per=per, progress=False)
    by_layer = get(("layer", "token"))[:, 0]
    rows = [by_layer.sum(0), *(by_layer[group].sum(0) for group in groups), get("output_token")[0]]
    return torch.cat([torch.stack(rows, 1), get("token_pair")[0]], 1)


def asked_about(lm, query, batch, scores):
    """The entry of one query: its tokens, which of them the loss is taken on, its probability, what is known of it."""
    ids = batch["input_ids"][0, batch["attention_mask"][0].bool()]
    taken = (batch["labels"][0] != -100).nonzero().flatten()
    told = None if query.places is None else tellings_found(query.places, scores)
    return {"prompt": query.prompt, "completion": query.completion, "tokens": tokens_of(lm.tokenizer, ids),
            "taken": [int(taken[0]), int(taken[-1]) + 1], "p": digits(probability(lm, *query[:2])),
            "told": told, "items": []}  # fmt: skip


def planted(lm, stories, row, places, length):
    """[[first, last)] of the tokens where a planted fact, or its distractor, stands in a story cut to `length`."""
    if places is None:
        return []
    here = places[places["row"] == row]
    spans = [token_span(lm.tokenizer, stories[row], *where) for where in zip(here["start"], here["end"])]
    return [[first, min(last, length)] for first, last in spans if first < length]


def quantise(rows):
    """(scales [row], int8 [row, token]): scale × int8 is within half a scale of each value, a scale being max / 127."""
    rows = np.asarray(rows, dtype=np.float64)
    scales = [digits(value / LEVELS) or 1.0 for value in np.abs(rows).max(1)]
    packed = np.rint(rows / np.array(scales)[:, None]).clip(-LEVELS, LEVELS).astype(np.int8)
    return scales, packed


def digits(value):
    """A float with five significant digits, so that JSON stays short."""
    return float(f"{float(value):.5g}")


def write_page(path, data, maps):
    """Write the page of `data` and `maps` (see explore) at `path`, whole or not at all; returns its size in bytes.

    Texts go into the page as JSON without <, > and &, so that no text of a story can end the script that holds it, and
    the page's own script is the only one that its content security policy lets run.
    """
    path, text = writable(path), TEMPLATE.read_text("utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    told = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        told = told.replace(character, f"\\u{ord(character):04x}")
    values = {
        "HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "DATA": told,
        "MAPS": base64.b64encode(gzip.compress(maps.tobytes(), mtime=0)).decode(),
    }
    page = re.sub(r"@@(HASH|DATA|MAPS)@@", lambda match: values[match[1]], text).encode()
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(page)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return len(page)


if __name__ == "__main__":
    sys.exit(main())
