"""Self-made tasks beside the collators of transformers and TRL's packing: a million tokens, taking turns in one process.

Every result is checked; the exit status is 1 when one is wrong, never for a ratio. Each peer runs in its fastest form: with the special tokens marked beforehand, in NumPy or torch, in batches of 64 or 512, whatever a first run finds best."""
import argparse
import statistics
import time
from functools import cache
from pathlib import Path

import datasets
import machine
import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, models
from transformers import DataCollatorForLanguageModeling, DataCollatorForPermutationLanguageModeling, PreTrainedTokenizerFast
from trl import pack_dataset

from synthlab.methods.selfsupervision import Ragged, corrupt_spans, mask_tokens, pack, restore_spans, text_keys

HERE = Path(__file__).parent
V, MASK, PAD, CLS, SEP, EOS, ROW = 30_000, 29_999, 29_998, 29_997, 29_996, 29_995, 2048
LONG = 20  # seconds: longer work is done once
SPECIAL, SENTINEL = (CLS, SEP, PAD, MASK, EOS), 32_099


FORMS = [(tensors, size) for tensors in ("np", "pt") for size in (64, 512)]


@cache
def tokenizer():
    "A vocabulary of the usual size."
    words = {f"w{i}": i for i in range(EOS)} | {"[EOS]": EOS, "[SEP]": SEP, "[CLS]": CLS, "[PAD]": PAD, "[MASK]": MASK}
    t = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=t, mask_token="[MASK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[EOS]", unk_token="w0")


