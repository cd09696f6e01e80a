#!/usr/bin/env bash
# The main job on two CPU cores: sets up .venv on the first call, then trains.
#
#   bash examples/quickstart/run.sh [section.key=value ...]
#
# for instance parallel.tp=1, parallel.pp=2, forking.select=all, training.steps=10
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

tools/setup_cpu.sh
export OMP_NUM_THREADS=1
exec .venv/bin/megafork train examples/quickstart/config.toml \
  run.dir="runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
