"""Torch with the same tricks, as a baseline: the prompt computed once, rollouts packed without padding, the head tiled.

Attention is cut into three exact parts: the prompt over itself, all rollouts over the prompt in one call, and each rollout
over itself; the last two are merged by their log-sum-exps. Norm weights are folded into the matrices behind them.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROWS, TILE = 512, 4096  # of the head: logits held at a time
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # as SDPA calls it, with the log-sum-exp



class Stock:
    "Matrix products as `torch.nn` computes them (float32: MKL)."
    linear = staticmethod(F.linear)
    @staticmethod
    def gated(x, gate, up): return F.silu(F.linear(x, gate), inplace=True).mul_(F.linear(x, up))
    @staticmethod
    def added(x, w, y): return F.linear(x, w).add_(y)


class OneDNN:
    "Matrix products through oneDNN in both dtypes, element-wise neighbours fused into them."
    @staticmethod
    def linear(x, w): return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    @staticmethod
    def gated(x, gate, up):
        g = torch.ops.mkldnn._linear_pointwise(x, gate, None, "swish", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, g, up, None, "mul")
    @staticmethod
    def added(x, w, y): return torch.ops.mkldnn._linear_pointwise.binary(x, y, w, None, "add")


@dataclass(frozen=True)
class Model:
    config: dict
    embed: torch.Tensor  # (V, D)
    layers: list[dict[str, torch.Tensor]]
    head: torch.Tensor  # (V, D)
    ops: type


def load(folder, dtype: torch.dtype, ops: type) -> Model:
    "Read a Llama folder; each RMS norm's weight is multiplied into the matrix that follows it."
    c, t = json.loads((Path(folder) / "config.json").read_text()), load_file(Path(folder) / "model.safetensors")
    fold = lambda norm, *names: torch.cat([t[f"{n}.weight"].float() * t[f"{norm}.weight"].float() for n in names]).to(dtype)
    layers = []
    for p in (f"model.layers.{i}." for i in range(c["num_hidden_layers"])):
        layers.append({"qkv": fold(p + "input_layernorm", *(f"{p}self_attn.{n}_proj" for n in "qkv")),
                       "o": t[p + "self_attn.o_proj.weight"].to(dtype), "down": t[p + "mlp.down_proj.weight"].to(dtype),
                       **{n: fold(p + "post_attention_layernorm", f"{p}mlp.{n}_proj") for n in ("gate", "up")}})
    head = "model.embed_tokens" if c.get("tie_word_embeddings") else "lm_head"
    return Model(c, t["model.embed_tokens.weight"].to(dtype), layers, fold("model.norm", head), ops)


def normed(x, eps):
    "RMS norm without its weight."
    return x * (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_() / x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


def rotation(positions, c):
    theta = c["rope_parameters"]["rope_theta"] ** (-torch.arange(0, c["head_dim"], 2) / c["head_dim"])
    angle = (positions[:, None] * theta)[:, None].repeat(1, 1, 2)
    sign = torch.ones(c["head_dim"])
    sign[:c["head_dim"] // 2] = -1
    return angle.cos(), angle.sin() * sign  # (N, 1, d); the sign of the half turned backwards is in the sine


def mixed(q, k, v, P, bounds):
    "Attention of the packed text: q (N, H, d), k and v (N, K, d), the prompt in the first P rows, a rollout in each of `bounds`."
    heads = lambda a, *at: a[slice(*at)].transpose(0, 1)[None]
    out = torch.empty_like(q)
    heads(out, P).copy_(_flash(heads(q, P), heads(k, P), heads(v, P), 0., True)[0])
    if len(q) == P: return out
    shared, shared_lse = _flash(heads(q, P, None), heads(k, P), heads(v, P))
    for a, b in bounds:
        own, own_lse = _flash(heads(q, a, b), heads(k, a, b), heads(v, a, b), 0., True)
        there = slice(a - P, b - P)
        share = torch.sigmoid(shared_lse[:, :, there] - own_lse)[..., None].to(q.dtype)
        heads(out, a, b).copy_(torch.lerp(own, shared[:, :, there], share))
    return out


def hidden(m: Model, ids, positions, P, bounds):
    "Final hidden states (N, D), normed, of a prompt of P tokens and the rollouts behind it."
    c, ops, eps = m.config, m.ops, m.config["rms_norm_eps"]
    H, K, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    cos, sin = (a.to(m.embed.dtype) for a in rotation(positions, c))
    x = F.embedding(ids, m.embed)
    for w in m.layers:
        qkv = ops.linear(normed(x, eps), w["qkv"]).view(-1, H + 2 * K, d)
        qk = qkv[:, :H + K]
        qk = torch.addcmul(qk * cos, qk.roll(d // 2, -1), sin)
        o = mixed(qk[:, :H], qk[:, H:], qkv[:, H + K:], P, bounds)
        x = ops.added(o.view(len(x), -1), w["o"], x)
        x = ops.added(ops.gated(normed(x, eps), w["gate"], w["up"]), w["down"], x)
    return normed(x, eps)


def tiled_head(h, m: Model, targets):
    "Log-prob of each target and entropy of each distribution, by an online log-sum-exp over tiles of the vocabulary."
    lps, entropies = [], []
    for rows, wanted in zip(h.split(ROWS), targets.split(ROWS)):
        top, total, weighted = torch.full((len(rows), 1), -1e30), torch.zeros(len(rows), 1), torch.zeros(len(rows), 1)
        for w in m.head.split(TILE):
            z = m.ops.linear(rows, w).float()
            new = torch.maximum(top, z.amax(-1, keepdim=True))
            e = z.sub_(new).exp()
            scale = torch.exp(top - new)
            weighted = scale * (weighted + (top - new) * total) + torch.bmm(e[:, None], z[..., None])[:, 0]
            total, top = scale * total + e.sum(-1, keepdim=True), new
        lse = top + total.log()
        lps.append((rows.float() * F.embedding(wanted, m.head).float()).sum(-1) - lse[:, 0])
        entropies.append((total.log() - weighted / total)[:, 0])
    return torch.cat(lps), torch.cat(entropies)


@torch.inference_mode()
def score_group(m: Model, prompt, replies):
    "Log-probs and entropies of the replies to one prompt, as one array each, reply after reply."
    P, lengths = len(prompt), [len(r) - 1 for r in replies]  # the last token of a reply is only predicted
    starts = [P + sum(lengths[:i]) for i in range(len(replies))]
    ids = torch.tensor([*prompt, *(t for r in replies for t in r[:-1])])
    positions = torch.cat([torch.arange(P), *(torch.arange(P, P + n) for n in lengths)])
    h = hidden(m, ids, positions, P, [(s, s + n) for s, n in zip(starts, lengths) if n])
    where = torch.tensor([i for s, n in zip(starts, lengths) for i in (P - 1, *range(s, s + n))])
    return tiled_head(h[where], m, torch.tensor([t for r in replies for t in r]))


@torch.inference_mode()
def plain_logprobs(folder, texts):
    "The textbook forward pass in float64, one text at a time, as the reference: log-probs and entropies of all tokens but the first."
    c, t = json.loads((Path(folder) / "config.json").read_text()), load_file(Path(folder) / "model.safetensors")
    H, K, d, eps = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["rms_norm_eps"]
    W = lambda name: t[f"{name}.weight"].double()
    norm = lambda x, w: x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w
    out = []
    for text in map(torch.tensor, texts):
        T, x = len(text), t["model.embed_tokens.weight"][text].double()
        angle = torch.arange(T)[:, None] * c["rope_parameters"]["rope_theta"] ** (-torch.arange(0, d, 2).double() / d)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        def turned(a):
            z = torch.complex(*a.view(T, -1, d).chunk(2, -1)) * turn
            return torch.cat([z.real, z.imag], -1)
        for p in (f"model.layers.{i}." for i in range(c["num_hidden_layers"])):
            h = norm(x, W(p + "input_layernorm"))
            q, k, v = (h @ W(f"{p}self_attn.{n}_proj").T for n in "qkv")
            q, k, v = turned(q), turned(k).repeat_interleave(H // K, 1), v.view(T, K, d).repeat_interleave(H // K, 1)
            s = torch.einsum("qhd,khd->hqk", q, k) / d**.5 + torch.full((T, T), -torch.inf).triu(1)
            x = x + torch.einsum("hqk,khd->qhd", s.softmax(-1), v).reshape(T, H * d) @ W(p + "self_attn.o_proj").T
            h = norm(x, W(p + "post_attention_layernorm"))
            x = x + (F.silu(h @ W(p + "mlp.gate_proj").T) * (h @ W(p + "mlp.up_proj").T)) @ W(p + "mlp.down_proj").T
        z = norm(x, W("model.norm"))[:-1] @ W("model.embed_tokens" if c.get("tie_word_embeddings") else "lm_head").T
        lp = z.log_softmax(-1)
        out.append((lp.gather(-1, text[1:, None])[:, 0], -(lp.exp() * lp).sum(-1)))
    return out
