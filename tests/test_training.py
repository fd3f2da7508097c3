"""A training run that is killed anywhere goes on as if it had not been."""
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from synthlab.store import Store

RUN = """
import sys
from pathlib import Path
from synthlab.lm.jaxlm import Config, random_params, save_jax_model
from synthlab.lm.local import LocalLM
from synthlab.training.grpo import Sampler, train_rl
from synthlab.training.organism import WORDS, anchor_prompt, make_world, problems, write_tokenizer
from synthlab.training.sft import Optimizer
home, steps = Path(sys.argv[1]), 400
if not (home / "start" / "model.safetensors").exists():
    write_tokenizer(home / "start")
    save_jax_model(random_params(Config("llama", len(WORDS), 32, 1, 2, 2, 16, 32, 1e-5, 256, True), 0, scale=.1), home / "start")
lm, world = LocalLM(home / "start", name="start"), make_world()
reward = lambda groups, refs: [[len(set(r.text.split())) / 8 for r in g.rollouts] for g in groups]
done = train_rl(lm, problems(world, 32), sampler=Sampler(4, 4, max_tokens=8, anchor_tokens=8), steps=steps, reward=reward, held_out=problems(world, 8, "held_out"), measure_every=200,
                optimizer=Optimizer(1e-2, "constant"), folder=home / "run", save_every=10, progress="", setting={"prompt": anchor_prompt})
done.history.drop(columns="seconds").to_csv(home / "history.csv", index=False)
"""


def start(home: Path) -> subprocess.Popen:
    home.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", RUN, str(home)], env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE)


def outcome(home: Path) -> list[str]:
    return [hashlib.sha256((home / name).read_bytes()).hexdigest() for name in ("run/model/model.safetensors", "run/checkpoint.safetensors", "history.csv")]


def finish(home: Path) -> None:
    p = start(home)
    _, err = p.communicate(timeout=600)
    assert p.returncode == 0, err.decode()[-2000:]


def reached(home: Path) -> int:
    "The last step in the journal of a run."
    if not (home / "run" / "journal.sqlite").exists(): return 0
    return max((r["step"] for r in Store(home / "run").rows("metrics").values()), default=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_ten_times_a_run_ends_with_the_same_bytes(tmp_path):
    finish(tmp_path / "whole")
    rng, home = random.Random(0), tmp_path / "killed"
    for kill in range(10):
        p, wanted = start(home), reached(home) + rng.randint(12, 35)
        while p.poll() is None and reached(home) < wanted: time.sleep(.05)
        time.sleep(rng.uniform(0, .3))
        assert p.poll() is None, f"the run ended before kill {kill + 1}"
        p.send_signal(signal.SIGKILL)
        p.communicate()
        assert Store(home / "run").check() == []
    finish(home)
    assert outcome(tmp_path / "whole") == outcome(home)
