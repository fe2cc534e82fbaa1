"""What a user's model and batches bring along: patches and hooks, autocast, inference mode, odd layers and labels."""

import dataclasses
import functools

import datasets
import pytest
import tiny
import torch
from torch import nn

from helpers import (
    arnoldi,
    causal_lm,
    cg,
    check_setup,
    classification,
    damping_sweep,
    fit_ekfac,
    influence,
    linear_layers,
    nystrom,
    regression,
    self_influence,
    top_k,
)
from helpers.examples import by_length
from helpers.head import head_gradient
from helpers.jobs import StoryBatches
from helpers.layers import capture, frozen
from helpers.tasks import keyed_uniforms

QUIET = {"progress": False}
BATCHES = tiny.batches(tiny.stories(6), 3)


def close(x, y, rtol=1e-6):
    return (x.double() - y.double()).norm() <= rtol * y.double().norm()


def test_a_patch_of_the_users_own_stays_and_counts():
    model = tiny.gpt2()
    layers = linear_layers(model, "mlp")
    plain = fit_ekfac(model, BATCHES, layers, labels="true", **QUIET)
    for block in model.transformer.h:
        block.mlp.act.forward = lambda x: 3 * torch.relu(x)
    patched = model.transformer.h[0].mlp.act.forward
    factors = fit_ekfac(model, BATCHES, layers, labels="true", **QUIET)
    assert model.transformer.h[0].mlp.act.forward is patched
    assert not close(factors.Lambda[layers[0]], plain.Lambda[layers[0]], 0.1), "the patch took no part"
    again = fit_ekfac(model, BATCHES, layers, labels="true", **QUIET)
    assert all(again.Lambda[name].equal(factors.Lambda[name]) for name in layers)


def test_a_hook_that_changes_a_layers_output_is_not_taken_for_the_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    batch = {"x": torch.randn(6, 4).double(), "labels": torch.randint(3, (6,))}
    task = lambda model, batch: (model(batch["x"]), batch["labels"])
    loss = nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="sum")
    wanted = torch.autograd.grad(loss, model[0].weight)[0]
    with frozen(model), torch.enable_grad(), capture(model, ["0"]) as taken:
        outputs, targets = task(model, batch)
        top = nn.functional.cross_entropy(outputs, targets, reduction="sum")
        (ds,) = torch.autograd.grad(top, [taken["0"][2]])
    assert close(ds.T @ taken["0"][0], wanted, 1e-12)


@pytest.mark.parametrize("context", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode])
def test_the_context_of_a_call_does_not_matter(context):
    model = tiny.gpt2().float()
    layers = linear_layers(model, "mlp")
    run = lambda: (factors := fit_ekfac(model, BATCHES, layers, **QUIET), influence(model, factors, BATCHES, BATCHES,
                   **QUIET), self_influence(model, factors, BATCHES, **QUIET))
    plain = run()
    with context():
        inside = run()
    assert close(inside[0].Lambda[layers[0]], plain[0].Lambda[layers[0]], 1e-5)
    assert inside[1].dtype is torch.float32 and close(inside[1], plain[1], 1e-5) and close(inside[2], plain[2], 1e-5)


def test_labels_on_or_beside_a_pad_are_refused():
    model = tiny.gpt2()
    layers = linear_layers(model, "mlp")
    left = tiny.batches(tiny.stories(4), 4, left=True)  # the first real token would be predicted from a pad
    copied = [{**batch, "labels": batch["input_ids"].clone()} for batch in BATCHES]
    for batches in (left, copied):
        with pytest.raises(ValueError, match="batch 0, row . has a label at position ., which is a pad or would be"):
            fit_ekfac(model, batches, layers, **QUIET)
    fit_ekfac(model, tiny.batches(tiny.stories(4, prompt=1), 4, left=True), layers, **QUIET)


