"""The frameworks under one interface, each imported only in its own process. `score` gives (log-probs, entropies) for each rollout in order."""
import importlib.metadata
import os
from contextlib import nullcontext
from functools import partial

import numpy as np

THREADS = len(os.sched_getaffinity(0))


def torch_threads():
    import torch
    torch.set_num_threads(THREADS)
    return torch


class Framework:
    "One way to score (and draw) replies."
    packages: tuple[str, ...] = ()  # must be installed; the first is the one to name when it is not
    batches: tuple[int | None, ...] = (None,)  # rows at a time of scoring; the warm-up tries each and keeps the fastest

    def __init__(self): self.kept = {}

    def versions(self): return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in self.packages)

    def once(self, f, *args):
        "Call `f` and keep what it gives."
        if args not in self.kept: self.kept[args] = f(*args)
        return self.kept[args]

    def model(self, work, dtype): return self.once(self.load, work.model, dtype)

    def load(self, folder, dtype): "Read the weights."
    def score(self, work, dtype, batch): raise NotImplementedError
    def sample(self, work, dtype, batch): raise NotImplementedError
    def gemm(self, n, dtype): "A function that multiplies two n x n matrices and waits for the product."


class Synthlab(Framework):
    "This library: `score_replies` and `generate`."
    packages = ("synthlab", "jax", "jaxlib")

    def load(self, folder, dtype):
        from synthlab.lm.jaxlm import load_jax_model
        return load_jax_model(folder, dtype=dtype)

    def score(self, work, dtype, batch):
        from synthlab.scoring.logprobs import score_replies
        prompts, replies = zip(*work.pairs)
        return score_replies(self.model(work, dtype), prompts, replies, progress=False)

    def sample(self, work, dtype, batch):
        from synthlab.lm.sampler import generate
        found = dict(generate(self.model(work, dtype), work.prompts, range(len(work.prompts)), temperature=1.0, max_tokens=work.new_tokens,
                              eos_ids=[], batch_size=len(work.prompts)))
        return [(found[i].token_ids, found[i].logprobs) for i in range(len(work.prompts))]

    def gemm(self, n, dtype):
        import jax, jax.numpy as jnp
        a = jnp.ones((n, n), dtype)
        f = jax.jit(partial(jnp.dot, precision="highest", preferred_element_type=jnp.float32))
        return lambda: f(a, a).block_until_ready()


class Torch(Framework):
    "The tricks of packed.py on stock torch: the honest baseline."
    packages, ops = ("torch",), "Stock"

    def load(self, folder, dtype):
        import packed
        torch = torch_threads()
        return packed.load(folder, getattr(torch, dtype), getattr(packed, self.ops))

    def score(self, work, dtype, batch):
        import packed
        out = []
        for prompt, replies in zip(work.prompts, work.replies):
            ends = np.cumsum([len(r) for r in replies])[:-1]
            out += zip(*(np.split(a.numpy(), ends) for a in packed.score_group(self.model(work, dtype), prompt, replies)))
        return out

    def gemm(self, n, dtype):
        import packed
        torch = torch_threads()
        a = torch.ones(n, n, dtype=getattr(torch, dtype))
        return lambda: getattr(packed, self.ops).linear(a, a)


class TorchOneDNN(Torch):
    "The same with every matrix product through oneDNN, which beats torch's default (MKL) on some processors."
    ops = "OneDNN"


class Reference(Framework):
    "The textbook forward pass in float64."
    packages = ("torch",)

    def logprobs(self, folder, pairs):
        import packed
        torch_threads()
        found = packed.plain_logprobs(folder, [[*p, *r] for p, r in pairs])
        return [[a[len(p) - 1:].numpy() for a in arrays] for (p, _), arrays in zip(pairs, found)]


class Transformers(Framework):
    "A batched forward pass, right-padded, and log_softmax; `generate` for sampling."
    packages, batches = ("transformers", "torch"), (2,)

    def load(self, folder, dtype):
        from transformers import AutoModelForCausalLM
        torch = torch_threads()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True).eval()

    def score(self, work, dtype, batch):
        import torch
        out, model, pairs = [], self.model(work, dtype), work.pairs
        with torch.inference_mode():
            for some in (pairs[i:i + batch] for i in range(0, len(pairs), batch)):
                keep = max(len(p) + len(r) for p, r in some) - min(len(p) for p, _ in some) + 1
                pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
                ids = pad([torch.tensor(p + r) for p, r in some])
                mask = pad([torch.ones(len(p) + len(r), dtype=torch.long) for p, r in some])
                lp = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits.log_softmax(-1)
                first = ids.shape[1] - keep
                for row, (p, r) in zip(lp, some):
                    mine = row[len(p) - 1 - first:len(p) + len(r) - 1 - first]
                    out.append((mine.gather(-1, torch.tensor(r)[:, None])[:, 0].float().numpy(), -(mine.exp() * mine).sum(-1).float().numpy()))
        return out

    def sample(self, work, dtype, batch):
        import torch
        ids, T = torch.tensor(work.prompts), work.new_tokens
        torch.manual_seed(0)
        with torch.inference_mode():
            out = self.model(work, dtype).generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                                        min_new_tokens=T, max_new_tokens=T, pad_token_id=0)
        return [(row, None) for row in out[:, ids.shape[1]:].numpy()]


