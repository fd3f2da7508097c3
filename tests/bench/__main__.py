"""Scoring and sampling beside their peers: one process a framework, taking turns on a quiet machine, answers checked in the same run.

The ratios are what to read; the seconds are of the machine that the result files name. The exit status is 1 when an answer is
wrong or a framework fails, never for a ratio."""
import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import machine
import results
import workloads

HERE = Path(__file__).parent
SECTIONS = ("scoring", "memory", "groups", "sampling")
ATTEMPTS, PATIENCE = 3, 300  # tries at a quiet repeat; seconds lost to waiting and trying again in a whole run
SHORT, LONG, SILENCE = 1, 20, 900  # seconds: shorter work is repeated five times as often, longer work twice at most; a silent worker has failed
WHY_NO_TUNIX = "needs safetensors below 0.8, transformers 5.23 needs 0.8; give --tunix the python of an environment with google-tunix"


class Failed(Exception): "A worker could not do its work."


class Process:
    "A framework's worker, which dies with this process."

    def __init__(self, python: str, framework: str, works: Path):
        self.framework, self.log = framework, works.with_name(f"{framework}.log")
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        env["PYTHONPATH"] = os.pathsep.join([str(workloads.ROOT), *filter(None, [env.get("PYTHONPATH")])])
        with open(self.log, "wb") as log:
            self.p = subprocess.Popen([python, str(HERE / "worker.py"), framework, str(works)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                      env=env, start_new_session=True)

    @property
    def ended(self): return self.p.poll() is not None

    def close(self):
        "Stop it now."
        self.p.kill()
        self.p.wait()
        with suppress(BrokenPipeError): self.p.stdin.close()
        self.p.stdout.close()

    def ask(self, do: str, **command) -> dict:
        "Give a command and wait for its answer."
        try:
            self.p.stdin.write(json.dumps({"do": do, **command}).encode() + b"\n")
            self.p.stdin.flush()
            if not select.select([self.p.stdout], [], [], SILENCE)[0]: self.p.kill()
            answer = json.loads(self.p.stdout.readline())
        except (OSError, ValueError) as e: raise Failed(f"{self.framework}: ended in {do}: {self.log.read_text(errors='replace')[-500:]}") from e
        if "error" in answer: raise Failed(f"{self.framework}: {answer['error']}")
        return answer


def enough(seconds: float, repeats: int) -> int:
    "How often to repeat work that takes so long."
    return 5 * repeats if seconds < SHORT else repeats if seconds <= LONG else min(2, repeats)


class Bench:
    "The state of a run: live processes, what is known of each framework, results and failures."

    def __init__(self, works: Path, python: dict[str, str], quick: bool):
        self.works, self.python, self.live = works, python, {}
        self.versions, self.missing, self.rows, self.failures = {}, {}, [], []
        self.quick, self.patience, self.start = quick, 0 if quick else PATIENCE, time.monotonic()

    def say(self, text: str): print(f"[{(time.monotonic() - self.start) / 60:5.1f} min] {text}", flush=True)

    def fail(self, text: str):
        self.failures.append(text)
        self.say(f"FAILED {text}")

    def only(self, frameworks):
        "Stop the processes that are not needed now and start those that are, together."
        for f in [f for f, p in self.live.items() if f not in frameworks or p.ended]: self.live.pop(f).close()
        for f in frameworks:
            if f not in self.live and f not in self.missing:
                if f in self.python: self.live[f] = Process(self.python[f], f, self.works)
                else: self.skip(f, WHY_NO_TUNIX)
        for f in [f for f in self.live if f not in self.versions]:
            try: answer = self.live[f].ask("hello")
            except Failed as e: self.fail(str(e)); self.live.pop(f).close(); continue
            if "missing" in answer: self.skip(f, f"{answer['missing']} is not installed: pip install 'synthlab[dev,bench]'")
            else: self.versions[f] = answer["versions"]

    def skip(self, framework, why):
        self.missing[framework] = why
        self.say(f"{framework} is not measured: {why}")
        if framework in self.live: self.live.pop(framework).close()

    def close(self):
        for p in self.live.values(): p.close()
        self.live = {}

    def quietly(self, f):
        "Call `f` while nobody else computes, and again when somebody did, as long as patience lasts; tells whether the last try was noisy."
        for _ in range(ATTEMPTS):
            if self.patience > 0: self.patience -= machine.wait_until_quiet(min(30, self.patience)) - machine.LOOK
            start = time.monotonic()
            with machine.Watch() as watch: out = f()
            if not watch.noisy or self.patience <= 0: break
            self.patience -= time.monotonic() - start
        return out, watch.noisy

    def peaks(self) -> dict[str, float]:
        "The arithmetic peak of the machine: the best large matrix product of any framework, GFLOP/s."
        self.only(("torch", "torch-onednn", "synthlab"))
        best = {}
        for dtype in workloads.BOTH:
            tries = {}
            for n in (256, 512) if self.quick else (2048, 4096):
                for f, p in self.live.items(): tries[f] = max(tries.get(f, 0), self.quietly(lambda: p.ask("peak", dtype=dtype, n=n))[0]["gflops"])
            best[dtype] = max(tries.values())
            self.say(f"arithmetic peak {dtype}: {best[dtype]:.0f} GFLOP/s ({', '.join(f'{f} {g:.0f}' for f, g in tries.items())})")
        return best

    def measure(self, i: int, work: workloads.Work, repeats: int, peaks: dict[str, float]):
        "Warm up, let the frameworks take turns, compare the answers, and keep a row for each."
        self.say(work.name)
        self.only(dict.fromkeys(["reference", *(f for f, _ in work.runs)]))
        runs = {}
        for f, dtype in [r for r in work.runs if r[0] in self.live]:
            try: runs[f, dtype] = {"warm": self.live[f].ask("warm", work=work.name, dtype=dtype), "turns": [], "noisy": 0}
            except Failed as e: self.fail(f"{work.name}, {dtype}: {e}")
        for repeat in range(repeats if self.quick else 5 * repeats):
            for (f, dtype), run in list(runs.items()):
                if repeat and repeat >= enough(run["turns"][-1]["seconds"], repeats): continue
                save = None if repeat else str(self.result(i, f, dtype))
                try: turn, noisy = self.quietly(lambda: self.live[f].ask("run", work=work.name, dtype=dtype, save=save))
                except Failed as e: self.fail(f"{work.name}, {dtype}: {e}"); del runs[f, dtype]; continue
                run["turns"].append(turn); run["noisy"] += noisy
        wrong = self.check_samples if work.samples else self.check_scores
        for (f, dtype), run in runs.items():
            try: found, problem = wrong(i, work, f, dtype)
            except Failed as e: found, problem = {}, str(e)
            if problem: self.fail(f"{work.name}, {f} {dtype}: {problem}")
            self.rows.append(self.row(work, f, dtype, run, peaks) | found | {"correct": "no" if problem else "yes"})
            self.say("  " + self.line(self.rows[-1]))

    def result(self, i, framework, dtype): return self.works.with_name(f"{i}.{framework}.{dtype}.npz")

    def exact(self, i, work, f, dtype, pairs):
        "Log-probs and entropies of some pairs in float64."
        path = self.result(i, f"exact-{f}", dtype)
        if not path.exists(): self.live["reference"].ask("check", model=work.model, pairs=pairs, save=str(path))
        return [results.arrays(path, k) for k in range(2)]

    def check_scores(self, i, work, f, dtype):
        "Compare with float64 on a few rollouts and with transformers in float32, where it took part, on all."
        found = [results.arrays(self.result(i, f, dtype), k) for k in range(2)]
        references = [(work.checked, self.exact(i, work, "", "", [work.pairs[j] for j in work.checked]))]
        if (other := self.result(i, "transformers", "float32")).exists(): references.append((None, [results.arrays(other, k) for k in range(2)]))
        return results.judged(dtype, found, references)

    def check_samples(self, i, work, f, dtype):
        "Count the tokens, and compare the log-probs that came with them with float64 on the first and last row."
        if f == "llama.cpp": return {}, ""  # counted in its own process
        ids, lps = (results.arrays(self.result(i, f, dtype), k) for k in range(2))
        if [len(a) for a in ids] != [work.new_tokens] * len(work.prompts): return {}, "not the number of tokens asked for"
        if not lps: return {}, ""
        rows = sorted({0, len(ids) - 1})
        return results.judged(dtype, [lps], [(rows, self.exact(i, work, f, dtype, [(work.prompts[j], ids[j].tolist()) for j in rows])[:1])])

    def row(self, work, f, dtype, run, peaks) -> dict:
        seconds, gflop = [t["seconds"] for t in run["turns"]], workloads.work_flops(work) / 1e9
        median, peak = statistics.median(seconds), peaks.get(dtype)
        return {"section": work.section, "work": work.name, "framework": f, "dtype": dtype, "seconds_median": median, "seconds_min": min(seconds),
                "repeats": len(seconds), "noisy": run["noisy"], "warm_up_s": run["warm"]["warm_s"], "load_s": run["warm"]["load_s"],
                "batch": "" if work.samples else run["warm"]["batch"] or "", "tokens": work.tokens, "tokens_per_s": work.tokens / median, "gflop": gflop, "gflops": gflop / median,
                "fraction_of_peak": gflop / median / peak if peak else "", "extra_mb": max(t["extra_mb"] for t in run["turns"]),
                "first_extra_mb": run["warm"]["extra_mb"], "resident_mb": max(t["resident_mb"] for t in run["turns"]), "machine": machine.name(), "versions": self.versions[f]}

    @staticmethod
    def line(r) -> str:
        share = f" ({r['fraction_of_peak']:.0%} of peak)" if r["fraction_of_peak"] else ""
        error = f", error max {r['max_error']:.1e} mean {r['mean_error']:.1e}" if "max_error" in r else ""
        noisy = f", {r['noisy']} of {r['repeats']} repeats NOISY" if r["noisy"] else ""
        return (f"{r['framework']:13}{r['dtype']:9} {r['seconds_median']:8.3f} s, min {r['seconds_min']:.3f}, first {r['warm_up_s']:.2f}, {r['tokens_per_s']:.0f} tokens/s, "
                f"{r['gflops']:.0f} GFLOP/s{share}, extra {r['extra_mb']:.0f} MB{error}{noisy}")


def arguments(argv):
    p = argparse.ArgumentParser("tests/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=f"parts to run: {', '.join(SECTIONS)}")
    p.add_argument("--repeats", type=int, default=3, help=f"timed repeats of each piece of work (default 3; five times as many where one takes less than {SHORT} s, at most 2 where it takes more than {LONG} s)")
    p.add_argument("--quick", action="store_true", help="a tiny random model and tiny sizes: tests the benchmark, measures nothing")
    p.add_argument("--out", type=Path, help="folder for results/ and images/; default: nbs after a full run, else runs/bench")
    p.add_argument("--tunix", metavar="PYTHON", help="interpreter of an environment with google-tunix, which cannot share ours")
    p.add_argument("--redraw", action="store_true", help="only print the table and draw the figure again from the saved results")
    return p.parse_args(argv)


def report(rows: list[dict], out: Path):
    "Print the table of targets and draw the figure."
    from synthlab.core import atomic_write
    print("\n" + results.aligned([("work", "must", "goal", "measured", "met"), *results.targets(rows)]))
    print(f"\nfigure: {atomic_write(out / 'images' / 'bench.png', results.figure(rows))}")


def main(argv=None) -> int:
    args = arguments(argv)
    full = not args.quick and set(args.only) == set(SECTIONS)
    out = args.out or workloads.ROOT / ("nbs" if full or args.redraw else "runs/bench")
    if args.redraw: report(results.read(out / "results"), out); return 0
    python = {f: sys.executable for f in ("synthlab", "torch", "torch-onednn", "trl", "transformers", "llama.cpp", "reference")}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        works = workloads.build(Path(scratch), args.only, args.quick)
        workloads.save(works, Path(scratch) / "works.json")
        bench = Bench(Path(scratch) / "works.json", python | ({"tunix": args.tunix} if args.tunix else {}), args.quick)
        bench.say(f"{machine.name()}; {len(works)} pieces of work, {args.repeats} repeats")
        try:
            peaks = bench.peaks()
            for i, work in enumerate(works): bench.measure(i, work, args.repeats, peaks)
        finally: bench.close()
    for path in results.write(bench.rows, out / "results"): bench.say(f"wrote {path}")
    if bench.rows: report(bench.rows, out)
    for text in bench.failures: print(f"FAILED {text}")
    return int(bool(bench.failures))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folder is removed
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; nothing was written")
