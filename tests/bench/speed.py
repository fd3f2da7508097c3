"""Scoring and sampling side by side with transformers: one process a framework, interleaved, medians, same weights and dtype, answers compared.

The figures are of this machine and this moment; the ratios are what to read."""
import json
import statistics
import subprocess
import sys
import time

import numpy as np

REPEATS, PROMPT, REPLIES, REPLY, NEW = 3, 128, 8, 64, 32


def token_ids():
    rng = np.random.default_rng(0)
    return rng.integers(100, 40_000, PROMPT).tolist(), rng.integers(100, 40_000, (REPLIES, REPLY)).tolist()


def ours(lm):
    from synthlab.lm.sampler import generate
    from synthlab.scoring.logprobs import nll
    prompt, replies = token_ids()
    score = lambda: [float(np.mean(x)) for x in nll(lm.params, prompt, replies)]
    sample = lambda: [len(s.token_ids) for _, s in generate(lm.params, [prompt] * REPLIES, range(REPLIES), temperature=1.0, max_tokens=NEW, eos_ids=[])]
    return score, sample


def transformers(lm):
    import torch
    prompt, replies = token_ids()
    ids = torch.tensor([prompt + r for r in replies])

    def score():
        with torch.inference_mode(): logits = lm.torch_model(ids).logits[:, PROMPT - 1:-1]
        return (-logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1).mean(-1)).tolist()

    def sample():
        out = lm.torch_model.generate(ids[:, :PROMPT], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, pad_token_id=0)
        return [out.shape[1] - PROMPT] * REPLIES
    return score, sample


def worker(framework):
    "Answer each line on standard input with the time and result of one piece of work."
    from synthlab.lm.backends import load_lm
    score, sample = {"synthlab": ours, "transformers": transformers}[framework](load_lm("embedded"))
    score(), sample()  # compile and warm up
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        result = {"score": score, "sample": sample}[line.strip()]()
        print(json.dumps([time.perf_counter() - start, result]), flush=True)


def main():
    names = ("synthlab", "transformers")
    children = {n: subprocess.Popen([sys.executable, __file__, n], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for n in names}
    for child in children.values(): assert child.stdout.readline() == "ready\n"
    seconds, results = {}, {}
    for work in [w for _ in range(REPEATS) for w in ("score", "sample")]:
        for name, child in children.items():
            print(work, file=child.stdin, flush=True)
            took, results[work, name] = json.loads(child.stdout.readline())
            seconds.setdefault((work, name), []).append(took)
    for child in children.values(): child.stdin.close()
    for work in ("score", "sample"):
        a, b = (statistics.median(seconds[work, n]) for n in names)
        print(f"{work}: synthlab {a:.2f} s, transformers {b:.2f} s (medians of {REPEATS}, float32): {b / a:.2f} x")
    apart = np.abs(np.subtract(results["score", "synthlab"], results["score", "transformers"])).max()
    print(f"largest difference of mean NLL: {apart:.1e}")
    return int(apart > 1e-3 or results["sample", "synthlab"] != results["sample", "transformers"])


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1]) if len(sys.argv) > 1 else main())
