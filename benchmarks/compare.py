"""PPO and its neighbours side by side, all from one SFT model, judged by one reward model: docs/objectives.md.

python benchmarks/compare.py [SEED ...]                     the built-in task; by default seeds 0 1 2, a process each
python benchmarks/compare.py --data reviews_zh_ranked.tsv   the Chinese reviews, after the presets' first two stages

Every method of the built-in task sees 25,600 answers: PPO and the like draw them from the policy as it learns; DPO,
chosen-only and RWR get them as 12,800 pairs that the labeler judged (the latter two less 256 held out), best-of-n
as 3,200 lists of 8 of which the reward model takes the best. All are measured on the same 1,024 prompts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from minirlhf import review_world, stage
from minirlhf.config import PPOConfig, RMConfig, load_config
from minirlhf.data import encode_sft
from minirlhf.evaluate import EXAM, examine, score_texts, sft_loss, summary
from minirlhf.pretrained import load_causal_lm, load_reward_model
from minirlhf.ptx import HELD_OUT, perplexity

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 25_600  # answers: 100 iterations of 256
K = 8  # answers of a list of best-of-n
SUPERVISED = [
    "--optim.lr",
    "5e-4",
    "--sft.minibatch_size",
    "64",
    "--data.holdout",
    "256",
    "--data.on_bad_row",
    "drop",
]  # an answer without words teaches nothing
GROUPS = ["--ppo.answers_per_prompt", "4", "--ppo.advantage"]
METHODS = {  # name: script, settings, file it learns from
    "chosen-only": ("sft", ["--sft.objective", "chosen", "--run.steps", "200", *SUPERVISED], "pairs"),
    "RWR": ("sft", ["--sft.objective", "rwr", "--run.steps", "400", *SUPERVISED], "pairs"),
    "best of 8, learnt": ("sft", ["--run.steps", "200", *SUPERVISED], "best"),
    "DPO": ("dpo", ["--run.steps", "200", "--data.size", str(BUDGET // 2)], ""),
    "REINFORCE": ("ppo", ["--ppo.advantage", "reinforce"], ""),
    "RLOO": ("ppo", [*GROUPS, "rloo"], ""),
    "GRPO": ("ppo", [*GROUPS, "grpo"], ""),
    "A2C": ("ppo", ["--ppo.clip_range", "inf", "--ppo.epochs", "1", "--ppo.minibatch_size", "256",
                    "--ppo.microbatch_size", "256", "--optim.lr", "2e-3"], ""),
    "PPO": ("ppo", [], ""),
    "PPO-ptx": ("ppo", ["--ppo.ptx_coef", "1"], ""),
}  # fmt: skip
REVIEWS = {
    "DPO": ("dpo", ["--run.steps", "136", "--data.holdout", "400", "--dpo.minibatch_size", "16",
                    "--dpo.microbatch_size", "4"], ""),
    "RLOO": ("ppo", [*GROUPS, "rloo"], ""),
    "PPO": ("ppo", [], ""),
}  # fmt: skip
COLUMNS = ("method", "gold", "score", "KL, nats", "tokens", "different", "base perplexity", "seconds")


def script(folder, name, *settings):
    """Seconds that a script took in `folder`, on one thread."""
    began = time.perf_counter()
    argv = [sys.executable, ROOT / f"train_{name}.py", *settings, "--run.threads", "1"]
    subprocess.run(argv, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_data(folder, seed):
    """pairs.jsonl and best.jsonl; the seconds of each."""
    began = time.perf_counter()
    config = load_config(RMConfig, ["--run.seed", str(seed), "--model.path", str(folder / "runs/sft/final")])
    policy = stage.load(config.model.path, load_causal_lm, key="model.path", made_by="train_sft.py")
    pairs = stage.judged_pairs(config, policy, BUDGET // 2, "compare")
    write_lines(
        folder / "pairs.jsonl", [{"prompt": p.prompt, "responses": p.responses, "ranks": p.ranks} for p in pairs]
    )
    drawn = time.perf_counter()
    prompts = [p for _ in range(BUDGET // K // 8) for p in review_world.prompts()]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    command = [sys.executable, "-m", "minirlhf.candidates", "runs/sft/final", "--k", str(K), "--prompts", "prompts.txt",
               "--max_new_tokens", str(config.sample.max_new_tokens), "--seed", str(seed)]  # fmt: skip
    made = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines()
    judge = stage.load(folder / "runs/rm/final", load_reward_model, key="reward.path", made_by="train_rm.py")
    best = []
    for task in map(json.loads, made):
        asked = [task["prompt"]] * len(task["responses"])
        scores = score_texts(judge.model, judge.tokenizer, judge.template, asked, task["responses"])
        best.append({"prompt": task["prompt"], "completion": task["responses"][scores.index(max(scores))]})
    write_lines(folder / "best.jsonl", best)
    return {"pairs": drawn - began, "best": time.perf_counter() - drawn, "": 0.0}


def measure(folder, settings):
    """Gold, score, KL, length, distinct answers of a saved policy, and perplexity of texts that SFT did not see."""
    config = load_config(PPOConfig, settings)
    roles, loaded, _ = stage.ppo_roles(config)
    roles.policy.load_state_dict(load_causal_lm(folder).state_dict())
    prompts = stage.ppo_prompts(config, None, loaded)[1]
    sampling, asked = stage.sampling(config.sample, loaded), [prompts[i % len(prompts)] for i in range(EXAM)]
    records = examine(roles, asked, loaded.tokenizer, sampling, stage.gold_reward(config), seed=config.run.seed)
    found = summary(records)
    if "gold" in found:
        texts = review_world.corpus(HELD_OUT, seed=config.run.seed, purpose="corpus/val")
        examples = encode_sft(texts, loaded.tokenizer, loaded.template, loaded.model.config.max_seq_len)[0]
        found["perplexity"] = perplexity(sft_loss(roles.policy, examples, 128))
    return found


def built_in(seed):
    """{method: what was measured} of one seed."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of what it starts
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        of_seed = ["--run.seed", str(seed)]
        seconds = {"SFT": script(folder, "sft", *of_seed)}
        script(folder, "rm", *of_seed)
        data = make_data(folder, seed)
        for name, (stage_, settings, file) in METHODS.items():
            given = ["--model.path", "runs/sft/final", *(["--data.path", f"{file}.jsonl"] if file else [])]
            seconds[name] = data[file] + script(folder, stage_, *of_seed, *given, *settings, "--run.dir", name)
        judge = [
            "--model.path",
            str(folder / "runs/sft/final"),
            "--reward.path",
            str(folder / "runs/rm/final"),
            *of_seed,
        ]
        where = {name: folder / ("runs/sft" if name == "SFT" else name) / "final" for name in seconds}
        return {name: measure(where[name], judge) | {"seconds": seconds[name]} for name in seconds}


