#!/bin/bash
# One experiment as one Slurm job: SimGCD, then SPTNet, then the table. slurm/*.sbatch call it, in the root of the
# checkout.
#
#   launch/slurm_node.sh NAME [section.key=value ...]    in the batch shell; NAME_simgcd.yaml and NAME.yaml in configs/
#
# A setting is for both stages; sptnet:prompts.lr=1 and simgcd:schedule.epochs=100 are for one.
#
# STRATEGY    which launch/*.yaml (ddp)                      RUNS         where runs go (runs); must be on a shared disk
# PROCESSES   per node (its GPUs, or 1)                      SPTNET_BIN   the environment's bin folder (.venv/bin)
# PRECISION   no, bf16 or fp16 (no)                          RESTARTS     how many in a row may bring nothing new (3)
#
# Who gets which signal, and does what (tests/slurm shows it on a real Slurm):
#   Slurm           USR1 to the batch shell only (--signal=B:USR1@120), before the time limit or at preemption
#   batch shell     this file; its trap passes USR1 to srun, notes it, and waits on
#   srun            passes it to the task of every node
#   torchrun        the task, inside accelerate launch; passes it to its workers (PET_SIGNALS_TO_HANDLE) and waits
#   sptnet train    finishes its step on all ranks, writes a checkpoint, exits with 75
#   batch shell     reads what the ranks noted ($SPTNET_OUTCOME), and requeues the job, which continues where it stood
# Where Slurm itself ends the job (a node is gone, scancel, preemption without a signal), it decides what comes next.
set -uo pipefail  # bash before 4.4 takes an empty array for an unset one: ${a[@]+"${a[@]}"}
STRATEGY=${STRATEGY:-ddp} PRECISION=${PRECISION:-no} RUNS=${RUNS:-runs} RESTARTS=${RESTARTS:-3}
BIN=${SPTNET_BIN:-.venv/bin} PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
[ "$PROCESSES" != 0 ] || PROCESSES=1  # so Slurm says that a node has no GPU

say() { echo "slurm_node: $*"; }
stop() { say "not requeued: $*"; exit 1; }  # the last line of the log says why

ended() { say "ended by Slurm or scancel; the same job continues where it stood"; exit 143; }

requeue() {  # WHY
  say "requeued: $*"
  # one task of an array has the job id of the whole array, which scontrol would requeue
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
  scontrol requeue "$job" || stop "scontrol would not; submit the job again, it continues where it stood"
  sleep 60 & wait  # until Slurm ends this shell
  exit 75
}

# ---- in the batch shell ----

experiment() {  # NAME [section.key=value ...]
  local name=$1 seed=${SLURM_ARRAY_TASK_ID:-0} override bare root
  shift
  trap 'asked=USR1; [ -z "$step" ] || kill -USR1 "$step"' USR1
  trap 'asked=TERM' TERM  # Slurm sends it to the tasks too: passing it on would be their second signal
  for override in "$@"; do
    bare=${override#simgcd:} bare=${bare#sptnet:}
    [[ $bare != seed=* || $bare = "$override" ]] || stop "$override: both stages have the same seed"
    case $bare in
      run=* | init=*) stop "$override: the folders of a job follow from RUNS, its name and its seed" ;;
      resume=* | resume.source=*) stop "$override: a job continues its own run; to start anew, remove the run's folder below $RUNS" ;;
      seed=*) [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || stop "$override: in an array the seed is the task's number"
        seed=${override#seed=} ;;
      [!-]*=*) ;;
      *) stop "$override must read section.key=value" ;;
    esac
  done
  check "$name"
  case $STRATEGY in
    ddp | single) ;;
    zero*) "$BIN/python" -c 'import importlib.util as u; raise SystemExit(u.find_spec("deepspeed") is None)' \
      || stop "STRATEGY=$STRATEGY needs DeepSpeed, which is not installed: in the checkout, pip install -c constraints.txt -e '.[deepspeed]'" ;;&
    hsdp) [[ $SLURM_JOB_NUM_NODES -gt 1 && $PROCESSES -gt 1 ]] || stop "STRATEGY=hsdp shards on every node and" \
      "copies from node to node: it needs two nodes or more, of two processes or more; fsdp2 does not" ;;
    *) [ $((SLURM_JOB_NUM_NODES * PROCESSES)) -gt 1 ] || stop "STRATEGY=$STRATEGY needs more than one process" ;;
  esac
  root=$RUNS/$name/seed-$seed
  export SPTNET_OUTCOME=$root/outcome/$SLURM_JOB_ID  # another job may be there, by mistake
  mkdir -p "$root/outcome" || stop "$root cannot be made"
  count_restarts "$root"
  say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: $name, seed $seed, $STRATEGY," \
    "$SLURM_JOB_NUM_NODES x $PROCESSES processes, precision $PRECISION"
  settings_of simgcd "$@"
  stage "configs/${name}_simgcd.yaml" "$root/simgcd" ${settings[@]+"${settings[@]}"} "seed=$seed"
  settings_of sptnet "$@"
  stage "configs/$name.yaml" "$root/sptnet" ${settings[@]+"${settings[@]}"} "seed=$seed" "init=$root/simgcd"
  "$BIN/sptnet" report "$root/simgcd" "$root/sptnet"
}

