"""One PPO iteration of six implementations, in NumPy and by hand: no autograd, no torch, nothing of the library.

    python tests/numpy_ppo.py      writes tests/golden/ppo/PRESET.json

The policy is a bigram table of low rank, logits = E[previous] Hᵀ / τ, the value model a table U[previous], so that
every gradient is a line of algebra: for a token with slope s = ∂loss/∂log π(a),
∂/∂logits = s (onehot(a) - softmax) / τ, ∂/∂E[previous] = ∂/∂logits · H, ∂/∂H = ∂/∂logitsᵀ · E[previous].
"""

import json
from pathlib import Path

import numpy as np

# What each implementation does, in the words of its own code or paper (transcribed apart from minirlhf/presets).
OURS = {
    "slot": "last token", "fit_slot": False, "beta": 0.1, "adaptive": None, "scores": "first", "clip": None,
    "no_eos": None, "scale_rewards": False, "whiten": True, "per_minibatch": False, "ddof": 0, "lam": 0.95,
    "eps": 0.2, "eps_v": 0.2, "vf": 0.5, "mean_of_means": False,
}  # fmt: skip
PEERS = {
    "": OURS,
    "oai2019": OURS | {"slot": "column R-1", "beta": 0.15, "adaptive": (6, 10000), "no_eos": -1.0,
                       "scale_rewards": True, "per_minibatch": True, "vf": 0.1},
    "trl-legacy": OURS | {"beta": 0.2, "adaptive": (6, 10000), "scores": None, "ddof": 1, "vf": 0.1,
                          "mean_of_means": True},
    "trl-v2": OURS | {"slot": "after last", "fit_slot": True, "beta": 0.05, "scores": None, "ddof": 1, "vf": 0.1,
                      "mean_of_means": True},
    "dschat": OURS | {"slot": "after last", "scores": None, "clip": 5, "whiten": False, "vf": 1.0,
                      "mean_of_means": True},
    "openrlhf": OURS | {"beta": 0.01, "scores": None, "clip": 10, "lam": 1.0, "eps_v": 0.5, "vf": 1.0},
    "instructgpt": OURS | {"beta": 0.02, "scores": "mean", "vf": 1.0},
}  # fmt: skip
V, C, B, P, R, TAU = 7, 3, 8, 3, 5, 0.7
LENGTHS = [5, 1, 3, 2, 5, 4, 3, 2]  # up to and including EOS; rows 0 and 4 fill every column, row 0 without EOS
PLANS = [  # two epochs, two optimizer steps each, microbatches of unequal size and length
    [[[1, 3, 6], [0]], [[7, 2], [5, 4]]],
    [[[4, 0], [1, 2]], [[3], [7, 6, 5]]],
]
ADAM = {"lr": 0.03, "betas": (0.9, 0.95), "adam_eps": 1e-8, "decay": 0.01, "max_norm": 0.8}


def make_inputs():
    """A ragged rollout whose old log-probs differ from the policy's, so that some ratios are clipped."""
    rng = np.random.default_rng(7)
    E, H, U = rng.normal(size=(V, C)), rng.normal(size=(V, C)), rng.normal(size=V)
    prompts, responses = rng.integers(2, V, (B, P)), rng.integers(2, V, (B, R))
    for b, n in enumerate(LENGTHS):
        if b != 0:
            responses[b, n - 1] = 1  # EOS
    x = {"E": E, "H": H, "U": U, "prompts": prompts, "responses": responses, "lengths": np.array(LENGTHS)}
    logprobs = forward(x, np.arange(B))[1]
    x["old_logprobs"] = logprobs + 0.3 * rng.normal(size=(B, R))
    x["ref_logprobs"] = x["old_logprobs"] + 0.4 * rng.normal(size=(B, R))
    x["values"] = forward(x, np.arange(B))[2] + 0.3 * rng.normal(size=(B, R))
    x["scores"] = np.array([1.0, -7.0, 12.0, 0.5, 2.0, -0.5, 6.0, -11.0])
    x["has_eos"] = np.arange(B) != 0
    return x


