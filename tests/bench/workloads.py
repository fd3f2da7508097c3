"""What is measured: prompts and replies of real text, who works on them, and the exact arithmetic of the work."""
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SCORERS = ("synthlab", "torch", "torch-onednn", "trl", "transformers", "tunix")
BOTH = ("float32", "bfloat16")


@dataclass(frozen=True)
class Work:
    name: str
    section: str  # "scoring" | "memory" | "groups" | "sampling"
    model: str  # folder with config.json, model.safetensors and tokenizer.json
    runs: list[tuple[str, str]]  # (framework, dtype), in the order in which they take turns
    prompts: list[list[int]]  # one a group; of sampling: one a row, equal or distinct
    replies: list[list[list[int]]]  # scoring: the replies of each group
    new_tokens: int = 0  # sampling: tokens drawn for each row
    gguf: str = ""  # sampling: the model as llama.cpp reads it

    @property
    def samples(self) -> bool: return self.section == "sampling"

    @property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        "Prompt and reply of every rollout."
        return [(p, r) for p, replies in zip(self.prompts, self.replies) for r in replies]

    @property
    def tokens(self) -> int:
        "Tokens scored or drawn."
        return len(self.prompts) * self.new_tokens if self.samples else sum(len(r) for _, r in self.pairs)

    @property
    def checked(self) -> list[int]:
        "Rollouts compared with the float64 reference: the first of the shortest and the last of the longest replies."
        n = [len(r) for _, r in self.pairs]
        return sorted({n.index(min(n)), len(n) - 1 - n[::-1].index(max(n))})


def save(works: list[Work], path: Path): path.write_text(json.dumps([dataclasses.asdict(w) for w in works]))
def load(path) -> list[Work]: return [Work(**w) for w in json.loads(Path(path).read_text())]


def flops(c: dict, prompts: list[list[int]], lengths: list[list[int]]) -> int:
    """Count the multiplications and additions in matrix products that scoring or drawing replies cannot do without.

    With L layers of width D, H heads and K key-value heads of d numbers, feed-forward width F and a vocabulary of V:
    every token that is read passes the layers once:       L * 2 * (2*D*H*d + 2*D*K*d + 3*D*F)
    and attends to itself and each token before it:        L * 4 * H*d for each such pair
    every token that is predicted needs one row of logits: 2 * D * V
    Each distinct prompt (P tokens) is read once, each reply (T tokens) without its last token, which is only predicted.
    Norms, rotations and softmaxes (about 1%) are left out. `c` is the model's config.json; a property of the work, not of a framework.
    """
    L, D, F, V = c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    H, K, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    read = seen = predicted = 0
    for P in map(len, {tuple(p) for p in prompts}): read, seen = read + P, seen + P * (P + 1) // 2
    for P, replies in zip(map(len, prompts), lengths):
        for T in replies:
            read, seen, predicted = read + T - 1, seen + (T - 1) * P + T * (T - 1) // 2, predicted + T
    return read * L * 2 * (2 * D * H * d + 2 * D * K * d + 3 * D * F) + seen * L * 4 * H * d + predicted * 2 * D * V


def work_flops(w: Work) -> int:
    lengths = [[w.new_tokens]] * len(w.prompts) if w.samples else [[len(r) for r in replies] for replies in w.replies]
    return flops(json.loads((Path(w.model) / "config.json").read_text()), w.prompts, lengths)


def prose() -> str:
    "The words of this repository's README and pages."
    pages = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
    texts = ["".join(c["source"]) for page in pages for c in page["cells"] if c["cell_type"] == "markdown"]
    return re.sub(r"[ \t]+", " ", "\n\n".join([(ROOT / "README.md").read_text(encoding="utf-8"), *texts]))


class Text:
    "Draws passages of real text as token ids, no two from the same place, and lengths that do not depend on the text."

    def __init__(self, folder):
        from tokenizers import Tokenizer
        self.ids = Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).encode(prose(), add_special_tokens=False).ids
        self.places, self.sizes = np.random.default_rng(0).permutation(len(self.ids) - 2048).tolist(), np.random.default_rng(1)

    def passage(self, n: int) -> list[int]:
        at = self.places.pop()
        return self.ids[at:at + n]

    def lengths(self, low: int, high: int, n: int) -> list[int]: return self.sizes.integers(low, high + 1, n).tolist()


