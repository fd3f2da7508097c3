"""Evaluation and the search for contamination, on published labels and real questions."""
import ast
import math

import numpy as np
import pytest
from real_data import GSM8K, MATH, MODELS, SOLUTIONS, needs, read
from scipy.stats import binomtest

from synthlab.core import Group, Rollout, Task
from synthlab.training.contamination import claim, clean, contamination, split_tasks
from synthlab.training.evaluate import accuracy, compare_models, evaluate_groups, holm, maj_at, outcomes, pass_at


@pytest.fixture(scope="module")
def published():
    "Four published models on 300 questions: evaluations of each, of all together, and the labels (300, 4)."
    rows = read(SOLUTIONS)
    tasks = [Task(r["id"], r["question"], r["ground_truth"]) for r in rows]
    said = [[r[m] if isinstance(r[m], dict) else ast.literal_eval(r[m]) for m in MODELS] for r in rows]
    one = {m: evaluate_groups([Group(t, [Rollout(t.id, 0, s[k]["solution"])]) for t, s in zip(tasks, said)], m) for k, m in enumerate(MODELS)}
    every = evaluate_groups([Group(t, [Rollout(t.id, k, x["solution"]) for k, x in enumerate(s)]) for t, s in zip(tasks, said)], "all")
    return one, every, np.array([[x["is_correct"] for x in s] for s in said])


@needs(SOLUTIONS)
def test_accuracy_is_the_published_one(published):
    one, every, labels = published
    for k, m in enumerate(MODELS):
        a = accuracy(one[m])
        assert a.value == labels[:, k].mean() and a.n == 300 and a.low < a.value < a.high
        assert outcomes(one[m]).tolist() == labels[:, k].tolist()
    assert accuracy(every).value == pytest.approx(labels.mean()) and pass_at(every, 4).value == labels.any(1).mean()
    assert maj_at(every, 1).value == pytest.approx(labels.mean()) and labels.mean() < maj_at(every, 4).value < labels.any(1).mean()


@needs(SOLUTIONS)
def test_published_models_are_compared_as_their_labels_say(published):
    one, _, labels = published
    names = list(MODELS)
    found = {(a, b): compare_models(one[a], one[b]) for i, a in enumerate(names) for b in names[i + 1:]}
    for (a, b), c in found.items():
        x, y = labels[:, names.index(a)], labels[:, names.index(b)]
        assert (c.only_a, c.only_b, c.both) == ((x & ~y).sum(), (~x & y).sum(), (x & y).sum()) and c.difference.value == pytest.approx(x.mean() - y.mean())
        assert c.p == pytest.approx(binomtest(c.only_a, c.only_a + c.only_b).pvalue)
    p = [c.p for c in found.values()]
    assert (holm(p) >= p).all() and found["6b_finetuning", "175b_verification"].difference.high < 0 and holm(p).min() < 1e-6


@needs(SOLUTIONS)
@needs(GSM8K)
def test_a_claim_on_real_questions(published):
    one, _, _ = published
    a, b = one["6b_finetuning"], one["175b_verification"]
    train, tasks = [r["question"] for r in read(GSM8K)], [g.task for g in a.groups]
    apart = contamination(train, tasks, 13)
    assert len(apart.flagged) <= 3, "two published splits of one data set share hardly any wording"
    leaked = contamination(train + [t.prompt.upper() for t in tasks[::10]], tasks, 13)
    assert leaked.flagged >= {t.id for t in tasks[::10]} and len(leaked.flagged - apart.flagged) <= 32
    assert leaked.table.longest[0] == leaked.table.words[0] and leaked.table.share[0] == 1
    with pytest.raises(ValueError, match="share 13-grams"): claim(a, b, leaked)
    kept, acc = clean(tasks, leaked)
    c = claim(a, b, leaked, "drop")
    assert c.difference.n == len(kept) == 300 - acc["filtered"] and c.difference.high < 0


@needs(GSM8K)
@needs(MATH)
def test_real_questions_split_evenly_and_stay():
    tasks = [Task(r["id"], r["question"]) for path in (GSM8K, MATH) for r in read(path)]
    sides = split_tasks(tasks)
    assert sum(map(len, sides.values())) == 400 and abs(len(sides["train"]) - 320) < 3 * math.sqrt(400 * .8 * .2)
    copies = split_tasks([Task(f"copy {t.id}", f" {t.prompt.upper()}\n") for t in tasks[::-1]])
    assert all({f"copy {t.id}" for t in part} == {t.id for t in copies[side]} for side, part in sides.items())
