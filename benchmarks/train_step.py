"""SFT and reward-model steps against TRL's trainers and a bare PyTorch loop on a model as nanoGPT writes it.

    python benchmarks/train_step.py                      4 layers of 256, vocabulary 4096: SFT, then reward pairs
    python benchmarks/train_step.py --shape gpt2-small   12 layers of 768, vocabulary 50257: SFT against the bare loop
    --trl DIR: where `pip install --no-deps --target DIR trl==1.12.0` put it; without it only the bare loop runs

A step: 16 sequences of up to 64 tokens (or 32 answers, best against worst), forward, backward, clipping, AdamW. Ratios
are of 4 steps on the same batches. The bare loop pads to the longest of the batch, as it must.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from paired import ceilings, compare
from tokenizers import Tokenizer, models
from torch import nn

from minirlhf.data import Example
from minirlhf.evaluate import score_sequences
from minirlhf.heads import RewardModel
from minirlhf.loss import ranking_loss
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.optim import adamw
from minirlhf.pretrained import save_pretrained
from minirlhf.rollout import label_logprobs

SHAPES = {"small": (4, 4, 256, 4096), "gpt2-small": (12, 12, 768, 50257)}
BATCH, LONGEST, STEPS = 16, 64, 4
ADAM = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


class Bare(nn.Module):
    """GPT-2 in the way of nanoGPT: nn.Linear, one fused attention, tied head."""

    def __init__(self, L: int, H: int, C: int, V: int) -> None:
        super().__init__()
        self.H = H
        self.wte, self.wpe, self.norm = nn.Embedding(V, C), nn.Embedding(LONGEST, C), nn.LayerNorm(C)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"n1": nn.LayerNorm(C), "qkv": nn.Linear(C, 3 * C), "out": nn.Linear(C, C),
                           "n2": nn.LayerNorm(C), "up": nn.Linear(C, 4 * C), "down": nn.Linear(4 * C, C)})
            for _ in range(L)
        )  # fmt: skip
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids):
        B, T = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(T))
        for b in self.blocks:
            q, k, v = (t.view(B, T, self.H, -1).transpose(1, 2) for t in b["qkv"](b["n1"](x)).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + b["out"](y.transpose(1, 2).flatten(2))
            x = x + b["down"](F.gelu(b["up"](b["n2"](x)), approximate="tanh"))
        return self.norm(x)


def sequences(V: int, n: int, *, ragged: bool = True) -> list[list[int]]:
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(LONGEST // 4, LONGEST + 1, (n,), generator=rng).tolist() if ragged else [LONGEST] * n
    return [torch.randint(2, V, (k,), generator=rng).tolist() for k in lengths]


def our_sft(model, data):
    optimizer = adamw(model.named_parameters(), **ADAM)

    def run():
        for i in range(0, len(data), BATCH):
            texts = [Example(s, [False] * 8 + [True] * (len(s) - 8)) for s in data[i : i + BATCH]]
            logprobs, labels = label_logprobs(model, texts)
            (-logprobs.sum() / labels.sum()).backward()
            step(model, optimizer)

    return run


def bare_sft(model, data):
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM, fused=True)

    def run():
        for i in range(0, len(data), BATCH):
            ids, labels = padded(data[i : i + BATCH])
            labels[:, :8] = -100
            logits = F.linear(model(ids), model.wte.weight)[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
            step(model, optimizer)

    return run


def our_reward(model, data):
    optimizer = adamw(model.named_parameters(), **ADAM)
    ranks = torch.tensor([[1, 2]]).expand(BATCH, 2)

    def run():
        for i in range(0, len(data), 2 * BATCH):
            scores = score_sequences(model, data[i : i + 2 * BATCH], BATCH)
            ranking_loss(scores.view(BATCH, 2), ranks).mean().backward()
            step(model, optimizer)

    return run


def bare_reward(model, data):
    score = nn.Linear(model.wte.weight.shape[1], 1, bias=False)
    optimizer = torch.optim.AdamW([*model.parameters(), *score.parameters()], **ADAM, fused=True)

    def run():
        for i in range(0, len(data), 2 * BATCH):
            ids, labels = padded(data[i : i + 2 * BATCH])
            last = (labels >= 0).sum(1) - 1
            scores = score(model(ids)[torch.arange(len(ids)), last])[:, 0].view(BATCH, 2)
            F.softplus(scores[:, 1] - scores[:, 0]).mean().backward()
            step(model, optimizer)

    return run


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    return ids, torch.tensor([r + [-100] * (width - len(r)) for r in rows])


def step(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class TRL:
    """A trainer over the same batches in the same order, made anew for each measurement on a model that goes on."""

    def __init__(self, folder: Path, data: list[list[int]], V: int, kind: str):
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t2"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1")
        if kind == "sft":
            self.model = AutoModelForCausalLM.from_pretrained(folder)
            masks = [[0] * 8 + [1] * (len(s) - 8) for s in data]
            self.data = Dataset.from_dict({"input_ids": data, "completion_mask": masks})
        else:
            self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
            self.data = Dataset.from_dict({"chosen_ids": data[::2], "rejected_ids": data[1::2]})
        self.model.config.pad_token_id = 0
        self.folder, self.kind = folder, kind

    def prepare(self):
        import trl

        name = "SFT" if self.kind == "sft" else "Reward"
        config = getattr(trl, f"{name}Config")(
            output_dir=str(self.folder / "run"), per_device_train_batch_size=BATCH, max_steps=STEPS, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, optim="adamw_torch_fused", max_length=None,
            train_sampling_strategy="sequential", **({"completion_only_loss": True} if self.kind == "sft" else {}),
        )  # fmt: skip
        self.trainer = getattr(trl, f"{name}Trainer")(
            model=self.model, args=config, train_dataset=self.data, processing_class=self.tokenizer
        )

    def __call__(self) -> None:
        self.trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--trl")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if args.trl:
        sys.path.insert(0, args.trl)
    ceiling = ceilings()[torch.float32]
    L, H, C, V = SHAPES[args.shape]
    config = ModelConfig(family="gpt2", vocab_size=V, n_layer=L, n_head=H, d_model=C, max_seq_len=LONGEST)
    policy = CausalLM(config, rng=torch.Generator().manual_seed(0))
    data = sequences(V, STEPS * BATCH, ragged=args.shape == "small")
    pairs = sequences(V, STEPS * BATCH * 2)
    with tempfile.TemporaryDirectory() as name:
        sft, reward, scored = Path(name) / "sft", Path(name) / "rm", RewardModel.from_causal_lm(policy)
        save_pretrained(policy, sft)
        save_pretrained(scored, reward)
        rivals = {"bare loop": bare_sft(Bare(L, H, C, V), data)}
        if args.trl:
            rivals["TRL 1.12.0"] = TRL(sft, data, V, "sft")
        goals = {"bare loop": 1.0, "TRL 1.12.0": 1.3}
        found = compare(f"SFT step, {args.shape}", our_sft(policy, data), rivals, runs=args.runs, target=goals)
        flops = 6 * sum(p.numel() for n, p in policy.named_parameters() if "pos" not in n) * sum(map(len, data))
        print(
            f"  model FLOPs (6 per parameter and real token): {flops / found['ours'] / ceiling:.0%} of torch's products"
        )
        if args.shape == "small":
            rivals = {"bare loop": bare_reward(Bare(L, H, C, V), pairs)}
            if args.trl:
                rivals["TRL 1.12.0"] = TRL(reward, pairs, V, "reward")
            goals["TRL 1.12.0"] = 1.15
            compare(f"reward step, {args.shape}", our_reward(scored, pairs), rivals, runs=args.runs, target=goals)


if __name__ == "__main__":
    main()
