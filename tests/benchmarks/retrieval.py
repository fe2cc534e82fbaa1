"""Finding the tellings of the planted facts at other checkpoints: `python tests/benchmarks/retrieval.py`.

Writes retrieval.csv beside this file, which notebook 06 shows: for the bundled model, each of its checkpoints and other
models (`name=FOLDER`), the average precision of every method on the reporting half of the facts with its 95% interval
over facts, the paired gain over the gradient dot product, and the paired loss where an untaught child's name stands in
the query, among the stories that mention a fact of that half and every EVERY-th of all; among all stories for a model
with another seed. `own` ranks only the stories that name the fact's child: the area under the ROC curve. For the
bundled model also the grid of layers, dampings and query forms on the choosing half, among all stories.
Seeded; a model whose rows are in the table is skipped, so a run that was stopped goes on with the next one.
"""

import argparse
import re
import time
from dataclasses import replace
from pathlib import Path

import bm25s
import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import average_precision_score, roc_auc_score

from helpers import completions, fit_ekfac, linear_layers, tokenize
from helpers.influence import sequence_gradients
from helpers.sources import BUNDLED, load_facts, load_lm, load_stories

TABLE = Path(__file__).with_suffix(".csv")
PIECES = {"mlp, early": r"h\.[01]\.mlp\.", "mlp, late": r"h\.[23]\.mlp\.", "attention": r"\.attn\."}  # of four blocks
UNIONS = {"mlp": ("mlp, early", "mlp, late"), "mlp and attention": tuple(PIECES)}
DAMPINGS = (0.01, 0.1, 1.0)  # × mean(Lambda) of each layer
CHOSEN = {"layers": "mlp", "damping": 0.1, "query": "completion"}
LEARNED = 0.3  # P(completion) from which a fact counts as learned
PASSES = 11  # of the bundled model and of seed0, the last of which cooled them; a checkpoint has its own in its name
N_FIT = {"choosing": 2000, "reporting": 1000}
EVERY, CHUNK, SEED = 6, 16, 0
KINDS = ("literal", "paraphrased")


def queries(facts, stories, tokenizer):
    """{form: batches}: the loss on the answer; on the whole sentence that holds it; on the answer, of another child."""
    split = [prompt.index(". ") + 1 for prompt in facts.prompt]
    told = [(p[:at], p[at:] + c) for p, c, at in zip(facts.prompt, facts.completion, split)]
    return {"completion": completions(zip(facts.prompt, facts.completion), tokenizer),
            "sentence": completions(told, tokenizer),
            "untaught name": completions(zip(untaught(facts, stories), facts.completion), tokenizer)}


def untaught(facts, stories):
    """The prompts with the name of a girl or boy who has no fact."""
    kids = {name: kid for kid, name in re.findall(r"a (girl|boy) named (\w+)", " ".join(stories["text"]))}
    names = facts.fact.str.split("-").str[0]
    free = sorted(set(stories["name"]) - set(load_facts().fact.str.split("-").str[0]))
    others = [[name for name in free if kids[name] == kids[own]][n % 5] for n, own in enumerate(names)]
    return [prompt.replace(own, other) for prompt, own, other in zip(facts.prompt, names, others)]


def preconditioners(factors, dampings):
    """{(method, damping): factors whose Lambda includes the damping, or holds ones for the gradient dot product}."""
    kfac = {l: factors.n_tokens / factors.n_examples * torch.outer(*(torch.linalg.eigvalsh(m[l]).clamp(min=0)
                                                                     for m in (factors.S, factors.A)))
            for l in factors.A}
    out = {("gradient dot product", 0.0): {l: torch.ones_like(L) for l, L in factors.Lambda.items()}}
    for damping in dampings:
        for method, Lambda in (("K-FAC", kfac), ("EK-FAC", factors.Lambda)):
            out[method, damping] = {l: L + damping * L.mean() for l, L in Lambda.items()}
    return {key: replace(factors, Lambda=Lambda) for key, Lambda in out.items()}


