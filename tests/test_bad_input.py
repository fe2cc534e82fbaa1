"""Bad input to fit_ekfac and influence gets one sentence: the argument, what came, what works."""

import dataclasses

import pytest
import tiny
import torch

from helpers import EKFACFactors, fit_ekfac, influence, linear_layers, self_influence, top_k

QUIET = {"progress": False}
BATCHES = tiny.batches(tiny.stories(4))


@pytest.fixture(scope="module")
def model():
    return tiny.gpt2()


@pytest.fixture(scope="module")
def factors(model):
    return fit_ekfac(model, BATCHES, linear_layers(model, "c_proj"), **QUIET)


def test_layers(model):
    with pytest.raises(ValueError, match=r"matched nothing for pattern 'mpl' in GPT2LMHeadModel; .*mlp\.c_fc"):
        linear_layers(model, "mpl")
    with pytest.raises(ValueError, match=r"'lm_head' shares its weight with 'transformer.wte'"):
        linear_layers(model, "lm_head")
    for layers, said in ((["transformer.ln_f"], "'transformer.ln_f' is LayerNorm"), (["nowhere"], "no such module"),
                         ("mlp", "must be a list of names, got 'mlp'"), ([], r"must be a list of names, got \[\]")):
        with pytest.raises(ValueError, match=said):
            fit_ekfac(model, BATCHES, layers, **QUIET)


def test_batches(model):
    layers = linear_layers(model, "c_fc")
    empty = {key: value[:0] for key, value in BATCHES[0].items()}
    ids = BATCHES[0]["input_ids"]
    first_only = torch.full_like(ids, -100)
    first_only[:, 0] = ids[:, 0]
    labels = BATCHES[0]["labels"]
    silent = {**BATCHES[0], "labels": torch.where(torch.arange(len(ids))[:, None] == 2, first_only, labels)}
    for batches, said in (([], "batches: got no batches"), ([BATCHES[0], empty], "batches: batch 1 has no examples"),
                          ([BATCHES[0], silent], "batches: batch 1, row 2 has no target")):
        with pytest.raises(ValueError, match=said):
            fit_ekfac(model, batches, layers, **QUIET)
    with pytest.raises(ValueError, match="labels must be 'sampled' or 'true', got 'empirical'"):
        fit_ekfac(model, BATCHES, layers, labels="empirical", **QUIET)


def test_queries_and_train_are_named(model, factors):
    for queries, train, said in (([], BATCHES, "queries: got no batches"), (BATCHES, [], "train: got no batches")):
        with pytest.raises(ValueError, match=said):
            influence(model, factors, queries, train, **QUIET)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite(value):
    model = tiny.llama()
    layers = linear_layers(model, "mlp")
    factors = fit_ekfac(model, BATCHES, layers, **QUIET)
    examples = [(torch.arange(6), torch.arange(6)) for _ in range(3)] + [(torch.arange(8), torch.arange(8))]
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = value  # token 7 is in the fourth example only
    said = r"layer 'model.layers.0.mlp.gate_proj', in the batch of examples \[2, 3\]"
    with pytest.raises(ValueError, match=said):
        fit_ekfac(model, tiny.batches(examples, 2), layers, **QUIET)
    with pytest.raises(ValueError, match=said):
        influence(model, dataclasses.replace(factors, fingerprint=""), BATCHES, tiny.batches(examples, 2), **QUIET)


def test_damping(model, factors):
    for damping in (-1e-9, float("nan")):
        with pytest.raises(ValueError, match="damping must be None or a number of at least 0, got"):
            influence(model, factors, BATCHES, BATCHES, damping=damping, **QUIET)
    flat = dataclasses.replace(factors, Lambda={name: 0 * x for name, x in factors.Lambda.items()})
    for damping in (0, None):
        with pytest.raises(ValueError, match="zero eigenvalues in Lambda of 'transformer.h.0.attn.c_proj'"):
            self_influence(model, flat, BATCHES, damping=damping, **QUIET)


def test_factors_of_another_model(model, factors):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer 'transformer.h.0.attn.c_proj'"):
        influence(tiny.llama(), factors, BATCHES, BATCHES, **QUIET)
    other = dataclasses.replace(factors, Lambda={name: x[:, 1:] for name, x in factors.Lambda.items()})
    with pytest.raises(ValueError, match=r"is \(12, 12\), that layer's gradient is \(12, 13\)"):
        influence(model, other, BATCHES, BATCHES, **QUIET)
    moved = tiny.gpt2()
    with torch.no_grad():
        moved.transformer.h[0].attn.c_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="fitted at other weights"):
        influence(moved, factors, BATCHES, BATCHES, **QUIET)
    influence(moved, dataclasses.replace(factors, fingerprint=""), BATCHES, BATCHES, **QUIET)


def test_per_and_rank_and_k(model, factors):
    with pytest.raises(ValueError, match="per must be one of .*'sequence'.*got 'tokens'"):
        influence(model, factors, BATCHES, BATCHES, per="tokens", **QUIET)
    with pytest.raises(ValueError, match="rank must be None or a whole number of at least 1, got 0"):
        influence(model, factors, BATCHES, BATCHES, rank=0, **QUIET)
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k={k} with scores of shape"):
            top_k(torch.zeros(2, 4), k)


def test_files_of_factors(factors, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="has no factors.safetensors"):
        EKFACFactors.load(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "factors.safetensors")
    with pytest.raises(ValueError, match="was not written by EKFACFactors.save"):
        EKFACFactors.load(tmp_path)
    factors.save(tmp_path)
    whole = (tmp_path / "factors.safetensors").read_bytes()
    (tmp_path / "factors.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="factors.safetensors.*cannot be read"):
        EKFACFactors.load(tmp_path)


def test_layers_that_hooks_cannot_read():
    class Odd(torch.nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.first, self.second, self.kind = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2), kind

        def forward(self, inputs):
            hidden = self.first(inputs)
            if self.kind == "twice":
                hidden = self.first(hidden)
            if self.kind == "no_grad":
                with torch.no_grad():
                    return self.second(hidden) + hidden[:, :2]
            if self.kind == "detached":
                hidden = hidden.detach()
            if self.kind == "flattened":
                hidden = hidden.reshape(1, -1, 3)
            return self.second(hidden).reshape(len(inputs), 2)

    batch = {"inputs": torch.randn(4, 3), "labels": torch.randn(4, 2)}
    task = lambda model, batch: (model(batch["inputs"]), batch["labels"])
    for kind, said in (("twice", "'first' is called twice"), ("detached", "does not depend on 'first'"),
                       ("flattened", r"'second' got an input of shape \(1, 2, 3\) for 2 examples"),
                       ("no_grad", "'second' runs without gradients, in a part of the model under no_grad")):
        with pytest.raises(ValueError, match=said):
            fit_ekfac(Odd(kind), [batch], ["first", "second"], task=task, **QUIET)
    with pytest.raises(ValueError, match="'unused' was not called"):
        odd = Odd("plain")
        odd.unused = torch.nn.Linear(3, 3)
        fit_ekfac(odd, [batch], ["first", "unused"], task=task, **QUIET)
