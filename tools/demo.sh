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

show generate --prompt "Once upon a time" --max-tokens 160 --seed 1
show chat --think --prompt "What is 17 + 25?" --max-tokens 200 --seed 1