def test_batches_of_other_kinds_are_named():
    model, ids = tiny.gpt2(), BATCHES[0]["input_ids"]
    layers = linear_layers(model, "mlp")
    without = {key: value for key, value in BATCHES[0].items() if key != "labels"}
    for batches, said in (((b for b in BATCHES), "got generator; give a list"), (BATCHES[0], "got dict; give a list"),
                          ([without], "labels must have the shape"), ([{**without, "labels": None}], "is NoneType"),
                          ([{}], "a batch is a dict of tensors"), ([{**BATCHES[0], "text": ["a"]}], "'text' is list"),
                          ([{**BATCHES[0], "x": ids[:2]}], "all must begin with the same axis")):
        with pytest.raises(ValueError, match=said):
            fit_ekfac(model, batches, layers, **QUIET)
    narrow = [{**batch, "labels": batch["labels"].int()} for batch in BATCHES]
    task = lambda model, batch: causal_lm(model, batch)  # no fast head: the general path
    fit_ekfac(model, narrow, layers, task, labels="true", **QUIET)


def test_examples_without_a_target_are_refused_in_any_task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    model.forward = lambda x: nn.Sequential.forward(model, x)
    batch = {"x": torch.randn(3, 4), "labels": torch.tensor([-100, 1, 2])}
    with pytest.raises(ValueError, match="an example has no target"):
        fit_ekfac(model, [batch], ["0"], classification, **QUIET)
    with pytest.raises(ValueError, match="classification takes integer classes, got torch.float32"):
        fit_ekfac(model, [{**batch, "labels": torch.rand(3, 3)}], ["0"], classification, **QUIET)


def test_groups_hold_no_more_tokens_than_the_largest_batch():
    stories = [(torch.arange(n) % 7, torch.arange(n) % 7) for n in (*[3] * 40, *[60] * 8)]
    batches = tiny.batches(stories[:40], 40) + tiny.batches(stories[40:], 2)
    groups = by_length(batches)
    assert max(batch["input_ids"].numel() for _, batch in groups) <= max(b["input_ids"].numel() for b in batches)
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(48))


def test_a_regression_with_as_many_targets_as_columns():
    torch.manual_seed(0)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 9)

        def forward(self, input_ids, attention_mask):
            return self.out((self.table(input_ids) * attention_mask[..., None]).sum(1))

    model, mask = Reads(), (torch.arange(9) < torch.tensor([[5], [9]])).long()
    batches = [{"input_ids": torch.randint(7, (2, 9)), "attention_mask": m, "labels": torch.randn(2, 9)}
               for m in (mask, mask.flip(0))]
    factors = fit_ekfac(model, batches, ["out"], regression, **QUIET)
    assert influence(model, factors, batches, batches, regression, **QUIET).shape == (4, 4)


def test_a_transformer_encoder_layer_can_be_studied():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 3)).eval()
    batch = {"x": torch.randn(5, 3, 8), "labels": torch.randint(3, (5,))}
    task = lambda model, batch: (model(batch["x"]), batch["labels"])
    report = check_setup(model, [batch], linear_layers(model, r"linear\d"), task)
    assert report.set_index("check").passed["gradient"], report.to_string()
    assert torch.backends.mha.get_fastpath_enabled()


def test_layers_that_see_other_positions_than_the_mask_are_refused():
    class Prompted(nn.Module):  # a soft prompt of three vectors before the text
        def __init__(self):
            super().__init__()
            self.inner = tiny.gpt2()

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            embedded = self.inner.transformer.wte(input_ids)
            longer = torch.cat([embedded[:, :1].expand(-1, 3, -1), embedded], 1)
            mask = torch.cat([torch.ones(len(input_ids), 3).long(), attention_mask], 1)
            out = self.inner(inputs_embeds=longer, attention_mask=mask)
            out.logits = out.logits[:, 3:]
            return out

    model = Prompted()
    with pytest.raises(ValueError, match="sees .* positions where the tokens are .* leave it out"):
        fit_ekfac(model, BATCHES, linear_layers(model, "mlp"), **QUIET)


