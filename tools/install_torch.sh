#!/usr/bin/env bash
# Installs the PyTorch of constraints.txt: from INDEX, if given, the build without CUDA.
# Usage: install_torch.sh PYTHON INDEX
set -euo pipefail

python=$1
index=$2
pip=("$python" -m pip --disable-pip-version-check install -qq)
version=$(sed -n 's/^torch==//p' "$(dirname "$0")/../constraints.txt")

if [ -n "$index" ]; then
  "${pip[@]}" --extra-index-url "$index" "torch==$version+cpu"
else
  "${pip[@]}" "torch==$version"
fi
