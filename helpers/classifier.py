"""Sequence classifiers, and texts with a label to train and question them: what `tasks.classification` runs on."""

import os

import datasets
import numpy as np
import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from .batches import tokenize
from .sources import BUNDLED, LM, _explained, _locate, _no_bars, _tokenizer, load_stories
from .tasks import check_classes

HUB_CLASSIFIER = "textattack/bert-base-uncased-imdb"
HUB_REVIEWS = "stanfordnlp/imdb"
MOODS = ("sad", "happy")


def load_classifier(source="bundled", classes=2, seed=0):
    """A sequence classifier as an LM (model, tokenizer, name), in eval mode and float32.

    "bundled": the bundled language model with a new, seeded linear head on the last token, still to be trained.
    "hub": textattack/bert-base-uncased-imdb, already trained. Else a folder or hub id: whatever
    AutoModelForSequenceClassification makes of it. Code from a model repository is never executed.

    Raises FileNotFoundError for a path that does not exist, OSError for what cannot be loaded, ValueError for a model
    without a trained head (its weights would be random; only "bundled" gets a new one), or with another number of
    classes.
    """
    place = BUNDLED / "model" if source == "bundled" else _locate(source, HUB_CLASSIFIER)
    model, missing = _model(place, {"num_labels": classes} if source == "bundled" else {}, seed)
    if missing and (source != "bundled" or missing != ["score.weight"]):
        raise ValueError(f"{place} lacks weights of {type(model).__name__}, such as {missing[0]}: is it a classifier?")
    if model.config.num_labels != classes:
        raise ValueError(f"{place} has {model.config.num_labels} classes, not classes={classes}")
    tokenizer = _tokenizer(place)
    if model.config.pad_token_id is None:  # by it a GPT finds the last token of a padded text
        model.config.pad_token_id = tokenizer.pad_token_id
    context = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    return LM(model.eval(), tokenizer, "bundled" if source == "bundled" else getattr(place, "name", place))


def load_labelled(source="bundled", split="train", limit=None, classes=2, seed=0):
    """`limit` texts drawn at random with their labels: a datasets.Dataset with columns "text" and "label".

    "bundled": stories, label 0 where the mood is sad and 1 where it is happy. "hub": stanfordnlp/imdb, which is sorted
    by label and so read whole before anything is drawn. Else a folder or hub id with columns "text" and "label".

    Raises ValueError for a limit below 1 and for data without whole-number labels, IndexError for a label outside
    0 … classes − 1; else as load_stories.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit={limit!r} must be a whole number, 1 or more, or None")
    place = BUNDLED if source == "bundled" else _locate(source, HUB_REVIEWS)
    if isinstance(place, str):
        with _explained("texts", place):
            rows = datasets.load_dataset(place, split=split)
    else:
        rows = load_stories("bundled" if source == "bundled" else place, split)
    labels = [MOODS.index(mood) for mood in rows["mood"]] if source == "bundled" else _labels(rows, place)
    check_classes(torch.tensor(labels), classes)
    order = np.random.default_rng(seed).permutation(len(rows))[:limit].tolist()
    return datasets.Dataset.from_dict({"text": rows.select(order)["text"][:], "label": [labels[i] for i in order]})


def labelled_batches(texts, labels, tokenizer, max_length=128, batch_size=16):
    """Batches of `texts` in order, with one label each: {input_ids, attention_mask, labels [B]}.

    Raises ValueError where there are not as many labels as texts, for labels with a fraction, and as `tokenize` does.
    """
    labels = torch.as_tensor(labels)
    if labels.is_floating_point():
        raise ValueError(f"labels: got {labels.tolist()[:3]}...; classes are whole numbers")
    labels = labels.long()
    if len(labels) != len(texts):
        raise ValueError(f"{len(labels)} labels for {len(texts)} texts: one each is needed")
    batches = tokenize(texts, tokenizer, max_length, batch_size)
    return [batch | {"labels": part} for batch, part in zip(batches, labels.split(batch_size))]


def train_classifier(model, batches, epochs, lr, seed=0):
    """Train every weight of `model` in place with AdamW on the mean loss of each batch; returns it in eval mode.

    Seeded: the order of the batches, fresh every epoch, and dropout. The learning rate falls linearly to 0.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        steps, step = max(1, epochs * len(batches)), 0
        model.train()
        for _ in range(epochs):
            for i in torch.randperm(len(batches)).tolist():
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
                optimizer.zero_grad()
                model(**batches[i]).loss.backward()
                optimizer.step()
                step += 1
    return model.eval()


def _model(place, sizes, seed):
    """(classifier, names of weights that the files lack), without the loader's own report on them."""
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # see load_lm
    level = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        with torch.random.fork_rng(), _explained("classifier", place), _no_bars(off=not isinstance(place, str)):
            torch.manual_seed(seed)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                place, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **sizes)
    finally:
        logging.set_verbosity(level)
    return model, sorted(report["missing_keys"])


def _labels(rows, place):
    if "label" not in rows.column_names:
        raise ValueError(f"{place} has no column 'label' beside 'text': it has {rows.column_names}")
    labels = rows["label"][:]
    wrong = [label for label in labels if not isinstance(label, int) or isinstance(label, bool)]
    if wrong:
        raise ValueError(f"{place}: the label {wrong[0]!r} is no whole number; give classes as 0, 1, …")
    return labels
