"""Sampling against transformers.generate: same weights, prompts and distribution, 64 new tokens for 16 prompts of 32.

python benchmarks/sampling.py                      4 layers of 256, vocabulary 4096: GPT-2, BLOOM and LLaMA kinds
python benchmarks/sampling.py --shape gpt2-small   12 layers of 768, vocabulary 50257, fp32 and bf16
python benchmarks/sampling.py --profile            and what our time goes into, kernel by kernel
python benchmarks/sampling.py --shape gpt2-small --batch 64     for a GPU, which is used where there is one
"""

import argparse
import tempfile

import torch
from paired import ceilings, compare
from transformers import AutoModelForCausalLM

from minirlhf.generate import generate
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.pretrained import load_causal_lm, save_pretrained

SHAPES = {
    "small": {"vocab_size": 4096, "n_layer": 4, "n_head": 4, "d_model": 256, "max_seq_len": 1024},
    "gpt2-small": {"vocab_size": 50257, "n_layer": 12, "n_head": 12, "d_model": 768, "max_seq_len": 1024},
}
KINDS = {"small": ("gpt2", "bloom", "llama"), "gpt2-small": ("gpt2",)}
GOALS = {("small", torch.float32): 3.0, ("gpt2-small", torch.float32): 1.6, ("gpt2-small", torch.bfloat16): 2.4}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def contenders(shape: str, kind: str, dtype: torch.dtype, batch: int, prompt: int, new: int):
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(
            CausalLM(ModelConfig(family=kind, **SHAPES[shape]), rng=torch.Generator().manual_seed(0)), folder
        )
        mine = load_causal_lm(folder, dtype=dtype).requires_grad_(False)
        model = (mine if isinstance(mine, CausalLM) else mine.model).to(DEVICE)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
    ids = torch.randint(SHAPES[shape]["vocab_size"], (batch, prompt), generator=torch.Generator().manual_seed(1))
    ids = ids.to(DEVICE)
    mask = torch.ones_like(ids)

    def ours():
        made = generate(
            model,
            ids,
            mask,
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            rng=torch.Generator().manual_seed(2),
        )
        assert made.tokens.shape == (batch, new)

    @torch.no_grad()
    def transformers():
        made = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        assert made.shape == (batch, prompt + new)

    return ours, transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    ceilings((torch.float32, torch.bfloat16))
    for dtype in (torch.float32, torch.bfloat16) if args.shape == "gpt2-small" else (torch.float32,):
        for kind in KINDS[args.shape]:
            ours, transformers = contenders(args.shape, kind, dtype, args.batch, args.prompt, args.new)
            label = f"{args.shape} {kind} {str(dtype)[6:]} batch {args.batch}"
            goal = {"transformers": GOALS[args.shape, dtype] if DEVICE == "cpu" else 5.0}
            compare(label, ours, {"transformers": transformers}, runs=args.runs, target=goal)
            if args.profile:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                    ours()
                print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))


if __name__ == "__main__":
    main()