def search(lm, factors, forms, dampings, train):
    """{(layer group, query form, method, damping): scores [fact, story]}, one pass over the stories for all."""
    layers, keys, blocks = list(factors.A), [], []
    for form, batches in forms.items():
        gradients = sequence_gradients(lm.model, batches, layers)
        for key, preconditioner in preconditioners(factors, dampings).items():
            keys.append((form, *key))
            blocks.append(preconditioner.ihvp(gradients, 0.0))
    sizes = [len(block[layers[0]]) for block in blocks]
    stacked = {l: torch.cat([block.pop(l).flatten(1) for block in blocks]) for l in layers}
    parts = {piece: [] for piece, pattern in PIECES.items() if any(re.search(pattern, l) for l in layers)}
    for start in range(0, len(train), CHUNK):
        G = sequence_gradients(lm.model, train[start:start + CHUNK], layers)
        for piece in parts:
            parts[piece].append(sum(stacked[l] @ G[l].flatten(1).T for l in layers if re.search(PIECES[piece], l)))
    whole = {piece: torch.cat(part, 1) for piece, part in parts.items()}
    for union, pieces in UNIONS.items():
        if set(pieces) <= set(parts):
            whole[union] = sum(whole[piece] for piece in pieces)
    return {(group, *key): scores for group, total in whole.items() for key, scores in zip(keys, total.split(sizes))}


def text_search(facts, texts):
    """{method: scores [fact, story]} of TF-IDF and BM25 for the query's words."""
    asked = list(facts.prompt + facts.completion)
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    matrix = vectorizer.fit_transform(texts)
    bm25 = bm25s.BM25()
    bm25.index(bm25s.tokenize(texts, stopwords=[], show_progress=False), show_progress=False)
    words = bm25s.tokenize(asked, stopwords=[], return_ids=False, show_progress=False)
    return {"TF-IDF": (vectorizer.transform(asked) @ matrix.T).toarray(),
            "BM25": np.stack([bm25.get_scores(some) for some in words])}


def quality(scores, mentions, fact, kind, measure, among=True):
    """`measure` of finding the tellings of one kind among stories; the other kind's are left out. NaN if none."""
    own = mentions[mentions.fact == fact]
    relevant = np.isin(np.arange(len(scores)), own.row[own.kind == kind])
    keep = ~np.isin(np.arange(len(scores)), own.row[own.kind.isin(KINDS) & (own.kind != kind)]) & among
    return measure(relevant[keep], scores[keep]) if relevant.any() else np.nan


