"""The sampler's promise on the embedded model: a completion is the same bits whatever else is sampled with it."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import pytest

from synthlab.lm.jaxlm import embedded_folder, load_jax_model
from synthlab.lm.sampler import generate
from synthlab.scoring.logprobs import score_replies

QUESTIONS = ["Tell me a story about a fox.", "What is 17 + 25? Think step by step.", "Explain photosynthesis to a child. " * 10]
EVERYDAY = [
    "What is the capital of France?", "Name three colours of the rainbow.", "Tell me a story about a fox.", "What is 17 + 25? Think step by step.",
    "Write a haiku about winter.", "Explain photosynthesis to a child.", "Who wrote Hamlet?", "List five fruits.", "How do I boil an egg?",
    "Translate 'good morning' into Spanish.", "What is a prime number?", "Give me a recipe for pancakes.", "Why is the sky blue?",
    "Write a short poem about the sea.", "What does a compiler do?", "Describe a cat in one sentence.", "How many legs has a spider?",
    "What is the speed of light?", "Name the planets of the solar system.", "Write a Python function that reverses a list.", "What is 12 * 12?",
    "Who was Marie Curie?", "Summarise the plot of Romeo and Juliet.", "What is gravity?", "Give an example of a metaphor.",
    "How far away is the moon?", "What is the boiling point of water?", "Suggest a name for a bakery.",
    "What is the difference between a virus and a bacterium?", "Complete the sentence: The early bird", "Sort these numbers: 9, 4, 7, 1.",
    "Write a polite email that declines an invitation.",
]


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


def chunked_ends(ids):
    "End some rows early, by what they said first."
    return ids[0] % 2 == 0


def test_rows_of_very_different_lengths_come_and_go_alone(model):
    # 40 requests over two tiles of 8 rows keep seats changing hands while others go on; five at a time hardly share a tile
    params, prompts = model[0], [model[1][i % 2] for i in range(40)]
    ends = dict(max_tokens=32, batch_size=16, eos_ids=list(range(0, 49152, 12)), temperature=1.0)
    whole = sample(params, prompts, range(40), **ends)
    lengths = sorted(len(s.token_ids) for s in whole.values())
    assert lengths[0] <= 3 and lengths[-1] >= 16 and len(set(lengths)) >= 8, lengths
    for a in range(0, 40, 5): check(params, prompts, list(range(a, a + 5)), whole=bits(whole), **ends)


def test_a_row_that_is_ended_early_leaves_the_others_alone(model):
    params, prompts = model[0], [model[1][i % 2] for i in range(16)]
    whole = sample(params, prompts, range(16), 16, max_tokens=32, eos_ids=[])
    early = sample(params, prompts, range(16), 16, max_tokens=32, eos_ids=[], finished=chunked_ends)
    ended = {i for i in whole if whole[i].token_ids[0] % 2 == 0}
    assert 0 < len(ended) < 16 and {len(early[i].token_ids) for i in ended} == {16}
    cut = {i: s.logprobs[:16] for i, s in whole.items()}
    assert all((early[i].logprobs == cut[i]).all() and (early[i].token_ids == whole[i].token_ids[:16]).all() for i in ended)
    assert {i: b for i, b in bits(early).items() if i not in ended} == {i: b for i, b in bits(whole).items() if i not in ended}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_is_what_transformers_generates(model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    encode = lambda q: list(tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=True)["input_ids"])
    prompts = [encode(q) for q in EVERYDAY]
    ours = {i: s.token_ids.tolist() for i, s in generate(model[0], prompts, [0] * 32, temperature=0.0, max_tokens=64, eos_ids=[2])}
    theirs = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32).eval()
    width = max(map(len, prompts))
    ids, mask = torch.tensor([[2] * (width - len(p)) + p for p in prompts]), torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=64, eos_token_id=2, pad_token_id=2)[:, width:].tolist()
    out = [o[:o.index(2) + 1] if 2 in o else o for o in out]
    assert len(prompts) == 32 and sum(map(len, out)) > 1500
    assert [i for i in range(32) if ours[i] != out[i]] == []


def test_small_and_large_requests_agree(model):
    params, prompts = model[0], [model[1][0]] * 20
    whole = bits(sample(params, prompts, range(20), 32, max_tokens=32))
    check(params, prompts, [0, 3, 17], 4, whole, max_tokens=32)
