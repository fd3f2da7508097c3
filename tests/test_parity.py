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
