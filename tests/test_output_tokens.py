"""Scores by output token and by pairs of tokens, against finite differences and explicit sums over positions."""

import dataclasses

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from helpers import causal_lm, fit_ekfac, influence, linear_layers, output_tokens, token_pairs
from helpers.gradients import token_gradients
from helpers.influence import sequence_gradients
from helpers.kernels import eager_attention
from helpers.layers import frozen

QUIET = {"progress": False}
EXAMPLES = tiny.stories(7, prompt=2)
QUERIES = tiny.stories(3, seed=1, prompt=3)
TRAIN, ASKED = tiny.batches(EXAMPLES, 4, 2), tiny.batches(QUERIES, 2, 1)


@pytest.fixture(scope="module", params=tiny.MODELS)
def fitted(request):
    model = tiny.MODELS[request.param]()
    layers = linear_layers(model, tiny.LAYERS)
    factors = fit_ekfac(model, tiny.batches(EXAMPLES), layers, **QUIET)
    score = lambda per, **more: influence(model, factors, ASKED, TRAIN, per=per, **QUIET, **more)
    return model, factors, score


def same(model, x, y, rtol=None):
    """Relative to the largest entry. GPT-Neo's attention, Llama's norms and eager softmax are float32 in any model, and
    forward-mode AD rounds there once more."""
    rtol = rtol or (1e-10 if isinstance(model, GPT2LMHeadModel) else 1e-5)
    return x.shape == y.shape and float((x - y).abs().max()) <= rtol * float(y.abs().max())


def test_both_sum_to_the_sequence_score(fitted):
    model, _, score = fitted
    whole, token, output, pair = map(score, ("sequence", "token", "output_token", "token_pair"))
    assert same(model, output.sum(-1), whole)
    assert same(model, pair.sum((2, 3)), whole, 1e-10)
    assert same(model, pair.sum(2), token, 1e-10)
    assert output.shape == token.shape == (3, 7, max(len(ids) for ids, _ in EXAMPLES) + 2)
    assert pair.shape == (3, 7, max(len(ids) for ids, _ in QUERIES) + 1, token.shape[2])
    assert not same(model, output, token, 1e-2)  # the two attributions are different questions
    assert not same(model, output[..., 1:], token[..., :-1], 1e-2)  # also with the positions aligned


def test_output_tokens_are_slopes_of_every_tokens_own_loss(fitted):
    """Five-point differences of each loss along θ + ε P(∇L_q), for every token of every training example."""
    model, factors, score = fitted
    output, expected = score("output_token"), torch.zeros_like(score("output_token"))
    directions = factors.ihvp(sequence_gradients(model, ASKED, list(factors.A)))
    for query in range(len(QUERIES)):
        for m, example in enumerate(EXAMPLES):
            expected[query, m, : len(example[0])] = slopes(model, directions, query, example)
    rounding = 1e-7 if isinstance(model, GPT2LMHeadModel) else 1e-2  # differences of float32 parts
    assert same(model, output, expected, rounding)
    for wrong in (-output, output.roll(1, -1), output.roll(-1, -1), score("token")):  # controls
        assert not same(model, wrong, expected, 0.1)


