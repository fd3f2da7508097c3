"""Reinforcement learning beside TRL: rollouts, scores under the reference model and one update, with equal settings, in turns in one process.

Both sides run GRPO with a KL term on the embedded model: the same prompts, rollouts, length, learning rate and reward; all weights are trained in float32. Tokens are those that the policy generated.
Prompts are short, or as long as a question with an instruction or a worked example before it."""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import machine
import pandas as pd
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

import synthlab.training.grpo as ours
import synthlab.training.sft as sft
from synthlab.core import new_task
from synthlab.lm.jaxlm import embedded_folder
from synthlab.lm.local import LocalLM

HERE = Path(__file__).parent
RATE, KL = 1e-6, .04
SUBJECTS = ["a lighthouse", "two brothers", "a train at night", "the first snow", "a lost key", "an old map", "a garden", "the sea"]
SHORT = [f"Write a long story about {s}." for s in SUBJECTS]
ADVICE = ["Begin in the middle of something that is happening, and let the reader find out who is there and why.", "Give each person a wish of their own and something that stands in the way of it.", "Name things by their plain names, and prefer what can be seen and heard to what is thought.",
          "Let people speak as they would, in short sentences, and do not explain what they have just said.", "Change the place or the hour when nothing more can happen where they are.", "Use the weather only where somebody gets wet.",
          "Keep the tense in which the story begins, and the person who tells it.", "When two sentences say the same, strike out the longer one.", "Let the end follow from what was there at the beginning, so that a second reading finds it.", "Do not stop at a moral, and do not wake anybody from a dream."]
LONG = [" ".join(["Here is advice on writing.", *ADVICE, s]) for s in SHORT]


def spread(text: str) -> float: return len(set(text)) / (1 + len(text))


class Clock:
    "Adds up the seconds spent in functions, by name."

    def __init__(self): self.seconds = {}

    def wrap(self, owner, name, label):
        inner = getattr(owner, name)
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try: return inner(*args, **kwargs)
            finally: self.seconds[label] = self.seconds.get(label, 0) + time.perf_counter() - start
        setattr(owner, name, timed)
        return lambda: setattr(owner, name, inner)


def run_ours(lm, prompts, args, seed: int, clock: Clock):
    "Steps of our trainer: seconds and tokens of each but the first."
    sampler = ours.Sampler(args.tasks, args.rollouts, max_tokens=args.tokens)
    done = ours.train_rl(lm, [new_task(p) for p in prompts], ours.Method("random"), algorithm=ours.Algorithm(kl=KL), sampler=sampler, steps=args.steps + 1, seed=seed, progress="",
                         reward=lambda groups, refs: [[spread(r.text) for r in g.rollouts] for g in groups], optimizer=sft.Optimizer(RATE, "constant"))
    return list(zip(done.history.seconds[1:], done.history.policy_tokens[1:]))


class Steps(TrainerCallback):
    def __init__(self): self.starts, self.seconds = None, []
    def on_step_begin(self, *_, **__): self.starts = time.perf_counter()
    def on_step_end(self, *_, **__): self.seconds.append(time.perf_counter() - self.starts)


def run_trl(folder, prompts, args, seed: int, clock: Clock):
    set_seed(seed)
    counted, steps = [], Steps()
    def reward(completions, completion_ids, **_):
        counted.append(sum(map(len, completion_ids)))
        return [spread(c[0]["content"]) for c in completions]
    batch = args.tasks * args.rollouts
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(out, per_device_train_batch_size=batch, num_generations=args.rollouts, max_completion_length=args.tokens, learning_rate=RATE, lr_scheduler_type="constant", beta=KL, loss_type="grpo",
                            max_steps=args.steps + 1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1000, disable_tqdm=True, seed=seed)
        rows = Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in prompts])
        trainer = GRPOTrainer(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), reward, config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[steps])
        clock.wrap(trainer, "_generate", "rollouts")
        clock.wrap(trainer, "_generate_and_score_completions", "rollouts and scores")
        trainer.train()
    return list(zip(steps.seconds[1:], counted[1:]))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--tasks", type=int, default=2)
    p.add_argument("--rollouts", type=int, default=8)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--steps", type=int, default=2, help="measured steps a turn; one more comes first and is not counted")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--out", type=Path, default=HERE.parent.parent / "nbs" / "results" / "51_grpo_bench.csv")
    args = p.parse_args()
    folder = embedded_folder()
    table = pd.concat([compare(LocalLM(folder), folder, prompts, args) for prompts in (SHORT, LONG)])
    table.to_csv(args.out, index=False, float_format="%.4g")


def compare(lm, folder, prompts, args) -> pd.DataFrame:
    "Both sides in turns: tokens a second, and where the time goes."
    clocks, found = {"synthlab": Clock(), "trl": Clock()}, {"synthlab": [], "trl": []}
    length = statistics.mean(len(lm.encode(new_task(p).messages)) for p in prompts)
    undo = [clocks["synthlab"].wrap(owner, name, label) for owner, name, label in ((ours, "sample", "rollouts"), (ours, "score_replies", "scores"), (sft._Run, "update", "update"))]
    for turn in range(args.repeats):
        found["synthlab"] += run_ours(lm, prompts, args, turn, clocks["synthlab"])
        found["trl"] += run_trl(folder, prompts, args, turn, clocks["trl"])
    for u in undo: u()
    c = clocks["trl"].seconds
    c["scores"] = c.pop("rollouts and scores") - c["rollouts"]
    table = pd.DataFrame([{"prompt_tokens": length, "framework": name, "tokens_per_s": statistics.median(n / s for s, n in steps), "seconds_a_step": statistics.median(s for s, _ in steps), "tokens_a_step": statistics.mean(n for _, n in steps), "steps": len(steps),
                           **{f"{part}_s": clocks[name].seconds.get(part, float("nan")) / (args.repeats * (args.steps + 1)) for part in ("rollouts", "scores", "update")}, "machine": machine.name()} for name, steps in found.items()])
    print(table.drop(columns="machine").round(2).to_string(index=False))
    rate = table.set_index("framework").tokens_per_s
    print(f"prompts of {length:.0f} tokens: {rate['synthlab'] / rate['trl']:.2f} x TRL (must 3, goal 5)", flush=True)
    return table


if __name__ == "__main__": main()
