"""Ours beside other libraries: the same scores? And how long, in how much memory? Each side in its own environment.

    python tests/benchmarks/peers.py right                                        writes peers_right.csv
    python tests/benchmarks/peers.py time --model 512 --stories 250 --sides ours kronfluence     adds to peers.csv

peer_<side>.py says how to make a side's environment; `--python kronfluence=…/bin/python` says where it is (the
default is ../<side>/bin/python). `--model 512` is karpathy/tinyllamas stories260K's shape (`--folder` for its weights
and `--texts` for stories, else both random), `50257` the configuration of roneneldan/TinyStories-1M with random
weights, `bundled` ours. Sides alternate, with `--threads` each; ratios are of processor time, which a shared machine
disturbs less than the clock's, and of one run.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from dense import difference, gradients, scores
from peer import read_problem, write_problem
from safetensors.torch import load_file
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import load_lm, load_stories, tokenize

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SIDES = ("ours", "kronfluence", "bergson", "pydvl", "dattri", "prototype")
COLUMNS = ["what", "side", "s", "cpu", "mib", "ratio", "model", "stories", "queries", "repeats", "threads", "layers",
           "difference"]  # of peers.csv; ratio is of processor time, difference that of the scores with true labels


class Side:
    """A running peer_<side>.py; ask(order) -> its answer."""

    def __init__(self, name, python, folder, threads):
        own = name in ("ours", "prototype")
        python = sys.executable if own else python.get(name, ROOT.parent / name / "bin/python")
        self.log = tempfile.TemporaryFile("w+")
        env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen([python, "-W", "ignore", HERE / f"peer_{name}.py", folder, str(threads)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
                                        env=env)

    def ask(self, **order):
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.log.seek(0)
            lines, code = self.log.read().strip().splitlines(), self.process.poll()
            killed = f"killed by signal {-code} (9: out of memory?)" if code and code < 0 else None
            return {"error": killed or (lines[-1][:300] if lines else "ended without a word")}

    def close(self):
        with contextlib.suppress(BrokenPipeError):  # it may have died, of memory for one
            self.process.stdin.close()
        self.process.wait()


def tinystories_1m():
    """The architecture of roneneldan/TinyStories-1M: 8 layers, hidden 64, 16 heads, vocabulary 50,257."""
    torch.manual_seed(0)
    return GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=50257, hidden_size=64, num_layers=8, num_heads=16, max_position_embeddings=2048, window_size=256,
        attention_types=[[["global", "local"], 4]])).eval()


def stories260k():
    """The architecture of karpathy/tinyllamas stories260K: 5 layers, hidden 64, 8 heads (4 of keys), vocabulary 512."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True)).eval()


def random_ids(n, vocabulary, shortest, longest):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (n,), generator=generator)
    return [torch.randint(vocabulary, (int(length),), generator=generator) for length in lengths]


def big_problem(folder, args):
    """Writes the problem of `time`; stories are cut to 256 tokens."""
    if args.model == "50257" or (args.model == "512" and not args.folder):
        ids = random_ids(args.stories + args.queries, int(args.model), 120, 239)
        queries, train = ids[: args.queries], ids[args.queries:]
        model = tinystories_1m() if args.model == "50257" else stories260k()
    else:
        lm = load_lm(args.folder or "bundled")
        texts = [load_stories(args.texts or args.folder or "bundled", split, limit)["text"]
                 for split, limit in (("train", args.stories), ("validation", args.queries))]
        train, queries = ([row[mask.bool()] for batch in tokenize(list(part), lm.tokenizer)
                           for row, mask in zip(batch["input_ids"], batch["attention_mask"])] for part in texts)
        model = lm.model
    write_problem(folder, model, args.layers, train, queries)