def test_half_precision_keeps_the_sums_over_a_vocabulary():
    flat = nn.Linear(8, 150_000, bias=False).half()  # the sum of its probabilities is more than float16 holds
    with torch.no_grad():
        flat.weight.zero_(), flat.weight[0].fill_(1)
    got = head_gradient(torch.zeros(2, 8).half(), flat, torch.tensor([0, 1]))
    assert bool(got.isfinite().all()) and float(got[0, 0]) == pytest.approx(-1, abs=1e-3)
    n, head = 20_000, nn.Linear(256, 256, bias=False).bfloat16()
    with torch.no_grad():
        head.weight.copy_(torch.eye(256))  # the gradient is p − onehot(y), so that y can be read off it
    hidden = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = head_gradient(hidden.expand(n, -1).contiguous(), head, torch.zeros(n).long(), uniforms).argmin(1)
    assert (torch.bincount(drawn, minlength=256) / n - hidden[0].float().softmax(-1)).abs().max() < 3e-4


def test_what_is_saved_belongs_to_a_task_with_a_name(tmp_path):
    model = tiny.gpt2()
    layers = linear_layers(model, "mlp")

    def scaled(model, batch, scale=1.0):
        outputs, targets = causal_lm(model, batch)
        return scale * outputs, targets

    for task in (functools.partial(scaled, scale=3.0), lambda model, batch: scaled(model, batch, 3.0)):
        with pytest.raises(ValueError, match="give a def, no lambda, partial"):
            fit_ekfac(model, BATCHES, layers, task, checkpoint=tmp_path, **QUIET)


def test_draws_take_inputs_of_any_kind():
    targets = torch.zeros(2, dtype=torch.long)
    plain = keyed_uniforms({"x": torch.ones(2, 3)}, targets, 0)
    assert keyed_uniforms({"x": torch.ones(2, 3, requires_grad=True)}, targets, 0).equal(plain)
    assert keyed_uniforms({"x": torch.ones(2, 3, dtype=torch.bfloat16)}, targets, 0).shape == (2,)


def test_scores_that_are_not_finite_have_no_rank():
    with pytest.raises(ValueError, match="scores: some are NaN or infinite"):
        top_k(torch.tensor([[1.0, float("nan"), 2.0, 3.0]]), 1)
    with pytest.raises(ValueError, match=r"pattern '\(' is no regular expression"):
        linear_layers(tiny.gpt2(), "(")


def test_factors_belong_to_all_weights_of_a_model():
    model = tiny.gpt2()
    factors = fit_ekfac(model, BATCHES, linear_layers(model, "mlp"), **QUIET)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1e-3  # no studied layer, and yet the gradients are others
    with pytest.raises(ValueError, match="fitted at other weights"):
        influence(model, factors, BATCHES, BATCHES, **QUIET)


def test_eigenvalues_that_are_rounding_are_not_divided_by():
    model = tiny.gpt2()
    layers = linear_layers(model, "mlp")
    factors = fit_ekfac(model, BATCHES, layers, **QUIET)
    noise = {name: torch.where(x == x.min(), 1e-20 * x.max(), x) for name, x in factors.Lambda.items()}
    with pytest.raises(ValueError, match="damping=0.0 leaves zero eigenvalues"):
        dataclasses.replace(factors, Lambda=noise).damped(layers[0], 0.0)
    dataclasses.replace(factors, Lambda=noise).damped(layers[0], 1e-30)


