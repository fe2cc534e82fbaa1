"""Measure the bundled corpus and model and write the numbers into README.md.

`python -m helpers.bundled.measure --real FOLDER`, where FOLDER holds train.jsonl.gz and validation.jsonl.gz of the real
TinyStories; without it the real text's column stays empty.
"""
import argparse
import gzip
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import average_precision_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.bundled import train as t
from helpers.bundled.expand import read_grammar

COMPARED = 3000  # stories of each corpus in the nearest-neighbour comparison
WORDS = 400_000  # words of each corpus in the 4-gram comparison
COPIED = 200  # held-out stories in which words are said again
SAMPLES, SHOWN, TEMPERATURE = 80, 10, 0.5  # stories that the model writes; those of them that README.md shows


def words(text):
    """Lower-case words and sentence marks."""
    return re.findall(r"[a-z']+|[.,!?\"]", text.lower())


def four_grams(text):
    """The text's 4-grams of words, with repetitions."""
    return list(zip(*(words(text)[k:] for k in range(4))))


def distinct_ratio(texts, limit=WORDS):
    """Distinct 4-grams over all 4-grams, among the first `limit` of them."""
    grams = []
    for text in texts:
        grams += four_grams(text)
        if len(grams) >= limit:
            break
    return len(set(grams[:limit])) / len(grams[:limit])


def neighbour_overlap(held_out, texts):
    """For each held-out story, the largest share of its distinct 4-grams that one training story also has; the mean."""
    where = defaultdict(set)
    for i, text in enumerate(texts):
        for gram in four_grams(text):
            where[gram].add(i)
    best = []
    for text in held_out:
        grams = set(four_grams(text))
        shared = Counter(i for gram in grams for i in where.get(gram, ()))
        best.append(max(shared.values(), default=0) / max(len(grams), 1))
    return mean(best)


def text_column(train, held_out):
    """The text statistics of one corpus, as strings by row name."""
    lengths = [len(words(text)) for text in train]
    return {
        "training stories": f"{len(train):,}",
        "words and marks a story, mean": f"{mean(lengths):.0f}",
        "words and marks a story, 5% to 95%": f"{np.quantile(lengths, 0.05):.0f} to {np.quantile(lengths, 0.95):.0f}",
        "different words": f"{len({w for text in train for w in words(text)}):,}",
        f"distinct 4-grams, first {WORDS:,}": f"{distinct_ratio(train):.3f}",
        f"4-grams shared with the nearest of {COMPARED:,}": f"{neighbour_overlap(held_out, train[:COMPARED]):.3f}",
    }


