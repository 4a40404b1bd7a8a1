"""Peak memory of a PPO step: adapters on one base against four models, each case in a process of its own.

    python benchmarks/lora_memory.py                 GPT-2 small in size, r 8; about two minutes and 6 GB
    python benchmarks/lora_memory.py --n_layer 2     smaller

A step is what train_ppo.py does: a rollout, judged by four roles, then gradients and AdamW. The figure is the largest
resident set of the process (`ru_maxrss`), Python and torch themselves included; beside it, the same without what the
process held before the first model.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from minirlhf import review_world, stage
from minirlhf.adapt import reward_model
from minirlhf.config import LoRASection, ModelSection, PPOConfig, PPOSection, RewardSection, RMConfig
from minirlhf.data import left_padded
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.optim import adamw
from minirlhf.ppo import epoch_plans, ppo_iteration
from minirlhf.pretrained import load_causal_lm, save_pretrained
from minirlhf.rng import generator
from minirlhf.rollout import collect
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

ANSWERS, PROMPT, NEW, MICROBATCH = 8, 16, 32, 4
CASES = {"four": 0, "lora": 8}  # lora.r
LIMIT = 0.45


def peak():
    """Bytes of the largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prepare(folder, n_layer):
    """The base, and both kinds of reward model on it."""
    sizes = {"vocab_size": 50257, "n_head": 12, "d_model": 768, "max_seq_len": 1024}
    base = CausalLM(ModelConfig(family="gpt2", n_layer=n_layer, **sizes), rng=generator(0, "weights"))
    tokenizer, template = Tokenizer.from_words(review_world.words("en")), get_template("plain")
    save_pretrained(base, folder / "base", tokenizer=tokenizer)
    del base
    for case, r in CASES.items():
        config = RMConfig(model=ModelSection(path=str(folder / "base")), lora=LoRASection(r=r))
        made = reward_model(load_causal_lm(folder / "base"), config)
        stage.save(folder / case, stage.Loaded(made, tokenizer, template))


def step(folder, case):
    """One PPO iteration; returns the peak, and the peak before the first model."""
    before = peak()
    options = PPOSection(epochs=1, rollout_size=ANSWERS, minibatch_size=ANSWERS, microbatch_size=MICROBATCH)
    config = PPOConfig(
        model=ModelSection(path=str(folder / "base")), reward=RewardSection(path=str(folder / case)),
        lora=LoRASection(r=CASES[case]), ppo=options,
    )  # fmt: skip
    roles, _, _ = stage.ppo_roles(config)
    named = [(n, p) for model in (roles.policy, roles.value_model) for n, p in model.named_parameters()]
    optimizer = adamw(named, lr=1e-4, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    plans = epoch_plans(torch.full((ANSWERS,), NEW), options, 0, 1)
    prompts, mask = left_padded([[i + 3] * PROMPT for i in range(ANSWERS)], 0, "cpu")
    rollout = collect(roles, prompts, mask, partition=lambda _: plans[0][0], max_new_tokens=NEW, eos_token_id=1,
                      pad_token_id=0, temperature=1.0, rng=generator(0, "sample"))  # fmt: skip
    ppo_iteration(roles.policy, roles.value_model, optimizer, rollout, rollout.scores, plans, options, kl_coef=0.1,
                  temperature=1.0, max_grad_norm=1.0)  # fmt: skip
    moments = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    return {"peak": peak(), "before": before, "moments": moments}


def apart(*argv):
    """What this file prints in a process of its own. The parent stays small: `ru_maxrss` is handed down to a child."""
    return subprocess.run([sys.executable, __file__, *argv], check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--part", choices=("prepare", *CASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "prepare":
        prepare(args.folder, args.n_layer)
        return
    if args.part:
        print(json.dumps(step(args.folder, args.part)))
        return
    with tempfile.TemporaryDirectory() as folder:
        apart("--part", "prepare", "--folder", folder, "--n_layer", str(args.n_layer))
        found = {case: json.loads(apart("--part", case, "--folder", folder)) for case in CASES}
    for case, row in found.items():
        total, own, moments = (n / 2**20 for n in (row["peak"], row["peak"] - row["before"], row["moments"]))
        print(f"{case}: {total:,.0f} MiB, {own:,.0f} without Python and torch; {moments:,.0f} of them moments")
    ratio = found["lora"]["peak"] / found["four"]["peak"]
    print(f"ratio {ratio:.3f} (wanted: at most {LIMIT})")
    sys.exit(ratio > LIMIT)


if __name__ == "__main__":
    main()
