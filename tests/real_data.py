"""Real task data, which lies beside the project and is not part of it."""
import json
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
SOLUTIONS, GSM8K, MATH = DATA / "gsm8k_solutions_dev.jsonl", DATA / "gsm8k_dev.jsonl", DATA / "math500_dev.jsonl"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def needs(path): return pytest.mark.skipif(not path.exists(), reason=f"real task data is not part of the project: no {path.name} in ../shared/data")


def read(path): return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
