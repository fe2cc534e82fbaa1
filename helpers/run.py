"""What `make run` does: EK-FAC influence on TinyStories from end to end, some pages of text and a picture a query.

TINYSTORIES names the model and STORIES the stories (helpers.sources): bundled, hub, or a folder. With the bundled
corpus the queries are planted facts, so the answer is known, and the model's own continuations of held-out openings;
with others only these. Everything is written to out/, explorer.html among it.
"""

import os
import sys
import time

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from . import completions, explorer, fit_ekfac, influence, linear_layers, tokenize, top_k
from .heatmap import Panel, token_figure, tokens_of
from .plots import output_folder
from .queries import (
    MAX_LENGTH,
    continued,
    examples,
    known_facts,
    load_sources,
    printable,
    probability,
    tellings_found,
    what,
)

LAYERS = r"mlp"  # the linear layers of every block's MLP, in GPT-Neo and in Llama
SHOWN = 5  # stories printed at each end of a ranking
TOLD = (2, 8, 16)  # planted facts to ask for: the best known of those told so many times


def main():
    """The whole of `make run`; returns the exit status: 1, with one line on stderr, for a model or stories unfit."""
    try:
        return from_end_to_end(os.environ.get("TINYSTORIES") or "bundled", os.environ.get("STORIES"))
    except (OSError, ValueError, IndexError) as error:
        print(f"make run: {error}", file=sys.stderr)
        return 1


def from_end_to_end(model_source, stories_source):
    """Factors, scores, rankings, token maps and the explorer of one model on one set of stories; 0."""
    began = time.perf_counter()
    lm, stories, queries, layers, train = prepare(model_source, stories_source)
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
    print(f"The same with {explorer.SHOWN} stories a query, to be explored in a browser:\n  "
          f"{explore(lm, factors, queries, stories, train, scores)}")  # fmt: skip
    print(f"All in all {time.perf_counter() - began:.0f} s. notebooks/06_ekfac_tinystories.ipynb explains the numbers.")
    return 0


def prepare(model_source, stories_source):
    """(LM, training texts, queries, layer names, training batches); ValueError or OSError for sources that fail."""
    lm, stories, held_out, planted = load_sources(model_source, stories_source)
    queries = known_facts(lm, TOLD) if planted else []
    queries += continued(lm, held_out, 1 if planted else 4)
    if not queries:
        raise ValueError("stories: none that is held out opens with a sentence to ask about (25 to 200 characters)")
    return lm, stories, queries, linear_layers(lm.model, LAYERS), tokenize(stories, lm.tokenizer, MAX_LENGTH)


def report(number, query, lm, factors, scores, train):
    """Print the ranking of one query, save the token heat map of its extremes, and return where it is."""
    print(f"\nQuery {number + 1}: {printable(f'{query.prompt}[{query.completion}]')}")
    print(f"  the loss is that of [...], whose probability is {probability(lm, query.prompt, query.completion):.2g}"
          f"{found_again(query.places, scores)}")  # fmt: skip
    print("  score, story, and in [] the token whose prediction of the next one adds most to the score")
    asked = completions([(query.prompt, query.completion)], lm.tokenizer, max_length=MAX_LENGTH)[0]
    panels = [query_panel(number, asked, lm.tokenizer)]
    ranking = top_k(scores[None], min(SHOWN, len(scores) // 2))
    (found,) = examples(train, list(ranking["train"]), len(ranking))
    values = influence(lm.model, factors, [asked], [found], per="token", progress=False)[0]
    for line, ids, mask, value in zip(ranking.itertuples(), found["input_ids"], found["attention_mask"], values):
        ids = ids[mask.bool()]
        tokens, value = tokens_of(lm.tokenizer, ids), value[: len(ids)].numpy()
        kind = what(line.train, query.places)
        print(f"  {line.rank:+3d} {line.score:+10.3g}  story {line.train:<5d} {kind:<12} {excerpt(tokens, value)}")
        if line.rank in (1, 2, 3, -1):
            title = f"{line.rank:+d} · score {line.score:+.3g} · story {line.train} {kind}".replace("-", "−")
            panels.append(Panel(title, tokens, value))
    return save(panels, f"run_query_{number + 1}.png")


def found_again(places, scores):
    """What is said of a planted fact: how many of its tellings are among as many most helpful stories."""
    if places is None:
        return ""
    told, found = tellings_found(places, scores)
    return f"; a planted fact, told in {told} stories: {found} of them among the {told} most helpful"


def explore(lm, factors, queries, stories, train, scores):
    """Write out/explorer.html with as many stories a query as there are to show, and return where it is."""
    shown = min(explorer.SHOWN, len(stories) // 2 * 2)
    page = explorer.explore(lm, factors, queries, stories, train, scores, shown, MAX_LENGTH,
                            queries[0].places is not None)
    path = output_folder("out") / "explorer.html"
    explorer.write_page(path, *page)
    return os.path.relpath(path)


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


def excerpt(tokens, values, width=32):
    """The text around the token, in [], that does most for the sign of the sum; on one line."""
    strongest = int(np.argmax(values * np.sign(values.sum())))
    before, after = "".join(tokens[:strongest]), "".join(tokens[strongest + 1 :])
    head = before if len(before) <= width else "… " + before[-width:].partition(" ")[2]
    tail = after if len(after) <= width else after[:width].rpartition(" ")[0] + " …"
    return printable(f"{head}[{tokens[strongest]}]{tail}")


if __name__ == "__main__":
    sys.exit(main())
