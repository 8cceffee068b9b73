"""A lean RLHF trainer that is read top to bottom.

Reading order, which is also the import order: config, types, data, model, rollout, reward, advantages, losses, optim,
checkpoint, log, then one file a command. Nothing is imported here: `import rlhf` costs nothing.
"""
