#!/usr/bin/env bash
# Installs what is missing, then trains the language model of examples/train_text.py (same flags).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
exec python examples/train_text.py "$@"
