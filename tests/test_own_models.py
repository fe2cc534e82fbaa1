"""Models, tasks and batches that people bring along: the numbers are autograd's, or there are none and a reason."""

import functools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import FalconConfig, FalconForCausalLM, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from helpers import (
    causal_lm,
    check_setup,
    exact_influence,
    fit_ekfac,
    influence,
    linear_layers,
    load_lm,
)
from helpers.classifier import labelled_batches
from helpers.examples import by_length
from helpers.influence import sequence_gradients
from helpers.queries import continuation
from helpers.tasks import keyed_uniforms

QUIET = {"progress": False}
BATCHES = tiny.batches(tiny.stories(6), 3)


def gradient(model, layer, batch, row, task):
    """autograd's gradient of one example's summed loss by a layer's weight."""
    outputs, targets = task(model, {key: value[row:row + 1] for key, value in batch.items()})
    loss = nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum")
    return torch.autograd.grad(loss, model.get_submodule(layer).weight)[0]


def close(x, y, rtol=1e-9):
    return float((x - y).norm()) <= rtol * float(y.norm())


class Tempered(GPT2LMHeadModel):
    """Logits that depend on something else that a batch holds."""

    def forward(self, input_ids=None, temperature=None, **named):
        out = super().forward(input_ids=input_ids, **named)
        out.logits = out.logits / (1.0 if temperature is None else temperature[:, None, None])
        return out


def test_what_else_a_batch_holds_may_change_the_logits():
    model = tiny.gpt2()
    model.__class__ = Tempered
    batches = [batch | {"temperature": torch.full((len(batch["labels"]),), t).double()}
               for batch, t in zip(BATCHES, (1.0, 4.0))]
    layer = linear_layers(model, r"mlp\.c_fc")[0]
    got = sequence_gradients(model, batches, [layer])[layer][-1, :, :-1].T
    assert close(got, gradient(model, layer, batches[-1], 2, causal_lm))


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 3 * self.weight, self.bias)


def classifier(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)).double()
    return model, [{"x": torch.randn(6, 4).double(), "labels": torch.randint(3, (6,))}]


def of_x(model, batch):
    return model(batch["x"]), batch["labels"]


@pytest.mark.parametrize("layer,right", [(nn.Linear(4, 5), True), (Scaled(4, 5), False)])
def test_a_layer_that_computes_something_else_is_refused(layer, right):
    model, batches = classifier(layer)
    if right:
        fit_ekfac(model, batches, ["0"], of_x, **QUIET)
        return
    with pytest.raises(ValueError, match=r"layers: '0' \(Scaled\) is no plain x Wᵀ \+ b"):
        fit_ekfac(model, batches, ["0"], of_x, **QUIET)


def test_a_weight_that_is_used_again_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.inner(x)) @ self.inner.weight)

    model, batches = Twice().double(), classifier(nn.Linear(4, 5))[1]
    with pytest.raises(ValueError, match="its weight is used elsewhere too"):
        fit_ekfac(model, batches, ["inner"], of_x, **QUIET)


def test_a_tuple_is_no_output():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = Router(4, 3)

        def forward(self, x):
            return self.router(x)[0]

    with pytest.raises(ValueError, match="layers: 'router' gives a tuple and no tensor: leave it out"):
        fit_ekfac(Routed().double(), classifier(nn.Linear(4, 5))[1], ["router"], of_x, **QUIET)


def test_pads_that_count_are_refused():
    def own(model, batch):
        return causal_lm(model, batch)[0], batch["input_ids"][:, 1:]

    model = tiny.gpt2()
    layers = linear_layers(model, "mlp")
    with pytest.raises(ValueError, match="batches: the loss depends on what .* gives at pads"):
        influence(model, fit_ekfac(model, BATCHES, layers, **QUIET), BATCHES, BATCHES, own, **QUIET)


