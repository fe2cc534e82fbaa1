"""Where our time goes, against the arithmetic that cannot be avoided: `floor.py --model 512`, or 50257; floor.csv.

Every matrix product that a fit and its scores need is listed by hand with its shape and how often it is needed, and
timed alone; the sum is the floor ("same shapes"). A second, lower one divides the same operations by the rate of one
large product ("best rate"). Attention's products count at the best rate, their causal half only, in both: a kernel
may fuse them. Elementwise work, softmax, copies and Python are in neither floor: they are what a profile shows as the
rest; what helpers/kernels.py computes shows as products and as elementwise. MLP layers, equal lengths, 8 queries
(counted with the stories), random weights; one thread, processor time.
"""

import argparse
import time
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch
from peer import batches
from peers import random_ids, stories260k, tinystories_1m
from torch.profiler import ProfilerActivity, profile

from helpers import fit_ekfac, influence, linear_layers

KINDS = {"products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::dot", "aten::mv", "aten::addmv"),
         "attention": ("aten::_scaled_dot_product",), "eigh": ("aten::_linalg_eigh",),
         "copies and look-ups": ("aten::copy_", "aten::index", "aten::gather", "aten::cat", "aten::masked_fill",
                                 "aten::_index_put", "aten::index_select", "aten::fill_", "aten::zero_")}
MODELS = {"512": stories260k, "50257": tinystories_1m}
GIGA = 1e9
ROWS = 80  # of the output head at a time; more logits do not fit into a cache


def shape_of(model):
    """(width, key width, hidden width of the MLP, its matrices up, blocks, vocabulary)."""
    c = model.config
    if c.model_type == "llama":
        keys = c.hidden_size * c.num_key_value_heads // c.num_attention_heads
        return c.hidden_size, keys, c.intermediate_size, 2, c.num_hidden_layers, c.vocab_size, False
    return c.hidden_size, c.hidden_size, 4 * c.hidden_size, 1, c.num_layers, c.vocab_size, True


def network(model, B, T):
    """[(batch, m, k, n, times)] of one batch's forward and backward pass and output head; attention apart, in GFLOP.

    No weight gradients; nothing below the output of the first studied layer is differentiated.
    """
    d, keys, ff, up, blocks, V, _ = shape_of(model)
    N = B * T
    forward = [(1, N, d, d, 2), (1, N, d, keys, 2), (1, N, d, ff, up), (1, N, ff, d, 1)]
    later = [(1, N, d, d, 2), (1, N, keys, d, 2), (1, N, ff, d, up)]  # input gradients, from the second block on
    products = [(b, m, k, n, times * blocks) for b, m, k, n, times in forward]
    products += [(b, m, k, n, times * (blocks - 1)) for b, m, k, n, times in later]
    products += [(1, N, d, ff, blocks), (1, ROWS, d, V, N / ROWS), (1, ROWS, V, d, N / ROWS)]
    attention = 2 * B * T * T * d / 2 * (2 * blocks + 4 * (blocks - 1)) / GIGA
    return products, attention


def layers_of(model):
    """[(d_out, d_in (+1))] of the studied layers."""
    d, _, ff, up, blocks, _, bias = shape_of(model)
    return ([(ff, d + bias)] * up + [(d, ff + bias)]) * blocks


def needed(what, model, B, T, queries):
    """(products of one batch, attention's GFLOP of one batch); the eigendecompositions are apart."""
    products, attention = network(model, B, T)
    for o, i in layers_of(model):
        if what == "fit":
            products += [(1, i, B * T, i, 1), (1, o, B * T, o, 1), (B, o, T, i, 1), (B, o, o, i, 1), (B, o, i, i, 1)]
        elif what == "sequence":
            products += [(B, o, T, i, 1), (1, queries, o * i, B, 1)]
        else:
            products += [(1, B * T, max(o, i), min(o, i), queries)]
    return products, attention


def median_time(function, repeats=3):
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return sorted(times)[repeats // 2]


@cache
def product_time(batch, m, k, n):
    x, y = (torch.randn(batch, *s) if batch > 1 else torch.randn(*s) for s in ((m, k), (k, n)))
    return median_time(lambda: x @ y)


def eigh_time(n):
    x = torch.randn(n, n).double()
    return median_time(lambda: torch.linalg.eigh(x @ x.T), 3)


def shares(function):
    """{kind of operation: share of the profiled time}."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        function()
    totals = dict.fromkeys([*KINDS, "elementwise and other"], 0.0)
    for event in recorded.key_averages():
        kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), "elementwise and other")
        totals[kind] += event.self_cpu_time_total
    whole = sum(totals.values())
    return {kind: total / whole for kind, total in totals.items()}


def rows_of(args, model, T, B, queries):
    """One row for the fit, the sequence scores and the token scores."""
    stories = args.stories
    ids = random_ids(stories + queries, model.config.vocab_size, T, T)
    train, asked = batches(ids[queries:], B), batches(ids[:queries], B)
    layers = linear_layers(model, "mlp")
    factors = fit_ekfac(model, train, layers, progress=False)
    best = 2 * 1024**3 / product_time(1, 1024, 1024, 1024) / GIGA
    rows = []
    for what in ("fit", "sequence", "token"):
        run = (partial(fit_ekfac, model, train, layers, progress=False) if what == "fit" else
               partial(influence, model, factors, asked, train, per=what, progress=False))
        products, attention = needed(what, model, B, T, queries)
        count = (stories + (0 if what == "fit" else queries)) / B
        work = count * (sum(2 * b * m * k * n * times for b, m, k, n, times in products) / GIGA + attention)
        own = count * (sum(times * product_time(b, m, k, n) for b, m, k, n, times in products) + attention / best)
        sizes = [n for pair in layers_of(model) for n in pair] if what == "fit" else []
        eigh = sum(sizes.count(n) * eigh_time(n) for n in set(sizes))
        measured = median_time(run, args.repeats)
        rows.append({"model": args.model, "what": what, "stories": stories, "tokens": stories * T, "gflop": work,
                     "best_rate": best, "floor_best": work / best + eigh, "floor_shapes": own + eigh, "s": measured,
                     "times_best": measured / (work / best + eigh), "times_shapes": measured / (own + eigh)}
                    | shares(run))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="512", choices=MODELS)
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = pd.DataFrame(rows_of(args, MODELS[args.model](), 200, 16, 8)).assign(threads=args.threads)
    path = Path(__file__).with_suffix(".csv")
    table.to_csv(path, mode="a", header=not path.exists(), index=False, float_format="%.4g")
    print(table.T.to_string())


if __name__ == "__main__":
    main()
