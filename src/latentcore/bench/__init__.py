"""Measures models and kernels against what the machine allows."""
