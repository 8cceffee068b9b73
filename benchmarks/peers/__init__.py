"""A whole PPO step of this trainer beside TRL's: `make peers`, then `python -m benchmarks.peers.ppo_step`."""
