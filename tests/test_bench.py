"""The benchmark itself: its count of arithmetic, its judgement of answers, its exit status, and a tiny run from end to end."""
import csv
import importlib.util
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "tests" / "bench"
sys.path.insert(0, str(BENCH))  # where its modules find each other

import results  # noqa: E402
import workloads  # noqa: E402


@pytest.fixture
def bench():
    "The orchestrator as a module."
    spec = importlib.util.spec_from_file_location("bench_main", BENCH / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 5, "vocab_size": 7, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}


def test_flops_of_one_layer_by_hand():
    # a token: q 4x4, k and v 4x2 each, o 4x4, gate, up and down 4x5 each = 16 + 16 + 16 + 60 multiply-adds; a visible key: 2 heads x 2 numbers, twice
    token, key, logits = 2 * (16 + 16 + 16 + 60), 2 * 2 * 2 * 2, 2 * 4 * 7
    # prompt of 3: keys 1+2+3. replies of 2 and 1 tokens: one more token is read, which sees 3 + 1 keys; 3 tokens are predicted
    assert workloads.flops(ONE_LAYER, [[1, 2, 3]], [[2, 1]]) == 4 * token + 10 * key + 3 * logits
    two_groups = workloads.flops(ONE_LAYER, [[1, 2, 3], [1, 2, 4]], [[2], [1]])
    assert two_groups == 7 * token + 16 * key + 3 * logits, "another prompt is read on its own"
    assert workloads.flops(ONE_LAYER, [[1, 2, 3], [1, 2, 3]], [[2], [1]]) == 4 * token + 10 * key + 3 * logits, "an equal prompt is not"


def test_errors_and_tolerances():
    a = [np.zeros(3, np.float32), np.zeros(1, np.float32)]
    assert results.errors(a, a) == (0, 0) and results.within("float32", 0, 0)
    bad = [np.array([0, 4e-3, 0], np.float32), a[1]]
    assert results.errors(bad, a) == pytest.approx((4e-3, 1e-3)) and not results.within("float32", 4e-3, 1e-3) and results.within("bfloat16", 4e-3, 1e-3)
    assert not results.within("float32", 5e-4, 2e-4), "the mean counts too"
    assert results.errors([np.array([0, np.nan, 0], np.float32), a[1]], a) == (math.inf, math.inf) == results.errors(a[:1], a) == results.errors(a[::-1], a)
    assert not results.within("bfloat16", math.inf, math.inf)


def test_judgement_looks_at_every_reference_and_at_entropies():
    good = [np.zeros(4, np.float32), np.zeros(4, np.float32)]
    off = [good[0], good[1] + 1]
    assert results.judged("float32", [good, good], [([0], [good[:1], good[:1]]), (None, [good, good])])[1] == ""
    assert "log-prob" in results.judged("float32", [off, good], [(None, [good, good])])[1]
    assert "log-prob" in results.judged("float32", [off, good], [([1], [good[1:], good[1:]])])[1]
    assert "entropy" in results.judged("float32", [good, off], [(None, [good, good])])[1]
    worst, problem = results.judged("float32", [good, []], [(None, [good, good])])
    assert problem == "" and worst == {"max_error": 0, "mean_error": 0}, "entropies are optional"
    assert "log-prob" in results.judged("float32", [[], good], [(None, [good, good])])[1], "log-probs are not"


def test_repeats(bench):
    assert [bench.enough(s, 3) for s in (.1, 2, 60)] == [15, 3, 2] and bench.enough(60, 1) == 1