def reviews(path):
    """{method: what was measured} on the Chinese reviews."""
    preset = str(ROOT / "minirlhf/presets/reviews_zh_ppo.toml")
    seconds = {"SFT": 0.0}
    with tempfile.TemporaryDirectory() as place:
        for name, (stage_, settings, _) in REVIEWS.items():
            given = ["--model.path", "runs/reviews_zh/sft/final", "--data.path", path] if stage_ == "dpo" else [preset]
            seconds[name] = script(".", stage_, *given, *settings, "--run.dir", f"{place}/{name}")
        where = {name: f"{place}/{name}/final" for name in REVIEWS} | {"SFT": "runs/reviews_zh/sft/final"}
        return {name: measure(where[name], [preset]) | {"seconds": seconds[name]} for name in seconds}


def row(name, runs):
    """A line of the table: means over the seeds."""
    mean = {k: sum(run[k] for run in runs) / len(runs) for k in runs[0]}
    gold, perplex = (f"{mean[k]:.2f}" if k in mean else "–" for k in ("gold", "perplexity"))
    return (f"| {name} | {gold} | {mean['score']:.2f} | {mean['kl']:.1f} | {mean['length']:.1f} | "
            f"{mean['distinct_frac']:.0%} | {perplex} | {mean['seconds']:.0f} |")  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--data", default="")
    args = parser.parse_args()
    if args.data:
        found = [reviews(args.data)]
    else:
        with ProcessPoolExecutor(len(args.seeds)) as pool:
            found = list(pool.map(built_in, args.seeds))
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name in found[0]:
        print(row(name, [of_seed[name] for of_seed in found]))
    if not args.data:
        lower = sum(of_seed["PPO-ptx"]["perplexity"] < of_seed["PPO"]["perplexity"] for of_seed in found)
        print(f"\nPPO-ptx has the lower base perplexity in {lower} of {len(found)} seeds")
        print("gold by seed: " + "; ".join(f"{name} " + " ".join(f"{run[name]['gold']:.2f}" for run in found)
                                           for name in found[0]))  # fmt: skip


if __name__ == "__main__":
    main()
