#!/usr/bin/env bash
# What tests/test_slurm.py needs from Debian; nothing where it is there. Needs root.
set -euo pipefail
for program in slurmctld slurmd sbatch shellcheck ip; do
  if ! command -v "$program" >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      slurmctld slurmd slurm-client shellcheck iproute2
    break
  fi
done
