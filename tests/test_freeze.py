"""What does not learn: parameters by their names, and the blocks that LISA has not drawn."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_scripts import TINY, digests, metrics, script

from minirlhf.adapt import freeze
from minirlhf.errors import UsageError
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.optim import adamw, some_layers
from minirlhf.rng import generator


def model(n_layer=4):
    sizes = {"vocab_size": 11, "d_model": 8, "n_layer": n_layer, "n_head": 2, "max_seq_len": 12}
    return CausalLM(ModelConfig(family="gpt2", **sizes), rng=generator(0, "weights"))


def changed(before, after):
    return {name for name in before if (before[name] != after[name]).any()}


def step(lm, optimizer):
    lm(torch.arange(10).view(2, 5))[..., :5].sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lisa_moves_the_drawn_blocks_and_what_is_in_none(weight_decay):
    lm = model()
    optimizer = adamw(lm.named_parameters(), lr=0.1, weight_decay=weight_decay, betas=(0.9, 0.99), eps=1e-8)
    step(lm, optimizer)  # every block has moments, which must not move the idle ones
    for seed in range(4):
        before = {name: p.detach().clone() for name, p in lm.named_parameters()}
        drawn = torch.randperm(4, generator=generator(seed, "lisa"))[:2].tolist()
        with some_layers(lm.trunk.blocks, 2, generator(seed, "lisa")):
            step(lm, optimizer)
        moved = changed(before, dict(lm.named_parameters()))
        blocks = {int(name.split("blocks.")[1].split(".")[0]) for name in moved if "blocks." in name}
        assert blocks == set(drawn)
        assert {name for name in before if "blocks." not in name} <= moved
        assert all(p.requires_grad for p in lm.parameters())


def test_lisa_gives_the_drawn_blocks_their_whole_gradient():
    whole, some = model(), model()
    whole(torch.arange(10).view(2, 5)).square().sum().backward()
    with some_layers(some.trunk.blocks, 1, generator(3, "lisa")):
        some(torch.arange(10).view(2, 5)).square().sum().backward()
    both = [(p.grad, q.grad) for p, q in zip(some.parameters(), whole.parameters(), strict=True) if p.grad is not None]
    assert len(both) < len(list(whole.parameters()))
    for found, expected in both:
        assert torch.equal(found, expected)


def test_every_block_is_drawn_in_time():
    seen = set()
    for period in range(40):
        lm = model()
        with some_layers(lm.trunk.blocks, 1, generator(0, "lisa", period)):
            seen |= {i for i, block in enumerate(lm.trunk.blocks) if next(block.parameters()).requires_grad}
    assert seen == {0, 1, 2, 3}


def test_freezing_by_name():
    lm = freeze(model(), r"embed|blocks\.[01]\.")
    for name, p in lm.named_parameters():
        assert p.requires_grad != any(word in name for word in ("embed", "blocks.0.", "blocks.1.")), name


@pytest.mark.parametrize(("pattern", "said"), [("nothing", "found in 0"), (".", "not in all"), ("(", "model.freeze")])
def test_patterns_that_freeze_nothing_or_everything(pattern, said):
    with pytest.raises(UsageError, match=said):
        freeze(model(), pattern)


def test_the_scripts_freeze(stages, tmp_path):
    """SFT and PPO leave block 0 as it was; PPO's step 0 is still at KL 0."""
    start = ["--model.path", stages / "runs/sft/final", "--model.freeze", r"blocks\.0\."]
    script("sft", *TINY["sft"], *start, "--run.dir", tmp_path / "sft", cwd=stages)
    script("ppo", *TINY["ppo"], *start, "--run.dir", tmp_path / "ppo", cwd=stages)
    before = load_file(stages / "runs/sft/final/model.safetensors")
    for name in ("sft", "ppo"):
        moved = changed(before, load_file(tmp_path / name / "final/model.safetensors"))
        assert moved == {n for n in before if ".h.0." not in n and not n.startswith("h.0.")}
    assert metrics(tmp_path / "ppo")[0]["objective/kl"] == 0
    assert "model.freeze" in script("sft", *TINY["sft"], "--model.freeze", "nothing", "--run.dir", tmp_path / "x",
                                    cwd=stages, code=2)  # fmt: skip


@pytest.mark.slow
def test_lisa_resumes_bit_for_bit(stages, tmp_path):
    lisa = [*TINY["sft"], "--sft.lisa_layers", "1", "--sft.lisa_every", "4",
            "--run.save_every", "10", "--run.keep", "9"]  # fmt: skip
    script("sft", *lisa, "--run.dir", tmp_path / "whole", cwd=stages)
    script("sft", *lisa, "--run.dir", tmp_path / "cut", cwd=stages)
    for gone in ("final", "checkpoints/step_00000020", "checkpoints/step_00000030"):
        shutil.rmtree(tmp_path / "cut" / gone)
    script("sft", *lisa, "--run.dir", tmp_path / "cut", "--run.resume", "true", cwd=stages)
    assert digests(tmp_path / "cut/final") == digests(tmp_path / "whole/final")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert "lora.r 0" in script("sft", *lisa, "--run.engine", "mini", "--run.dir", tmp_path / "x", cwd=stages, code=2)


def test_lisa_draws_among_blocks_that_learn():
    lm = freeze(model(), r"blocks\.[012]\.")
    with some_layers(lm.trunk.blocks, 1, generator(0, "lisa")):
        assert all(p.requires_grad for p in lm.trunk.blocks[3].parameters())
    assert not any(p.requires_grad for p in lm.trunk.blocks[0].parameters())


def test_lisa_refuses_an_adapter_folder(tmp_path, stages):
    short = ["--run.steps", "1", "--data.size", "64", "--optim.warmup_steps", "0", "--lora.r", "2"]
    script("sft", *short, "--model.path", stages / "runs/sft/final", "--run.dir", tmp_path / "a", cwd=stages)
    line = script("sft", *TINY["sft"], "--model.path", tmp_path / "a/final", "--sft.lisa_layers", "1",
                  "--run.dir", tmp_path / "b", cwd=stages, code=2)  # fmt: skip
    assert "is an adapter" in line