settings_of() {  # STAGE [section.key=value ...]: its own and those of both, in `settings`
  local wanted=$1 override
  shift
  settings=()
  for override in "$@"; do
    case $override in
      "$wanted":*) settings+=("${override#*:}") ;;
      simgcd:* | sptnet:*) ;;
      *) settings+=("$override") ;;
    esac
  done
}

check() {  # NAME
  local file where
  where="(in $PWD, on $(hostname))"
  for file in "configs/$1.yaml" "configs/${1}_simgcd.yaml" launch/slurm_node.sh; do
    [ -e "$file" ] || stop "$file is missing $where: submit from the root of the checkout"
  done
  [ -e "launch/$STRATEGY.yaml" ] || stop "STRATEGY=$STRATEGY: there is no launch/$STRATEGY.yaml, but" launch/*.yaml
  [ -e "$BIN/accelerate" ] || stop "$BIN/accelerate is missing $where: make install, or say in SPTNET_BIN where it is"
  { is_count "$PROCESSES" && [ "$PROCESSES" -gt 0 ]; } || stop "PROCESSES=$PROCESSES is no number of processes"
  is_count "$RESTARTS" || stop "RESTARTS=$RESTARTS is no number of restarts"
  case $PRECISION in no | bf16 | fp16) ;; *) stop "PRECISION=$PRECISION must be no, bf16 or fp16" ;; esac
}

is_count() { [[ $1 =~ ^(0|[1-9][0-9]{0,5})$ ]]; }

count_restarts() {  # ROOT: stop where restarts of this job bring nothing new
  local reached seen='' count=0 tokens before=''
  # how many tokens a run had when it was last asked to stop before its first step
  tokens=$(told continue)
  [[ $tokens = *'files of tokens'* ]] || tokens=''
  [ ! -e "$SPTNET_OUTCOME.restarts" ] || read -r seen count before < "$SPTNET_OUTCOME.restarts"
  is_count "$count" || count=0  # bash computes what stands where a number is expected
  tokens=${tokens:-$before}
  reached=$({ find "$1" \( -path '*/checkpoints/step-?????????' -o -name finished \) -printf '%P\n' | sort
    echo "$tokens"; } | cksum)
  reached=${reached%% *}
  # where another job trains in the folder, what is new there is not of this one
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -n "$seen" ] \
    && { [ "$reached" = "$seen" ] || [[ $(told retry) = *'being trained by'* ]]; }; then
    count=$((count + 1))
  else
    count=0
  fi
  # what cannot be written would be counted anew at every restart; NFS says so when it is synced
  { echo "$reached $count $tokens" > "$SPTNET_OUTCOME.restarts" && sync "$SPTNET_OUTCOME.restarts"; } 2> /dev/null \
    || stop "$SPTNET_OUTCOME.restarts cannot be written, or not synced: is the disk full? Submit the job again"
  [ "$count" -le "$RESTARTS" ] || stop "$count restarts without a new checkpoint below $1"
}