def fake_process(wrong=(), failing=(), missing=()):
    "A worker that answers at once: log-probs and entropies of zero, but for the frameworks named."
    class Fake:
        ended = False

        def __init__(self, python, framework, works): self.name, self.works = framework, {w.name: w for w in workloads.load(works)}

        def close(self): pass

        def ask(self, do, work=None, dtype=None, save=None, pairs=None, **_):
            if do == "hello": return {"missing": self.name} if self.name in missing else {"versions": "fake 1"}
            if do == "peak": return {"gflops": 100.}
            if do == "warm": return {"load_s": 0., "warm_s": 1., "extra_mb": 3., "batch": None}
            if do == "run" and self.name in failing: raise sys.modules["bench_main"].Failed("no memory")
            if save:
                off = .01 if self.name in wrong and dtype == "float32" else 0
                named = enumerate(r for _, r in (pairs or self.works[work].pairs))
                np.savez(save, **{f"{i}.{k}": np.full(len(r), off, np.float32) for i, r in named for k in range(2)})
            return {"seconds": .1, "extra_mb": 1., "resident_mb": 2.}
    return Fake


@pytest.mark.parametrize("case, status", [({}, 0), ({"missing": ("trl",)}, 0), ({"wrong": ("synthlab",)}, 1), ({"wrong": ("torch",)}, 1), ({"failing": ("trl",)}, 1)])
def test_exit_status(bench, monkeypatch, tmp_path, capsys, case, status):
    monkeypatch.setitem(sys.modules, "bench_main", bench)
    monkeypatch.setattr(bench, "Process", fake_process(**case))
    assert bench.main(["--quick", "--only", "scoring", "--out", str(tmp_path)]) == status
    said = capsys.readouterr().out
    assert ("FAILED" in said) == bool(status) and ("trl is not measured: trl is not installed" in said) == ("missing" in case)
    rows = {(r["framework"], r["dtype"]): r["correct"] for r in results.read(tmp_path / "results")}
    assert [k for k, v in rows.items() if v == "no"] == [(f, "float32") for f in case.get("wrong", ())]
    assert ("synthlab", "bfloat16") in rows and ("torch", "float32") in rows, "what was measured is kept"
    table = said[said.index("\nwork "):said.index("\nfigure")]
    for line in table.splitlines():
        if "float32, vs TRL" in line: assert line.endswith("not measured") == bool(case and "torch" not in case.get("wrong", ())), "a wrong answer earns no ratio"
    assert "vs torch with the same tricks" in table and bench.main(["--redraw", "--out", str(tmp_path)]) == 0
    assert table in capsys.readouterr().out, "the saved results give the same table"


def test_quick_run_end_to_end(tmp_path):
    done = subprocess.run([sys.executable, str(BENCH), "--quick", "--repeats", "1", "--out", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [r for f in (tmp_path / "results").iterdir() for r in csv.DictReader(f.read_text().splitlines())]
    assert {r["section"] for r in rows} == {"scoring", "memory", "groups", "sampling"} and {"synthlab", "torch", "torch-onednn", "transformers"} <= {r["framework"] for r in rows}
    for r in rows:
        figures = [float(r[k]) for k in ("seconds_median", "seconds_min", "warm_up_s", "tokens_per_s", "gflop", "gflops", "extra_mb", "resident_mb")]
        assert all(map(math.isfinite, figures)) and min(figures[:6]) > 0, r
        if r["section"] != "sampling": assert 0 <= float(r["mean_error"]) <= float(r["max_error"]) < 1
        assert r["machine"].endswith("cores") and r["versions"] and str(tmp_path) not in json.dumps(r)
    assert (tmp_path / "images" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "vs torch with the same tricks" in done.stdout


def test_interrupt_leaves_no_process(tmp_path):
    import psutil
    p = subprocess.Popen([sys.executable, str(BENCH), "--quick", "--only", "groups", "--repeats", "1000", "--out", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        for line in p.stdout:
            if "groups=1" in line: break
        children = psutil.Process(p.pid).children(recursive=True)
        p.send_signal(signal.SIGINT)
        rest = p.communicate(timeout=60)[0]
    finally: p.kill()
    assert children and p.returncode == 1 and "wrote" not in rest and not list(tmp_path.iterdir())
    psutil.wait_procs(children, 10)
    assert not [c for c in children if c.is_running()]
