"""One framework in one process: commands come in and answers go out as lines of JSON."""
import json
import os
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError

import numpy as np

import machine
import workloads
from frameworks import FRAMEWORKS


def timed(f):
    start = time.perf_counter()
    out = f()
    return time.perf_counter() - start, out


def named(found):
    "Arrays of each rollout under the names `number of the rollout.number of the array`."
    return {f"{i}.{k}": a for i, arrays in enumerate(found) for k, a in enumerate(arrays) if a is not None}


class Worker:
    def __init__(self, framework: str, works: str):
        self.framework, self.works = FRAMEWORKS[framework](), {w.name: w for w in workloads.load(works)}
        self.batch: dict[str, int | None] = {}

    def do(self, work, dtype, batch):
        w = self.works[work]
        return (self.framework.sample if w.samples else self.framework.score)(w, dtype, batch)

    def warm(self, work, dtype):
        "Load and run once, which compiles. The first work of a dtype also settles the rows at a time: each size runs once more, the fastest is kept."
        load = timed(lambda: self.framework.model(self.works[work], dtype))[0]
        sizes, before = self.framework.batches, machine.resident()
        first = timed(lambda: self.do(work, dtype, self.batch.get(dtype, sizes[0])))[0]
        extra = machine.high_water() - before
        if dtype not in self.batch:
            seconds = {b: timed(lambda: self.do(work, dtype, b))[0] for b in sizes} if len(sizes) > 1 else {sizes[0]: first}
            self.batch[dtype] = min(seconds, key=seconds.get)
        return {"load_s": load, "warm_s": first, "extra_mb": extra, "batch": self.batch[dtype]}

    def run(self, work, dtype, save=None):
        "Do the work once: time, extra memory over what was resident before; the result goes to the file `save`."
        before = machine.resident()
        seconds, found = timed(lambda: self.do(work, dtype, self.batch[dtype]))
        extra = machine.high_water() - before
        if save: np.savez(save, **named(found))
        return {"seconds": seconds, "extra_mb": extra, "resident_mb": before}

    def peak(self, dtype, n):
        "GFLOP/s of the best of five products of n x n matrices."
        f = self.framework.gemm(n, dtype)
        f()
        return {"gflops": 2 * n**3 / 1e9 / min(timed(f)[0] for _ in range(5))}

    def check(self, model, pairs, save):
        "Score these pairs of prompt and reply in float64."
        np.savez(save, **named(self.framework.logprobs(model, pairs)))
        return {}

    def hello(self):
        try: return {"versions": self.framework.versions()}
        except PackageNotFoundError as e: return {"missing": e.name}


def main(framework, works):
    "Serve one command a line until standard input ends."
    machine.die_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print goes to the log
    worker = Worker(framework, works)
    for line in sys.stdin:
        command = json.loads(line)
        try: answer = getattr(worker, command.pop("do"))(**command)
        except Exception as e:
            traceback.print_exc()
            answer = {"error": f"{type(e).__name__}: {e}"[:300]}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__": main(*sys.argv[1:])