def test_positions_that_are_no_tokens_are_refused_without_a_mask_too():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.heads, self.out = nn.Embedding(37, 6), nn.Linear(3, 3), nn.Linear(6, 3)

        def forward(self, input_ids):
            x = self.embed(input_ids).unflatten(-1, (2, 3))  # [B, T, head, 3]
            return self.out(torch.tanh(self.heads(x)).flatten(2).mean(1))

    task = lambda model, batch: (model(batch["input_ids"]), batch["labels"])
    batches = [{"input_ids": torch.randint(37, (4, 5)), "labels": torch.randint(3, (4,))}]
    with pytest.raises(ValueError, match=r"layers: 'heads' sees 10 positions where the tokens are \(2, 5\)"):
        fit_ekfac(Heads().double(), batches, ["heads"], task, **QUIET)


def test_what_is_no_token_is_not_cut_with_the_pads():
    mask = (torch.arange(12) < 6).long().expand(5, -1)
    batch = {"input_ids": torch.ones(5, 12).long(), "attention_mask": mask, "x": torch.rand(5, 12)}
    ((_, same),) = by_length([batch])
    assert same["x"].shape == (5, 12)
    ((_, cut),) = by_length([{key: batch[key] for key in ("input_ids", "attention_mask")}])
    assert cut["input_ids"].shape == (5, 6)


def test_encoder_and_decoder_are_found_inside():
    config = T5Config(vocab_size=37, d_model=8, d_ff=12, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        linear_layers(nn.ModuleDict({"inner": T5ForConditionalGeneration(config)}), "wi")


def test_the_outputs_of_a_regression_have_draws_of_their_own():
    mask = (torch.arange(12) < 4).long().expand(3, -1)
    batch = {"input_ids": torch.arange(36).view(3, 12) * mask, "attention_mask": mask}
    draws = keyed_uniforms(batch, torch.zeros(3, 12).double(), 0)
    assert len(draws.unique()) == draws.numel()
    cut = {key: value[:, :4] for key, value in batch.items()}
    assert torch.equal(draws, keyed_uniforms(cut, torch.zeros(3, 12).double(), 0))


def falcon():
    torch.manual_seed(0)
    return FalconForCausalLM(FalconConfig(vocab_size=37, hidden_size=12, num_hidden_layers=1, num_attention_heads=3,
                                          alibi=True, new_decoder_architecture=False)).double().eval()


def test_attention_that_is_another_when_written_out():
    model = falcon()  # transformers' eager form adds the biases of ALiBi twice
    layers = linear_layers(model, "mlp")
    factors = fit_ekfac(model, BATCHES, layers, **QUIET)
    whole = influence(model, factors, BATCHES[:1], BATCHES, **QUIET)
    parts = influence(model, factors, BATCHES[:1], BATCHES, per="output_token", **QUIET)
    assert close(parts.sum(2), whole, 1e-6)
    with pytest.raises(ValueError, match="attention written out, .* gives other outputs than its own"):
        exact_influence(model, BATCHES[:1], BATCHES, causal_lm, 1.0)


def test_a_weight_that_is_made_of_others():
    model = tiny.gpt2()
    head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    prune.random_unstructured(head[0], "weight", 0.3)
    batches = classifier(nn.Linear(4, 5))[1]
    factors = fit_ekfac(head, batches, ["0"], of_x, **QUIET)
    assert influence(head, factors, batches, batches, of_x, **QUIET).isfinite().all()
    with pytest.raises(ValueError, match="the weight of '0' is no parameter but made of one"):
        influence(head, factors, batches, batches, of_x, per="output_token", **QUIET)
    layer = linear_layers(model, r"mlp\.c_fc")[0]
    model.get_submodule(layer).extra = nn.Parameter(torch.zeros(2, 3).double())  # as some adapters keep theirs
    assert not check_setup(model, BATCHES, [layer]).passed.eq(False).any()


class Task:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, model, batch):
        outputs, targets = causal_lm(model, batch)
        return self.scale * outputs, targets


def make(scale):
    """The same name with another body, as a cell that is edited and run again."""
    space = {"causal_lm": causal_lm}
    exec(f"def task(model, batch):\n    out, y = causal_lm(model, batch)\n    return {scale} * out, y", space)
    return space["task"]


def test_a_task_is_told_by_what_it_does_in_every_process():
    code = ("import hashlib, torch; from helpers.checkpoint import job_of\n"
            "def task(model, batch): return model if batch in {'one', 'two', 'three', 'four'} else None\n"
            "print(job_of(torch.nn.Linear(1, 1), task, hashlib.md5(), {})['task_code'])")
    told = [subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, text=True,
                           capture_output=True, check=True).stdout for seed in ("1", "2")]
    assert told[0] == told[1] != ""


