"""Judges and rubrics behind a real server: the form is enforced where the server can, and asked for again where it cannot."""
import json
from collections import Counter

import pytest
from servers import chat, embedded_gguf, faulty, llama_server

from synthlab.checks.judge import INJECTIONS, Case, inject, judge, prefer
from synthlab.checks.rubrics import board_rewards, judge_rubrics
from synthlab.core import Criterion, Group, Rollout, Rubric, new_task
from synthlab.lm.remote import OpenAIChat
from synthlab.store import Store

needs_llama = pytest.mark.skipif(embedded_gguf() is None, reason="the embedded model's wheel is not installed")
CASES = [Case(f"How much is {a} + {a}?", f"The answer is {2 * a + off}.") for a in (3, 7, 12) for off in (0, 1)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    pytest.importorskip("xllamacpp")
    with llama_server(tmp_path_factory.mktemp("llama")) as url: yield url


@needs_llama
def test_a_server_that_constrains_decoding_fills_in_every_form(llama):
    found = judge(OpenAIChat("smol", llama), CASES, max_tokens=200, retries=0, progress=False)
    counts = Counter(j.value or j.cause for j in found)
    print(counts)
    closed = [j for j in found if j.raw.rstrip().endswith("}")]
    assert len(closed) >= 4 and all(j.value in ("yes", "no") for j in closed), "a form that was not cut off is a valid one"
    assert all(j.value is not None or "{" in j.raw for j in found)


@needs_llama
def test_the_same_path_judges_rubrics_and_pairs_over_http(llama, tmp_path):
    lm, task = OpenAIChat("smol", llama), new_task("How much is 2 + 2?", answer="4")
    group = Group(task, [Rollout(task.id, 0, "It is 4."), Rollout(task.id, 1, "It is 5.")])
    rubric = Rubric([Criterion("The answer names the number 4."), Criterion("The answer is a full sentence.")])
    options = dict(max_tokens=200, retries=1, progress=False, store=Store(tmp_path / "run"))
    (board,) = judge_rubrics([group], [rubric], lm, **options)
    assert board_rewards([board]).shape == (1, 2) and len(board.frame()) == 4
    again = judge_rubrics([group], [rubric], OpenAIChat("smol", llama, max_retries=0), **options)[0]
    assert [again.met(k) for k in (0, 1)] == [board.met(k) for k in (0, 1)]
    (p,) = prefer(lm, [Case("How much is 2 + 2?", "4", other="5")], max_tokens=200, retries=1, progress=False)
    assert p.winner in ("answer", "other", "tie", None)


def test_a_server_without_forms_is_asked_again_and_the_schema_is_sent():
    talks = []
    def script(h, i, body):
        talks.append(body)
        return 200, chat('{"reason": "r", "verdict": "no"}' if len(body["messages"]) > 2 else "I would say no.", tokens=9)
    with faulty(script) as s:
        (j,) = judge(OpenAIChat("m", s.url, max_wait=.02), CASES[:1], progress=False)
    assert j.value == "no" and j.usage.calls == 2 and len(talks) == 2
    schema = talks[0]["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["reason", "verdict"] and schema["additionalProperties"] is False
    assert "there is no JSON object" in talks[1]["messages"][-1]["content"]


def test_a_server_that_refuses_forms_is_asked_without():
    def script(h, i, body):
        if "response_format" in body: return 400, {"error": {"message": "Unsupported parameter: 'response_format'", "param": "response_format", "type": "invalid_request_error"}}
        return 200, chat('{"reason": "r", "verdict": "yes"}', tokens=9)
    with faulty(script) as s: found = judge(OpenAIChat("m", s.url, max_wait=.02), CASES, progress=False)
    assert [j.value for j in found] == ["yes"] * len(CASES)


def test_attacks_reach_a_server_as_quoted_material_only():
    bodies = []
    with faulty(lambda h, i, b: (bodies.append(b), (200, chat('{"reason": "r", "verdict": "no"}', tokens=9)))[1]) as s:
        judge(OpenAIChat("m", s.url, max_wait=.02), [Case("How much is 2 + 2?", inject("5", n)) for n in INJECTIONS], progress=False)
    assert len(bodies) == len(INJECTIONS) and all([m["role"] for m in b["messages"]] == ["system", "user"] for b in bodies)
    text = json.dumps(bodies)
    for token in ("<|im_end|>", "<|eot_id|>", "[/INST]", "<end_of_turn>", "</s>"): assert token not in text
