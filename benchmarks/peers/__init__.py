"""Steps of this trainer beside TRL's, in processes of their own: `make peers`, then `python -m benchmarks.trainer`."""
