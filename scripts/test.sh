#!/usr/bin/env bash
# Installs what is missing, then runs every check: style, types, example, documentation, validation layers, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

step() { printf '\n== %s\n' "$*"; }

step style
ruff check .
ruff format --check .
git ls-files 'csrc/*.cc' 'csrc/*.h' 'tests/*.cc' | xargs clang-format --dry-run --Werror

step types
mypy

step example, in a tiny size
python examples/train_text.py --layers 1 --width 32 --context 32 --batch 2 \
  --steps 4 --save-every 2 --output build/example

step documentation
mkdocs build --strict

# The tests' time goes to what XLA compiles, most of it run once. Its older generator of code takes
# half as long; some tests choose the one that users have (tests/comparison.py).
export JAX_DISABLE_MOST_OPTIMIZATIONS=1
quick="--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# An XLA that does not know a flag ends at its sight.
if XLA_FLAGS="$quick" JAX_PLATFORMS=cpu python -c 'import jax; jax.devices()' 2>/dev/null; then
  export XLA_FLAGS="${XLA_FLAGS:-} $quick"
fi

step tests, all under the Vulkan validation layers
# What the tests of a file share is compiled once by each process that runs some of them: processes
# start with neighbours.
JAX_AAT_VALIDATION=1 pytest -q -n auto --maxprocesses 8 --dist worksteal
