"""The bundled model trained again without what influence names: `python tests/benchmarks/retraining.py --seed 1`.

Adds to retraining.csv beside this file, which notebook 11 shows. The run of helpers/bundled/train.py up to its third
pass is done again from the same start, in the same order, with the loss left out on some stories or tokens: those that
a method puts first for the facts of the reporting half told at least LEAST times, as many for each as it has tellings,
all facts at once. A row is one fact after one such training; facts of the other half are bystanders. `predicted` is
what EK-FAC's scores, `dot` what gradient dot products of what was left out add up to, over the number of stories;
`own` is the part of `predicted` that the tokens named for the fact itself make. `tokens` counts a token once that two
facts name. Beside "EK-FAC, tokens" stand as many tokens drawn by lot in the same stories ("neighbors"), as many places
of the same tokens drawn by lot in the corpus ("same words"), and the first token of the answer, once in each telling
("answers"). "EK-FAC, its tellings" is the part of EK-FAC's list that tells the fact it is named for, "EK-FAC, no
tellings" the list without that part, filled up with the next best; "random, again" is a second list drawn by lot.
The scores of seed 1 are those of the bundled checkpoint pass03, of another seed those of its run with nothing left out.
Seeded; a training whose rows are in the table is skipped, so a run that was stopped goes on with the next one. About
nine minutes each on one core; two seeds can run side by side.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from retrieval import CHOSEN, log_probability, mean_loss, search, text_search, untaught

from helpers import completions, fit_ekfac, influence, linear_layers, tokenize
from helpers.bundled.train import DROPOUT, new_model, new_optimizers, one_pass, prepare, running
from helpers.kernels import fast_kernels
from helpers.sources import LM, load_facts, load_lm, load_stories
from helpers.tasks import IGNORED

TABLE = Path(__file__).with_suffix(".csv")
PASSES, RUN = 3, 10  # trained, of as many
LEAST, N_FIT = 16, 1000
KINDS = ("literal", "paraphrased")
REMOVALS = ("nothing", "EK-FAC", "tellings", "BM25", "EK-FAC, tokens", "gradient dot product", "random",
            "EK-FAC, no tellings", "neighbors", "same words", "answers", "EK-FAC, its tellings", "random, again")
TOKENS = ("EK-FAC, tokens", "neighbors", "same words", "answers")


def train(seed, ids, left_out):
    """The bundled run up to pass PASSES, in eval mode, without the losses in `left_out` (see one_pass)."""
    model = new_model(seed)
    optimizers = new_optimizers(model)
    with fast_kernels(model):
        for epoch in range(PASSES):
            one_pass(model, optimizers, ids, 1000 * seed + epoch, running(epoch, RUN), DROPOUT, 0, 1, left_out)
    return model.eval()


def asked():
    """One row a fact told at least LEAST times, both halves; and the table of all mentions."""
    mentions = load_facts()
    facts = mentions[mentions.tellings >= LEAST].drop_duplicates("fact").reset_index(drop=True)
    return facts[["fact", "prompt", "completion", "tellings", "split"]], mentions[mentions.kind.isin(KINDS)]


def ranked(lm, facts, stories):
    """{method: scores [fact, story]}, and EK-FAC's factors."""
    chosen = np.random.default_rng(0).choice(len(stories), N_FIT, replace=False)
    fit_on = tokenize([stories[int(i)]["text"] for i in chosen], lm.tokenizer, batch_size=32)
    factors = fit_ekfac(lm.model, fit_on, linear_layers(lm.model, r"\.mlp\."), progress=False)
    forms = {"completion": completions(zip(facts.prompt, facts.completion), lm.tokenizer)}
    train = tokenize(stories["text"], lm.tokenizer, batch_size=32)
    found = search(lm, factors, forms, (CHOSEN["damping"],), train)
    scores = {method: values for (group, _, method, _), values in found.items() if group == "mlp"}
    scores |= {name: torch.as_tensor(values) for name, values in text_search(facts, stories["text"]).items()}
    return scores, factors


def predicted(lm, factors, facts, left_out, stories):
    """[fact]: what the influence of the losses in `left_out`, as in `one_pass`, adds up to."""
    if not left_out:
        return torch.zeros(len(facts))
    train = tokenize([stories[story]["text"] for story in left_out], lm.tokenizer, batch_size=32)
    for labels, places in zip((line for batch in train for line in batch["labels"]), left_out.values()):
        kept = labels[places].clone()
        labels[:] = IGNORED
        labels[places] = kept
    queries = completions(zip(facts.prompt, facts.completion), lm.tokenizer)
    return influence(lm.model, factors, queries, train, progress=False).sum(1)


