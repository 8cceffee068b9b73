"""A lean RLHF trainer that is read top to bottom.

Reading order, which is also the import order: config, types, data, attention, model, forward, rollout, reward, optim,
checkpoint, log, layout, advantages, losses, evaluation, watch, then one file a command. Nothing is imported here:
`import rlhf` costs nothing.
"""