class Trl(Transformers):
    "TRL's own functions: GRPOTrainer's log-probs and entropies with the fused head that it installs, on batches padded by TRL's `pad`."
    packages, batches = ("trl", "transformers", "torch"), (4,)  # faster here than 16, and than all at once

    def load(self, folder, dtype):
        from trl.trainer.utils import add_fused_lm_head
        model = super().load(folder, dtype)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))  # as GRPOTrainer does when it is made
        return model

    def score(self, work, dtype, batch):
        from types import SimpleNamespace

        import torch
        from trl import GRPOTrainer
        from trl.trainer.utils import pad
        trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext, is_main_process=True))
        sides, masks = [], []
        for texts, side in zip(zip(*work.pairs), ("left", "right")):
            sides.append(pad([torch.tensor(t) for t in texts], padding_value=0, padding_side=side))
            masks.append(pad([torch.ones(len(t), dtype=torch.long) for t in texts], padding_value=0, padding_side=side))
        with torch.no_grad():
            found = GRPOTrainer._get_per_token_logps_and_entropies(trainer, self.model(work, dtype), torch.cat(sides, 1), torch.cat(masks, 1),
                                                                   sides[1].shape[1], batch_size=batch, compute_entropy=True)
        return [tuple(a[i, :len(r)].float().numpy() for a in found[:2]) for i, (_, r) in enumerate(work.pairs)]


class Tunix(Framework):
    "google-tunix's `compute_per_token_logps` (JAX) on the same weights; it gives no entropies."
    packages, batches = ("google-tunix", "jax", "jaxlib"), (1, 4)

    def load(self, folder, dtype):
        import json
        from pathlib import Path

        import jax
        from flax import nnx
        from tunix.models.llama3 import model, params
        c = json.loads((Path(folder) / "config.json").read_text())
        # tunix 0.1.7 passes rope_theta to its Llama but rotates by its default of 1e6 whatever the model says
        model.apply_rope = partial(model.apply_rope, rope_theta=c["rope_parameters"]["rope_theta"])
        config = model.ModelConfig(c["num_hidden_layers"], c["vocab_size"], c["hidden_size"], c["intermediate_size"], c["num_attention_heads"], c["head_dim"],
                                   c["num_key_value_heads"], c["rope_parameters"]["rope_theta"], c["rms_norm_eps"], weight_tying=c["tie_word_embeddings"])
        return nnx.split(params.create_model_from_safe_tensors(folder, config, dtype=jax.numpy.dtype(dtype)))

    def score(self, work, dtype, batch):
        from tunix.rl.common import compute_per_token_logps
        pairs, out, (graph, state) = work.pairs, [], self.model(work, dtype)
        assert not any(0 in [*p, *r] for p, r in pairs), "token 0 is tunix's padding here"
        P, T = (max(map(len, texts)) for texts in zip(*pairs))
        prompts, replies = np.zeros((len(pairs), P), np.int32), np.zeros((len(pairs), T), np.int32)
        for i, (p, r) in enumerate(pairs): prompts[i, P - len(p):], replies[i, :len(r)] = p, r
        for i in range(0, len(pairs), batch):
            lp = np.asarray(compute_per_token_logps(graph, state, prompts[i:i + batch], replies[i:i + batch], pad_id=0, eos_id=-1))
            out += [(row[:len(r)].astype(np.float32), None) for row, (_, r) in zip(lp, pairs[i:])]
        return out


class LlamaCpp(Framework):
    "llama.cpp's server in this process through xllamacpp: as many slots as rows; equal prompts are read once (n_cmpl), nothing is kept between calls."
    packages = ("xllamacpp",)

    def server(self, gguf, slots, context):
        import xllamacpp
        p = xllamacpp.CommonParams()
        p.model.path, p.n_parallel, p.n_ctx, p.port, p.hostnames = gguf, slots, slots * context, free_port(), ["127.0.0.1"]
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = THREADS
        p.model_alias = {"model"}
        return xllamacpp.Server(p)

    def sample(self, work, dtype, batch):
        rows, T, shared = len(work.prompts), work.new_tokens, len(set(map(tuple, work.prompts))) == 1
        server = self.once(self.server, work.gguf, rows, len(work.prompts[0]) + T + 8)
        found = server.handle_completions({
            "prompt": work.prompts[0] if shared else work.prompts, "n_cmpl": rows if shared else 1, "n_predict": T, "ignore_eos": True, "temperature": 1.0,
            "samplers": ["temperature"], "cache_prompt": False, "seed": 1})
        drawn = sum(c["finish_reason"] == "length" for c in found["choices"])  # each with the n_predict tokens that were asked for
        if drawn != rows or found["usage"]["completion_tokens"] % T: raise RuntimeError(f"llama.cpp drew {drawn} rows of {T} tokens, not {rows}")
        return []


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


FRAMEWORKS = {"synthlab": Synthlab, "torch": Torch, "torch-onednn": TorchOneDNN, "trl": Trl, "transformers": Transformers, "tunix": Tunix, "llama.cpp": LlamaCpp,
              "reference": Reference}