def tiny(kind):
    """A small float64 model without constant parameters: a GPT-Neo with biases in its MLP, or a Llama without any."""
    torch.manual_seed(0)
    if kind == "biases":
        model = GPTNeoForCausalLM(GPTNeoConfig(
            vocab_size=37, hidden_size=12, num_layers=2, num_heads=3, intermediate_size=20, max_position_embeddings=40,
            bos_token_id=0, eos_token_id=0, window_size=40, attention_types=[[["global", "local"], 1]]))
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=20, max_position_embeddings=40))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def right(args):
    """Rows of peers_right.csv, those of `sides` anew: their scores on small models against dense float64 ones."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        problems = {}
        for at in product(("biases", "no biases"), ("ragged", "even")):
            ids = random_ids(24, 37, 9 if at[1] == "ragged" else 20, 20)
            problems[at] = Path(folder) / "-".join(at)
            write_problem(problems[at], tiny(at[0]), "mlp", ids[4:], ids[:4])
        for name in args.sides:
            side = Side(name, args.python, problems["biases", "even"], 1)
            rows += [{"side": name, "model": model, "lengths": lengths} | right_of(name, side, problems[model, lengths])
                     for model, lengths in problems]
            side.close()
    path = HERE / "peers_right.csv"
    before = pd.read_csv(path) if path.exists() else pd.DataFrame({"side": []})
    table = pd.concat([before[~before["side"].isin(args.sides)], pd.DataFrame(rows)])
    table.to_csv(path, index=False, float_format="%.2g")
    print(table.to_string())


def right_of(name, side, folder):
    """The largest ‖Δ‖/‖score‖ of a query against the definition, and against what the side says that it computes."""
    problem = read_problem(folder)
    model = problem.model().double()
    read = lambda ids, labels="true": [gradients(model, problem.layers, x, labels) for x in ids]
    query, train = read(problem.queries), read(problem.train)
    damping = 0.01 if name == "pydvl" else None
    truth = scores(query, train, damping=damping)
    own = {"bergson": lambda: scores(query, train, positions="targets"),
           "pydvl": lambda: scores(query, train, read(problem.train, "sqrt_p"), damping, "token")}.get(name)
    side.ask(do="problem", folder=str(folder))
    fitted, row = side.ask(do="fit", labels="true"), {}
    for per in ("sequence", "token"):
        path = folder / f"{name}_{per}"
        answer = fitted if "error" in fitted else side.ask(do=per, save=str(path))
        if "error" in answer:
            row[f"why no {per}"] = answer["error"]
            continue
        got = load_file(path)["scores"]
        row[per] = difference(got.sum(2) if per == "token" else got, truth)
        if per == "sequence":
            row["own definition"] = difference(got, own()) if own else row[per]
            row["correlation"] = float(torch.corrcoef(torch.stack([got.flatten(), truth.flatten()]))[0, 1])
    return row


def compared(sides, folder):
    """{(side, what): path of its scores}, of factors fitted with the labels given."""
    for side in sides.values():
        side.ask(do="fit", labels="true")
    return {(name, per): path for name, side in sides.items() for per in ("sequence", "token")
            if "error" not in side.ask(do=per, save=str(path := folder / f"{name}_{per}"))}


def timed(args):
    """Rows of peers.csv: medians of alternating repeats."""
    rows, steps = [], args.steps or ("fit", "sequence", "token")
    with tempfile.TemporaryDirectory() as folder:
        big_problem(folder, args)
        sides = {name: Side(name, args.python, folder, args.threads) for name in args.sides}
        for side in sides.values():  # all are loaded before one is timed
            side.ask(do="problem", folder=folder)
        if args.steps:  # factors of few stories are as good for the time of the scores
            few = Path(folder) / "few"
            big_problem(few, argparse.Namespace(**vars(args) | {"stories": 64}))
            for side in sides.values():
                [side.ask(**order) for order in ({"do": "problem", "folder": str(few)}, {"do": "fit", "labels": "true"},
                                                 {"do": "stories", "folder": folder})]
        got = {} if args.unchecked else compared(sides, Path(folder))
        for repeat in range(args.repeats):
            for name, side in list(sides.items())[:: 1 if repeat % 2 else -1]:
                for what in steps:
                    answer = side.ask(do=what, labels="sampled")
                    rows.append({"side": name, "what": what, "s": None, "cpu": None, "mib": None, **answer})
                    print(repeat, name, what, answer, flush=True)
        table = pd.DataFrame(rows).groupby(["what", "side"], sort=False)[["s", "cpu", "mib"]].median().reset_index()
        for (name, per), path in got.items():
            at = (table["side"] == name) & (table["what"] == per)
            if ("ours", per) in got:
                a, b = (load_file(p)["scores"] for p in (got["ours", per], path))
                width = min(a.shape[-1], b.shape[-1])
                table.loc[at, "difference"] = difference(a[..., :width], b[..., :width])
        for side in sides.values():
            side.close()
    ours = table[table["side"] == "ours"].set_index("what")["cpu"]
    table["ratio"] = table["cpu"] / table["what"].map(ours)
    table = table.assign(model=args.model if not args.folder else f"{args.model}, real weights", stories=args.stories,
                         queries=args.queries, repeats=args.repeats, threads=args.threads, layers=args.layers)
    table = table.reindex(columns=COLUMNS)
    path = HERE / "peers.csv"
    table.to_csv(path, mode="a", header=not path.exists(), index=False, float_format="%.4g")
    print(table.to_string())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("right", "time"))
    parser.add_argument("--model", default="512", choices=("512", "50257", "bundled"))
    parser.add_argument("--folder", help="weights and tokenizer for --model 512")
    parser.add_argument("--texts", help="a source of load_stories, where it differs from the model's")
    parser.add_argument("--layers", default="mlp", help="pattern of names of linear layers")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--python", nargs="*", default=[], metavar="SIDE=PATH")
    parser.add_argument("--stories", type=int, default=250)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", nargs="+", choices=("sequence", "token"), help="time these only, with factors of 64 "
                        "stories; goes with --unchecked")
    parser.add_argument("--unchecked", action="store_true", help="time only; do not compare the scores first")
    args = parser.parse_args()
    args.python = dict(pair.split("=", 1) for pair in args.python)
    torch.set_num_threads(args.threads)
    {"right": right, "time": timed}[args.what](args)


if __name__ == "__main__":
    main()