def test_a_layer_whose_gradients_are_rounding_has_no_damping_of_its_own():
    model = tiny.llama()
    pairs = [(ids[:2], labels[:2]) for ids, labels in tiny.stories(6)]  # the one target sees one key
    train, layers = tiny.batches(pairs), linear_layers(model, "q_proj|v_proj|mlp")
    factors = fit_ekfac(model, train, layers, **QUIET)
    means = {name: float(Lambda.mean()) for name, Lambda in factors.Lambda.items()}
    for scores in (influence, self_influence, functools.partial(damping_sweep, dampings=[0.1])):
        batches = [train] if scores is self_influence else [train, train]
        with pytest.raises(ValueError, match="q_proj' are zero but for rounding .* leave the layer out, or give damp"):
            scores(model, factors, *batches, **QUIET)
    there = [name for name in layers if "q_proj" not in name]
    assert max(means.values()) < 1e6 * min(means[name] for name in there)
    whole = influence(model, factors, train, train, damping=1e-3, **QUIET)
    rest = fit_ekfac(model, train, there, **QUIET)
    assert torch.allclose(influence(model, rest, train, train, damping=1e-3, **QUIET), whole, rtol=1e-10)
    influence(model, rest, train, train, **QUIET)  # and with theirs, those that have gradients


@pytest.mark.parametrize("solver", [cg, arnoldi, nystrom])
def test_solvers_take_finite_vectors_only(solver):
    with pytest.raises(ValueError, match="give finite floating vectors"):
        solver(lambda u: u, torch.tensor([1.0, float("nan"), 2.0]).double(), 0.1)


def test_half_precision_scores_of_output_tokens_are_single():
    model = tiny.gpt2().bfloat16()
    factors = fit_ekfac(model, BATCHES, linear_layers(model, "mlp"), **QUIET)
    assert influence(model, factors, BATCHES, BATCHES, per="output_token", **QUIET).dtype is torch.float32


def test_story_batches_are_read_in_steps_of_one():
    batches = StoryBatches(datasets.Dataset.from_dict({"text": ["a"] * 9}), None, batch_size=2)
    with pytest.raises(ValueError, match="in steps of 1"):
        batches[::2]


def test_everything_in_a_batch_reaches_the_model():
    model, ids = tiny.gpt2(), tiny.stories(1)[0]
    layers = linear_layers(model, "mlp")
    plain = tiny.batches([ids], 1)
    gap, positions = torch.zeros(1, 3).long(), torch.arange(plain[0]["input_ids"].shape[1])[None]
    left = {key: torch.cat([gap if key != "labels" else gap - 100, value], 1) for key, value in plain[0].items()}
    left["labels"][:, 3] = -100  # predicted from a pad
    moved = left | {"position_ids": torch.cat([gap, positions], 1)}
    factors = fit_ekfac(model, plain, layers, labels="true", **QUIET)
    wanted = influence(model, factors, plain, plain, **QUIET)
    assert close(influence(model, factors, [moved], [moved], **QUIET), wanted, 1e-10)
    assert not close(influence(model, factors, [left], [left], **QUIET), wanted, 1e-3), "the positions take no part"


def test_a_language_model_task_without_ids_is_named():
    model, batch = tiny.gpt2(), {"inputs_embeds": torch.randn(2, 5, 12).double(), "labels": torch.ones(2, 5).long()}
    with pytest.raises(ValueError, match="batches: batch 0 has 'inputs_embeds', 'labels'; causal_lm reads input_ids"):
        fit_ekfac(model, [batch], linear_layers(model, "mlp"), **QUIET)


def test_a_model_that_cannot_be_differentiated_forwards_is_named():
    model = tiny.gpt2()
    factors = fit_ekfac(model, BATCHES, linear_layers(model, "mlp"), labels="true", **QUIET)
    wanted = influence(model, factors, BATCHES, BATCHES, **QUIET)
    model.enable_input_require_grads()  # what PEFT with checkpointed gradients does
    assert influence(model, factors, BATCHES, BATCHES, **QUIET).equal(wanted)
    with pytest.raises(RuntimeError, match=r"GPT2LMHeadModel cannot be differentiated forwards .*disable_input"):
        influence(model, factors, BATCHES, BATCHES, per="output_token", **QUIET)
    model.disable_input_require_grads()
    assert close(influence(model, factors, BATCHES, BATCHES, per="output_token", **QUIET).sum(2), wanted, 1e-10)
