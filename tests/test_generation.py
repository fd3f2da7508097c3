"""Generation across processes and over HTTP: killed with -9 and resumed, and through an OpenAI-compatible server."""
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from servers import chat, error, faulty
from synthlab.core import BadInput
from synthlab.lm.backends import Stub, load_lm
from synthlab.lm.conversations import Budget
from synthlab.methods.generation import RECIPES, Material, Pool, Tool, generate, rouge_l, rouge_words

ROOT = Path(__file__).parent.parent
WORDS = "amber basalt cedar delta ember fjord granite harbour indigo juniper kelp lagoon marble nectar orchid pebble".split()
DOCS = {"swifts": "Swifts sleep in the air. They climb to 2000 metres and glide down slowly.\n\nA young swift leaves the nest after 42 days."}
TOOLS = (Tool("add", "Adds two numbers.", {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}, lambda a, b: a + b),)
NAMES = [name for name, r in RECIPES.items() if r.write.__module__ == "synthlab.methods.generation"]  # other pages may have added theirs in this process
GIVEN = Material(documents=DOCS, code=("def f(x):\n    return x + 1",), tools=TOOLS)


def reply(text, n):
    "A writer that knows what some recipes want and chatters otherwise."
    if '"quote"' in text: return '{"question": "What of %s?", "answer": "%s", "quote": "%s"}' % (" ".join(WORDS[n // 16**k % 16] for k in range(4)), *[text.split(".")[0]] * 2)
    if '"verdict"' in text: return '{"reason": "so", "verdict": "%s"}' % ("5" if "How good" in text else ("first", "second")[n % 2])
    if "returned" in text: return "It is " + " ".join(re.findall(r"returned (\S+)\. Answer", text)) + "."
    return ("Explain " if "Reply with" in text else "One can say of it: ") + " ".join(WORDS[n // 16**k % 16] for k in range(6)) + "."


def script(req): return reply(req.messages[-1]["content"], req.seed)


RUN = """
import sys
sys.path.insert(0, sys.argv[2])
from test_generation import GIVEN, NAMES, Budget, Stub, generate, script
found = generate(NAMES, 8, Stub(script, delay=.004), material=GIVEN, block=24, concurrency=2, store=sys.argv[1], budget=Budget(tokens=6000, in_flight=4), progress=False)
print(found.accounting, found.spent)
"""


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_and_resumed_is_uninterrupted(tmp_path, seed):
    budget = Budget(tokens=6000, in_flight=4)
    whole = generate(NAMES, 8, Stub(script), material=GIVEN, block=24, budget=budget, progress=False)
    env, rng, kills = {**os.environ, "PYTHONPATH": str(ROOT)}, random.Random(seed), 0
    for _ in range(40):
        p = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path / "run"), str(ROOT / "tests")], stdout=subprocess.PIPE, text=True, env=env)
        while not (tmp_path / "run" / "journal.sqlite").exists() and p.poll() is None: time.sleep(.01)
        try: out, _ = p.communicate(timeout=rng.uniform(1., 4.) if kills < 3 else 200)
        except subprocess.TimeoutExpired:
            p.send_signal(signal.SIGKILL); p.communicate(); kills += 1
            continue
        assert p.returncode == 0
        break
    assert out.strip() == f"{whole.accounting} {whole.spent}"
    dead = Stub(lambda req: 1 / 0)
    again = generate(NAMES, 8, dead, material=GIVEN, block=24, budget=budget, store=tmp_path / "run", progress=False)
    assert again.rows == whole.rows and again.spent == whole.spent and dead.calls == 0, "everything that was paid for is there"
    assert whole.accounting["unknown"] > 0 and whole.accounting["ok"] > 5


def test_every_recipe_runs_through_an_openai_compatible_server():
    with faulty(lambda h, i, b: (200, chat(reply(b["messages"][-1]["content"], b["seed"]), tokens=7))) as s:
        lm = load_lm(f"openai:m@{s.url}", concurrency=4, max_wait=.02)
        names = [r for r in RECIPES if r != "magpie"]
        found = generate(names, 20, lm, material=GIVEN, progress=False)
        acc = found.accounting
        assert acc.total == 20 * len(names) and acc["failed"] == 0 and acc["ok"] > 60 and s.peak <= 4
        assert found.spent.calls == len(s.bodies) and found.spent.completion_tokens == 7 * len(s.bodies)
        assert any("response_format" in b for b in s.bodies), "servers that can are asked to keep to the schema"
        with pytest.raises(BadInput, match="'magpie' needs a local model"): generate(["magpie"], 1, lm)


def test_a_server_that_fails_fails_rows_and_the_next_run_tries_them_again(tmp_path):
    broken = [True]
    def act(h, i, b): return (400, error("too long")) if broken[0] and b["seed"] % 3 == 0 else (200, chat(reply(b["messages"][-1]["content"], b["seed"])))
    with faulty(act) as s:
        lm = load_lm(f"openai:m@{s.url}", concurrency=4, max_wait=.02)
        first = generate(["persona", "dialogue"], 12, lm, store=tmp_path, progress=False)
        assert 0 < first.accounting["failed"] < 24 and first.accounting.total == 24
        broken[0], before = False, len(s.bodies)
        second = generate(["persona", "dialogue"], 12, lm, store=tmp_path, progress=False)
        assert second.accounting["failed"] == 0 and len(s.bodies) > before
        assert all(a == b for a, b in zip(first.rows, second.rows) if a.status == "ok" and a.recipe == "persona"), "what was there is kept"


def test_decisions_are_those_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    words, rng = "Write explain LIST three 5 ways, causes of the war; peace bread-crumbs in_detail (for a child's play)?".split(), random.Random(2)
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(120)]
    same = [(scorer.score(a, b)["rougeL"].fmeasure, rouge_l(rouge_words(a), rouge_words(b))) for a in texts for b in texts]
    assert all(x == y for x, y in same) and 100 < sum(x > .7 for x, _ in same) < 10_000, "to the last bit"
    pool = Pool(texts[:60])
    assert [pool.find(t) is not None for t in texts[60:]] == [any(scorer.score(a, t)["rougeL"].fmeasure > .7 for a in texts[:60]) for t in texts[60:]]
