"""Other language models than the ones the project uses: what a user brings passes the check-up, by every fast path."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ElectraConfig,
    ElectraForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers import causal_lm, check_setup, fit_ekfac, influence, linear_layers
from helpers.gradients import fast_paths
from helpers.layers import frozen

SMALL = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
         "pad_token_id": 0}
GROUPED, BOTH, BLOCKS = {"num_key_value_heads": 2}, ["head", "kernels"], r"layers?\.\d|\bh\.\d"
KINDS = {
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, BOTH),  # its feed-forward layers see [B · T, d]
    "falcon": ({"parallel_attn": True}, BOTH),  # the output of its feed-forward part is changed in place
    "qwen2_moe": ({**GROUPED, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4},
                  BOTH),  # its shared expert sees [B · T, d]
    "bloom": ({}, BOTH), "gpt_neox": ({}, BOTH), "gptj": ({"rotary_dim": 4}, BOTH), "phi": (GROUPED, BOTH),
    "gemma2": ({**GROUPED, "head_dim": 8, "final_logit_softcapping": 1.0}, ["kernels"]),
    "qwen3": ({**GROUPED, "head_dim": 8}, BOTH), "phi3": (GROUPED, BOTH), "mistral": (GROUPED, BOTH),
    "cohere": ({**GROUPED, "logit_scale": 0.5}, ["kernels"]),
    "bert": ({"is_decoder": True}, ["kernels"]),  # a layer between the last block and the head
    "granite": ({**GROUPED, "logits_scaling": 2.0}, ["kernels"]), "glm": ({**GROUPED, "head_dim": 8}, BOTH),
    "gemma3_text": ({**GROUPED, "head_dim": 8}, BOTH), "codegen": ({"rotary_dim": 4}, BOTH),
    **{kind: (GROUPED, BOTH) for kind in ("olmo2", "smollm3", "stablelm", "starcoder2", "nemotron")},
    **{kind: ({}, BOTH) for kind in ("gpt_bigcode", "persimmon", "biogpt")},
}


def batches():
    return tiny.batches(tiny.stories(6), size=3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_up_passes_and_parts_sum_up(kind):
    torch.manual_seed(0)
    options, paths = KINDS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **options})).eval()
    with torch.no_grad():
        [parameter.add_(0.02 * torch.randn_like(parameter)) for parameter in model.parameters()]
    layers = linear_layers(model, BLOCKS)
    report = check_setup(model, batches(), layers)
    assert report.passed.all(), report.to_string()
    with frozen(model):
        assert fast_paths(model, batches()[0], layers, causal_lm) == paths
    factors = fit_ekfac(model, batches(), layers, progress=False)
    scores, token = (influence(model, factors, batches()[:1], batches(), per=per, progress=False)
                     for per in ("sequence", "token"))
    assert torch.allclose(token.sum(2), scores, rtol=1e-3, atol=1e-5 * float(scores.abs().max()))
    real = torch.cat([F.pad(b["attention_mask"], (0, token.shape[2] - b["input_ids"].shape[1])) for b in batches()])
    assert not token[:, real == 0].any()


def test_experts_of_a_mixture_in_forward_mode():
    """transformers' grouped products have no forward mode; the experts are computed one by one meanwhile."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **{**SMALL, **GROUPED, "num_local_experts": 4})
    model = AutoModelForCausalLM.from_config(config).eval()
    before, layers = config._experts_implementation, linear_layers(model, "self_attn")
    factors = fit_ekfac(model, batches(), layers, progress=False)
    scores, output = (influence(model, factors, batches()[:1], batches(), per=per, progress=False)
                      for per in ("sequence", "output_token"))
    assert torch.allclose(output.sum(2), scores, rtol=1e-3, atol=1e-4 * float(scores.abs().max()))
    assert check_setup(model, batches(), layers).passed.all()
    assert model.config._experts_implementation == before != "eager"


def test_a_head_of_another_width_goes_the_general_way():
    model = ElectraForCausalLM(ElectraConfig(**SMALL, embedding_size=16, is_decoder=True)).eval()
    with frozen(model):
        assert fast_paths(model, batches()[0], linear_layers(model, "attention"), causal_lm) == ["kernels"]


def test_two_token_axes_are_refused():
    model = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        linear_layers(model, "wi")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_single_and_says_what_it_cannot_check(dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).to(dtype)
    layers = linear_layers(model, BLOCKS)
    factors = fit_ekfac(model, batches(), layers, progress=False)
    score = lambda per: influence(model, factors, batches()[:1], batches(), per=per, progress=False)
    scores, token = score("sequence"), score("token")
    assert torch.allclose(token.sum(2), scores, rtol=1e-4, atol=1e-5 * float(scores.abs().max()))
    if dtype is torch.bfloat16:  # float16 has no room for the mask of eager attention, and influence says so
        assert (score("output_token").sum(2) - scores).norm() < 0.1 * scores.norm()  # in the model's own precision
    report = check_setup(model, batches(), layers).set_index("check")
    assert report.passed.drop(["sign", "size"]).all() and report.passed[["sign", "size"]].isna().all()
    assert report.found["size"] == f"a small step is lost in {str(dtype)[6:]}: load the model in float32 to check it"