def forward(x, rows):
    """→ token before each action (b, R), its log-prob (b, R), its value (b, R), all probabilities (b, R, V)."""
    tokens = np.concatenate([x["prompts"][rows], x["responses"][rows]], 1)
    before = tokens[:, P - 1 : -1]
    logits = x["E"][before] @ x["H"].T / TAU
    logits = logits - logits.max(-1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    logprobs = np.log(np.take_along_axis(p, x["responses"][rows][..., None], -1)[..., 0])
    return before, logprobs, x["U"][before], p


def whitened(x, mask, ddof, keep_mean):
    """Scaled to variance 1 over the mask, mean removed or kept; 0 elsewhere."""
    mean = x[mask].mean()
    out = (x - mean) / np.sqrt(x[mask].var(ddof=ddof) + 1e-8) + (mean if keep_mean else 0.0)
    return np.where(mask, out, 0.0)


def advantages_of(rewards, values, actions, states, o):
    """Generalized advantage estimation row by row, γ = 1."""
    if o["scale_rewards"]:
        rewards = whitened(rewards, states, o["ddof"], keep_mean=True)
    A = np.zeros_like(rewards)
    for b, row in enumerate(states):
        following = 0.0
        for t in reversed(range(row.sum())):
            after = values[b, t + 1] if t + 1 < row.sum() else 0.0
            following = A[b, t] = rewards[b, t] + after - values[b, t] + o["lam"] * following
    returns = np.where(states, A + values, 0.0)
    return (whitened(A, actions, o["ddof"], keep_mean=False) if o["whiten"] else A), returns


def shaped_scores(x, o):
    """The reward model's scores as they enter the rewards."""
    s = x["scores"]
    if o["scores"]:
        s = s - s.mean()
    if o["scores"] == "first":
        s = s / x["scores"].std()
    if o["clip"]:
        s = np.clip(s, -o["clip"], o["clip"])
    return s if o["no_eos"] is None else np.where(x["has_eos"], s, o["no_eos"])


def shaped_rewards(x, scores, o):
    """→ rewards, where actions are, where states with a value are: (B, R) each."""
    column, n = np.arange(R), x["lengths"][:, None]
    whole, after = o["slot"] == "column R-1", o["slot"] == "after last"
    actions = np.broadcast_to(column >= 0, (B, R)) if whole else column < n
    states = column < n + 1 if after else actions
    rewards = np.where(actions, -o["beta"] * (x["old_logprobs"] - x["ref_logprobs"]), 0.0)
    place = np.full(B, R - 1) if whole else np.minimum(x["lengths"] - (0 if after else 1), R - 1)
    rewards[np.arange(B), place] += scores
    return rewards, actions, states


def microbatch(x, rows, advantages, returns, actions, fitted, n, n_fitted, o):
    """→ Σ policy loss, Σ value loss over tokens, and the gradients of their weighted means."""
    before, logprobs, values, p = forward(x, rows)
    A, old = advantages[rows], x["old_logprobs"][rows]
    ratio = np.exp(logprobs - old)
    near = np.clip(ratio, 1 - o["eps"], 1 + o["eps"])
    policy = -np.minimum(ratio * A, near * A)
    slope = np.where(ratio * A <= near * A, -ratio * A, 0.0)  # a clip that binds leaves no gradient
    wide, v_old = values - returns[rows], x["values"][rows]
    narrow = v_old + np.clip(values - v_old, -o["eps_v"], o["eps_v"]) - returns[rows]
    value = 0.5 * np.maximum(wide**2, narrow**2)
    v_slope = np.where(wide**2 >= narrow**2, wide, np.where(np.abs(values - v_old) < o["eps_v"], narrow, 0.0))

    slope, v_slope = np.where(actions[rows], slope, 0.0) / n, np.where(fitted[rows], v_slope, 0.0) / n_fitted
    by_logit = slope[..., None] * (np.eye(V)[x["responses"][rows]] - p) / TAU  # (b, R, V)
    grads = {"E": np.zeros((V, C)), "H": np.einsum("brv,brc->vc", by_logit, x["E"][before]), "U": np.zeros(V)}
    np.add.at(grads["E"], before, by_logit @ x["H"])
    np.add.at(grads["U"], before, o["vf"] * v_slope)
    return policy[actions[rows]].sum(), value[fitted[rows]].sum(), grads


def adamw(x, grads, moments, t):
    """Each model's gradient cut to max_norm by itself (torch's + 1e-6), then AdamW with decay of every table."""
    for names in (("E", "H"), ("U",)):
        norm = np.sqrt(sum((grads[k] ** 2).sum() for k in names))
        for k in names:
            g = grads[k] * min(1.0, ADAM["max_norm"] / (norm + 1e-6))
            m, v = moments.get(k, (0.0, 0.0))
            (b1, b2), lr = ADAM["betas"], ADAM["lr"]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            moments[k] = m, v
            step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + ADAM["adam_eps"])
            x[k] = x[k] * (1 - lr * ADAM["decay"]) - lr * step


