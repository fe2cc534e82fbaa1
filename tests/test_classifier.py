"""A sequence classifier: pooled gradients and scores against dense references, its sources, and what is refused."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from local_hub import serve
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from helpers import classification, fit_ekfac, influence, linear_layers, self_influence
from helpers.classifier import labelled_batches, load_classifier, load_labelled, train_classifier

ROOT = Path(__file__).resolve().parents[1]
IMDB = ROOT.parent / "shared" / "data" / "imdb"
TEXTS = ["a dog ran to the park", "the cat sat", "sad", "the dog sat in the park and the cat ran"]


def tiny_bert(folder=None):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(TEXTS).split()))]
    torch.manual_seed(3)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(words), hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24, num_labels=2, initializer_range=0.5)).eval()
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, model_max_length=24)
    if folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module", params=["bert", "gpt_neo"])
def instance(request):
    if request.param == "bert":
        model, tokenizer = tiny_bert()
        pattern = r"value|output\.dense|pooler|classifier"
    else:
        lm = load_classifier(seed=1)
        pattern = r"h\.3\.attn.*(v_proj|out_proj)|score"  # GPT-Neo rounds queries · keys to float32 whatever it is
        model, tokenizer = lm.model, lm.tokenizer
    batches = labelled_batches(TEXTS, [0, 1, 1, 0], tokenizer, batch_size=2)
    return model.double(), batches, linear_layers(model, pattern)


def gradients(model, batch, row, layers):
    """autograd's gradient of one example's loss, alone and unpadded: {layer: [d_out, d_in (+1)]}."""
    n = int(batch["attention_mask"][row].sum())
    logits = model(input_ids=batch["input_ids"][row : row + 1, :n]).logits
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"][row : row + 1], reduction="sum")
    parameters = [list(model.get_submodule(name).parameters()) for name in layers]
    taken = iter(torch.autograd.grad(loss, sum(parameters, [])))
    flat = [[next(taken) for _ in some] for some in parameters]
    return {name: torch.cat([g.reshape(len(g), -1) for g in some], 1) for name, some in zip(layers, flat)}


def test_scores_against_autograd_and_dense_kronecker_solves(instance):
    model, batches, layers = instance
    factors = fit_ekfac(model, batches, layers, classification, labels="true", progress=False)
    each = [gradients(model, batch, row, layers) for batch in batches for row in range(len(batch["labels"]))]
    by_layer = influence(model, factors, batches, batches, classification, per="layer", progress=False)
    for at, name in enumerate(layers):
        basis = torch.kron(factors.Q_S[name], factors.Q_A[name])  # row-major vec of [out, in]
        g = torch.stack([x[name].flatten() for x in each])
        Lambda = (g @ basis).square().mean(0)
        torch.testing.assert_close(factors.Lambda[name].flatten(), Lambda, rtol=1e-4, atol=1e-7 * float(Lambda.max()))
        expected = g @ (basis / (Lambda + 0.1 * Lambda.mean())) @ basis.T @ g.T
        torch.testing.assert_close(by_layer[at], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    total = influence(model, factors, batches, batches, classification, progress=False)
    torch.testing.assert_close(by_layer.sum(0), total, rtol=1e-10, atol=1e-10)
    own = self_influence(model, factors, batches, classification, progress=False)
    torch.testing.assert_close(own, total.diagonal(), rtol=1e-9, atol=1e-9)


def test_a_step_along_the_direction_lowers_the_query_loss(instance):
    model, batches, layers = instance
    factors = fit_ekfac(model, batches, layers, classification, progress=False)
    score = influence(model, factors, batches[:1], batches[1:], classification, progress=False)[0, 1]
    step = factors.ihvp(gradients(model, batches[1], 1, layers))
    losses, eta = [], 1e-4 / max(float(value.abs().max()) for value in step.values())
    n = int(batches[0]["attention_mask"][0].sum())
    with torch.no_grad():
        for sign in (-1, 1):
            before = {name: [p.clone() for p in model.get_submodule(name).parameters()] for name in layers}
            for name in layers:
                module, change = model.get_submodule(name), sign * eta * step[name]
                module.weight -= change[:, : module.in_features]
                if module.bias is not None:
                    module.bias -= change[:, -1]
            logits = model(input_ids=batches[0]["input_ids"][:1, :n]).logits
            losses.append(torch.nn.functional.cross_entropy(logits, batches[0]["labels"][:1]))
            for name in layers:
                for p, value in zip(model.get_submodule(name).parameters(), before[name]):
                    p.copy_(value)
    torch.testing.assert_close((losses[1] - losses[0]) / (2 * eta), -score, rtol=1e-3, atol=1e-7)


def test_a_flipped_label_multiplies_the_score_by_minus_the_odds(instance):
    model, batches, layers = instance
    factors = fit_ekfac(model, batches, layers, classification, progress=False)
    flipped = [batch | {"labels": 1 - batch["labels"]} for batch in batches]
    again = fit_ekfac(model, flipped, layers, classification, progress=False)
    assert all(torch.equal(factors.Lambda[name], again.Lambda[name]) for name in layers)  # the draws ask no label
    scores = [influence(model, factors, batches, some, classification, progress=False) for some in (batches, flipped)]
    with torch.no_grad():
        p = torch.cat([classification(model, b)[0].softmax(-1).gather(1, b["labels"][:, None])[:, 0] for b in batches])
    torch.testing.assert_close(scores[1], -scores[0] * p / (1 - p), rtol=1e-4, atol=1e-5 * float(scores[1].abs().max()))


def test_bundled_stories_and_training_are_seeded():
    some, same, other = (load_labelled("bundled", "validation", limit=8, seed=seed) for seed in (0, 0, 1))
    assert some[:] == same[:] != other[:] and set(some["label"]) <= {0, 1}
    trained = []
    for _ in range(2):
        lm = load_classifier(seed=4)
        batches = labelled_batches(some["text"][:], some["label"][:], lm.tokenizer, max_length=32, batch_size=4)
        trained.append(train_classifier(lm.model, batches, 1, 1e-3).score.weight)
        assert not lm.model.training
    assert torch.equal(*trained)


def test_the_head_reads_the_last_token_and_not_a_pad():
    lm, texts = load_classifier(), ["Tom was sad.", "Once upon a time, there was a girl named Daisy who sang."]
    with torch.no_grad():
        both, one = (lm.model(**labelled_batches(some, [0] * len(some), lm.tokenizer)[0]).logits
                     for some in (texts, texts[:1]))
    torch.testing.assert_close(both[:1], one, rtol=1e-4, atol=1e-5)


def test_what_is_refused(tmp_path):
    model, tokenizer = tiny_bert()
    layers, batches = ["classifier"], labelled_batches(TEXTS, [0, 1, 1, 0], tokenizer)
    factors = fit_ekfac(model, batches, layers, classification, progress=False)
    wrong = [batches[0] | {"labels": torch.tensor([0, 2, 1, 1])}]
    for ask in (lambda: fit_ekfac(model, wrong, layers, classification, progress=False),
                lambda: influence(model, factors, wrong, batches, classification, progress=False)):
        with pytest.raises(IndexError, match="2 is out of (the classes 0 to 1|bounds)"):
            ask()
    with pytest.raises(ValueError, match="token axis"):
        influence(model, factors, batches, batches, classification, per="output_token", progress=False)
    with pytest.raises(ValueError, match="3 labels for 4 texts"):
        labelled_batches(TEXTS, [0, 1, 0], None)
    with pytest.raises(ValueError, match="limit=0"):
        load_labelled("bundled", limit=0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_classifier("no such folder")
    with pytest.raises(ValueError, match="is it a classifier"):
        load_classifier(ROOT / "helpers" / "bundled" / "model")
    tiny_bert(tmp_path / "model")
    with pytest.raises(ValueError, match="2 classes, not classes=3"):
        load_classifier(tmp_path / "model", classes=3)
    for label, error, said in (("good", ValueError, "'good' is no whole number"), (-1, IndexError, "labels: -1")):
        (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a b", "label": label}))
        with pytest.raises(error, match=said):
            load_labelled(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "a b"}')
    with pytest.raises(ValueError, match="no column 'label'"):
        load_labelled(tmp_path)


def test_the_hub_by_the_libraries_own_code(tmp_path):
    model, _ = tiny_bert(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"text": text, "label": i // 2} for i, text in enumerate(TEXTS)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script = ("import json\nfrom helpers import load_classifier, load_labelled\nlm = load_classifier('hub')\n"
              "d = load_labelled('hub', limit=3)\n"
              "print(json.dumps([lm.name, type(lm.model).__name__, lm.model.classifier.weight.tolist(),"
              " lm.tokenizer.model_max_length, d['text'][:], d['label'][:]]))")
    with serve({"textattack/bert-base-uncased-imdb": tmp_path / "model",
                "datasets/stanfordnlp/imdb": tmp_path / "data"}) as hub:
        said = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=False, timeout=300,
                              env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"),
                                                "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"})
    assert said.returncode == 0, said.stderr[-2000:]
    name, kind, weight, context, texts, labels = json.loads(said.stdout.splitlines()[-1])
    assert (name, kind, context) == ("textattack/bert-base-uncased-imdb", "BertForSequenceClassification", 24)
    torch.testing.assert_close(torch.tensor(weight), model.classifier.weight.detach())
    assert all(TEXTS.index(text) // 2 == label for text, label in zip(texts, labels)) and len(texts) == 3


@pytest.mark.skipif(not IMDB.exists(), reason="no reviews on this machine")
def test_real_reviews():
    reviews = load_labelled(str(IMDB), "test", limit=200)
    assert len(reviews) == 200 and set(reviews["label"]) == {0, 1}
    with gzip.open(IMDB / "test.jsonl.gz", "rt") as lines:
        truth = {row["text"]: row["label"] for row in map(json.loads, lines)}
    assert all(truth[row["text"]] == row["label"] for row in reviews)
