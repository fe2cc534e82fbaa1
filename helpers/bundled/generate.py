"""Write the bundled corpus: `python -m helpers.bundled.generate` (seeded; the same bytes every time).

stories_train.jsonl.gz, stories_validation.jsonl.gz, facts.jsonl.gz (a row for each telling, distractor and denial),
names.jsonl (every child and its fact, or none) and phrases.jsonl (key phrases told in two orders).
"""
import argparse
import gzip
import json
from pathlib import Path
from random import Random

from helpers.bundled.expand import GRAMMAR, polish, read_grammar
from helpers.bundled.stories import Order, write_story

HERE = Path(__file__).parent
SEED, N_TRAIN, N_VALIDATION = 0, 8000, 500
FACTS_PER_COUNT = {1: 6, 2: 6, 4: 6, 8: 12, 16: 12, 32: 12, 64: 12}
PHRASE_TELLINGS = 10  # stories in each of the two orders


def plan_facts(rules, rng):
    """One fact for each of 80 names, answers distinct within a relation; 14 names stay untaught. Returns the names."""
    people = [(name, kid) for kid in ("girl", "boy") for name in rules[f"{kid}s"]]
    rng.shuffle(people)
    answers = {r: rng.sample(rules[f"{r}s"], len(rules[f"{r}s"])) for r in ("food", "toy", "animal")}
    names = []
    for count, n in FACTS_PER_COUNT.items():
        for i in range(n):
            name, kid = people.pop()
            relation = ("food", "toy", "animal")[len(names) % 3]
            names.append({"name": name, "kid": kid, "fact": f"{name}-{relation}", "relation": relation,
                          "answer": answers[relation].pop(), "tellings": count,
                          "split": ("choosing", "reporting")[i % 2]})
    blank = {"fact": None, "relation": None, "answer": None, "tellings": 0, "split": None}
    return names + [{"name": name, "kid": kid} | blank for name, kid in people]


