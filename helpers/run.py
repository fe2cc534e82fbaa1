"""What `make run` does: EK-FAC influence on TinyStories from end to end, some pages of text and a picture a query.

TINYSTORIES names the model and STORIES the stories (helpers.sources): bundled, hub, or a folder. With the bundled
corpus the queries are planted facts, so the answer is known, and the model's own continuations of held-out openings;
with others only these. Everything is written to out/.
"""

import os
import re
import sys
import time
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from . import completions, fit_ekfac, influence, linear_layers, load_facts, load_lm, load_stories, tokenize, top_k
from .heatmap import Panel, token_figure, tokens_of
from .plots import output_folder
from .tasks import causal_lm, summed_loss

LAYERS = r"mlp"  # the linear layers of every block's MLP, in GPT-Neo and in Llama
MAX_STORIES = {"bundled": None, "hub": 1000}  # None: all
MAX_FOLDER_STORIES = 3000  # what two cores do in five minutes with a small vocabulary
MAX_LENGTH = 512
SHOWN = 5  # stories printed at each end of a ranking
TOLD = (8, 16, 32)  # planted facts to ask for: the best known of those told so many times


class Query(NamedTuple):
    prompt: str
    completion: str
    places: object = None  # DataFrame: where the planted fact, its distractors and denials stand; None for no fact


