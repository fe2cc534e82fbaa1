"""check_setup passes what is right and fails each way of being wrong; factor_bytes counts what a fit saves."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from helpers import causal_lm, classification, fit_ekfac, linear_layers, load_lm, load_stories, regression, tokenize
from helpers.setup import check_setup, factor_bytes


def batch_of(mask=True):
    ids = torch.randint(0, tiny.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    real = torch.arange(9) < torch.tensor([[9], [6], [7]])
    labels = ids.masked_fill(~real, -100)
    return {"input_ids": ids, "attention_mask": real.long() if mask else torch.ones_like(ids), "labels": labels}


def failed(report):
    return set(report.check[report.passed.eq(False)])


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_right_set_up_passes_and_the_model_comes_back(name):
    model = tiny.MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = check_setup(model, [batch_of()], linear_layers(model, tiny.LAYERS))
    # GPT-Neo computes attention in float32, also in a double model
    assert failed(report) <= ({"pads", "one by one", "gradient"} if name == "gpt_neo" else set()), report.to_string()
    assert list(report.check) == ["labels", "one by one", "pads", "gradient", "sign", "size"]
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and not model.training


def test_the_bundled_model_passes_in_single_precision():
    lm = load_lm()
    batches = tokenize(load_stories()["text"][:4], lm.tokenizer, max_length=64)
    assert not failed(check_setup(lm.model, batches, linear_layers(lm.model, "mlp")))


def test_an_end_token_behind_completions_is_no_pad():
    batch = batch_of() | {"attention_mask": torch.ones(3, 9, dtype=torch.long)}
    batch["labels"] = batch["input_ids"].clone().index_fill_(1, torch.tensor([0, 1, 8]), -100)
    model = tiny.llama()
    assert not failed(check_setup(model, [batch], linear_layers(model, "mlp")))
    batch["labels"][:, 7] = -100  # two in every example are pads
    assert failed(check_setup(model, [batch], linear_layers(model, "mlp"))) == {"pads"}


def test_every_mistake_fails_its_check():
    model = tiny.llama()
    layers = linear_layers(model, "mlp")

    def twice(model, batch):  # labels shifted twice
        outputs, targets = causal_lm(model, batch)
        return outputs[:, :-1], targets[:, 1:]

    def mean(model, batch):  # gradients of a mean over the batch
        outputs, targets = causal_lm(model, batch)
        return outputs - outputs.mean(0, keepdim=True), targets

    assert "labels" in failed(check_setup(model, [batch_of()], layers, twice))
    assert {"labels", "one by one"} <= failed(check_setup(model, [batch_of()], layers, mean))
    assert failed(check_setup(model, [batch_of(mask=False)], layers)) == {"pads"}
    paid = batch_of() | {"labels": batch_of()["input_ids"]}  # the usual slip: labels = input_ids.clone()
    with pytest.raises(ValueError, match="batch 0, row 1 has a label at position 6, which is a pad"):
        check_setup(model, [paid], layers)
    no_mask = lambda model, batch: causal_lm(model, {k: v for k, v in batch.items() if k != "attention_mask"})
    bidirectional = lambda model, batch: (model(input_ids=batch["input_ids"].flip(1)).logits.flip(1)[:, :-1],
                                          batch["labels"][:, 1:])  # fmt: skip
    assert "pads" not in failed(check_setup(model, [batch_of()], layers, no_mask)), "a causal model reads no later pad"
    assert {"pads", "gradient"} <= failed(check_setup(model, [batch_of()], layers, bidirectional))


def test_other_tasks():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    x = torch.randn(4, 4).double()
    classes = {"input": x, "labels": torch.tensor([0, 2, 1, 1])}
    report = check_setup(net, [classes], ["0", "2"], classification)
    assert not failed(report) and report.passed[:3].tolist() == [None, True, None]
    values = {"input": x, "labels": torch.randn(4, 3).double()}
    assert not failed(check_setup(net, [values], ["0", "2"], regression))
    mixing = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)).double()
    mixed = lambda model, batch: (model(batch["input"] - batch["input"].mean(0)), batch["labels"])
    assert "one by one" in failed(check_setup(mixing, [classes], ["0", "2"], mixed))
    swapped = lambda model, batch: tuple(x.flip(0) for x in classification(model, batch))  # of the same sum
    assert "one by one" in failed(check_setup(net, [classes], ["0", "2"], swapped))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_factor_bytes_are_those_of_the_factors(name):
    model = tiny.MODELS[name]()
    layers = linear_layers(model, tiny.LAYERS)
    told, factors = factor_bytes(model, layers), fit_ekfac(model, [batch_of()], layers, progress=False)
    matrices = (factors.A, factors.S, factors.Q_A, factors.Q_S, factors.Lambda)
    assert told["all"] == sum(value.nbytes for matrix in matrices for value in matrix.values())
    assert told[layers[0]] == sum(matrix[layers[0]].nbytes for matrix in matrices)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert factor_bytes(empty, layers).equals(told)
