"""`python -m latentcore` is the `latentcore` command."""

from latentcore.cli.app import program

program()
