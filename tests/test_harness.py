"""Our models under the real lm-evaluation-harness; skipped where it is not installed (pip install 'synthlab[eval]')."""
import importlib
import json

import numpy as np
import pytest

from synthlab.lm.backends import Stub
from synthlab.training.harness import harness_lm


class Knowing(Stub):
    "Finds the true answer likely: the sum of the two numbers in the question."
    def logprobs(self, pairs): return [np.full(2, -.1 if t == right(m[-1]["content"]) else -2.) for m, t in pairs]

def right(question): return str(sum(int(w) for w in question.split() if w.isdecimal()))


def local_task(folder, name, **config):
    rows = [{"question": f"What is {i} + {i + 1} ?", "choices": [str(2 * i), str(2 * i + 1)], "label": 1, "answer": str(2 * i + 1)} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder)},
            "test_split": "test", "doc_to_text": "{{question}}", **config}


@pytest.mark.parametrize("chat", (False, True))
def test_the_real_harness_runs_on_our_models(tmp_path, chat):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'synthlab[eval]'")
    choose = local_task(tmp_path, "choose", output_type="multiple_choice", doc_to_choice="choices", doc_to_target="label", metric_list=[{"metric": "acc"}])
    write = local_task(tmp_path, "write", output_type="generate_until", doc_to_target="answer", generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
                       metric_list=[{"metric": "exact_match"}])
    lm = Knowing(lambda r: right(r.messages[-1]["content"]))
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=False)  # do not index the thousands of published tasks
    run = lambda: lm_eval.simple_evaluate(model=harness_lm(lm, store=tmp_path / "run"), tasks=[choose, write], task_manager=manager, bootstrap_iters=0,
                                          apply_chat_template=chat)["results"]
    found = run()
    assert found["choose"]["acc,none"] == found["write"]["exact_match,none"] == 1.
    calls, again = lm.calls, run()
    assert again["choose"] == found["choose"] and lm.calls == calls > 0, "a second run is read from the journal"
