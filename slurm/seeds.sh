#!/bin/bash
# An experiment over several seeds, and behind them the table of means and standard deviations:
#   slurm/seeds.sh NAME SEEDS [section.key=value ...]      e.g. slurm/seeds.sh cub 0-4
# Resources beyond those of slurm/NAME.sbatch are taken from sbatch's own variables, e.g. SBATCH_PARTITION=gpu.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; }
name=$1 seeds=$2
shift 2
job=$(sbatch --parsable --array="$seeds" "slurm/$name.sbatch" "$@")
numbers=()
for part in ${seeds//,/ }; do
  mapfile -t -O "${#numbers[@]}" numbers < <(seq "${part%-*}" "${part#*-}")
done
table=$(sbatch --parsable --dependency="afterok:$job" --kill-on-invalid-dep=yes \
  slurm/over_seeds.sbatch "$name" "${numbers[@]}")
echo "job $job runs seeds $seeds; job $table prints the table when all of them are finished, and is cancelled if one fails"
