#!/usr/bin/env bash
# Trains on the forking tokens, on random ones, on the others and on all, and draws the comparison.
#
#   bash examples/forking_vs_all/run.sh [options] [section.key=value ...]
#
# --help lists the options, for instance --steps 20 --seeds 0 1 2 --arms top all --jobs 2.
# It may be stopped at any time: called again, it goes on with what is left.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

tools/setup_cpu.sh
export OMP_NUM_THREADS=1
exec .venv/bin/python examples/forking_vs_all/compare.py "$@"
