#!/usr/bin/env bash
# Runs the test suite on a machine without network, compiler or make, several files at a time.
# Usage: suite_on.sh SITE OUTPUT SHARDS [TEST_FILE_OR_FOLDER...]
#
# SITE     folder with the packages of the extra `test` that the machine's Python lacks
# OUTPUT   folder for what the shards print: shard-N.log, and failures.txt where something failed
# SHARDS   how many pytest processes run side by side, each on its own share of the processors
#
# The library must have been built into src/latentcore already (any x86-64 machine's will do).
# PYTHON (python3) names the interpreter, PYTEST_ARGS more arguments (`-m slow`). Left out are the
# tests of packaging, which need pip and a compiler.
set -uo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $*" >&2; exit 2; }
[ $# -ge 3 ] || fail "usage: suite_on.sh SITE OUTPUT SHARDS [TEST_FILE_OR_FOLDER...]"
[ -d "$1" ] || fail "$1 is not a folder"
[[ $3 =~ ^[1-9][0-9]*$ ]] || fail "SHARDS must be a number above zero, not '$3'"
site=$(realpath "$1") shards=$3
mkdir -p "$2" && out=$(realpath "$2") || fail "cannot write $2"
shift 3
[ $# -gt 0 ] || set -- tests
python=${PYTHON:-python3}
read -ra more <<<"${PYTEST_ARGS:-}"
export PYTHONPATH=$PWD/src:$PWD:$site PYTHONDONTWRITEBYTECODE=1

[ -e src/latentcore/_C.abi3.so ] || fail "src/latentcore/_C.abi3.so is missing: build it and bring it along"
"$python" - <<'END' || exit 2
import importlib, os, platform, sys

needed = "pytest pytest_timeout hypothesis httpx2 openai psutil safetensors transformers tiktoken"
needed += " tokenizers fastapi uvicorn typer rich prometheus_client huggingface_hub xgrammar"
missing = []
for name in needed.split():
    try:
        importlib.import_module(name)
    except Exception as error:
        missing.append(f"{name} ({type(error).__name__}: {error})")
if missing:
    sys.exit("error: does not import: " + "; ".join(missing))
import torch, transformers
from latentcore.ops import runtime

print(f"Python {platform.python_version()}, torch {torch.__version__}, "
      f"transformers {transformers.__version__}, {len(os.sched_getaffinity(0))} processors, "
      f"tiers {' '.join(runtime.cpu_features())}")
END

# Whole cores to each shard: its tests' threads spin, and two on one core would wait for each other.
mapfile -t shares < <("$python" - "$shards" <<'END'
import os, sys
from pathlib import Path


def core(cpu: int) -> tuple[int, int]:
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        package, number = (int((topology / f"{kind}_id").read_text())
                           for kind in ("physical_package", "core"))
    except (OSError, ValueError):
        return 0, cpu
    return package, number


cpus, shards = os.sched_getaffinity(0), int(sys.argv[1])
cores = sorted({core(cpu) for cpu in cpus})
for shard in range(shards):
    mine = cores[shard * len(cores) // shards : (shard + 1) * len(cores) // shards]
    mine = mine or [cores[shard % len(cores)]]
    print(",".join(str(cpu) for cpu in sorted(cpus) if core(cpu) in mine))
END
)

# The files, long ones first: the last to end should be short.
queue=$(mktemp -d)
rm -f "$out"/shard-*.log "$out/failures.txt"
find "$@" -name 'test_*.py' -not -path '*/packaging/*' -printf '%s %p\n' | sort -rn | cut -d' ' -f2- |
  awk '/test_(against_transformers|ops|oracle)\.py$/ { print; next } { rest = rest $0 "\n" }
       END { printf "%s", rest }' >"$queue/files"
[ -s "$queue/files" ] || fail "no test files in $*"

# Takes files that no other shard has taken until none is left.
shard() {
  local number=$1 log=$out/shard-$1.log rc file
  while read -r file; do
    mkdir "$queue/${file//\//+}" 2>/dev/null || continue
    echo "== $file" >>"$log"
    taskset -c "${shares[$number]}" "$python" -m pytest -q -p no:cacheprovider --color=no \
      --basetemp="$queue/tmp-$number" ${more[@]+"${more[@]}"} "$file" </dev/null >>"$log" 2>&1
    rc=$?
    rm -rf "$queue/tmp-$number"
    # 5: nothing in the file is selected. Else the last line has the counts, or pytest itself died.
    [ $rc -le 1 ] || [ $rc = 5 ] || echo "DIED $file: exit status $rc" >>"$log"
    echo "$file" >>"$queue/done-$number"
  done <"$queue/files"
}

# "12 passed, 1 failed in 3.40s" of each log, added up.
counts() {
  cat "$@" 2>/dev/null | awk '
    / in [0-9.]+s( \(.*\))?$/ { n = split($0, part, /[ ,]+/)
      for (i = 1; i < n; i++)
        if (part[i] ~ /^[0-9]+$/ && part[i + 1] ~ /^(passed|failed|skipped|errors?|x[a-z]+)$/)
          sum[part[i + 1] == "errors" ? "error" : part[i + 1]] += part[i] }
    /^DIED / { died++ }
    END { printf "%d passed, %d failed, %d errors, %d died, %d skipped", sum["passed"],
          sum["failed"] + sum["xpassed"], sum["error"], died, sum["skipped"] }'
}

summary() {
  local n files bad
  trap - TERM INT
  for ((n = 0; n < shards; n++)); do
    files=$(cat "$queue/done-$n" 2>/dev/null | wc -l)
    echo "shard $n (processors ${shares[$n]}): $files files, $(counts "$out/shard-$n.log")"
  done
  grep -hE '^(FAILED|ERROR|DIED) ' "$out"/shard-*.log >"$out/failures.txt"
  cat "$queue"/done-* 2>/dev/null | sort | comm -13 - <(sort "$queue/files") |
    sed 's/^/NOT FINISHED /' >>"$out/failures.txt"
  bad=$(wc -l <"$out/failures.txt")
  cat "$out/failures.txt"
  echo "total: $(cat "$queue"/done-* 2>/dev/null | wc -l) of $(wc -l <"$queue/files") files," \
    "$(counts "$out"/shard-*.log) in ${SECONDS} s"
  [ "$bad" -gt 0 ] || rm "$out/failures.txt"
  rm -rf "$queue"
  [ "$bad" = 0 ]
}

# Cut off (`timeout 500 suite_on.sh ...`), it still says how far it came.
stop() {
  local workers running
  workers=$(jobs -p)
  running=$(ps -o pid= --ppid "$(paste -sd, <<<"$workers")")
  kill $workers $running 2>/dev/null
  wait
  summary
  exit 1
}
trap stop TERM INT
SECONDS=0
for ((n = 0; n < shards; n++)); do shard "$n" & done
wait
summary
