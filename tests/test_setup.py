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


def failed(report):  # the tiny models' weights are noise, so they do worse than a guess
    return set(report.check[report.passed.eq(False)]) - {"guess"}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_right_set_up_passes_and_the_model_comes_back(name):
    model = tiny.MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = check_setup(model, [batch_of()], linear_layers(model, tiny.LAYERS))
    # GPT-Neo computes attention in float32, also in a double model
    assert failed(report) <= ({"pads", "one by one", "gradient"} if name == "gpt_neo" else set()), report.to_string()
    assert list(report.check) == ["labels", "guess", "one by one", "pads", "gradient", "sign", "size"]
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
    shifted = batch_of()
    shifted["labels"] = torch.cat([shifted["labels"][:, 1:], torch.full((3, 1), -100)], 1)
    report = check_setup(model, [shifted], layers).set_index("check")
    assert not report.passed["labels"] and report.found["labels"].endswith("labels are not the token at their position")
    without = {key: value for key, value in batch_of().items() if key != "attention_mask"}
    assert failed(check_setup(model, [without], layers)) == {"pads"}
    ids = torch.where(without["labels"] == -100, 7, without["input_ids"])  # pads that take a loss, and no mask
    report = check_setup(model, [{"input_ids": ids, "labels": ids}], layers).set_index("check")
    assert report.found["pads"] == "no attention_mask, and 3 times the same id at an end" and not report.passed["pads"]
    full = {key: value[:1] for key, value in without.items()}
    assert not failed(report := check_setup(model, [full], layers)) and report.passed[3] is None
    no_mask = lambda model, batch: causal_lm(model, {k: v for k, v in batch.items() if k != "attention_mask"})
    bidirectional = lambda model, batch: (model(input_ids=batch["input_ids"].flip(1)).logits.flip(1)[:, :-1],
                                          batch["labels"][:, 1:])  # fmt: skip
    assert "pads" not in failed(check_setup(model, [batch_of()], layers, no_mask)), "a causal model reads no later pad"
    assert {"pads", "gradient"} <= failed(check_setup(model, [batch_of()], layers, bidirectional))


def test_left_pads_must_not_be_counted_as_positions():
    examples = tiny.stories(4)
    for name, wrong in (("llama", set()), ("gpt2", {"pads", "one by one"})):
        model = tiny.MODELS[name]()
        layers = linear_layers(model, "mlp")
        assert not failed(check_setup(model, tiny.batches(examples, 4), layers))
        left = tiny.batches(examples, 4, extra_pads=2, left=True)
        left[0]["labels"][torch.arange(4), left[0]["attention_mask"].argmax(1)] = -100  # it has none before it
        report = check_setup(model, left, layers).set_index("check")
        assert failed(report.reset_index()) <= wrong and bool(report.passed["pads"]) == (not wrong)
        assert not wrong or "positions from the pads on the left" in report["if it fails"]["pads"]


def test_the_tokens_of_another_tokenizer_are_worse_than_a_guess():
    lm = load_lm()
    right = tokenize(load_stories()["text"][:4], lm.tokenizer, max_length=64)
    layers = linear_layers(lm.model, r"h\.0\.mlp")
    ids = torch.where(right[0]["attention_mask"] == 1, (right[0]["input_ids"] * 7 + 11) % 2800, 0)
    foreign = right[0] | {"input_ids": ids, "labels": torch.where(right[0]["labels"] == -100, -100, ids)}
    report = check_setup(lm.model, [foreign], layers).set_index("check")
    assert report.index[report.passed.eq(False)].tolist() == ["guess"]
    report = check_setup(lm.model, right, layers).set_index("check")
    assert report.passed.all() and report.found["guess"] < 2


def test_what_the_model_does_not_know_has_a_name():
    model, batch = tiny.llama(), batch_of()
    layers = linear_layers(model, "mlp")
    for name, said in (("input_ids", "token ids .* the model has embeddings for"), ("labels", "out of the classes")):
        for fits in (lambda batches: check_setup(model, batches, layers),
                     lambda batches: fit_ekfac(model, batches, layers, progress=False),
                     lambda batches: fit_ekfac(model, batches, layers, labels="true", progress=False)):
            with pytest.raises(IndexError, match=said):
                fits([batch | {name: torch.where(batch["labels"] == -100, batch[name], batch[name] + 40)}])


def test_quantised_weights_of_any_shape_are_no_obstacle():
    """As bitsandbytes keeps them: packed integers, with the layer's shape in in_features and out_features."""
    class Packed(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight.view(self.out_features, self.in_features).to(x) / 50)

    torch.manual_seed(0)
    model = torch.nn.Sequential(Packed(6, 5, bias=False), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    whole = torch.randint(-100, 100, (5, 6), dtype=torch.int8)
    model[0].weight = torch.nn.Parameter(whole.view(-1, 1), requires_grad=False)
    batch = {"input": torch.randn(7, 6).double(), "labels": torch.randint(3, (7,))}
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Tanh(), model[2]).double()
    plain[0].weight.data = whole.double() / 50
    factors, expected = (fit_ekfac(some, [batch], ["0", "2"], classification, progress=False)
                         for some in (model, plain))
    assert all(torch.allclose(factors.Lambda[name], expected.Lambda[name]) for name in expected.Lambda)
    assert factor_bytes(model, ["0"]).equals(factor_bytes(plain, ["0"]))
    report = check_setup(model, [batch], ["0", "2"], classification).set_index("check")
    assert report.passed[["gradient", "sign", "size"]].isna().all() and "quantised" in report.found["size"]


def test_other_tasks():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    x = torch.randn(4, 4).double()
    classes = {"input": x, "labels": torch.tensor([0, 2, 1, 1])}
    report = check_setup(net, [classes], ["0", "2"], classification)
    assert not failed(report) and report.passed[:4].tolist() == [None, None, True, None]
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