def slopes(model, directions, query, example, step=2e-5):
    """d/dε of every token's loss, [T]; the first token has none."""
    ids, labels = example
    weights = [(model.get_submodule(name), V[query]) for name, V in directions.items()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    total = 0
    for times, weight in ((2, -1), (1, 8), (-1, -8), (-2, 1)):
        with torch.no_grad():
            for module, V in weights:
                if module.bias is not None:
                    module.bias += times * step * V[:, -1]
                    V = V[:, :-1]
                module.weight += times * step * (V.T if type(module).__name__ == "Conv1D" else V)
            logp = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            losses = [0.0] + [-float(logp[t - 1, labels[t]]) if labels[t] != -100 else 0.0 for t in range(1, len(ids))]
            total = total + weight * torch.tensor(losses, dtype=torch.float64)
            model.load_state_dict(before)
    return total / (12 * step)


def test_pairs_are_the_products_of_per_position_gradients(fitted):
    """P of each query position's gradient Ds_u ā_uᵀ alone, against each training position's, written as loops."""
    model, factors, score = fitted
    pair, expected = score("token_pair"), torch.zeros_like(score("token_pair"))
    asked, train = (positions(model, examples, list(factors.A)) for examples in (QUERIES, EXAMPLES))
    for q, outer in enumerate(asked):
        P = factors.ihvp(outer)
        for m, other in enumerate(train):
            block = sum(torch.einsum("uoi,toi->ut", P[name], other[name]) for name in P)
            expected[q, m, : block.shape[0], : block.shape[1]] = block
    assert same(model, pair, expected, tiny.rtol(model))
    assert not same(model, pair.roll(1, 2), expected, 0.1) and not same(model, pair.roll(1, 3), expected, 0.1)


def positions(model, examples, layers):
    """For every example {layer: [T, d_out, d_in (+1)]}."""
    out = []
    with frozen(model):
        for example in examples:
            got = token_gradients(model, tiny.batches([example])[0], layers, causal_lm)
            out.append({name: torch.einsum("to,ti->toi", got.outputs[name][0], got.inputs[name][0]) for name in layers})
    return out


def test_pads_first_tokens_and_tokens_without_a_loss_are_zero(fitted):
    _, _, score = fitted
    output, pair = score("output_token"), score("token_pair")
    for m, (ids, labels) in enumerate(EXAMPLES):
        nothing = F.pad(labels, (0, output.shape[2] - len(ids)), value=-100) == -100
        nothing[0] = True
        assert bool((output[:, m, nothing] == 0).all()) and bool((output[:, m, ~nothing] != 0).all())
        assert bool((pair[:, m, :, len(ids):] == 0).all())
        assert bool((pair[:, m, 0, : len(ids) - 1] != 0).all())  # a prompt acts through attention
    for q, (ids, _) in enumerate(QUERIES):
        assert bool((pair[q, :, len(ids):] == 0).all())


@pytest.mark.parametrize("per", ["output_token", "token_pair"])
def test_batches_pads_order_and_pieces_do_not_matter(fitted, per, monkeypatch):
    model, factors, score = fitted
    reference = score(per)
    width = reference.shape[-1]
    score = lambda queries, train: F.pad(
        influence(model, factors, queries, train, per=per, **QUIET), (0, width))[..., : width]
    for size, pads in ((1, 1), (9, 3)):
        got = score(tiny.batches(QUERIES, size, pads), tiny.batches(EXAMPLES, size, pads))
        got = got if per == "output_token" else got[:, :, : reference.shape[2]]
        assert same(model, got, reference)
    assert same(model, score(ASKED, tiny.batches(EXAMPLES[::-1], 4, 2)).flip(1), reference)
    assert same(model, score(tiny.batches(QUERIES[::-1], 3, 1), TRAIN).flip(0), reference)
    monkeypatch.setattr(output_tokens, "IN_FLIGHT", 1)
    monkeypatch.setattr(token_pairs, "CHUNK", 1000)
    assert same(model, score(ASKED, TRAIN), reference)


@pytest.mark.parametrize("per", ["output_token", "token_pair"])
def test_left_pads(per):
    model = tiny.llama().float()  # its positions are relative; eager attention from nowhere is NaN in float64
    factors = fit_ekfac(model, tiny.batches(EXAMPLES), linear_layers(model, tiny.LAYERS), **QUIET)
    right, left = (influence(model, factors, tiny.batches(QUERIES[:1]), tiny.batches(EXAMPLES[:2], 2, left=left),
                             per=per, **QUIET) for left in (False, True))
    for m, (ids, _) in enumerate(EXAMPLES[:2]):
        moved = left[:, m, ..., left.shape[-1] - len(ids):]
        assert same(model, moved, right[:, m, ..., : len(ids)], 1e-3)


def test_rank_and_the_gradient_dot_product(fitted):
    model, factors, score = fitted
    assert same(model, score("output_token", rank=2).sum(-1), score("sequence", rank=2))
    assert not same(model, score("output_token", rank=2), score("output_token"), 1e-3)
    zero = dataclasses.replace(factors, Lambda={name: 0 * value for name, value in factors.Lambda.items()})
    for per in ("output_token", "token_pair"):
        dot = influence(model, zero, ASKED, TRAIN, damping=1.0, per=per, **QUIET)
        whole = influence(model, zero, ASKED, TRAIN, damping=1.0, **QUIET)
        assert same(model, dot.flatten(2).sum(2) if per == "output_token" else dot.sum((2, 3)), whole)
        with pytest.raises(ValueError, match="zero eigenvalues"):
            influence(model, zero, ASKED, TRAIN, damping=0.0, per=per, **QUIET)
    with pytest.raises(ValueError, match="rank must be None with per='token_pair', got 2"):
        score("token_pair", rank=2)


@pytest.mark.parametrize("change", ["plain", "bias", "soft-cap"])
def test_fast_head_and_general_path_agree(change):
    model = tiny.llama()
    head = model.get_output_embeddings()
    if change == "bias":
        head.bias = torch.nn.Parameter(torch.randn(tiny.VOCABULARY, dtype=torch.float64))
    if change == "soft-cap":
        head.register_forward_hook(lambda module, inputs, output: 3 * torch.tanh(output / 3))
    factors = fit_ekfac(model, TRAIN, linear_layers(model, "mlp"), **QUIET)
    general = lambda model, batch: causal_lm(model, batch)
    for per in ("output_token", "token_pair"):
        fast, slow = (influence(model, factors, ASKED, TRAIN, task, per=per, **QUIET) for task in (causal_lm, general))
        assert same(model, fast, slow, 1e-9)


def test_float32_sums_within_rounding():
    model = tiny.gpt_neo()
    factors = fit_ekfac(model, TRAIN, linear_layers(model, tiny.LAYERS), labels="true", **QUIET)
    factors, model = dataclasses.replace(factors, fingerprint=""), model.float()
    whole = influence(model, factors, ASKED, TRAIN, **QUIET)
    for per in ("output_token", "token_pair"):
        parts = influence(model, factors, ASKED, TRAIN, per=per, **QUIET)
        assert parts.dtype == torch.float32
        assert float((parts.flatten(2).sum(2) - whole).norm() / whole.norm()) < 1e-5


# The model comes back as it was.

def test_the_model_comes_back_also_after_an_exception(fitted):
    model, factors, _ = fitted
    usual = model.config._attn_implementation
    model.train()
    first = next(model.parameters())
    first.requires_grad_(False)
    seen, before = [], {name: value.clone() for name, value in model.state_dict().items()}

    def task(model, batch):
        seen.append((model.config._attn_implementation, model.training))
        if len(seen) == stop:
            raise KeyError("the task's own mistake")
        return causal_lm(model, batch)

    stop = 0
    for again in (False, True):
        if again:  # at the last call, which runs inside
            stop = len(seen)
            seen.clear()
            with pytest.raises(KeyError, match="own mistake"):
                influence(model, factors, ASKED, TRAIN, task, per="output_token", **QUIET)
        else:
            influence(model, factors, ASKED, TRAIN, task, per="output_token", **QUIET)
        assert seen[-1] == (usual, False)
        assert model.config._attn_implementation == model.base_model.config._attn_implementation == usual
        assert all(module.training for module in model.modules())
        assert not first.requires_grad and all(p.requires_grad for p in list(model.parameters())[1:])
        assert not any(module._forward_hooks for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    first.requires_grad_(True)


def test_configurations_inside_others_keep_their_own_attention():
    from transformers import CLIPConfig, CLIPModel
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config={**size, "vocab_size": 9}, vision_config={**size, "image_size": 4,
                                                                                      "patch_size": 2}))
    model.text_model.config._attn_implementation = "eager"
    usual = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    assert {"sdpa", "eager"} <= set(usual)
    with eager_attention(model):
        assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == \
            {"eager"}
    assert usual == [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


# Other tasks.

class Reader(torch.nn.Module):
    """PyTorch's own attention between two linear layers; one output a position, or one for all."""

    def __init__(self, pooled=False):
        super().__init__()
        self.first, self.second, self.pooled = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False), pooled

    def forward(self, inputs):
        h = self.first(inputs)
        h = torch.tanh(h + F.scaled_dot_product_attention(h, h, h))
        return self.second(h.mean(1) if self.pooled else h)


