"""Checkpoints, their weights, and the forward pass that runs on them."""
