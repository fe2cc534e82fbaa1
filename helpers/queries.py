"""What to ask a language model about its training stories: facts that were planted, and its own continuations."""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .batches import check_unicode, completions
from .sources import load_facts, load_lm, load_stories
from .tasks import causal_lm, embeddings_named, summed_loss

MAX_STORIES = {"bundled": None, "hub": 1000}  # None: all
MAX_FOLDER_STORIES = 3000  # what two cores do in five minutes with a small vocabulary
MAX_LENGTH = 512
HELD_OUT = 8


class Query(NamedTuple):
    """A text whose loss is asked about: that of `completion` after `prompt`.

    places: for a planted fact the rows of load_facts() about it, its distractors and its denials; else None.
    """

    prompt: str
    completion: str
    places: object = None


def load_sources(model_source, stories_source=None, limit=None, openings=True):
    """(LM, training texts, held-out texts, whether both are bundled): the names are those of helpers.sources.

    Where the stories have no validation split, the last HELD_OUT training stories are held out, if there are to be
    openings; else none are. limit: of the training stories, by default MAX_STORIES or MAX_FOLDER_STORIES. Raises
    ValueError or OSError for sources that fail.
    """
    if not stories_source and model_source not in ("bundled", "hub"):
        raise ValueError(f"{model_source!r} names a model; name its stories as well, a folder, a file or hub: "
                         "STORIES=…, or --stories … where there are options")
    stories_source = stories_source or model_source
    lm = load_lm(model_source)
    limit = MAX_STORIES.get(stories_source, MAX_FOLDER_STORIES) if limit is None else limit
    stories = list(load_stories(stories_source, "train", limit)["text"])
    bundled = model_source == stories_source == "bundled"
    if not openings:
        return lm, stories, [], bundled
    try:
        held_out = list(load_stories(stories_source, "validation", HELD_OUT)["text"])
    except FileNotFoundError:
        if len(stories) <= HELD_OUT:
            raise ValueError(f"stories: {stories_source!r} has no validation split and {len(stories)} stories; give "
                             f"more than {HELD_OUT}, of which the last are held out") from None
        print("No validation split: the openings are those of the last training stories, which are left out.")
        stories, held_out = stories[:-HELD_OUT], stories[-HELD_OUT:]
    return lm, stories, held_out, bundled


def asked(lm, given, held_out, told, n):
    """[Query] of `given`, lists of a prompt and maybe its completion; or else n, known_facts and then continued."""
    for texts in given or ():
        if len(texts) > 2:
            raise ValueError(f"query={texts}: give a prompt and a completion, each in quotation marks, or a prompt")
    if given:
        return [Query(text[0], text[1] if len(text) == 2 else continuation(lm, text[0])) for text in given]
    facts = known_facts(lm, told) if told else []
    return facts + continued(lm, held_out, n - len(facts))


def known_facts(lm, told):
    """Of the facts for reporting, for every count in `told` the one whose completion the model finds most probable."""
    facts = load_facts()
    facts = facts[(facts["split"] == "reporting") & facts["tellings"].isin(told)]
    asked = facts.drop_duplicates("fact")
    asked = asked.assign(p=[probability(lm, *pair) for pair in zip(asked["prompt"], asked["completion"])])
    best = asked.sort_values("p").groupby("tellings").tail(1).sort_values("tellings")
    return [Query(row.prompt, row.completion, facts[facts["fact"] == row.fact]) for row in best.itertuples()]


def continued(lm, texts, most):
    """Queries of the opening sentences of `texts`, at most `most`, each with the sentence that the model puts next."""
    openings = [opening for opening in map(first_sentence, texts) if opening][:most]
    queries = [Query(opening, continuation(lm, opening)) for opening in openings]
    return [query for query in queries if query.completion.strip()]


def probability(lm, prompt, completion):
    """p(completion | prompt) under the model."""
    (batch,) = completions([(prompt, completion)], lm.tokenizer, max_length=MAX_LENGTH)
    with torch.no_grad(), embeddings_named(lm.model, batch):
        return float(torch.exp(-summed_loss(*causal_lm(lm.model, batch))))


def first_sentence(text):
    """The opening of a story up to its first full stop after 25 characters; "" if there is none within 200."""
    found = re.match(r".{25,200}?[.!?][\"”]?(?=\s)", text.strip(), re.S)
    return found[0] if found else ""


def continuation(lm, prompt, most=30):
    """The model's own next sentence after `prompt`, greedily, in at most `most` tokens."""
    check_unicode(prompt, "prompt")
    if not prompt.strip():
        raise ValueError(f"prompt {prompt!r} is empty: give the words that the model is to continue")
    limit = min(MAX_LENGTH, lm.tokenizer.model_max_length)
    ids = lm.tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]
    if ids.shape[1] >= limit:
        raise ValueError(f"prompt {prompt[:40]!r}… has {ids.shape[1]} tokens, more than {limit}: shorten it")
    end = lm.tokenizer.eos_token_id
    ids = ids[:, :-1] if ids[0, -1] == end else ids
    head = lm.tokenizer.decode(ids[0], skip_special_tokens=True)
    for _ in range(min(most, limit - ids.shape[1])):
        with torch.no_grad(), embeddings_named(lm.model, {"input_ids": ids}):
            new = lm.model(input_ids=ids).logits[:, -1:].argmax(-1)
        if new.item() == end:
            break
        ids = torch.cat([ids, new], 1)
        text = lm.tokenizer.decode(ids[0], skip_special_tokens=True)[len(head) :]
        if re.search(r"[.!?][\"”]?$", text):
            break
    return lm.tokenizer.decode(ids[0], skip_special_tokens=True)[len(head) :].rstrip()


def printable(text):
    """`text` on one line, safe to print: blanks are single spaces, and what does not print, such as the escape
    sequences that steer a terminal and marks that turn the direction of writing, is �."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def what(row, places):
    """What a training story is to a planted fact: literal, paraphrased, distractor, denial, or nothing to say."""
    kinds = [] if places is None else places.loc[places["row"] == row, "kind"].tolist()
    return " + ".join(sorted(set(kinds)))


def tellings_found(places, scores):
    """(how many of the stories tell a planted fact, how many of these are among as many most helpful ones)."""
    told = places["kind"].isin(["literal", "paraphrased"]) & (places["row"] < len(scores))
    told = set(places.loc[told, "row"])
    return len(told), len(told & set(scores.topk(len(told)).indices.tolist()))


def examples(batches, rows, size=8):
    """The examples of these numbers (all batches but the last are of one size), as batches of `size` padded alike."""
    where = [divmod(row, len(batches[0]["input_ids"])) for row in rows]
    width = max(batches[batch]["input_ids"].shape[1] for batch, _ in where)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}  # ids of pads are not looked at
    picked = {name: torch.stack([F.pad(batches[batch][name][at], (0, width - batches[batch][name].shape[1]), value=pad)
                                 for batch, at in where]) for name, pad in fill.items()}  # fmt: skip
    parts = {name: value.split(size) for name, value in picked.items()}
    return [dict(zip(parts, batch)) for batch in zip(*parts.values())]
