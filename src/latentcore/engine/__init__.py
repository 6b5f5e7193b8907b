"""The engine: requests in, scheduled steps of the model, tokens and text out."""
