"""Two devices give what one gives: run in a process of its own, because the number of devices is fixed when JAX starts."""
import os
import subprocess
import sys

PROGRAM = """
import jax, numpy as np
from jax.sharding import Mesh
from synthlab.lm.jaxlm import Config, random_params
from synthlab.lm.sampler import generate
from synthlab.scoring.logprobs import score_replies

params, rng = random_params(Config("llama", 128, 32, 2, 4, 2, 8, 48, 1e-5, 5000), scale=.2), np.random.default_rng(0)
mesh = Mesh(np.array(jax.devices()), ("data",))
assert mesh.size == 2, jax.devices()

prompts = [p for n in (30, 200, 7, 90, 1500) for p in [rng.integers(0, 128, n).tolist()] * 8]
replies = [rng.integers(0, 128, n).tolist() for n in rng.integers(0, 300, 40)]
one, two = (score_replies(params, prompts, replies, mesh=m) for m in (None, mesh))
assert all(np.array_equal(a, b) for x, y in zip(one, two) for a, b in zip(x, y)), "scores differ"

ask = dict(temperature=1.0, max_tokens=20, eos_ids=[3])
one, two = (dict(generate(params, prompts[:24], range(24), mesh=m, **ask)) for m in (None, mesh))
assert all(np.array_equal(one[i].token_ids, two[i].token_ids) and np.array_equal(one[i].logprobs, two[i].logprobs) for i in range(24)), "samples differ"
print("equal on", {d for a in (one, two) for d in jax.devices()})
"""


def test_two_devices_equal_one():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "equal on" in done.stdout, done.stderr[-2000:]
