"""The embedded model, as unpacked and run by us, against transformers."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import pytest

from synthlab.lm.jaxlm import embedded_folder, load_jax_model, log_probs

TEXTS = ["The capital of France is Paris.", "def add(a, b):\n    return a + b\n", "Natalia sold clips to 48 of her friends in April, and then half as many in May. " * 8,
         "La somme de 17 et 25 est 42."]


@pytest.fixture(scope="module")
def both():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXTS[2]}], add_generation_prompt=True, return_dict=True)["input_ids"]
    rows = [tokenizer.encode(t) for t in TEXTS] + [chat]
    with torch.no_grad():
        want = [model(torch.tensor([r])).logits.log_softmax(-1)[0, :-1].gather(-1, torch.tensor(r)[1:, None])[:, 0].numpy() for r in rows]
    return load_jax_model(folder), rows, want


def test_embedded_model_matches_transformers_in_one_padded_batch(both):
    params, rows, want = both
    ids = np.full((len(rows), max(map(len, rows)) + 5), 7)
    for i, r in enumerate(rows): ids[i, :len(r)] = r
    got = np.asarray(log_probs(params, ids))
    diff = np.concatenate([np.abs(got[i, :len(w)] - w) for i, w in enumerate(want)])
    assert diff.max() <= 1e-3 and diff.mean() <= 1e-4, (diff.max(), diff.mean())


def test_embedded_folder_is_complete(both):
    names = {p.name for p in embedded_folder().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= names
    assert both[0].config.tied and both[0].config.num_kv_heads == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scores_of_real_rollouts_match_transformers(both):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from synthlab.lm.sampler import generate
    from synthlab.scoring.logprobs import score_replies

    params, folder = both[0], embedded_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    questions = ["Why is the sky blue?", "What is 17 + 25? Explain each step.", "Write three sentences about a fox and a river."]
    encode = lambda q: tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=True)["input_ids"]
    prompts = [encode(q) for q in questions for _ in range(16)]
    samples = dict(generate(params, prompts, range(48), temperature=1.0, max_tokens=64, eos_ids=[2]))
    replies = [samples[i].token_ids.tolist() for i in range(48)]
    assert len({tuple(r) for r in replies}) == 48
    scored, diff, entropy = score_replies(params, prompts, replies), [], []
    for p, r, (lp, H) in zip(prompts, replies, scored):
        with torch.inference_mode(): z = model(torch.tensor([p + r])).logits[0, len(p) - 1:-1].double().log_softmax(-1)
        diff.append(np.abs(lp - z.gather(-1, torch.tensor(r)[:, None])[:, 0].numpy()))
        entropy.append(np.abs(H + (z.exp() * z).sum(-1).numpy()))
    for d in map(np.concatenate, (diff, entropy)): assert d.max() <= 1e-3 and d.mean() <= 1e-4, (d.max(), d.mean())
    assert max(np.abs(lp - samples[i].logprobs).max() for i, (lp, _) in enumerate(scored)) <= 1e-3
