"""Ours beside kronfluence 1.0.1: the same scores, and how long each takes, alternating in one process.

    python -m venv peers && . peers/bin/activate
    pip install torch==2.13.0 && pip install --no-deps kronfluence==1.0.1 -e .
    pip install accelerate opt_einsum einconv einops safetensors tqdm transformers datasets pandas matplotlib scipy
    python tests/benchmarks/peers.py --model bundled --stories 1000

`--model tinystories-1m` is the configuration of roneneldan/TinyStories-1M with random weights. kronfluence's
torchvision dependency is left out on purpose: beside a CPU build of torch it breaks the import of transformers.
"""

import argparse
import tempfile
import time
from functools import partial

import pandas as pd
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from helpers import fit_ekfac, influence, linear_layers, load_lm, load_stories, tokenize


class LanguageTask(Task):
    """The summed next-token loss; pseudo-labels are drawn as kronfluence's own examples draw them."""

    def __init__(self, layers):
        self.layers = layers

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        logits, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(-1), 1).flatten()
                labels = torch.where(labels == -100, labels, drawn)
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self.layers

    def get_attention_mask(self, batch):
        return batch["attention_mask"]


def rows(batches):
    """The examples of our batches, one dictionary each, without pads."""
    return [{key: value[row][batch["attention_mask"][row].bool()] for key, value in batch.items()}
            for batch in batches for row in range(len(batch["input_ids"]))]


def collate(examples, width=0):
    """One batch, padded to its longest example or, if that is more, to `width`."""
    width = max(width, *(len(example["input_ids"]) for example in examples))
    return {key: torch.stack([torch.nn.functional.pad(e[key], (0, width - len(e[key])), value=pad) for e in examples])
            for key, pad in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items()}


class Kronfluence:
    """fit, scores and token scores of kronfluence, each from files in a temporary folder of its own."""

    def __init__(self, model, layers, train, queries, batch_size):
        self.train, self.queries, self.batch_size, self.folder = rows(train), rows(queries), batch_size, None
        self.task = LanguageTask(layers)
        self.model = prepare_model(model, self.task)

    def analyzer(self, width=0):
        analyzer = Analyzer("peers", self.model, self.task, cpu=True, disable_tqdm=True, log_level=40,
                            output_dir=self.folder.name)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=partial(collate, width=width)))
        return analyzer

    def fit(self, labels):
        self.folder = tempfile.TemporaryDirectory()
        self.analyzer().fit_all_factors("factors", self.train, per_device_batch_size=self.batch_size,
                                        factor_args=FactorArguments(use_empirical_fisher=labels == "true"))

    def scores(self, per):
        longest = max(len(row["input_ids"]) for row in self.train)  # its token scores must all have one width
        analyzer = self.analyzer(longest if per == "token" else 0)
        args = ScoreArguments(damping_factor=None, compute_per_token_scores=per == "token")
        analyzer.compute_pairwise_scores(per, "factors", self.queries, self.train, len(self.queries), self.batch_size,
                                         score_args=args, overwrite_output_dir=True)
        return analyzer.load_pairwise_scores(per)["all_modules"]


class Ours:
    def __init__(self, model, layers, train, queries):
        self.model, self.layers, self.train, self.queries = model, layers, train, queries

    def fit(self, labels):
        self.factors = fit_ekfac(self.model, self.train, self.layers, labels=labels, progress=False)

    def scores(self, per):
        return influence(self.model, self.factors, self.queries, self.train, per=per, progress=False)


def tinystories_1m():
    """The architecture of roneneldan/TinyStories-1M: 8 layers, hidden 64, 16 heads, vocabulary 50,257."""
    config = GPTNeoConfig(vocab_size=50257, hidden_size=64, num_layers=8, num_heads=16, max_position_embeddings=2048,
                          attention_types=[[["global", "local"], 4]], window_size=256)
    torch.manual_seed(0)
    return GPTNeoForCausalLM(config).eval()


def setting(args):
    """(a function that makes the model anew, its layers, training batches, query batches)."""
    if args.model == "tinystories-1m":
        lengths = torch.randint(120, 240, (args.stories + args.queries,), generator=torch.Generator().manual_seed(0))
        ids = [torch.randint(50257, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)]
        examples = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
        batches = [collate(examples[i:i + args.batch]) for i in range(args.queries, len(examples), args.batch)]
        return tinystories_1m, batches, [collate(examples[: args.queries])]
    lm = load_lm(args.model)
    texts = load_stories(args.texts or args.model, limit=args.stories)["text"]
    queries = load_stories(args.texts or args.model, "validation", limit=args.queries)["text"]
    return (lambda: load_lm(args.model).model, tokenize(list(texts), lm.tokenizer, batch_size=args.batch),
            tokenize(list(queries), lm.tokenizer, batch_size=args.queries))


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def disagreement(ours, theirs):
    """The largest ‖Δ‖/‖score‖ of a query."""
    width = min(ours.shape[-1], theirs.shape[-1])
    ours, theirs = ours[..., :width].flatten(1), theirs[..., :width].flatten(1)
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="a source of load_lm, or tinystories-1m")
    parser.add_argument("--texts", help="a source of load_stories, where it differs from the model's")
    parser.add_argument("--layers", default="mlp", help="pattern of linear_layers")
    parser.add_argument("--stories", type=int, default=250)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    make, train, queries = setting(args)
    layers = linear_layers(make(), args.layers)
    sides = {"ours": Ours(make(), layers, train, queries),
             "kronfluence": Kronfluence(make(), layers, train, queries, args.batch)}
    for side in sides.values():
        side.fit("true")
    for per in ("sequence", "token"):
        print(f"{per} scores, largest ‖Δ‖/‖score‖ of a query:",
              f"{disagreement(*(side.scores(per) for side in sides.values())):.1e}", flush=True)
    table = []
    for repeat in range(args.repeats):
        for name, side in list(sides.items())[:: 1 if repeat % 2 else -1]:
            table.append((name, "fit", timed(side.fit, "sampled")[0]))
            table.extend((name, f"{per} scores", timed(side.scores, per)[0]) for per in ("sequence", "token"))
    seconds = pd.DataFrame(table, columns=["side", "what", "s"]).pivot_table("s", "what", "side", "median", sort=False)
    seconds["ratio"] = seconds["kronfluence"] / seconds["ours"]
    print(f"{args.model}, layers {args.layers!r} ({len(layers)}), {args.stories} stories, {args.queries} queries, "
          f"median of {args.repeats}, {args.threads} threads, seconds:\n{seconds.round(2)}")


if __name__ == "__main__":
    main()