def iterate(inputs, o):
    """The whole iteration → everything worth comparing."""
    x, moments, steps = dict(inputs), {}, []
    scores = shaped_scores(x, o)
    rewards, actions, states = shaped_rewards(x, scores, o)
    fitted = states if o["fit_slot"] else actions
    advantages, returns = (a.copy() for a in advantages_of(rewards, x["values"], actions, states, o))
    for minibatches in PLANS:
        for microbatches in minibatches:
            rows = np.concatenate(microbatches)
            if o["per_minibatch"]:
                columns = (c[rows] for c in (rewards, x["values"], actions, states))
                advantages[rows], returns[rows] = advantages_of(*columns, o)
            total = dict.fromkeys(("E", "H", "U", "policy", "value"), 0.0)
            for index in microbatches:
                n, n_fitted = actions[rows].sum(), fitted[rows].sum()
                if o["mean_of_means"]:
                    n, n_fitted = len(microbatches) * actions[index].sum(), len(microbatches) * fitted[index].sum()
                policy, value, grads = microbatch(x, index, advantages, returns, actions, fitted, n, n_fitted, o)
                for k, g in {"policy": policy, "value": value, **grads}.items():
                    total[k] = total[k] + g
            gradients = {k: total[k] for k in ("E", "H", "U")}
            adamw(x, gradients, moments, len(steps) + 1)
            steps.append(
                {"advantages": advantages[rows].copy(), "returns": returns[rows].copy(), "policy_sum": total["policy"],
                 "value_sum": total["value"], "gradients": gradients, "weights": {k: x[k].copy() for k in gradients}}
            )  # fmt: skip
    n, n_fitted = (sum(mask[np.concatenate(m)].sum() for e in PLANS for m in e) for mask in (actions, fitted))
    kl = np.where(actions, x["old_logprobs"] - x["ref_logprobs"], 0.0).sum(1).mean()
    factor = 1.0
    if o["adaptive"]:
        target, horizon = o["adaptive"]
        factor += np.clip(kl / target - 1, -0.2, 0.2) * B / horizon
    return {
        "scores": scores, "rewards": rewards, "kl": kl, "next_kl_coef": o["beta"] * factor, "first": steps[0],
        "last_weights": steps[-1]["weights"], "policy_loss": sum(s["policy_sum"] for s in steps) / n,
        "value_loss": sum(s["value_sum"] for s in steps) / n_fitted,
    }  # fmt: skip


def plain(x):
    """NumPy → what JSON holds."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return x.tolist() if isinstance(x, np.ndarray | np.generic) else x


def golden(name):
    """The file of one preset."""
    return {
        "function": "ppo.ppo_iteration",
        "source": "independent implementation in NumPy, gradients by hand, fp64",
        "provenance": "closed form",
        "command": "python tests/numpy_ppo.py",
        "convention": PEERS[name],
        "inputs": plain(make_inputs()),
        "expected": plain(iterate(make_inputs(), PEERS[name])),
        "tolerance": "fp64",
    }


def main():
    folder = Path(__file__).parent / "golden/ppo"
    folder.mkdir(exist_ok=True)
    for name in PEERS:
        (folder / f"{name or 'minirlhf'}.json").write_text(json.dumps(golden(name), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
