"""From results to judgement: errors against the references, the table of targets, the CSV files and the figure."""
import csv
import io
import math
import re
from pathlib import Path

import numpy as np

COLUMNS = ("section", "work", "framework", "dtype", "seconds_median", "seconds_min", "repeats", "noisy", "warm_up_s", "load_s", "batch", "tokens", "tokens_per_s",
           "gflop", "gflops", "fraction_of_peak", "extra_mb", "first_extra_mb", "resident_mb", "max_error", "mean_error", "entropy_max_error", "correct", "machine", "versions")
TOLERANCE = {"float32": (1e-3, 1e-4), "bfloat16": (1.0, .05)}  # largest and mean absolute error of a log-prob or entropy, nats
FILES = {"scoring": "20_logprobs_bench.csv", "memory": "20_logprobs_bench.csv", "groups": "20_logprobs_bench.csv", "sampling": "13_sampler_bench.csv"}
FLAT_MB = 25  # growth of the extra memory that still counts as flat


def errors(found: list[np.ndarray], wanted: list[np.ndarray]) -> tuple[float, float]:
    "Largest and mean absolute difference; infinite where a shape differs or a number is not finite."
    if [a.shape for a in found] != [a.shape for a in wanted]: return math.inf, math.inf
    apart = np.abs(np.concatenate(found).astype(np.float64) - np.concatenate(wanted))
    return (float(apart.max()), float(apart.mean())) if np.isfinite(apart).all() else (math.inf, math.inf)


def within(dtype: str, largest: float, mean: float) -> bool:
    "Whether errors stay inside the tolerance of a dtype."
    return largest <= TOLERANCE[dtype][0] and mean <= TOLERANCE[dtype][1]


def arrays(path: Path, k: int) -> list[np.ndarray]:
    "The k-th array of every rollout in a result file; empty when the framework gives none."
    with np.load(path) as z: return [z[n] for i in range(len(z.files)) if (n := f"{i}.{k}") in z.files]


def judged(dtype: str, found: list[list[np.ndarray]], references: list[tuple[list[int] | None, list[list[np.ndarray]]]]) -> tuple[dict, str]:
    """Compare log-probs and entropies (found[0], found[1]) with references, each for some rollouts (None: all).

    Gives the columns of the table, the worst over the references, and what is wrong ("" when nothing is)."""
    worst, wrong = {}, ""
    for rows, wanted in references:
        for kind, mine, theirs in zip(("", "entropy_"), found, wanted):
            if kind and not mine: continue  # not every framework gives entropies; log-probs must be there
            largest, mean = errors([mine[i] for i in rows if i < len(mine)] if rows is not None else mine, theirs)
            for name, e in (("max_error", largest), ("mean_error", mean)): worst[kind + name] = max(worst.get(kind + name, 0), e)
            if not (wrong or within(dtype, largest, mean)): wrong = f"{'entropy' if kind else 'log-prob'} error max {largest:.1e}, mean {mean:.1e} beyond {TOLERANCE[dtype]}"
    return worst, wrong


def write(rows: list[dict], folder: Path) -> list[Path]:
    "Write one CSV file a page, whole or not at all."
    from synthlab.core import atomic_write
    out = []
    for name in dict.fromkeys(FILES.values()):
        if not (mine := [r for r in rows if FILES[r["section"]] == name]): continue
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in mine)
        out.append(atomic_write(folder / name, text.getvalue()))
    return out


def read(folder: Path) -> list[dict]:
    "Rows of the files that `write` made; numbers as floats."
    def value(k, v): return v if k in ("section", "work", "framework", "dtype", "correct", "machine", "versions") or v == "" else float(v)
    files = [folder / n for n in dict.fromkeys(FILES.values()) if (folder / n).exists()]
    return [{k: value(k, v) for k, v in r.items()} for f in files for r in csv.DictReader(f.read_text().splitlines())]


class Table:
    "Looks up measured rows with correct answers by section, position of the work in its section, framework and dtype."

    def __init__(self, rows): self.rows = rows

    def works(self, section): return list(dict.fromkeys(r["work"] for r in self.rows if r["section"] == section))

    def row(self, section, i, framework, dtype="float32"):
        works = self.works(section)
        if not -len(works) <= i < len(works): return None
        return next((r for r in self.rows if (r["work"], r["framework"], r["dtype"], r["correct"]) == (works[i], framework, dtype, "yes")), None)

    def ratio(self, section, i, peer, dtype="float32", peer_dtype=None):
        "How many times as long as ours the peer takes (medians)."
        a, b = self.row(section, i, "synthlab", dtype), self.row(section, i, peer, peer_dtype or dtype)
        return b["seconds_median"] / a["seconds_median"] if a and b else None

    def torch(self, i, dtype):
        "The ratio over the faster of the two torch baselines."
        return least(self.ratio("scoring", i, f, dtype) for f in ("torch", "torch-onednn"))


def least(values): return min((v for v in values if v is not None), default=None)


