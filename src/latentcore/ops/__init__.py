"""The native ops: one typed Python function each, and nothing else calls `torch.ops.latentcore`."""
