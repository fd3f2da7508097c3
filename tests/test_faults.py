"""Faults from outside: kill -9, Ctrl-C, full disks, read-only folders, torn and foreign files. Nothing is lost, nothing is half-written."""
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from synthlab.core import BadInput, atomic_write
from synthlab.store import Store, StoreError

CLI = [sys.executable, "-c", "from synthlab.lab.cli import main; main()"]
STUB = ["--model", "stub:0.02", "--n", "24", "--rollouts", "8", "--estimators", "synthesis,majority,random"]
AUGMENT = ["--model", "stub:0.2", "--n", "20", "--copies", "2", "--by", "numbers,whitespace,rephrase,back_translate,metamath_answers", "--keep-unknown"]
EMBEDDED = ["--n", "3", "--rollouts", "4", "--max-tokens", "24", "--config", "min_terms=2,max_terms=2,min_digits=1,max_digits=1",
            "--estimators", "synthesis,majority,min_ppl,mutual"]


def cat(out, *args, command="cat"):
    return subprocess.run([*CLI, command, "--out", str(out), *args], capture_output=True, text=True)


def made(run):
    "The files of a run by name, without the journal, whose bytes depend on when things were committed."
    return {str(p.relative_to(run)): p.read_bytes() for p in Path(run).rglob("*") if p.is_file() and "journal" not in p.name}