def reader_task(model, batch):
    return model(batch["inputs"]), batch["labels"]


@pytest.mark.parametrize("labels", ["integer", "floating"])
def test_a_task_with_its_own_token_axis(labels):
    torch.manual_seed(0)
    model, size = Reader().double(), (5, 6)
    y = torch.randint(2, size) if labels == "integer" else torch.randn(*size, 2, dtype=torch.float64)
    batch = {"inputs": torch.randn(*size, 3, dtype=torch.float64), "labels": y}
    factors = fit_ekfac(model, [batch], ["first", "second"], task=reader_task, **QUIET)
    score = lambda per: influence(model, factors, [batch], [batch], reader_task, per=per, **QUIET)
    output, pair, whole = score("output_token"), score("token_pair"), score("sequence")
    assert output.shape == (5, 5, 6) and pair.shape == (5, 5, 6, 6)
    assert torch.allclose(output.sum(-1), whole, rtol=1e-10) and torch.allclose(pair.sum((2, 3)), whole, rtol=1e-10)
    alone = {**batch, "labels": torch.full_like(y, -100)}  # the loss of one position is a training example of its own
    if labels == "integer":
        alone["labels"][:, 4] = y[:, 4]
        one = influence(model, factors, [batch], [alone], reader_task, **QUIET)
        assert torch.allclose(output[..., 4], one, rtol=1e-10)


