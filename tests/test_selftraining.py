"""Self-training from outside: its preference loss against TRL's own, and loops that are killed at random moments."""
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from synthlab.lm.jaxlm import Config, random_params, save_jax_model
from synthlab.store import Store
from synthlab.training.organism import WORDS, make_world, problems, write_tokenizer
from synthlab.training.sft import lay_out, next_token, preference_loss

BETA = .3
SIZE = Config("llama", len(WORDS), 32, 2, 4, 2, 8, 48, 1e-5, 256, True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "The same small model as ours and inside TRL's DPO trainer, which takes the reference's log-probabilities from the batch."
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'synthlab[trl]'")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    folder, params = tmp_path_factory.mktemp("model"), random_params(SIZE, 0, scale=.2)
    write_tokenizer(folder)
    save_jax_model(params, folder)
    rows = Dataset.from_list([{"prompt": t.prompt, "chosen": " A1", "rejected": " A2"} for t in problems(make_world(), 8)])
    config = DPOConfig(str(folder / "out"), per_device_train_batch_size=4, use_cpu=True, bf16=False, beta=BETA, loss_type="sigmoid", report_to="none", disable_dropout=True)
    trainer = DPOTrainer(AutoModelForCausalLM.from_pretrained(folder), args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.model.eval()
    trainer.precompute_ref_logps = True
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # its threads and those of JAX wait for each other on a machine with few cores
    yield params, trainer
    torch.set_num_threads(before)


def drawn(seed, n=5):
    "Prompts, real replies, the model's own replies, and what a reference model says of each token of both."
    rng = np.random.default_rng(seed)
    ids = lambda most: rng.integers(2, len(WORDS), rng.integers(1, most)).tolist()
    prompts, real, own = ([ids(7) for _ in range(n)] for _ in range(3))
    return prompts, real, own, [[rng.normal(-3, 1, len(r)) for r in side] for side in (real, own)]


def ours(prompts, real, own, refs):
    "The batch that `dpo` lays out."
    def text(p, r, ref):
        t = next_token([*p, *r], np.repeat([0., 1.], [len(p), len(r)]))
        first = np.eye(1, len(t.inputs))[0]
        return type(t)(t.inputs, t.targets, t.weights, t.ahead, {"reference": np.concatenate([np.zeros(len(p) - 1), ref]), "share": first / len(prompts)})
    units = [[text(p, r, a), text(p, o, b)] for p, r, o, a, b in zip(prompts, real, own, *refs)]
    import jax
    return jax.tree.map(lambda a: a[0], lay_out(units, 64))


def theirs(prompts, real, own, refs):
    "The same as TRL's collator would have it: chosen above rejected, padded on the right."
    import torch
    rows, sides = [[*p, *r] for side in (real, own) for p, r in zip(prompts, side)], prompts + prompts
    length = max(map(len, rows))
    pad = lambda values: torch.tensor([[*v, *[0] * (length - len(v))] for v in values])
    sums = [torch.tensor([x.sum() for x in side]).float() for side in refs]
    return {"input_ids": pad(rows), "attention_mask": pad([[1] * len(r) for r in rows]), "completion_mask": pad([[0] * len(p) + [1] * (len(r) - len(p)) for p, r in zip(sides, rows)]),
            "ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]}


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_of_spin_and_dpo_is_trls_sigmoid_loss(pair, seed):
    import jax
    params, trainer = pair
    trainer.args.beta = trainer.beta = BETA
    data = drawn(seed)
    (value, sums), grads = jax.value_and_grad(lambda p: preference_loss(p, ours(*data), BETA), has_aux=True)(params)
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, theirs(*data), return_outputs=False)
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads.embed, trainer.model.get_input_embeddings().weight.grad.numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_is_the_formula_of_spin(seed):
    from synthlab.scoring.logprobs import score_replies
    params, (prompts, real, own, refs) = random_params(SIZE, 0, scale=.2), drawn(seed)
    logp = [[float(np.asarray(lp, np.float64).sum()) for lp, _ in score_replies(params, prompts, side, progress=False)] for side in (real, own)]
    ref = [[x.sum() for x in side] for side in refs]
    margin = BETA * ((np.array(logp[0]) - np.array(logp[1])) - (np.array(ref[0]) - np.array(ref[1])))
    value, sums = preference_loss(params, ours(prompts, real, own, refs), BETA)
    np.testing.assert_allclose(value, np.mean(np.logaddexp(0, -margin)), rtol=1e-5)
    np.testing.assert_allclose(sums["right"], (margin > 0).mean(), rtol=1e-6)


CODE = """
import re, sys, time
from pathlib import Path
import numpy as np
from synthlab.core import Usage, new_task
from synthlab.lm.backends import Completion
from synthlab.methods.selftraining import Stop, self_train

class Pupil:
    def __init__(self, skill): self.name, self.skill, self.revision = "pupil", skill, f"{skill:.9f}"
    def complete(self, requests, concurrency=None):
        for i, r in enumerate(requests):
            time.sleep(.004)
            rng, (a, b) = np.random.default_rng(r.seed), map(int, re.findall("[0-9]+", r.messages[-1]["content"])[:2])
            total = a + b + (0 if rng.random() < self.skill else 1)
            yield i, Completion(f"{a} + {b} = {total}\\n#### {total}", usage=Usage(10, 6, 1))

def train(start, examples, folder):
    time.sleep(.1)
    return Pupil(.5 * start.skill + .5 * len(examples) / 64)

def evaluate(lm): time.sleep(.05); return {"validation": lm.skill, "validation_n": 500}

tasks = [new_task(f"{a} + {3 * a} = ?", str(4 * a)) for a in range(1, 17)]
done = self_train(Pupil(.3), tasks, "raft", train=train, evaluate=evaluate, n=4, batch=4, until=Stop(4, patience=9), folder=sys.argv[1], progress=False)
Path(sys.argv[2]).write_text(done.history.to_csv() + str([a.counts for a in done.accounting]) + str([e.id for e in done.examples]) + done.lm.revision)
"""


def loop(folder, result): return subprocess.Popen([sys.executable, "-W", "ignore", "-c", CODE, str(folder), str(result)], env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE)


def ended(child, seconds=120):
    _, err = child.communicate(timeout=seconds)
    assert child.returncode == 0, err.decode()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_loop_that_was_stopped_goes_on_and_ends_as_one_that_was_not(tmp_path, how):
    ended(loop(tmp_path / "whole", tmp_path / "expected"))
    rng, stopped, before = random.Random(int(how)), 0, -1
    for _ in range(4):
        child, folder = loop(tmp_path / "run", tmp_path / "found"), tmp_path / "run"
        deadline, wanted = time.monotonic() + 60, before + rng.randint(1, 60)
        while time.monotonic() < deadline and child.poll() is None and (not (folder / "journal.sqlite").exists() or sum(Store(folder).counts().values()) < wanted): time.sleep(.02)
        stopped += child.poll() is None
        child.send_signal(how)
        child.communicate(timeout=30)
        assert Store(folder).check() == []
        before = sum(Store(folder).counts().values())
    assert stopped >= 2
    ended(loop(tmp_path / "run", tmp_path / "found"))
    assert (tmp_path / "found").read_text() == (tmp_path / "expected").read_text()