def killed_at_random_moments(run, args, span, seed, times=5):
    "Start the run again and again, killing it each time; how many kills found it still working."
    rng, alive = random.Random(seed), 0
    for _ in range(times):
        child = subprocess.Popen([*CLI, "cat", "--out", str(run), *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(*span))
        alive += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (run / "journal.sqlite").exists() or Store(run).check() == []
    return alive


def test_five_kills_change_nothing_with_the_stub(tmp_path):
    assert cat(tmp_path / "whole", *STUB).returncode == 0
    assert killed_at_random_moments(tmp_path / "killed", STUB, (0.6, 2.5), seed=1) >= 3
    done = cat(tmp_path / "killed", *STUB)
    assert done.returncode == 0, done.stderr
    assert made(tmp_path / "killed") == made(tmp_path / "whole")


def killed_after_some_rows(run, rng):
    "Start or go on with an augmentation, kill it when its journal has grown by a random number of rows; the rows it then has."
    rows = lambda: sum(Store(run).counts().values()) if (run / "journal.sqlite").exists() else 0
    child = subprocess.Popen([*CLI, "augment", "--out", str(run), *AUGMENT], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    enough, deadline = rows() + rng.randint(1, 40), time.monotonic() + 60
    while rows() < enough and child.poll() is None and time.monotonic() < deadline: time.sleep(.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert Store(run).check() == []
    return rows()


def test_kills_change_nothing_of_augmented_tasks(tmp_path):
    whole = cat(tmp_path / "whole", *AUGMENT, command="augment")
    assert whole.returncode == 0 and "200 rows: " in whole.stdout and " 0 failed" not in whole.stdout, whole.stderr
    kept = [killed_after_some_rows(tmp_path / "killed", random.Random(i)) for i in range(4)]
    assert kept == sorted(kept) and kept[0] > 0 and kept[-1] < sum(Store(tmp_path / "whole").counts().values()), "killed in the middle of its work, which is kept"
    done = cat(tmp_path / "killed", *AUGMENT, command="augment")
    assert done.returncode == 0 and done.stdout.replace("killed", "whole") == whole.stdout and made(tmp_path / "killed") == made(tmp_path / "whole")


@pytest.mark.slow
def test_five_kills_change_nothing_with_the_embedded_model(tmp_path):
    assert cat(tmp_path / "whole", *EMBEDDED).returncode == 0
    assert killed_at_random_moments(tmp_path / "killed", EMBEDDED, (4, 14), seed=2) >= 3
    assert cat(tmp_path / "killed", *EMBEDDED).returncode == 0
    assert made(tmp_path / "killed") == made(tmp_path / "whole")


def test_ctrl_c_keeps_what_was_finished_and_says_how_to_go_on(tmp_path):
    args = ["--model", "stub:0.5", "--n", "8", "--rollouts", "8", "--estimators", "majority"]
    child = subprocess.Popen([*CLI, "cat", "--out", str(tmp_path), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not ((tmp_path / "journal.sqlite").exists() and Store(tmp_path).counts()): time.sleep(.1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 130 and "run the same command again" in err and "Traceback" not in err
    assert 0 < Store(tmp_path).counts()["completion"] < 64 and set(made(tmp_path)) == {"run.json"}


@contextmanager
def mounted(folder, options):
    "A tmpfs of one megabyte, mounted for the length of a test."
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=1m,{options}", "none", str(folder)], capture_output=True).returncode: pytest.skip("mounting a tmpfs needs root")
    try: yield folder
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", "rw") as disk: yield disk


@pytest.fixture
def read_only(tmp_path):
    "A folder that even root cannot write to."
    with mounted(tmp_path / "ro", "ro") as folder: yield folder


def test_a_full_disk_is_explained_and_the_run_goes_on_later(small_disk, tmp_path):
    args = ["--model", "stub", "--n", "4", "--rollouts", "4", "--estimators", "majority"]
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (1024 * 1024 - 60 * 1024))
    full = cat(small_disk / "run", *args)
    assert full.returncode in (1, 2) and "space" in full.stderr and "Traceback" not in full.stderr, full.stderr
    assert not [p for p in (small_disk / "run").rglob("*") if p.suffix == ".tmp"]
    ballast.unlink()
    assert cat(small_disk / "run", *args).returncode == 0
    assert cat(tmp_path / "whole", *args).returncode == 0 and made(small_disk / "run") == made(tmp_path / "whole")


def test_a_write_that_does_not_fit_leaves_nothing(small_disk):
    with pytest.raises(BadInput, match="nothing was left behind"): atomic_write(small_disk / "big", b"x" * 2_000_000)
    assert list(small_disk.iterdir()) == []


def test_a_read_only_folder_is_explained(read_only):
    done = cat(read_only / "run", "--model", "stub", "--n", "2")
    assert done.returncode == 2 and "cannot write" in done.stderr and "Choose another folder" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(StoreError, match="choose another folder"): Store(read_only / "run")


@pytest.mark.parametrize("args, words", [
    (["--tasks", "TORN"], ["torn.jsonl line 2", "torn last line", "--skip-bad"]), (["--tasks", "LATIN"], ["latin.jsonl line 1", "not UTF-8 at byte"]),
    (["--tasks", "TWICE"], ["twice.jsonl line 2", "same id"]), (["--tasks", "EMPTY"], ["holds no task"]), (["--tasks", "missing.jsonl"], ["neither a file"]),
    (["--model", "gtp:5"], ["unknown model spec"]), (["--model", "gguf:none.gguf"], ["no such file"])])
def test_bad_input_is_refused_before_anything_is_made(tmp_path, args, words):
    (tmp_path / "torn.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n{"question": "3+')
    (tmp_path / "latin.jsonl").write_bytes('{"question": "Gr\xfc\xdfe?"}\n'.encode("latin-1"))
    (tmp_path / "twice.jsonl").write_text('{"id": "a", "question": "2+2?"}\n{"id": "a", "question": "3+3?"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    args = [str(tmp_path / f"{a.lower()}.jsonl") if a.isupper() else a for a in args]
    done = cat(tmp_path / "run", "--model", "stub", "--n", "1", *args)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for w in words: assert w in done.stderr, done.stderr
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_two_processes_share_a_journal(tmp_path):
    code = "import sys\nfrom synthlab.store import Store\ns = Store(sys.argv[1])\nfor i in range(200): s.put('x', {f'{sys.argv[2]}-{i}': i, f'both-{i}': i})"
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(3)]
    assert [c.wait() for c in children] == [0, 0, 0]
    assert Store(tmp_path).counts() == {"x": 800} and Store(tmp_path).check() == []


def test_open_files_do_not_pile_up(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(50): Store(tmp_path).close()
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_checkpoint_that_does_not_fit_is_explained_and_training_goes_on_later(small_disk, tmp_path):
    import jax
    import numpy as np

    from synthlab.lm.jaxlm import Config, random_params
    from synthlab.training.sft import fit, lay_out, likelihood_loss, next_token
    params, ballast = random_params(Config("llama", 40, 32, 1, 2, 2, 16, 32, 1e-5, 64, True), 0), small_disk / "ballast"
    def batches(step, model):
        return lay_out([[next_token(np.random.default_rng(step).integers(0, 40, 30), np.full(30, 1 / 30))]], 32), {}
    def train(folder, **more):
        return fit(params, likelihood_loss, batches, 20, folder=folder, save_every=5, progress="", **more)
    def fill(step, model):
        if step == 12:
            with pytest.raises(OSError), open(ballast, "wb", buffering=0) as f:
                while True: f.write(b"x" * 4096)
        return {}
    with pytest.raises((BadInput, StoreError), match="space|full"): train(small_disk / "run", after=fill)
    assert not list((small_disk / "run").glob("*.tmp")) and not list((small_disk / "run").glob(".*.tmp"))
    ballast.unlink()
    whole, later = train(tmp_path / "whole"), train(small_disk / "run")
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(later.params)))
    assert later.history.loss.tolist() == whole.history.loss.tolist()
