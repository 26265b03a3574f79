"""The training loop and all it consists of: packing, steps, optimizer, checkpoints, gates, several processes.

Only this package divides losses, clips gradients, steps and saves; objectives return sums (decision 0001).
"""
