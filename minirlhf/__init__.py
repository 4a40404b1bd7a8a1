"""minirlhf: supervised fine-tuning, reward model and PPO from scratch, small enough to read."""
