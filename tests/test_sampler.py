"""The sampler's promise on the embedded model: a completion is the same bits whatever else is sampled with it."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import pytest

from synthlab.lm.jaxlm import embedded_folder, load_jax_model
from synthlab.lm.sampler import generate
from synthlab.scoring.logprobs import score_replies

QUESTIONS = ["Tell me a story about a fox.", "What is 17 + 25? Think step by step.", "Explain photosynthesis to a child. " * 10]


@pytest.fixture(scope="module")
def model():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    encode = lambda q: tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=True)["input_ids"]
    return load_jax_model(embedded_folder()), [encode(q) for q in QUESTIONS]


def sample(params, prompts, order, batch_size, **kw):
    settings = dict(temperature=0.8, max_tokens=48, eos_ids=[2]) | kw
    found = generate(params, [prompts[i] for i in order], [1000 + i for i in order], batch_size=batch_size, **settings)
    return {order[i]: s for i, s in found}


def bits(samples): return {i: (s.token_ids.tobytes(), s.logprobs.tobytes(), s.finish_reason) for i, s in samples.items()}


def check(params, prompts, order, batch_size, whole, **kw):
    got = bits(sample(params, prompts, order, batch_size, **kw))
    assert got == {i: whole[i] for i in order}, f"batch size {batch_size}: rows {[i for i in order if got[i] != whole[i]]} differ"


def test_batch_and_company_do_not_change_a_bit(model):
    params, prompts = model[0], [model[1][i % 2] for i in range(16)]
    samples = sample(params, prompts, range(16), 32)
    whole, order = bits(samples), np.random.default_rng(0).permutation(16).tolist()
    assert len({w[0] for w in whole.values()}) == 16
    check(params, prompts, order, 32, whole)
    check(params, prompts, order[:8], 4, whole)
    check(params, prompts, order[:2], 1, whole)
    scored = score_replies(params, prompts, [samples[i].token_ids.tolist() for i in range(16)])
    assert max(np.abs(lp - samples[i].logprobs).max() for i, (lp, _) in enumerate(scored)) <= 1e-3


def test_filters_and_greedy_too(model):
    params, prompts = model[0], model[1] * 2
    for kw in (dict(temperature=0.0), dict(temperature=1.0, top_k=50, top_p=0.9)):
        whole = bits(sample(params, prompts, range(6), None, max_tokens=8, **kw))
        check(params, prompts, [5, 1], 1, whole, max_tokens=8, **kw)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_every_row_at_every_batch_size(model, batch_size):
    params, prompts = model[0], [model[1][i % 3] for i in range(24)]
    whole, order = bits(sample(params, prompts, range(24), None)), np.random.default_rng(1).permutation(24).tolist()
    check(params, prompts, order, batch_size, whole)