def targets(rows: list[dict]) -> list[tuple[str, str, str, str, str]]:
    "Rows of the final table: work, must, goal, measured, met."
    t, out = Table(rows), []
    def add(work, must, goal, value, show="{:.2f}x", higher=True):
        at_least = lambda bar: value >= bar if higher else value <= bar
        met = "not measured" if value is None else "goal" if goal and at_least(goal) else "must" if must and at_least(must) else "no" if must or goal else "-"
        out.append((work, *(show.format(v) if v else "" for v in (must, goal)), "" if value is None else show.format(value), met))
    name = lambda section, i: (t.works(section)[i:] or [f"({section} not run)"])[0]
    long, short = name("scoring", 0), name("scoring", 1)
    add(f"{long}, float32, vs TRL", 5, 8, t.ratio("scoring", 0, "trl"))
    add(f"{long}, bfloat16, vs TRL", 4, 6, t.ratio("scoring", 0, "trl", "bfloat16"))
    for dtype in ("float32", "bfloat16"): add(f"{short}, {dtype}, vs TRL", 7, 12, t.ratio("scoring", 1, "trl", dtype))
    for i, work in enumerate((long, short)):
        add(f"{work}, float32, vs torch with the same tricks", 1.05, 1.3, t.torch(i, "float32"))
        add(f"{work}, bfloat16, vs torch with the same tricks", 1.0, 1.3, t.torch(i, "bfloat16"))
    ours = t.row("scoring", 0, "synthlab")
    add(f"{long}, float32, share of the arithmetic peak", .6, .75, ours and ours["fraction_of_peak"], "{:.0%}")
    memory = [r["extra_mb"] for r in rows if r["section"] == "memory" and r["framework"] == "synthlab"]
    add("extra peak memory over the weights, any G and dtype, large vocabulary", 100, 50, max(memory, default=None), "{:.0f} MB", higher=False)
    n = len(t.works("sampling"))
    for i, must, goal in ((1, 4, 8), (n - 2, 5, 10), (n - 1, None, None)):
        add(f"{name('sampling', i)}, float32, vs transformers generate", must, goal, t.ratio("sampling", i, "transformers") if n else None)
    for dtype in ("float32", "bfloat16"):
        for i in range(n): add(f"{name('sampling', i)}, {dtype}, vs llama.cpp (q4_1)", None, 1 if i == n - 2 else None, t.ratio("sampling", i, "llama.cpp", dtype, "q4_1"))
    out.append(groups(t))
    return out


def groups(t: Table) -> tuple[str, str, str, str, str]:
    "Time a group beside that of a group alone, and growth of the extra memory."
    rows = [r for r in t.rows if r["section"] == "groups"]
    work, must = "cost by number of groups", f"linear within 10%, flat within {FLAT_MB} MB"
    if len(rows) < 2: return work, must, "", "", "not measured"
    each = [r["seconds_median"] / r["gflop"] for r in rows]
    slowest, grown = max(each) / each[0], rows[-1]["extra_mb"] - min(r["extra_mb"] for r in rows[:2])
    shown = f"a group takes {min(each) / each[0]:.2f} to {slowest:.2f} of one alone; {grown:+.0f} MB from {rows[0]['work']} to {rows[-1]['work']}"
    return work, must, "", shown, "must" if slowest <= 1.1 and grown <= FLAT_MB else "no"


def aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def comparisons(t: Table) -> list[tuple[str, float, int]]:
    "What the figure shows: label, how many times as fast ours is, and the number of the peer."
    n, out = len(t.works("sampling")), []
    short = lambda section, i: " ".join([section, *re.findall(r"(?:P|batch)=\d+", t.works(section)[i])[-1:]])
    for i in range(len(t.works("scoring"))):
        for dtype, bits in (("float32", "f32"), ("bfloat16", "bf16")):
            out.append((f"{short('scoring', i)} {bits}", t.ratio("scoring", i, "trl", dtype), 0))
            out.append((f"{short('scoring', i)} {bits}", t.torch(i, dtype), 1))
    for i in range(1, n - 1): out.append((f"{short('sampling', i)} f32", t.ratio("sampling", i, "transformers"), 2))
    if n: out.append((f"{short('sampling', n - 2)} f32", t.ratio("sampling", n - 2, "llama.cpp", "float32", "q4_1"), 3))
    return sorted([c for c in dict.fromkeys(out) if c[1] is not None], key=lambda c: c[2])


def figure(rows: list[dict]) -> bytes:
    "Draw by how much ours is faster, work by work, as PNG; the title says it in words."
    from synthlab.lab.plots import COLOURS, fig_png, house_axes
    t, bars, peers = Table(rows), comparisons(Table(rows)), ("TRL", "torch, same tricks", "transformers", "llama.cpp q4_1")
    n = len(t.works("sampling"))
    said = [text.format(v) for text, v in (
        ("scoring is {:.1f}x as fast as TRL", t.ratio("scoring", 0, "trl")), ("{:.2f}x as torch with the same tricks", t.torch(0, "float32")),
        ("sampling {:.1f}x as transformers", t.ratio("sampling", n - 2, "transformers") if n else None)) if v is not None]
    title = (", ".join(said) or "Nothing was compared") + f" (float32; {rows[0]['machine']})"
    fig, ax = house_axes(title[0].upper() + title[1:], "times as fast as the peer (medians, log scale)", size=(6.0, 2.8))
    for i, (_, v, k) in enumerate(bars):
        ax.barh(i, v - 1, left=1, color=COLOURS[k], height=.7)
        ax.annotate(f"{v:.3g}", (max(v, 1), i), (3, 0), textcoords="offset points", va="center", fontsize=7, color="#333333")
    ax.axvline(1, color="#555555", lw=1)
    ax.set_xscale("log"); ax.set_yticks(range(len(bars)), [f"{label} over {peers[k]}" for label, _, k in bars], fontsize=7); ax.invert_yaxis()
    low, high = (f((1, *(v for _, v, _ in bars))) for f in (min, max))
    ticks = [v for v in (.125, .25, .5, 1, 2, 4, 8, 16, 32) if low / 1.5 < v < high * 1.5]
    ax.set_xlim(low / 1.1, high * 1.25); ax.set_xticks(ticks, [f"{v:g}" for v in ticks]); ax.minorticks_off(); ax.grid(axis="y", visible=False)
    return fig_png(fig)