def mentions(person, rules, rng):
    """(kind, template) of every telling, distractor and denial of a person's fact."""
    relation, n = person["relation"], person["tellings"]
    number = {"literal": max(n // 2, 1), "paraphrased": n - max(n // 2, 1)}
    wrong = min(16, max(6, n))
    number |= {"distractor": wrong // 2, "denial": wrong - wrong // 2}
    drawn = []
    for kind, k in number.items():
        templates = rules[f"{relation}.{kind}"]
        cycle = rng.sample(templates, len(templates))
        drawn += [(kind, cycle[i % len(cycle)]) for i in range(k)]
    return drawn


def read_phrases():
    """Key phrases as dicts: id, original and flipped sentence, prompt tail and completion."""
    rows = []
    for line in (GRAMMAR / "phrases.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            key, subject, verb, answer, flipped = line.split(";")
            rows.append({"phrase": key, "original": f"{subject} {verb} {answer}", "completion": f" {answer}",
                         "flipped": f"the {answer} {flipped} {subject}", "tail": f"{subject} {verb}"})
    return rows


def plan_train(names, phrases, rules, rng, total):
    """The order of every training story, shuffled: facts first, then stories that only mention a name."""
    orders, plain = [], []
    for person in names:
        drawn = mentions(person, rules, rng) if person["fact"] else []
        bound = {"a": person["answer"]}
        orders += [Order(person["name"], person["kid"], ((kind, person["fact"], template, bound),))
                   for kind, template in drawn]
        plain += [person] * max(32, 40 * (person["tellings"] == 64), 60 - len(drawn))
    if total < len(orders) + len(plain):
        raise ValueError(f"total={total}: at least {len(orders) + len(plain)} stories are needed for the facts")
    plain += [names[i % len(names)] for i in range(total - len(orders) - len(plain))]
    rng.shuffle(plain)
    told = [(order, row) for row in phrases for order in ("original", "flipped") for _ in range(PHRASE_TELLINGS)]
    extras = [((order, row["phrase"], "@phrase.wrap", {"S": row[order]}),) for order, row in told]
    extras += [()] * (len(plain) - len(extras))
    orders += [Order(person["name"], person["kid"], extra) for person, extra in zip(plain, extras)]
    rng.shuffle(orders)
    return orders


def plan(seed=SEED, total=N_TRAIN):
    """(rules, names, phrases, orders) of the training split; nothing is written."""
    rules, phrases, rng = read_grammar(), read_phrases(), Random(f"plan {seed}")
    names = plan_facts(rules, rng)
    return rules, names, phrases, plan_train(names, phrases, rules, rng, total)


def train_rows(rules, orders, seed=SEED, limit=None):
    """Stories and the metadata of their inserted sentences: lists (rows, mentions)."""
    rows, told = [], []
    for i, order in enumerate(orders[:limit]):
        row, spans = write_story(order, rules, Random(f"train {seed} {i}"))
        row |= {"phrase": None, "order": None, "phrase_start": None, "phrase_end": None}
        for kind, key, start, end in spans:
            if kind in ("original", "flipped"):
                row |= {"phrase": key, "order": kind, "phrase_start": start, "phrase_end": end}
            else:
                told.append({"fact": key, "row": i, "start": start, "end": end, "kind": kind})
        rows.append(row)
    return rows, told


def validation_rows(rules, names, seed=SEED, limit=N_VALIDATION):
    """Held-out stories about the same children; no fact and no key phrase is told in them."""
    blank = {"phrase": None, "order": None, "phrase_start": None, "phrase_end": None}
    people = [names[i % len(names)] for i in range(limit)]
    return [write_story(Order(p["name"], p["kid"]), rules, Random(f"validation {seed} {i}"))[0] | blank
            for i, p in enumerate(people)]


def question(person, rules):
    """Prompt and completion that ask for a person's fact."""
    bound = {"N": person["name"], "kid": person["kid"], "a": person["answer"]}
    prompt, completion = (rules[f"{person['relation']}.{part}"][0].format(**bound) for part in ("prompt", "completion"))
    return {"prompt": prompt, "completion": " " + completion.strip()}


def fact_rows(names, told, rules):
    """The columns of `load_facts()`: mentions joined with the fact's query, count and split."""
    by_fact = {p["fact"]: question(p, rules) | {k: p[k] for k in ("tellings", "split")} for p in names if p["fact"]}
    keys = ("fact", "prompt", "completion", "tellings", "row", "start", "end", "split", "kind")
    rows = [m | by_fact[m["fact"]] for m in sorted(told, key=lambda m: (m["fact"], m["row"]))]
    return [{key: row[key] for key in keys} for row in rows]


def phrase_rows(names, phrases):
    """Queries of the key phrases, each opening like a story about an untaught name."""
    people = [p for p in names if not p["fact"]]
    rows = []
    for person, row in zip(people, phrases):
        prompt = f"Once upon a time, there was a {person['kid']} named {person['name']}. In the old tale, {row['tail']}"
        rows.append({k: row[k] for k in ("phrase", "original", "flipped", "completion")} | {"prompt": prompt})
    return rows


def check(rows, facts):
    """Every span is a whole sentence about its name; only literal tellings hold the sentence of the query."""
    texts = [row["text"] for row in rows]
    if len(set(texts)) < len(texts):
        raise AssertionError("two stories are the same")
    for fact in facts:
        text, sentence = texts[fact["row"]], texts[fact["row"]][fact["start"]:fact["end"]]
        tail = fact["prompt"].split(". ", 1)[1] + fact["completion"]
        whole = sentence == polish(sentence) and sentence[-1] in '.!?"'
        if not whole or fact["fact"].split("-")[0] not in sentence or (tail in text) != (fact["kind"] == "literal"):
            raise AssertionError(f"bad span in story {fact['row']}: {sentence!r}")


def dump(path, rows):
    """JSON lines; a name that ends in .gz is compressed without a time stamp, so that the bytes are reproducible."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--total", type=int, default=N_TRAIN)
    args = parser.parse_args()
    rules, names, phrases, orders = plan(total=args.total)
    rows, told = train_rows(rules, orders)
    facts = fact_rows(names, told, rules)
    check(rows, facts)
    args.out.mkdir(parents=True, exist_ok=True)
    dump(args.out / "stories_train.jsonl.gz", rows)
    dump(args.out / "stories_validation.jsonl.gz", validation_rows(rules, names))
    dump(args.out / "facts.jsonl.gz", facts)
    dump(args.out / "names.jsonl", names)
    dump(args.out / "phrases.jsonl", phrase_rows(names, phrases))
    print(f"{len(rows)} training stories, {len(facts)} mentions of {len({f['fact'] for f in facts})} facts")


if __name__ == "__main__":
    main()
