#!/usr/bin/env bash
# Runs the tests of the native library built with AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: sanitize.sh PYTHON [PYTEST_ARGUMENT...]
#
# The library goes to build/sanitize with a copy of the package beside it; nothing installed changes.
# A finding ends the program: its report is printed at the end. The tests run in two processes.
# Left out: opcheck and fake tensors, which test Python.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(command -v "$1")
shift
PATH=$(dirname "$python"):$PATH
cxx=${CXX:-g++}
build=$PWD/build/sanitize
library() {
  local path
  path=$("$cxx" -print-file-name="$1")
  [ -e "$path" ] || { echo "error: $cxx has no $1: install the sanitizers' libraries" >&2; exit 1; }
  echo "$path"
}
# Python itself is not sanitized, so the run-time has to be there before it; with it the C++ library,
# or exceptions would pass it by.
preload="$(library libasan.so) $(library libstdc++.so.6)"

CXX=$cxx cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$python" -DLATENTCORE_SANITIZE=ON \
  >/dev/null
ninja -C "$build"
grep -q __asan_report "$build/_C.abi3.so" || { echo "error: $build is not sanitized" >&2; exit 1; }
rm -rf "$build/package" "$build"/report.* "$build"/*.log
mkdir -p "$build/package"
cp -r src/latentcore "$build/package/"
rm -f "$build"/package/latentcore/_C*.so
cp "$build/_C.abi3.so" "$build/package/latentcore/"

export PYTHONPATH=$build/package
# Python never gives back what lives as long as it does; torch asks for more memory than there is and
# takes no for an answer.
export ASAN_OPTIONS=log_path=$build/report:detect_leaks=0:allocator_may_return_null=1
export UBSAN_OPTIONS=log_path=$build/report:print_stacktrace=1
tests() {
  LD_PRELOAD=$preload python -m pytest -m "not (slow or peers)" -p no:cacheprovider \
    -k "not (opcheck or fake_tensors or symbolic_shapes)" "$@"
}
status=0
tests tests/ops/test_contract.py tests/ops/test_entry_checks.py tests/ops/test_sanitize.py \
  tests/ops/test_runtime.py tests/ops/test_topology.py tests/models/test_packed_cache.py \
  "$@" >"$build/entry.log" 2>&1 &
entry=$!
trap 'kill "$entry" 2>/dev/null || true' EXIT
tests tests/ops/test_ops.py tests/ops/test_sampling.py tests/quant tests/models/test_runner.py \
  tests/engine/test_native_sampler.py "$@" || status=$?
wait "$entry" || status=$?
cat "$build/entry.log"
for report in "$build"/report.*; do
  [ -e "$report" ] || continue
  head -n 60 "$report" >&2
  status=1
done
[ "$status" -eq 0 ] && echo "no finding" || echo "FAILED: see above" >&2
exit "$status"
