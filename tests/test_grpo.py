"""Losses, gradients and advantages of reinforcement learning, against those that TRL and verl compute themselves."""
from dataclasses import replace

import jax
import numpy as np
import pytest

from synthlab.lm.jaxlm import Config, random_params, save_jax_model
from synthlab.scoring.groups import group_advantages, kl
from synthlab.training.grpo import ALGORITHMS, Algorithm, policy_loss, policy_units
from synthlab.training.organism import WORDS, make_world, problems, write_tokenizer
from synthlab.training.sft import lay_out, packed_logprobs

LONGEST = 8
SIZE = Config("llama", len(WORDS), 32, 2, 4, 2, 8, 48, 1e-5, 256, True)
# our algorithm, and the settings of TRL's trainer that mean the same
SAME = {
    "grpo": (ALGORITHMS["grpo"], dict(loss_type="grpo")),
    "grpo with KL": (Algorithm(kl=.3), dict(beta=.3)),
    "grpo with KL times the ratio": (Algorithm(kl=.3, kl_ratio=True), dict(beta=.3, use_bias_correction_kl=True)),
    "Dr. GRPO": (ALGORITHMS["dr_grpo"], dict(loss_type="dr_grpo")),
    "token mean": (Algorithm(average="token"), dict(loss_type="bnpo")),
    "DAPO": (ALGORITHMS["dapo"], dict(loss_type="dapo", epsilon_high=.28)),
    "DAPO with KL": (replace(ALGORITHMS["dapo"], kl=.1), dict(loss_type="dapo", epsilon_high=.28, beta=.1)),
    "GSPO": (ALGORITHMS["gspo"], dict(importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4)),
}
DEFAULTS = dict(loss_type="grpo", beta=0., epsilon_low=.2, epsilon_high=.2, importance_sampling_level="token", use_bias_correction_kl=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "The same small model as ours and inside TRL's trainer, whose rewards come from the data set."
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'synthlab[trl]'")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    folder, params = tmp_path_factory.mktemp("model"), random_params(SIZE, 0, scale=.2)
    write_tokenizer(folder)
    save_jax_model(params, folder)
    config = GRPOConfig(str(folder / "out"), per_device_train_batch_size=8, num_generations=4, max_completion_length=LONGEST, use_cpu=True, bf16=False, beta=.1, report_to="none")
    trainer = GRPOTrainer(AutoModelForCausalLM.from_pretrained(folder), lambda reward, **_: reward, config, train_dataset=Dataset.from_list([{"prompt": t.prompt} for t in problems(make_world(), 8)]),
                          processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.model.eval()
    return params, trainer


def drawn(seed: int, n: int = 6):
    "Rollouts near the policy, so that some are clipped; the first is empty."
    rng = np.random.default_rng(seed)
    replies = [rng.integers(2, len(WORDS), k).tolist() for k in [0, *rng.integers(1, LONGEST + 1, n - 1)]]
    prompts = [rng.integers(2, len(WORDS), rng.integers(1, 6)).tolist() for _ in replies]
    return prompts, replies, rng.normal(size=n), rng


def near(params, prompts, replies, rng) -> list[np.ndarray]:
    from synthlab.scoring.logprobs import score_replies
    return [lp + rng.normal(0, .3, len(lp)) for lp, _ in score_replies(params, prompts, replies, progress=False)]


def as_trl(prompts, replies, old, ref, advantages) -> dict:
    "What TRL's loss takes: prompts padded on the left, completions on the right."
    import torch
    P, T, n = max(map(len, prompts)), LONGEST, len(prompts)
    ids, mask, out, seen = (np.zeros(shape, int) for shape in ((n, P), (n, P), (n, T), (n, T)))
    lp = np.zeros((2, n, T))
    for i, (p, r) in enumerate(zip(prompts, replies)):
        ids[i, P - len(p):], mask[i, P - len(p):], out[i, :len(r)], seen[i, :len(r)] = p, 1, r, 1
        lp[0, i, :len(r)], lp[1, i, :len(r)] = old[i], ref[i]
    t = torch.tensor
    return {"prompt_ids": t(ids), "prompt_mask": t(mask), "completion_ids": t(out), "completion_mask": t(seen), "advantages": t(advantages).float(),
            "old_per_token_logps": t(lp[0]).float(), "ref_per_token_logps": t(lp[1]).float(), "num_items_in_batch": t(seen.sum())}


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_are_those_of_trl(pair, name):
    (params, trainer), (algorithm, theirs) = pair, SAME[name]
    for key, value in (DEFAULTS | theirs).items(): setattr(trainer if hasattr(trainer, key) else trainer.args, key, value)
    for seed in range(3):
        prompts, replies, advantages, rng = drawn(seed)
        spread = .1 if algorithm.ratio == "token" else 1e-3  # a sequence's ratio is clipped in the fourth digit
        old, ref = ([lp + (x - lp) * spread / .3 for lp, x in zip(near(params, prompts, replies, np.random.default_rng(9)), near(params, prompts, replies, rng))] for _ in range(2))
        units = policy_units(prompts, replies, old, ref if algorithm.kl else None, advantages, algorithm.average, LONGEST)
        batch = jax.tree.map(lambda a: a[0], lay_out(units, 32))
        (value, sums), grads = jax.value_and_grad(lambda p: policy_loss(algorithm)(p, batch), has_aux=True)(params)
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, as_trl(prompts, replies, old, ref, advantages))
        loss.backward()
        np.testing.assert_allclose(value, loss.item(), rtol=1e-5, atol=1e-6)
        layers = trainer.model.model.layers
        pairs = [(grads.embed, trainer.model.get_input_embeddings().weight)] + [(grads.layers[ours][i], m.weight) for i in range(2) for ours, m in
                 [("q", layers[i].self_attn.q_proj), ("v", layers[i].self_attn.v_proj), ("down", layers[i].mlp.down_proj), ("attn_norm", layers[i].input_layernorm)]]
        for mine, weight in pairs: np.testing.assert_allclose(mine, weight.grad.numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["grpo with KL", "DAPO", "GSPO"])
def test_the_gradient_is_the_slope_of_the_loss(name):
    params, (algorithm, _) = random_params(SIZE, 0, scale=.2), SAME[name]
    prompts, replies, advantages, rng = drawn(5)
    old = near(params, prompts, replies, rng)
    batch = jax.tree.map(lambda a: a[0], lay_out(policy_units(prompts, replies, old, old if algorithm.kl else None, advantages, algorithm.average, LONGEST), 32))
    loss = jax.jit(lambda p: policy_loss(algorithm)(p, batch)[0])
    grads = jax.grad(loss)(params)
    for _ in range(4):
        way = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), params)
        norm = np.sqrt(sum((w**2).sum() for w in jax.tree.leaves(way)))
        move = lambda h: jax.tree.map(lambda a, w: a + h / norm * w, params, way)
        slope = (loss(move(1e-2)) - loss(move(-1e-2))) / 2e-2
        found = sum(float((g * w).sum()) for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(way))) / norm
        np.testing.assert_allclose(found, slope, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_are_those_of_trl(pair, scale):
    _, trainer = pair
    trainer.scale_rewards, trainer.beta = scale, 0.
    rng = np.random.default_rng(0)
    for G, seed in ((4, 0), (4, 1), (8, 2), (1, 3)):
        trainer.num_generations = trainer.num_generations_eval = G
        rewards = rng.choice([0., 1., .25, np.nan], (8 // G, G), p=[.4, .3, .1, .2])
        rewards[0] = np.nan if seed == 1 else rewards[0]  # a group of which nothing is known
        tasks = [t for t in problems(make_world(), 8 // G) for _ in range(G)]
        rows = [{"prompt": t.prompt, "reward": None if np.isnan(r) else float(r)} for t, r in zip(tasks, rewards.ravel())]
        theirs = trainer._generate_and_score_completions(rows)["advantages"].numpy().reshape(-1, G)
        np.testing.assert_allclose(group_advantages(rewards, "trl" if scale == "group" else "dr_grpo"), theirs, rtol=1e-5, atol=1e-5)


# our algorithm, and verl's loss, its average and its settings that mean the same; verl has a second clip (Ye et al. 2020) and leaves empty rollouts out of means
VERL = {
    "GRPO": (Algorithm(), "vanilla", "seq-mean-token-mean", dict(clip_ratio_low=.2, clip_ratio_high=.2, clip_ratio_c=1e6)),
    "DAPO": (ALGORITHMS["dapo"], "vanilla", "token-mean", dict(clip_ratio_low=.2, clip_ratio_high=.28, clip_ratio_c=1e6)),
    "Dr. GRPO": (ALGORITHMS["dr_grpo"], "vanilla", "seq-mean-token-sum-norm", dict(clip_ratio_low=.2, clip_ratio_high=.2, clip_ratio_c=1e6)),
    "GSPO": (ALGORITHMS["gspo"], "gspo", "seq-mean-token-mean", dict(clip_ratio_low=3e-4, clip_ratio_high=4e-4)),
}


@pytest.fixture(scope="module")
def verl():
    "The formulas of verl; its training loop needs accelerators."
    return pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed: pip install verl")


@pytest.mark.parametrize("name", VERL)
def test_loss_and_gradient_are_those_of_verl(verl, name):
    import torch
    from verl.workers.config import ActorConfig
    algorithm, loss, average, settings = VERL[name]
    config = ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=1, **settings)
    params = random_params(SIZE, 0, scale=.2)
    for seed in range(3):
        prompts, replies, advantages, rng = (x[1:] if isinstance(x, (list, np.ndarray)) else x for x in drawn(seed))
        spread = 1 if algorithm.ratio == "token" else 3e-3
        old = [np.asarray(n, np.float32) + spread * rng.normal(0, .3, len(n)) for n in near(params, prompts, replies, np.random.default_rng(9))]
        batch = jax.tree.map(lambda a: a[0], lay_out(policy_units(prompts, replies, old, None, advantages, algorithm.average, LONGEST), 32))
        (value, _), grads = jax.value_and_grad(lambda p: policy_loss(algorithm)(p, batch), has_aux=True)(params)

        (lp, _), back = jax.vjp(lambda p: packed_logprobs(p, batch), params)
        mine = np.asarray(batch.weights) > 0
        places = [np.argwhere(mine & (np.asarray(batch.extra["advantage"]) == np.float32(a))) for a in advantages]  # where each rollout lies in the packed rows
        now, then, seen = (torch.zeros(len(replies), LONGEST) for _ in range(3))
        for i, at in enumerate(places):
            now[i, :len(at)], then[i, :len(at)], seen[i, :len(at)] = torch.tensor(np.asarray(lp)[tuple(at.T)]), torch.tensor(old[i]).float(), 1
        now.requires_grad_(True)
        found, _ = verl.get_policy_loss_fn(loss)(then, now, torch.tensor(advantages).float()[:, None].expand(-1, LONGEST), seen, average, config)
        found.backward()
        np.testing.assert_allclose(value, found.item(), rtol=1e-5, atol=1e-6)
        pull = np.zeros(lp.shape, np.float32)
        for i, at in enumerate(places): pull[tuple(at.T)] = now.grad[i, :len(at)].numpy()
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(back((pull, np.zeros_like(pull)))[0])): np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_advantages_and_divergences_are_those_of_verl(verl):
    import torch
    rng = np.random.default_rng(0)
    for G in (2, 4, 8):
        rewards = rng.choice([0., 1., .25], (6, G))
        rewards[0] = .25  # nothing to compare
        flat = torch.zeros(6 * G, 3)
        flat[:, -1] = torch.tensor(rewards.ravel())
        of = lambda f, **options: f(flat.clone(), torch.ones(6 * G, 3), np.repeat(np.arange(6), G), **options)[0][:, 0].numpy().reshape(6, G)
        np.testing.assert_allclose(group_advantages(rewards, "verl"), of(verl.compute_grpo_outcome_advantage), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(group_advantages(rewards, "dr_grpo"), of(verl.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(group_advantages(rewards, "rloo"), of(verl.compute_rloo_outcome_advantage), rtol=1e-5, atol=1e-5)
    lp, ref = rng.normal(-2, .5, (2, 40))
    for kind in ("k1", "k2", "k3"): np.testing.assert_allclose(kl(lp, ref, kind), verl.kl_penalty(torch.tensor(lp), torch.tensor(ref), kind), rtol=1e-5)
