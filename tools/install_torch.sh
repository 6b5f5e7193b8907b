#!/usr/bin/env bash
# Installs the PyTorch of constraints.txt, without CUDA where such a build can be had.
# Usage: install_torch.sh PYTHON INDEX
set -euo pipefail

python=$1
index=$2
pip=("$python" -m pip --disable-pip-version-check install --quiet)
version=$(sed -n 's/^torch==//p' "$(dirname "$0")/../constraints.txt")

# PyPI's build for Linux brings gigabytes of CUDA libraries along; a local version means without.
if ! "${pip[@]}" --no-deps --retries 1 --extra-index-url "$index" "torch==$version+cpu" 2>/dev/null; then
  echo "no torch $version+cpu from $index; installing the default build"
fi
"${pip[@]}" "torch==$version"
