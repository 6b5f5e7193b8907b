"""Seeded generators of chat documents. Every generator is a function of a `random.Random`."""