def random_model(folder: Path, like: Path, **changes) -> Path:
    "Write a Llama of normal random numbers with the configuration of `like` but for `changes`, and its tokenizer."
    from safetensors.numpy import save_file
    folder.mkdir()
    c = json.loads((like / "config.json").read_text()) | changes
    D, F, d, rng = c["hidden_size"], c["intermediate_size"], c["head_dim"], np.random.default_rng(0)
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    matrix = lambda *shape: rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -.5)
    t = {"model.embed_tokens.weight": matrix(c["vocab_size"], D), "model.norm.weight": np.ones(D, np.float32)}
    for i in range(c["num_hidden_layers"]):
        shapes = {"self_attn.q_proj": (q, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D), "self_attn.o_proj": (D, q),
                  "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        t |= {f"model.layers.{i}.{n}.weight": matrix(*s) for n, s in shapes.items()}
        t |= {f"model.layers.{i}.{n}_layernorm.weight": np.ones(D, np.float32) for n in ("input", "post_attention")}
    save_file(t, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(c))
    (folder / "tokenizer.json").write_bytes((like / "tokenizer.json").read_bytes())
    return folder


def build(scratch: Path, sections, quick: bool) -> list[Work]:
    "Make the work list; `quick` has the same shape with a tiny model and tiny sizes, to test the benchmark itself."
    from synthlab.lm.jaxlm import embedded_folder, embedded_gguf
    embedded, gguf = embedded_folder(), str(embedded_gguf())
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
    model = random_model(scratch / "tiny", embedded, **tiny) if quick else embedded
    text, works = Text(embedded), []

    def scoring(name, section, folder, runs, prompt, lengths):
        replies = [[text.passage(n) for n in group] for group in lengths]
        works.append(Work(name, section, str(folder), runs, [text.passage(prompt) for _ in lengths], replies))

    if "scoring" in sections:
        for i, (P, low, high) in enumerate([(24, 4, 12), (40, 2, 6)] if quick else [(256, 32, 256), (1024, 16, 64)]):
            runs, G = [(f, d) for d in BOTH for f in SCORERS if (f, d) != ("transformers", "bfloat16") and (f != "tunix" or i == 0)], 3 if quick else 16
            scoring(f"scoring P={P} G={G} T={low}-{high}", "scoring", model, runs, P, [text.lengths(low, high, G)])
    if "memory" in sections:
        changes = {**tiny, "vocab_size": 50_000} if quick else {"num_hidden_layers": 2, "vocab_size": 152_064}
        wide = random_model(scratch / "wide", embedded, **changes)
        for G, runs in ((16, [("synthlab", "float32"), ("synthlab", "bfloat16"), ("trl", "float32")]), (64, [("synthlab", "float32"), ("synthlab", "bfloat16")])):
            if quick: G //= 8
            scoring(f"memory V={changes['vocab_size']} G={G}", "memory", wide, runs, 16 if quick else 256, [text.lengths(*((4, 8) if quick else (32, 256)), G)])
    if "groups" in sections:
        sizes = (1, 2) if quick else (1, 4, 16, 64, 256)
        first = len(works)
        scoring("all", "groups", model, [("synthlab", "float32")], 8 if quick else 64, [[3, 4, 5, 6] if quick else [24, 29, 35, 40]] * sizes[-1])
        full = works.pop()
        works[first:] = [dataclasses.replace(full, name=f"groups={n}", prompts=full.prompts[:n], replies=full.replies[:n]) for n in sizes]
    if "sampling" in sections:
        P, T = (12, 4) if quick else (256, 64)
        for rows, shared in [(1, True), (2, True), (2, False)] if quick else [(1, True), (8, True), (32, True), (32, False)]:
            prompts = [text.passage(P)] * rows if shared else [text.passage(P) for _ in range(rows)]
            runs = [("synthlab", "float32"), ("synthlab", "bfloat16"), ("transformers", "float32"), ("llama.cpp", "q4_1")]
            name = f"sampling P={P} T={T} batch={rows} {'shared' if shared else 'distinct'}"
            works.append(Work(name, "sampling", str(model), runs, prompts, [], T, gguf))
    return works