@pytest.mark.parametrize("first,other", [(Task(1.0), Task(3.0)), (make(1.0), make(3.0))])
def test_another_task_of_the_same_name_is_another_job(first, other, tmp_path):
    model = tiny.gpt2()
    fit = functools.partial(fit_ekfac, model, BATCHES, linear_layers(model, "mlp"), checkpoint=tmp_path, **QUIET)
    fit(first)
    fit(first)
    with pytest.raises(ValueError, match="belongs to another job: task_code is"):
        fit(other)
    with pytest.raises(ValueError, match="is a method"):
        fit(Task(1.0).__call__)


def test_another_configuration_is_another_job(tmp_path):
    model = tiny.llama()
    layers = linear_layers(model, "mlp")
    fit_ekfac(model, BATCHES, layers, checkpoint=tmp_path, **QUIET)
    model.config.rms_norm_eps *= 2
    with pytest.raises(ValueError, match="belongs to another job: config is"):
        fit_ekfac(model, BATCHES, layers, checkpoint=tmp_path, **QUIET)


def test_scores_wider_than_the_file_are_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(2, 3).double()
    batches = [{"x": torch.randn(2, T, 2).double(), "labels": torch.randint(3, (2, T))} for T in (4, 7)]
    factors = fit_ekfac(nn.Sequential(model), batches, ["0"], of_tokens, **QUIET)
    run = functools.partial(influence, nn.Sequential(model), replace(factors, fingerprint=""), batches[:1],
                            task=of_tokens, per="token", **QUIET)
    assert run(batches).shape[-1] == 7
    with pytest.raises(ValueError, match="train: scores of 7 positions where the first batch"):
        run(batches, out=tmp_path / "s.npy")


def of_tokens(model, batch):
    return model(batch["x"]), batch["labels"]


@pytest.mark.parametrize("change,error", [
    (lambda a, b: [a, {**b, "position_ids": b["input_ids"]}], "batch 1 holds .* and batch 0 .*; all must hold"),
    (lambda a, b: [{key: value[0] for key, value in a.items()}], r"input_ids must be \[examples, tokens\], got"),
    (lambda a, b: [a | {"attention_mask": a["labels"][:, None]}], r"attention_mask must be \[examples, tokens\], got"),
])
def test_batches_that_do_not_fit_together(change, error):
    model = tiny.gpt2()
    with pytest.raises(ValueError, match=error):
        fit_ekfac(model, change(*BATCHES), linear_layers(model, "mlp"), **QUIET)


def test_small_things():
    model = tiny.gpt2()
    layer = linear_layers(model, "mlp")[0]
    with pytest.raises(ValueError, match=f"layers: '{layer}' is named twice"):
        fit_ekfac(model, BATCHES, [layer, layer], **QUIET)
    with pytest.raises(ValueError, match="labels: got .*; classes are whole numbers"):
        labelled_batches(["a b", "c d"], [0.7, 1.9], None)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="prompt .* is empty"):
        continuation(load_lm(), prompt)


@pytest.mark.parametrize(("ids", "match"), [
    (torch.full((2, 5), tiny.VOCABULARY + 3), f"5 positions with token ids {tiny.VOCABULARY + 3} to "
     f"{tiny.VOCABULARY + 3}, but the model has embeddings for 40 positions and {tiny.VOCABULARY} tokens"),
    (torch.ones(2, 50, dtype=torch.long), "50 positions with token ids 1 to 1"),
])
def test_what_the_embeddings_lack_is_named(ids, match):
    """A tokenizer of another model, and texts longer than the position table; in the first batch and in a later one."""
    model, good = tiny.gpt2(), torch.ones(2, 5, dtype=torch.long)
    layers = linear_layers(model, tiny.LAYERS)
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x % 5} for x in (ids, good)]
    for order in (batches, batches[::-1]):
        with pytest.raises(IndexError, match=match):
            fit_ekfac(model, order, layers, progress=False)
