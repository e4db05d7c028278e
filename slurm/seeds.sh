#!/bin/bash
# An experiment over several seeds, and behind them the table of means and standard deviations:
#   slurm/seeds.sh NAME SEEDS [section.key=value ...]      e.g. slurm/seeds.sh cub 0-4, or 0-8:2 or 0-9%2 as sbatch takes it
# Resources beyond those of slurm/NAME.sbatch are taken from sbatch's own variables, e.g. SBATCH_PARTITION=gpu.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; }
name=$1 seeds=$2
shift 2
refused="error: $seeds: seeds are numbers and ranges like 1,3 or 0-4 or 0-8:2, with %N behind them for N at a time"
[[ $seeds =~ ^[0-9,:-]+(%[0-9]+)?$ ]] || { echo "$refused" >&2; exit 2; }
numbers=()
for part in $(tr , ' ' <<< "${seeds%\%*}"); do
  [[ $part =~ ^([0-9]+)(-([0-9]+)(:([0-9]+))?)?$ ]] || { echo "$refused" >&2; exit 2; }
  first=${BASH_REMATCH[1]} last=${BASH_REMATCH[3]:-${BASH_REMATCH[1]}} by=${BASH_REMATCH[5]:-1}
  mapfile -t -O "${#numbers[@]}" numbers < <(seq "$first" "$by" "$last")
done
[ "${#numbers[@]}" -gt 0 ] || { echo "$refused" >&2; exit 2; }
mapfile -t numbers < <(printf '%s\n' "${numbers[@]}" | sort -nu)  # one that is named twice is one run
job=$(sbatch --parsable --array="$seeds" "slurm/$name.sbatch" "$@")
job=${job%%;*}  # of several clusters it names its own
table=$(sbatch --parsable --dependency="afterok:$job" --kill-on-invalid-dep=yes \
  slurm/over_seeds.sbatch "$name" "${numbers[@]}")
echo "job $job runs seeds $seeds; job $table prints the table when all of them are finished, and is cancelled if one fails"