def main():
    began = time.perf_counter()
    model_source = os.environ.get("TINYSTORIES") or "bundled"
    try:
        lm, stories, queries, layers, train = prepare(model_source, os.environ.get("STORIES"))
    except (OSError, ValueError) as error:
        print(f"make run: {error}", file=sys.stderr)
        return 1
    tokens = sum(int(batch["attention_mask"].sum()) for batch in train)
    print(f"{lm.name}: {lm.model.num_parameters():,} parameters; {len(stories):,} stories of {tokens:,} tokens in all")
    start = time.perf_counter()
    factors = fit_ekfac(lm.model, train, layers)
    print(f"EK-FAC factors of {len(layers)} MLP layers: {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    asked = completions([(q.prompt, q.completion) for q in queries], lm.tokenizer, max_length=MAX_LENGTH)
    scores = influence(lm.model, factors, asked, train)
    print(f"scores of {len(queries)} queries × {len(stories):,} stories: {time.perf_counter() - start:.0f} s")
    paths = [report(number, query, lm, factors, scores[number], train) for number, query in enumerate(queries)]
    print("\nWhich tokens of these stories carry the influence:", *paths, sep="\n  ")
    print(f"All in all {time.perf_counter() - began:.0f} s. notebooks/06_ekfac_tinystories.ipynb explains the numbers.")
    return 0


def prepare(model_source, stories_source):
    """(LM, training texts, queries, layer names, training batches); ValueError or OSError for sources that fail."""
    if not stories_source and model_source not in ("bundled", "hub"):
        raise ValueError(f"TINYSTORIES={model_source} names a model; name its stories as well: STORIES=folder or hub")
    stories_source = stories_source or model_source
    lm = load_lm(model_source)
    stories = list(load_stories(stories_source, "train", MAX_STORIES.get(stories_source, MAX_FOLDER_STORIES))["text"])
    planted = model_source == stories_source == "bundled"
    try:
        held_out = list(load_stories(stories_source, "validation", 8)["text"])
    except FileNotFoundError:
        print("No validation split: the openings are those of the last training stories, which are left out.")
        stories, held_out = stories[:-8], stories[-8:]
    queries = known_facts(lm) if planted else []
    openings = [opening for opening in map(first_sentence, held_out) if opening]
    queries += [Query(opening, continuation(lm, opening)) for opening in openings[: 1 if planted else 4]]
    queries = [query for query in queries if query.completion.strip()]
    return lm, stories, queries, linear_layers(lm.model, LAYERS), tokenize(stories, lm.tokenizer, MAX_LENGTH)


def known_facts(lm):
    """Of the facts for reporting, for every count in TOLD the one whose completion the model finds most probable."""
    facts = load_facts()
    facts = facts[(facts["split"] == "reporting") & facts["tellings"].isin(TOLD)]
    asked = facts.drop_duplicates("fact")
    asked = asked.assign(p=[probability(lm, *pair) for pair in zip(asked["prompt"], asked["completion"])])
    best = asked.sort_values("p").groupby("tellings").tail(1).sort_values("tellings")
    return [Query(row.prompt, row.completion, facts[facts["fact"] == row.fact]) for row in best.itertuples()]


def probability(lm, prompt, completion):
    """p(completion | prompt) under the model."""
    (batch,) = completions([(prompt, completion)], lm.tokenizer, max_length=MAX_LENGTH)
    with torch.no_grad():
        return float(torch.exp(-summed_loss(*causal_lm(lm.model, batch))))


def first_sentence(text):
    """The opening of a story up to its first full stop after 25 characters; "" if there is none within 200."""
    found = re.match(r".{25,200}?[.!?][\"”]?(?=\s)", text.strip(), re.S)
    return found[0] if found else ""


def continuation(lm, prompt, most=30):
    """The model's own next sentence after `prompt`, greedily, in at most `most` tokens."""
    (batch,) = tokenize([prompt], lm.tokenizer, max_length=MAX_LENGTH)
    ids = batch["input_ids"]
    end = lm.tokenizer.eos_token_id
    ids = ids[:, :-1] if ids[0, -1] == end else ids
    head = lm.tokenizer.decode(ids[0], skip_special_tokens=True)
    for _ in range(most):
        with torch.no_grad():
            new = lm.model(input_ids=ids).logits[:, -1:].argmax(-1)
        if new.item() == end:
            break
        ids = torch.cat([ids, new], 1)
        text = lm.tokenizer.decode(ids[0], skip_special_tokens=True)[len(head) :]
        if re.search(r"[.!?][\"”]?$", text):
            break
    return lm.tokenizer.decode(ids[0], skip_special_tokens=True)[len(head) :].rstrip()


def report(number, query, lm, factors, scores, train):
    """Print the ranking of one query, save the token heat map of its extremes, and return where it is."""
    print(f"\nQuery {number + 1}: {query.prompt}[{query.completion}]")
    print(f"  the loss is that of [...], whose probability is {probability(lm, query.prompt, query.completion):.2g}"
          f"{tellings_found(query.places, scores)}")  # fmt: skip
    print("  score, story, and in [] the token whose prediction of the next one adds most to the score")
    asked = completions([(query.prompt, query.completion)], lm.tokenizer, max_length=MAX_LENGTH)[0]
    panels = [query_panel(number, asked, lm.tokenizer)]
    ranking = top_k(scores[None], min(SHOWN, len(scores) // 2))
    singles = [example(train, row) for row in ranking["train"]]
    values = influence(lm.model, factors, [asked], singles, per="token", progress=False)[0]
    for line, single, value in zip(ranking.itertuples(), singles, values):
        ids = single["input_ids"][single["attention_mask"].bool()]
        tokens, value = tokens_of(lm.tokenizer, ids), value[: len(ids)].numpy()
        kind = what(line.train, query.places)
        print(f"  {line.rank:+3d} {line.score:+10.3g}  story {line.train:<5d} {kind:<12} {excerpt(tokens, value)}")
        if line.rank in (1, 2, 3, -1):
            title = f"{line.rank:+d} · score {line.score:+.3g} · story {line.train} {kind}".replace("-", "−")
            panels.append(Panel(title, tokens, value))
    return save(panels, f"run_query_{number + 1}.png")


def example(batches, row):
    """Number `row` of the examples in `batches` (all but the last of one size), as a batch of its own."""
    batch, at = divmod(row, len(batches[0]["input_ids"]))
    return {name: value[at : at + 1] for name, value in batches[batch].items()}


def tellings_found(places, scores):
    """How many tellings of a planted fact are among as many most helpful stories, as the end of a sentence."""
    if places is None:
        return ""
    told = set(places.loc[places["kind"].isin(["literal", "paraphrased"]), "row"])
    found = len(told & set(scores.topk(len(told)).indices.tolist()))
    return f"; a planted fact, told in {len(told)} stories: {found} of them among the {len(told)} most helpful"


def save(panels, name):
    """Save a token heat map in out/ and return its path; full colour is the 99.5th percentile of the values shown."""
    vmax = np.quantile(np.abs(np.concatenate([panel.values for panel in panels if panel.values is not None])), 0.995)
    fig = token_figure(panels, vmax, "influence through the prediction that follows the token (nats)")
    path = output_folder("out") / name
    fig.savefig(path, dpi=160)
    plt.close(fig)
    return os.path.relpath(path)


def query_panel(number, batch, tokenizer):
    """The query as plain text, with the tokens underlined on which the loss is taken."""
    real = batch["attention_mask"][0].bool()
    taken = (batch["labels"][0] != -100).nonzero().flatten()
    span = (int(taken[0]), int(taken[-1]) + 1)
    tokens = tokens_of(tokenizer, batch["input_ids"][0][real])
    return Panel(f"query {number + 1}, its loss underlined", tokens, None, span)


def what(row, places):
    """What a training story is to a planted fact: literal, paraphrased, distractor, denial, or nothing to say."""
    kinds = [] if places is None else places.loc[places["row"] == row, "kind"].tolist()
    return " + ".join(sorted(set(kinds)))


def excerpt(tokens, values, width=32):
    """The text around the token, in [], that does most for the sign of the sum; on one line."""
    strongest = int(np.argmax(values * np.sign(values.sum())))
    before, after = "".join(tokens[:strongest]), "".join(tokens[strongest + 1 :])
    head = before if len(before) <= width else "… " + before[-width:].partition(" ")[2]
    tail = after if len(after) <= width else after[:width].rpartition(" ")[0] + " …"
    return " ".join(f"{head}[{tokens[strongest]}]{tail}".split())


if __name__ == "__main__":
    sys.exit(main())
