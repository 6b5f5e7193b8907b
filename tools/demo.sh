#!/usr/bin/env bash
# What `make demo` shows: a story, then a question answered with thinking.
# Usage: demo.sh LATENTCORE
set -euo pipefail

latentcore=$1

# What is run stands above what comes of it, bold on a terminal.
show() {
  local word bold='' plain=''
  if [ -t 1 ]; then bold=$'\e[1m' plain=$'\e[0m'; fi
  printf '\n%s$ latentcore' "$bold"
  for word in "$@"; do
    case $word in
      *' '*) printf ' "%s"' "$word" ;;
      *) printf ' %s' "$word" ;;
    esac
  done
  printf '%s\n\n' "$plain"
  "$latentcore" "$@" </dev/null
}

show chat --prompt "Tell me a story about a fox." --max-tokens 400 --seed 1
show chat --think --prompt "What is 123 + 456?" --max-tokens 300 --seed 1