def documents(n: int, seed: int = 0, low: int = 8, high: int = 512) -> list[np.ndarray]:
    "Texts of skewed lengths, n tokens in all, even ones because permutation language modelling needs that."
    rng, out = np.random.default_rng(seed), []
    while n > 0:
        size = min(int(np.clip(rng.lognormal(4.2, 1.), low, high)) // 2 * 2, n)
        ids = rng.integers(0, EOS, size)
        ids[0], ids[-1] = CLS, SEP
        out.append(ids); n -= size
    return out


def collator(kind, rows: list[dict], forms=FORMS, **options):
    "Calls that collate all rows, by framework and batch size."
    def run(tensors, size):
        collate = kind(tokenizer(), return_tensors=tensors, **options)
        return lambda: [collate([dict(r) for r in rows[a:a + size]]) for a in range(0, len(rows), size)]
    return [run(*form) for form in forms]


def spans_one_by_one(docs: list[np.ndarray], rate=.15, mean=3.):
    "Span corruption text by text, with the random segmentation of the T5 paper's code: shuffled borders, cumulative sums."
    rng = np.random.default_rng(0)
    def segment(n, k): return np.bincount(np.concatenate([[0], np.cumsum(rng.permutation(np.arange(n - 1) < k - 1))]), minlength=k)
    def one(ids):
        n = min(max(round(len(ids) * rate), 1), len(ids) - 1)
        k = max(round(n / mean), 1)
        drop = np.repeat(np.tile([False, True], k), np.stack([segment(len(ids) - n, k), segment(n, k)], 1).ravel())
        def sides(gone):
            first = gone & ~np.concatenate([[False], gone[:-1]])
            return np.where(first, SENTINEL + 1 - np.cumsum(first), ids)[first | ~gone]
        return sides(drop), sides(~drop)
    return lambda: [one(d) for d in docs]


def masking_right(found, docs) -> bool:
    "Labels are the tokens, the rest is as it was, and the shares are those asked for."
    ids, (x, y) = np.concatenate(docs), (a.values for a in found)
    at = y != -100
    return bool((y[at] == ids[at]).all() and (x[~at] == ids[~at]).all() and abs(at.mean() - .15) < .01 and abs((x[at] == MASK).mean() - .8) < .01 and not np.isin(ids[at], SPECIAL).any())


def spans_right(found, docs) -> bool:
    return all(np.array_equal(restore_spans(a, b, sentinel=SENTINEL), d) for d, a, b in zip(docs, found.inputs.rows(), found.targets.rows()))


def packing_right(p, docs) -> bool:
    "Every token once, in the order of its text, in its text's place."
    used = np.flatnonzero(p.source.ravel() >= 0)
    order = np.lexsort((used, p.source.ravel()[used]))
    return bool(np.array_equal(p.ids.ravel()[used][order], np.concatenate(docs)) and (p.efficiency >= .99 or used.size < 500_000))


def works(n: int):
    "name -> (ours, check, {peer: calls})."
    docs = documents(n)
    lists = [{"input_ids": d.tolist(), "special_tokens_mask": np.isin(d, SPECIAL).astype(int).tolist()} for d in docs]
    long = documents(n, 1, 4, ROW)
    ds = datasets.Dataset.from_dict({"input_ids": long})
    bounds = lambda d: np.stack([np.arange(len(d)), np.arange(1, len(d) + 1)], 1) + (np.arange(len(d)) + 2)[:, None] // 3  # offsets of words of three tokens, with a gap between words
    even = [np.concatenate([[CLS], np.random.default_rng(i).integers(0, EOS, 254), [SEP]]) for i in range(n // 256)]  # the peer's whole words need texts of one length
    words = [{"input_ids": d.tolist(), "special_tokens_mask": np.isin(d, SPECIAL).astype(int).tolist(), "offset_mapping": bounds(d).tolist()} for d in even]
    numbered = Ragged(np.tile((np.arange(256) + 2) // 3, len(even)), np.full(len(even), 256))
    keyed = lambda texts=docs: (Ragged.of(texts), text_keys(0, range(len(texts))))
    mask = lambda texts=docs, **o: mask_tokens(*keyed(texts), mask_id=MASK, vocab_size=V, special_ids=SPECIAL, **o)
    plain = [{"input_ids": r["input_ids"]} for r in lists]
    return {
        "masking 80/10/10": (mask, lambda f: masking_right(f, docs), {"transformers DataCollatorForLanguageModeling": collator(DataCollatorForLanguageModeling, lists)}),
        "masking whole words": (lambda: mask(even, words=numbered), lambda f: masking_right(f, even),
                                {"transformers DataCollatorForLanguageModeling(whole_word_mask)": collator(DataCollatorForLanguageModeling, words, whole_word_mask=True, mask_replace_prob=1., random_replace_prob=0.)}),
        "span corruption": (lambda: corrupt_spans(*keyed(), sentinel=SENTINEL), lambda f: spans_right(f, docs),
                            {"text by text, NumPy (T5's algorithm)": [spans_one_by_one(docs)], "transformers DataCollatorForPermutationLanguageModeling": collator(DataCollatorForPermutationLanguageModeling, plain, FORMS[:1])}),
        "packing": (lambda: pack(Ragged.from_dataset(ds), ROW), lambda f: packing_right(f, long),
                    {"TRL pack_dataset(bfd_split)": [lambda size=size: pack_dataset(ds, ROW, "bfd_split", map_kwargs={"batch_size": size, "load_from_cache_file": False}) for size in (1000, None)]}),
    }


def timed(f):
    start = time.perf_counter()
    out = f()
    return time.perf_counter() - start, out


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--tokens", type=int, default=1_000_000)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--out", type=Path, default=HERE.parent.parent / "nbs" / "results" / "40_selfsup_bench.csv")
    args = p.parse_args(argv)
    datasets.disable_progress_bars()
    torch.set_num_threads(machine.CORES)
    table, wrong = [], []
    for name, (ours, right, peers) in works(args.tokens).items():
        if not right(ours()): wrong.append(name)
        print(name, flush=True)
        calls = {"synthlab": ours, **{peer: min(forms, key=lambda f: timed(f)[0]) if len(forms) > 1 else forms[0] for peer, forms in peers.items()}}
        seconds = {k: [] for k in calls}
        for _ in range(args.repeats):
            for k, f in calls.items():
                if not seconds[k] or seconds[k][0] < LONG: seconds[k].append(timed(f)[0])
        for k, s in seconds.items():
            median = statistics.median(s)
            table.append({"work": name, "framework": k, "tokens": args.tokens, "seconds_median": median, "seconds_min": min(s), "repeats": len(s), "tokens_per_s": args.tokens / median,
                          "times_as_long": median / statistics.median(seconds["synthlab"]), "efficiency": ours().efficiency if name == "packing" and k == "synthlab" else None, "machine": machine.name()})
    table = pd.DataFrame(table)
    print(table.drop(columns="machine").round(4).to_string(index=False))
    for w in wrong: print("WRONG", w)
    if not wrong: table.to_csv(args.out, index=False, float_format="%.4g")
    return 1 if wrong else 0


if __name__ == "__main__": raise SystemExit(main())
