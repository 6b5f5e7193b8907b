#!/usr/bin/env bash
# What `make demo` shows: a story, then a question answered with thinking.
# Usage: demo.sh LATENTCORE
set -euo pipefail

latentcore=$1

show() {
  printf '\n$ latentcore'
  printf ' %q' "$@"
  printf '\n\n'
  "$latentcore" "$@" </dev/null
}

show chat --prompt "Tell me a story about a fox." --max-tokens 400 --seed 1
show chat --think --prompt "What is 123 + 456?" --max-tokens 300 --seed 1