def texts_of(path):
    """The texts of a gzipped JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def five_gram(train_ids, order=5, discount=0.75):
    """Interpolated absolute discounting over tokens; returns a function of held-out ids -> mean nats a token."""
    follow = [defaultdict(Counter) for _ in range(order)]
    for row in train_ids:
        for k in range(1, len(row)):
            for n in range(min(order - 1, k) + 1):
                follow[n][tuple(row[k - n:k])][row[k]] += 1
    totals = [{context: sum(c.values()) for context, c in level.items()} for level in follow]

    def probability(context, token):
        p = 1 / t.VOCABULARY
        for n in range(len(context) + 1):
            seen = follow[n].get(context[len(context) - n:])
            if seen is None:
                break
            total = totals[n][context[len(context) - n:]]
            p = (max(seen[token] - discount, 0) + discount * len(seen) * p) / total
        return p

    def loss(ids):
        places = ((row, k) for row in ids for k in range(1, len(row)))
        return -mean(float(np.log(probability(tuple(row[max(k - order + 1, 0):k]), row[k]))) for row, k in places)

    return loss


def tfidf_table(texts, facts):
    """Mean average precision of TF-IDF (query = prompt + completion) by kind of telling: rows of (variant, dict)."""
    table = []
    for ngrams in ((1, 1), (1, 2)):
        vectorizer = TfidfVectorizer(ngram_range=ngrams)
        matrix, found = vectorizer.fit_transform(texts), defaultdict(list)
        for mentions in facts.values():
            query = vectorizer.transform([mentions[0]["prompt"] + mentions[0]["completion"]])
            scores = (matrix @ query.T).toarray().ravel()
            rows = {kind: [m["row"] for m in mentions if m["kind"] == kind] for kind in ("literal", "paraphrased")}
            rows["both"] = rows["literal"] + rows["paraphrased"]
            for kind, relevant in rows.items():
                keep = np.setdiff1d(np.arange(len(texts)), np.setdiff1d(rows["both"], relevant))
                if relevant:
                    found[kind].append(average_precision_score(np.isin(keep, relevant), scores[keep]))
        table.append((f"TF-IDF, words of {ngrams[0]} to {ngrams[1]}", {k: mean(v) for k, v in found.items()}))
    return table


def new_share(texts, known):
    """Share of the 4-grams of `texts` that are in none of the texts `known`."""
    seen = {gram for text in known for gram in four_grams(text)}
    grams = [gram for text in texts for gram in four_grams(text)]
    return sum(gram not in seen for gram in grams) / len(grams)


def samples(model, tokenizer, n=SAMPLES):
    """Stories that the model writes after a short opening."""
    torch.manual_seed(0)
    ids = tokenizer("Once upon a time, there was a", return_tensors="pt")
    rows = model.generate(**ids, max_length=240, do_sample=True, temperature=TEMPERATURE, top_k=0,
                          num_return_sequences=n, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


@torch.no_grad()
def copied(model, tokenizer, texts, words):
    """Where one of `words` is said again in a text: the mean share that it gets of the probability of all of them."""
    first = {word: tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words}
    shares = []
    for text in texts:
        encoded, said = tokenizer(text, return_offsets_mapping=True), set()
        p = model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0].softmax(-1)
        for k, (start, end) in enumerate(encoded["offset_mapping"]):
            word = re.match(r" (\w+)", text[start:])  # tokens of words begin with the space
            if k and end > start and word and word[1] in said:
                shares.append((p[k - 1, first[word[1]]] / p[k - 1, [*set(first.values())]].sum()).item())
            said |= {word[1]} & set(words) if word else set()
    return mean(shares)


def table(header, rows):
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def facts_section(model, tokenizer):
    """P(completion) by number of tellings, and of the key phrases."""
    rows, by_count = [], defaultdict(list)
    for fact in t.fact_table(model, tokenizer):
        by_count[fact["tellings"]].append(fact)
    for n, facts in sorted(by_count.items()):
        p, control = [f["p"] for f in facts], [f["control"] for f in facts]
        ratio = median(a / b for a, b in zip(p, control))
        rows.append((n, len(facts), f"{median(p):.3f}", f"{min(p):.3f} to {max(p):.3f}", f"{median(control):.3f}",
                     f"{ratio:.0f}"))
    often = [fact for n, facts in by_count.items() if n >= 16 for fact in facts]
    p, control = (median(fact[key] for fact in often) for key in ("p", "control"))
    each = median(fact["p"] / fact["control"] for fact in often)
    phrases = t.probability(model, tokenizer, [(r["prompt"], r["completion"]) for r in t.read("phrases.jsonl")])
    header = ("tellings", "facts", "P(completion), median", "range", "untaught name, median", "ratio, median")
    return table(header, rows) + (
        f"\n\nTold 16 times and more: median P(completion) {p:.2f}, {p / control:.1f} times the median of an "
        f"untaught name ({each:.1f} times fact by fact). Key phrases: median P(completion) {median(phrases):.2f}.")


def losses_section(models, tokenizer, train_texts, held_out_texts):
    """Loss in nats a token, on 1,000 training stories and all held-out ones, of every model and of a 5-gram model."""
    ids, held_out = t.encode(train_texts, tokenizer), t.encode(held_out_texts, tokenizer)
    loss = five_gram(ids)
    rows = [(name, f"{t.mean_loss(model, ids[:1000]):.3f}", f"{t.mean_loss(model, held_out):.3f}")
            for name, model in models]
    rows.append(("5-gram model of the same tokens", f"{loss(ids[:1000]):.3f}", f"{loss(held_out):.3f}"))
    tokens = [len(row) for row in ids]
    note = f"A story has {mean(tokens):.0f} tokens on average, {max(tokens)} at most; {sum(tokens):,} in all."
    return note + "\n\n" + table(("model", "training", "held out"), rows)


def copying_section(models, tokenizer, texts):
    """How well every model says a word of a story again, and not another of its kind."""
    rules = read_grammar()
    lists = {kind: rules[kind] for kind in ("foods", "toys", "animals")}
    lists |= {"things": rules["nouns"], "names": rules["girls"] + rules["boys"]}
    shares = lambda model: (f"{copied(model, tokenizer, texts, words):.2f}" for words in lists.values())
    return table(("model", *lists), [(name, *shares(model)) for name, model in models])


def measure(real):
    """The measured part of README.md as markdown."""
    train, held_out = (texts_of(t.HERE / f"stories_{split}.jsonl.gz") for split in ("train", "validation"))
    columns = [text_column(train, held_out)]
    if real:
        columns.append(text_column(*(texts_of(real / f"{split}.jsonl.gz")[:None if split == "train" else len(held_out)]
                                     for split in ("train", "validation"))))
    text = table(("", "bundled", "TinyStories")[:1 + len(columns)], [(k, *(c[k] for c in columns)) for k in columns[0]])
    folders = [t.HERE / "model", *sorted((t.HERE / "checkpoints").glob("*"))]
    models = [(f.name, AutoModelForCausalLM.from_pretrained(f).eval()) for f in folders]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    facts = defaultdict(list)
    for row in t.read("facts.jsonl.gz"):
        facts[row["fact"]].append(row)
    tfidf = [(name, *(f"{found[k]:.2f}" for k in ("literal", "paraphrased", "both"))) for name, found in
             tfidf_table(train, facts)]
    told, unseen = samples(models[0][1], tokenizer), new_share(held_out, train)
    parts = ["### The text", text, "### Losses (nats a token)", losses_section(models, tokenizer, train, held_out),
             "### Saying it again", f"Where one of {COPIED} held-out stories says a food, toy, animal, thing or name "
             "again: its share of the probability of all foods (toys, …), in the mean.",
             copying_section(models, tokenizer, held_out[:COPIED]),
             "### Facts", *(f"`{name}`\n\n{facts_section(model, tokenizer)}" for name, model in models),
             "### Finding the tellings by words", table(("average precision", "literal", "paraphrased", "both"), tfidf),
             "### Ten samples", f"At temperature {TEMPERATURE}, the first {SHOWN} of {SAMPLES}. Of the 4-grams of all "
             f"{SAMPLES}, {new_share(told, train):.1%} are in no training story; of held-out stories' {unseen:.1%}.",
             *("> " + story.replace("\n", "\n> ") for story in told[:SHOWN])]
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path)
    readme, mark = t.HERE / "README.md", "<!-- below: written by measure.py -->\n"
    head = readme.read_text(encoding="utf-8").split(mark)[0]
    readme.write_text(head + mark + "\n" + measure(parser.parse_args().real) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
