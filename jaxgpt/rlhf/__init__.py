"""Reinforcement learning from human feedback: reward models, rollouts, PPO, DPO, and how answers are judged."""