def test_pooled_layers_have_one_position():
    torch.manual_seed(0)
    model = Reader(pooled=True).double()
    batch = {"inputs": torch.randn(4, 6, 3, dtype=torch.float64), "labels": torch.randint(2, (4,))}
    factors = fit_ekfac(model, [batch], ["first", "second"], task=reader_task, **QUIET)
    score = lambda per: influence(model, factors, [batch], [batch], reader_task, per=per, **QUIET)
    assert torch.allclose(score("token_pair").sum((2, 3)), score("sequence"), rtol=1e-10)
    assert torch.allclose(score("token_pair").sum(2), score("token"), rtol=1e-10)
    with pytest.raises(ValueError, match=r"needs targets with a token axis, this task's are \(4,\).*per='token'"):
        score("output_token")


def test_bad_tasks():
    model = tiny.gpt2()
    factors = fit_ekfac(model, TRAIN, linear_layers(model, "mlp"), **QUIET)
    short = lambda model, batch: tuple(value[:, 1:] for value in causal_lm(model, batch))
    with pytest.raises(ValueError, match=r"targets of \d+ positions for inputs of \d+: .* as long, or one shorter"):
        influence(model, factors, tiny.batches(QUERIES), tiny.batches(EXAMPLES, 9), short, per="output_token", **QUIET)
    with pytest.raises(ValueError, match="per must be one of .*'output_token', 'token_pair'.*got 'output'"):
        influence(model, factors, ASKED, TRAIN, per="output", **QUIET)
    last = lambda model, batch: (model(input_ids=batch["input_ids"]).logits[:, -1], batch["label"])
    labelled = [{"input_ids": TRAIN[0]["input_ids"], "label": torch.arange(4)}]
    with pytest.raises(ValueError, match="per='output_token' needs targets with a token axis"):
        influence(model, factors, labelled, labelled, last, per="output_token", **QUIET)


def test_derivatives_that_are_not_finite():
    model = tiny.llama()
    factors = fit_ekfac(model, TRAIN, linear_layers(model, "mlp"), **QUIET)
    examples = [(torch.arange(6), torch.arange(6))] * 2 + [(torch.arange(8), torch.arange(8))]
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")  # token 7 is in the third example only
    factors = dataclasses.replace(factors, fingerprint="")
    with pytest.raises(ValueError, match=r"NaN or infinite derivatives in the batch of examples \[2\]"):
        influence(model, factors, tiny.batches(examples[:1]), tiny.batches(examples, 2), per="output_token", **QUIET)