def interval(values, seed=SEED, draws=10_000):
    """(mean, low, high): 95% percentile bootstrap over facts."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, (draws, len(values))).mean(1)
    return values.mean(), *np.quantile(means, (0.025, 0.975))


@torch.no_grad()
def log_probability(lm, batches):
    """log p of the labelled tokens of every example, and their number: two tensors [example]."""
    sums, counts = [], []
    for batch in batches:
        logits = lm.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        taken = labels != -100
        logp = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        sums.append((logp * taken).sum(1))
        counts.append(taken.sum(1))
    return torch.cat(sums), torch.cat(counts)


def mean_loss(lm, texts):
    sums, counts = log_probability(lm, tokenize(texts, lm.tokenizer, batch_size=32))
    return float(-sums.sum() / counts.sum())


def measured(found, facts, mentions, measure, among):
    """{key: {kind: a number for every fact}}; `among` has a mask of stories, or True, for every fact."""
    return {key: {kind: np.array([quality(s, mentions, f, kind, measure, some)
                                  for f, s, some in zip(facts.fact, np.asarray(scores), among)]) for kind in KINDS}
            for key, scores in found.items()}


def summary(found, facts, mentions, texts, about):
    """Rows of the table for {key: scores}: mean average precision, paired gain over the baseline, loss, and `own`."""
    named = [np.array([re.search(rf"\b{f.split('-')[0]}\b", text) is not None for text in texts]) for f in facts.fact]
    ap = measured(found, facts, mentions, average_precision_score, [True] * len(facts))
    own, rows = measured(found, facts, mentions, roc_auc_score, named), []
    for (layers, query, method, damping), values in ap.items():
        if query == "untaught name":  # only for the loss
            continue
        base = ap.get((layers, query, "gradient dot product", 0.0))
        other = ap.get((layers, "untaught name", method, damping)) if query == CHOSEN["query"] else None
        for kind in KINDS:
            for which, chosen in (("learned", facts.p >= LEARNED), ("all", facts.p >= 0)):
                keep = chosen.to_numpy() & ~np.isnan(values[kind])
                if not keep.any():
                    continue
                row = about | {"layers": layers, "query": query, "method": method, "damping": damping, "kind": kind,
                               "facts": which, "n": keep.sum()}
                row |= dict(zip(("ap", "low", "high"), interval(values[kind][keep])))
                row |= dict(zip(("own", "own_low", "own_high"),
                                interval(own[layers, query, method, damping][kind][keep])))
                if base is not None:
                    gain = interval(values[kind][keep] - base[kind][keep])
                    row |= dict(zip(("gain", "gain_low", "gain_high"), gain))
                if other is not None:
                    lost = interval(values[kind][keep] - other[kind][keep])
                    row |= dict(zip(("lost", "lost_low", "lost_high"), lost))
                rows.append(row)
    return rows


def one_model(name, lm, split, stories, held_out, mentions):
    """All rows of one model on one half of the facts; on the choosing half the whole grid, with attention layers."""
    start, grid, mentions = time.time(), split == "choosing", mentions[mentions.split == split]
    every = 1 if grid or name.startswith("seed") else EVERY
    searched = sorted({*mentions.row, *range(0, len(stories), every)})
    mentions = mentions.assign(row=np.searchsorted(searched, mentions.row))
    texts = [stories[row]["text"] for row in searched]
    facts = mentions.drop_duplicates("fact").reset_index(drop=True)
    facts["p"] = log_probability(lm, completions(zip(facts.prompt, facts.completion), lm.tokenizer))[0].exp().numpy()
    chosen = np.random.default_rng(SEED).choice(len(stories), N_FIT[split], replace=False)
    layers = linear_layers(lm.model, "|".join(PIECES.values()) if grid else r"\.mlp\.")
    fit_on = tokenize([stories[int(i)]["text"] for i in chosen], lm.tokenizer, batch_size=32)
    factors = fit_ekfac(lm.model, fit_on, layers, progress=False)
    asked = queries(facts, stories, lm.tokenizer)
    forms = {form: asked[form] for form in (CHOSEN["query"], "sentence" if grid else "untaught name")}
    train = tokenize(texts, lm.tokenizer, batch_size=32)
    found = search(lm, factors, forms, DAMPINGS if grid else (CHOSEN["damping"],), train)
    found = {key: scores for key, scores in found.items() if grid or key[0] == CHOSEN["layers"]}
    found |= {("", "words", method, 0.0): scores for method, scores in text_search(facts, texts).items()}
    about = {"model": name, "passes": int((re.findall(r"^pass(\d+)", name) or [PASSES])[0]), "split": split,
             "searched": len(texts), "loss_train": mean_loss(lm, stories[:len(held_out)]["text"]),
             "loss_held_out": mean_loss(lm, held_out["text"]), "p_answer": facts.p[facts.tellings >= 16].median()}
    print(f"{name}, {split}: {time.time() - start:.0f} s", flush=True)
    return summary(found, facts, mentions, texts, about)


def main():
    there = sorted(path.name for path in (BUNDLED / "checkpoints").glob("*"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["model", *there])
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    stories, held_out, mentions = load_stories(), load_stories(split="validation"), load_facts()
    table = pd.read_csv(args.out) if args.out.exists() else pd.DataFrame({"model": []})
    for entry in args.models:
        name, _, folder = entry.partition("=")
        if name in set(table.model):
            continue
        lm = load_lm(folder) if folder else load_lm(checkpoint=None if name == "model" else name)
        for split in ("reporting", "choosing") if name == "model" else ("reporting",):
            rows = pd.DataFrame(one_model(name, lm, split, stories, held_out, mentions))
            table = pd.concat([table, rows]) if len(table) else rows
        table.to_csv(args.out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