told() {  # OUTCOME: the first reason that a rank gave for it
  sed -sn "s/^$1: //p" "$SPTNET_OUTCOME"/* 2> /dev/null | head -n 1
}

asked='' step=''

stage() {  # CONFIG RUN [section.key=value ...]: until it is finished, or this shell ends
  local config=$1 run=$2 code final
  shift 2
  [ ! -e "$run/finished" ] || { say "$run is finished"; return; }
  [ "$asked" != TERM ] || ended
  [ -z "$asked" ] || requeue "asked to stop before $config"
  rm -rf "$SPTNET_OUTCOME"
  mkdir "$SPTNET_OUTCOME" || stop "$SPTNET_OUTCOME cannot be made"
  # a task that fails ends the others, which would wait for it until a collective times out
  # a site or `sbatch --export` may have it that steps get less than this shell has
  srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    bash launch/slurm_node.sh --on-node "$config" "$@" "run=$run" &
  step=$!
  [ "$asked" != USR1 ] || kill -USR1 "$step"  # it came while there was nobody to pass it to
  while wait "$step"; code=$?; kill -0 "$step" 2> /dev/null; do :; done  # a trapped signal ends `wait` early
  step=''
  [ "$code" -ne 0 ] || [ ! -e "$run/finished" ] || return 0
  final=$(told final)
  [ -z "$final" ] || stop "$final"
  [ "$asked" != TERM ] || ended
  [ -z "$(told continue)" ] || requeue "asked to stop${asked:+ by $asked}; $(told continue)"
  [ -z "$asked" ] || requeue "asked to stop by $asked, and lost (exit code $code) before a checkpoint: $(told retry)"
  requeue "a process was lost (exit code $code): $(told retry)"
}

# ---- on every node ----

address_of() { getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }'; }  # HOST

interface_to() {  # ADDRESS: the network interface that reaches it, of the address itself the one that has it
  local name
  name=$(ip -o route get "$1" 2> /dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p')
  [ "$name" != lo ] || name=$(ip -o -4 address show | awk -v ip="$1" 'index($4, ip "/") == 1 { print $2; exit }')
  echo "$name"
}

on_node() {  # CONFIG [section.key=value ...]
  local head peer address toward interface total=$((SLURM_JOB_NUM_NODES * PROCESSES)) cpus=${SLURM_CPUS_PER_TASK:-1}
  # another port for every job and start: the one of a job that was just killed may still be taken
  local port=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))
  { read -r head; read -r peer; } < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  address=$(address_of "$head")
  toward=$address
  # the first node may know itself as 127.0.1.1; the others reach it by what reaches them
  [[ $address != 127.* || -z $peer ]] || toward=$(address_of "$peer")
  interface=$(interface_to "$toward")
  # a node has several networks: gloo and NCCL take the first they find
  if [ -n "$interface" ] && [ "$interface" != lo ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
  fi
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}    # NCCL's own errors say which link failed
  export PYTHONFAULTHANDLER=1              # a crash in native code says where
  # torch would start a thread per core in every process; loader workers need cores too
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > PROCESSES ? cpus / PROCESSES : 1))}
  # torchrun dies of USR1 unless told, and kills its workers 30 s after it passed a signal on
  export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=110
  # shards behind a URL are kept on the node's own disk; what the user says comes later, and wins
  set -- "$1" "data.remote.cache=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/sptnet-${USER:-$(id -un)}" "${@:2}"
  local sizes=()
  [ "$STRATEGY" != hsdp ] || sizes=(--parallelism_config_dp_replicate_size "$SLURM_JOB_NUM_NODES" \
    --parallelism_config_dp_shard_size "$PROCESSES")
  if [ "$total" -eq 1 ]; then  # no launcher: it would not pass USR1 on
    ACCELERATE_MIXED_PRECISION=$PRECISION exec "$BIN/python" -m sptnet train "$@"
  fi
  exec "$BIN/accelerate" launch --config_file "launch/$STRATEGY.yaml" --mixed_precision "$PRECISION" \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$total" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$address" --main_process_port "$port" ${sizes[@]+"${sizes[@]}"} \
    -m sptnet train "$@"
}

case ${1:-} in
  --on-node) shift; on_node "$@" ;;
  '') sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
  *) experiment "$@" ;;
esac
