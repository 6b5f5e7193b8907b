"""Training code of the demo model: data builders, model, run, evaluation, export."""