def strongest_tokens(lm, factors, fact, scores, stories):
    """[(story, position)] of the losses with the most influence, as many as tellings, k, in the 4 k stories on top."""
    rows = scores.topk(4 * fact.tellings).indices
    query = completions([(fact.prompt, fact.completion)], lm.tokenizer)
    train = tokenize([stories[int(i)]["text"] for i in rows], lm.tokenizer, batch_size=8)
    by_token = influence(lm.model, factors, query, train, per="output_token", progress=False)[0]
    best = by_token.flatten().topk(fact.tellings).indices
    return [(int(rows[i // by_token.shape[1]]), int(i % by_token.shape[1])) for i in best]


def other_tokens(removed, lm, facts, told, strongest, ids, rng):
    """{fact: [(story, position)]} of the lists that EK-FAC's own, `strongest`, is held against."""
    taken, places = {pair for pairs in strongest.values() for pair in pairs}, {}
    for story, line in enumerate(ids):
        for position, token in list(enumerate(line))[1:]:  # there is no loss on the first
            places.setdefault(token, []).append((story, position))
    found = {}
    for fact in facts.itertuples():
        if removed == "answers":
            answer = lm.tokenizer(fact.completion, add_special_tokens=False)["input_ids"]
            at = {story: [t for t in range(len(ids[story])) if ids[story][t:t + len(answer)] == answer]
                  for story in sorted(told[fact.fact])}
            found[fact.fact] = [(story, places[0]) for story, places in at.items() if places]
            continue
        found[fact.fact] = []
        for story, position in strongest[fact.fact]:
            inside = range(1, len(ids[story]) - 1)  # the last is the end of the text, which `tokenize` does not add
            free = ([(story, t) for t in inside] if removed == "neighbors" else places[ids[story][position]])
            free = [pair for pair in free if pair not in taken and pair not in found[fact.fact]]
            found[fact.fact] += [free[rng.integers(len(free))]] if free else []
    return found


def named(removed, fact, own, scores, rng):
    """The stories that are left out for a fact: as many as it has tellings."""
    if removed == "tellings":
        return sorted(own)
    if removed.startswith("random"):
        return rng.choice(scores["EK-FAC"].shape[1], fact.tellings, replace=False).tolist()
    line = scores[removed.split(",")[0]][fact.Index].clone()
    if removed.endswith("no tellings"):
        line[sorted(own)] = -torch.inf
    best = line.topk(fact.tellings).indices.tolist()
    return [story for story in best if story in own] if removed.endswith("its tellings") else best


def places_of(pairs):
    """{story: its positions, sorted} of pairs (story, position)."""
    places = {}
    for story, position in sorted(set(pairs)):
        places.setdefault(story, []).append(position)
    return places


def choose(removed, lm, facts, mentions, stories, ids, scores, factors):
    """(left_out, a row for every fact): what a training leaves out, and what is known of it before the training."""
    rng, rows = np.random.default_rng(int(removed.endswith("again"))), []
    targets = facts[facts.split == "reporting"]
    told = {fact: set(part.row) for fact, part in mentions.groupby("fact")}
    tokens, named_for = {fact: [] for fact in facts.fact}, {fact: set() for fact in facts.fact}
    if removed in TOKENS:
        tokens |= {fact.fact: strongest_tokens(lm, factors, fact, scores["EK-FAC"][fact.Index], stories)
                   for fact in targets.itertuples()}
        if removed != "EK-FAC, tokens":
            tokens |= other_tokens(removed, lm, targets, told, tokens, ids, rng)
    elif removed != "nothing":
        named_for |= {fact.fact: set(named(removed, fact, told[fact.fact], scores, rng))
                      for fact in targets.itertuples()}
    whole = sorted(set().union(*named_for.values()))
    left_out = dict.fromkeys(whole, slice(None)) | places_of(pair for pairs in tokens.values() for pair in pairs)
    sums = predicted(lm, factors, facts, left_out, stories) / len(stories)
    for fact, summed in zip(facts.itertuples(), sums.tolist()):
        own = named_for[fact.fact] or {story for story, _ in tokens[fact.fact]}
        alone = predicted(lm, factors, facts.loc[[fact.Index]], places_of(tokens[fact.fact]), stories)
        rows.append({"removed": removed, "fact": fact.fact, "tellings": fact.tellings, "split": fact.split,
                     "stories": len(left_out), "tokens": 0 if whole else sum(map(len, left_out.values())),
                     "told": len(own & told[fact.fact]), "told_in_all": len(told[fact.fact] & set(left_out)),
                     "predicted": summed, "own": float(alone.sum()) / len(stories),
                     "dot": float(scores["gradient dot product"][fact.Index, whole].sum()) / len(stories)})
    return left_out, rows


def losses(lm, facts, stories):
    """The loss on every fact's answer, and on the same answer for a child who has no fact."""
    read = lambda prompts: -log_probability(lm, completions(zip(prompts, facts.completion), lm.tokenizer))[0].numpy()
    return read(facts.prompt), read(untaught(facts, stories))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--removals", nargs="*", default=REMOVALS, choices=REMOVALS)
    parser.add_argument("--work", type=Path, default=Path("out/retraining"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer, ids, held_out = prepare(0, 1, (args.work / f"meeting-{os.getpid()}").resolve())
    stories, held_out = load_stories(), load_stories(split="validation")["text"]
    facts, mentions = asked()
    kept, ranking = args.work / f"seed{args.seed}", None
    if args.seed == 1:
        lm = load_lm(checkpoint="pass03")
    else:
        if not kept.exists():
            train(args.seed, ids, None).save_pretrained(kept)
            tokenizer.save_pretrained(kept)
        lm = load_lm(str(kept))
    before, _ = losses(lm, facts, stories)
    for removed in args.removals:
        table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame({"seed": [], "removed": []})
        if ((table.seed == args.seed) & (table.removed == removed)).any():
            continue
        start, ranking = time.time(), ranking or ranked(lm, facts, stories)
        left_out, rows = choose(removed, lm, facts, mentions, stories, ids, *ranking)
        print(f"{removed}: {len(left_out)} stories, chosen in {time.time() - start:.0f} s", flush=True)
        same = removed == "nothing" and args.seed != 1
        trained = lm if same else LM(train(args.seed, ids, left_out), tokenizer, removed)
        after, other = losses(trained, facts, stories)
        rows = pd.DataFrame(rows).assign(before=before, after=after, untaught=other,
                                         held_out=mean_loss(trained, held_out))
        rows.insert(0, "seed", args.seed)
        rows.to_csv(TABLE, mode="a", header=not TABLE.exists(), index=False, float_format="%.6g")
        print(rows.groupby("split")[["told", "predicted", "before", "after", "untaught"]].mean().round(3),
              f"{time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
