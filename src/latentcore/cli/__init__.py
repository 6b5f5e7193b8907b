"""The command line. Each command has a file of its own; heavy imports wait until it runs."""
