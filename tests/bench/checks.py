"""Throughput of the verifier: math checks beside plain math-verify, and a mixed run with and without pathological answers.

Most pathological answers are recognised, and cost about as much as any other. Three runaways a run are not: each burns its whole time limit on one worker, whatever the verifier does. Every verdict is compared with what is known of its pair; the exit status is 1 when one is wrong or lost, never for a ratio."""
import argparse
import random
import statistics
import time
from pathlib import Path

import machine
import pandas as pd
import sympy

from synthlab.checks.verify import VerifierPool, verifier

X, Y = sympy.symbols("x y")
HERE = Path(__file__).parent
BOMB = "(" * 5000 + "1" + ")" * 5000
HUGE = "7" * 10_000_000
PATHOLOGICAL = [  # kind, answer, gold
    ("math", "9^{9^{9^9}}", "1"), ("math", "10000000!", "2"), ("regex", "a" * 40 + "!", "(a+)+$"), ("math", "\\binom{10^9}{5*10^8}", "1"), ("math", "\\sum_{k=1}^{10^9} k^k", "3"),
    ("math", HUGE, "7"), ("exact", HUGE, "x"), ("math", BOMB, "2"), ("json", "[" * 40_000, "[1]"), ("math", "\\frac{1}{" * 900 + "2" + "}" * 900, "1"), ("math", "\ud800\udfff", "4"),
    ("exact", "\udcff" * 100, "z"), ("math", "10^{10^{10}}", "5"), ("math", "\\boxed{" * 3000, "6"), ("json", '{"a":' * 20_000, "{}"),
]
RUNAWAY = [("regex", "a" * 40 + "!", "(a+)+(?!x)$"), ("stuck", "loop", "1"), ("stuck", "memory", "1")]


@verifier("stuck")
def check_stuck(answer, gold, context):
    eaten = []
    while True: eaten += [bytearray(2**20)] * 0 if answer == "loop" else [bytearray(2**20)]


def math_pair(rng):
    "(answer, gold, truth): two spellings of one value, or of two values; numbers mostly, as in school and competition mathematics, and one expression in ten."
    a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(1, 9)
    numbers = [sympy.Integer(a * b), sympy.Integer(a * b * 1000), sympy.Integer(-a), sympy.Rational(a, b), sympy.Rational(a, 4), sympy.sqrt(a) * c, sympy.pi * a / b]
    value = rng.choice(numbers) if rng.random() < .9 else rng.choice([a * X**2 + b * X + c, X / (Y + c)])
    other = value if (right := rng.random() < .5) else value + c
    text = sympy.latex(other)
    if right and rng.random() < .5: text = sympy.latex(sympy.expand(other)).replace("\\frac", "\\dfrac")
    return f"So the answer is \\boxed{{{text}}}.", sympy.latex(value), right


def mixed(n, rng):
    "(kind, answer, gold, truth) of everyday checks, six in ten of them mathematics."
    rows = []
    for _ in range(n):
        k, right = rng.randint(0, 10_000), rng.random() < .5
        match rng.choice("mmmmmmnecjr"):
            case "m": answer, gold, right = math_pair(rng); rows.append(("math", answer, gold, right))
            case "n": rows.append(("numeric", f"about {k + (0 if right else 1)}.0", str(k), right))
            case "e": rows.append(("exact", f"Answer: {'New York' if right else 'Rome'} ", "new york", right))
            case "c": rows.append(("choice", f"The answer is ({'B' if right else 'C'})", "B", right))
            case "j": rows.append(("json", f'It is {{"b": {k}, "a": [1, 2.0]}}', f'{{"a": [1, 2], "b": {k + (not right)}}}', right))
            case "r": rows.append(("regex", f"room {k}{'b' if right else ''}", r"\d+b$", right))
    return rows


def run(pool, rows):
    "Seconds for all rows, and the verdicts that are not what is known of them."
    start = time.perf_counter()
    found = pool.verify_many([(a, g) for _, a, g, _ in rows], [k for k, *_ in rows])
    seconds = time.perf_counter() - start
    wrong = [(k, a[:60], g, truth, v) for (k, a, g, truth), v in zip(rows, found) if truth is not None and v.value is not truth or truth is None and v.value is True]
    assert len(found) == len(rows), "verdicts were lost"
    return seconds, wrong


def plain(rows):
    "Seconds for the same pairs with math-verify alone, in this process, without any limit."
    from math_verify import parse, verify
    start = time.perf_counter()
    for answer, gold, _ in rows: verify(parse(f"${gold}$", parsing_timeout=0), parse(answer, parsing_timeout=0), timeout_seconds=0)
    return time.perf_counter() - start


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--n", type=int, default=10_000)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--out", type=Path, default=HERE.parent.parent / "nbs" / "results" / "30_verify_throughput.csv")
    args = p.parse_args()
    rng = random.Random(0)
    pairs, clean = [math_pair(rng) for _ in range(args.n // 3)], mixed(args.n, rng)
    dirty = list(clean)
    places = rng.sample(range(args.n), args.n // 20)
    for i, at in enumerate(places): dirty[at] = (*(RUNAWAY[i] if i < len(RUNAWAY) else PATHOLOGICAL[i % len(PATHOLOGICAL)]), None)
    works = {"math": [("math", *p) for p in pairs], "mixed": clean, "mixed, 5% pathological": dirty}
    seconds, wrong = {w: [] for w in [*works, "math-verify alone, one process"]}, []
    with VerifierPool(workers=2, timeout=.5, memory_mb=1024) as pool:
        run(pool, clean[:300])
        plain(pairs[:50])
        for _ in range(args.repeats):
            for name, rows in works.items():
                t, bad = run(pool, rows)
                seconds[name].append(t); wrong += [(name, *b) for b in bad]
            seconds["math-verify alone, one process"].append(plain(pairs))
        alive = run(pool, clean[:100])[1] == []
    size = {w: len(works.get(w, pairs)) for w in seconds}
    table = pd.DataFrame([{"work": w, "checks": size[w], "checks_per_s": size[w] / statistics.median(t), "best": size[w] / min(t), "repeats": len(t), "machine": machine.name()} for w, t in seconds.items()])
    print(table.drop(columns="machine").round(0).to_string(index=False))
    rate = table.set_index("work").checks_per_s
    print(f"with 5% pathological: {rate['mixed, 5% pathological'] / rate['mixed']:.2f} of the throughput without (must 0.70)")
    print(f"math: {rate['math']:.0f} checks/s on 2 workers (must 1200), {rate['math'] / rate['math-verify alone, one process']:.2f} x math-verify alone")
    print(f"wrong or lost: {len(wrong)}; pool alive: {alive}")
    for w in wrong[:10]: print("  ", w)
    if not wrong: table.to_csv(args.out, index=False, float_format="%.4g")
    return 1 if wrong or not alive else 0


if __name__ == "__main__": raise SystemExit(main())
