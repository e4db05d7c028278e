#!/bin/bash
# A real Slurm cluster on one machine: every node is its own network, host name,
# process and mount namespace, with its own slurmd. Needs root and, on Debian:
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
# usage: cluster.sh up [NODES]       then  export SLURM_CONF=$LAB/slurm.conf
#        cluster.sh kill-node NAME   power a node off (every process on it dies)
#        cluster.sh start-node NAME  power it on again
#        cluster.sh down
set -euo pipefail
LAB=${SLURMLAB:-${TMPDIR:-/tmp}/slurm-lab}
NET=10.77.0                     # nodes are $NET.1, $NET.2, ...; this host is $NET.254
BRIDGE=slurmbr0
CPUS=80 GPUS=8 MEM=4000         # per node, claimed rather than measured: the largest of slurm/*.sbatch fits
FREEZER=/sys/fs/cgroup/freezer  # cgroup v1: the only process tracking that misses no orphan
export SLURM_CONF=$LAB/slurm.conf

say() { echo "cluster: $*" >&2; }
alive() {                       # PID: is it ours and running? (a zombie waiting for init to reap it is not)
  local comm state
  comm=$(cat "/proc/$1/comm" 2> /dev/null) && state=$(sed 's/.*) //; s/ .*//' "/proc/$1/stat" 2> /dev/null) || return 1
  [[ $comm =~ ^(unshare|slurmctld|munged)$ && $state != Z ]]
}
gone() { for _ in $(seq 200); do alive "$1" || return 0; sleep .05; done; say "process $1 will not end"; return 1; }

stop() {                        # slurmctld | munged
  local pid; pid=$(cat "$LAB/$1.pid" 2> /dev/null) || return 0
  if alive "$pid"; then kill "$pid"; gone "$pid"; fi
  rm -f "$LAB/$1.pid"
}

kill_node() {                   # NAME
  local pid; pid=$(cat "$LAB/$1.pid" 2> /dev/null) || return 0
  # killing the node's init takes all its processes along; unshare, the parent, ends after the last of them
  if alive "$pid"; then pkill -KILL -P "$pid"; gone "$pid"; fi
  rm -f "$LAB/$1.pid"
}

configure() {                   # NODES
  mkdir -p "$LAB"/{state,dev,log}; chmod 755 "$LAB"
  ( umask 077; head -c 128 /dev/urandom > "$LAB/munge.key" )
  for i in $(seq 0 $((GPUS - 1))); do [ -e "$LAB/dev/gpu$i" ] || mknod -m 666 "$LAB/dev/gpu$i" c 1 3; done
  echo "Name=gpu File=$LAB/dev/gpu[0-$((GPUS - 1))]" > "$LAB/gres.conf"
  { echo "127.0.0.1 localhost"; echo "$NET.254 $(hostname -s)"
    for i in $(seq "$1"); do echo "$NET.$i n$i"; done; } > "$LAB/hosts"
  local track=linuxproc
  [ ! -w "$FREEZER/cgroup.procs" ] || track=cgroup
  printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s\n' "${FREEZER%/*}" > "$LAB/cgroup.conf"
  cat > "$SLURM_CONF" <<EOF
ClusterName=lab
SlurmctldHost=$(hostname -s)($NET.254)
SlurmUser=root
SlurmdUser=root
# cred_expire is also how long a requeued job waits before it may start again (default 120)
AuthInfo=socket=$LAB/munge.sock,cred_expire=5
StateSaveLocation=$LAB/state
SlurmctldPidFile=$LAB/slurmctld.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdPidFile=$LAB/%n.slurmd.pid
SlurmdLogFile=$LAB/log/%n.log
SlurmdSpoolDir=$LAB/%n.spool
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/${PROCTRACK:-$track}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdTimeout=10
KillWait=5
ReturnToService=2
GresTypes=gpu
$(for i in $(seq "$1"); do echo "NodeName=n$i NodeAddr=$NET.$i CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS"; done)
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
EOF
}

start_node() {                  # NAME
  [ ! -e "$LAB/$1.pid" ] || { say "$1 is on (or run '$0 kill-node $1')"; return 1; }
  mkdir -p "$LAB/$1.spool"
  # shellcheck disable=SC2016  # for the inner shell
  # bash, the node's init, reaps what jobs leave behind; the node outlives its slurmd
  setsid nsenter --net="/run/netns/slurm-$1" unshare --uts --mount --pid --fork --kill-child --mount-proc bash -c '
    hostname "$1"; mount --bind "$2/hosts" /etc/hosts; slurmd -N "$1"; sleep infinity; :' node "$1" "$LAB" \
    < /dev/null >> "$LAB/log/$1.out" 2>&1 &
  echo $! > "$LAB/$1.pid"
}

up() {
  local n=${1:-2}
  [ ! -e "/sys/class/net/$BRIDGE" ] || { say "already up (or run '$0 down')"; exit 1; }
  configure "$n"
  ip link add "$BRIDGE" type bridge; ip addr add "$NET.254/24" dev "$BRIDGE"; ip link set "$BRIDGE" up
  for i in $(seq "$n"); do
    ip netns add "slurm-n$i"
    ip link add "slurm-n$i" type veth peer name eth0 netns "slurm-n$i"
    ip link set "slurm-n$i" master "$BRIDGE" up
    ip -n "slurm-n$i" addr add "$NET.$i/24" dev eth0
    ip -n "slurm-n$i" link set eth0 up; ip -n "slurm-n$i" link set lo up
  done
  munged --key-file="$LAB/munge.key" --socket="$LAB/munge.sock" --pid-file="$LAB/munged.pid" \
         --log-file="$LAB/log/munged.log" --seed-file="$LAB/munge.seed"
  slurmctld
  for i in $(seq "$n"); do start_node "n$i"; done
  for _ in $(seq 900); do [ "$(sinfo -h -o %t%D 2> /dev/null)" = "idle$n" ] && break; sleep .1; done
  sinfo -N -o '%N %o %t %c %G %E'
  [ "$(sinfo -h -o %t%D)" = "idle$n" ] || { say "not every node came up; see $LAB/log"; exit 1; }
}

down() {
  for p in "$LAB"/n*.pid; do p=${p##*/}; p=${p%.pid}; [[ $p == *[.*]* ]] || kill_node "$p"; done
  stop slurmctld; stop munged
  for d in /run/netns/slurm-n*; do
    d=${d##*/}; [ -e "/run/netns/$d" ] || continue
    ip link del "$d" 2> /dev/null || true; ip netns del "$d"
  done
  ip link del "$BRIDGE" 2> /dev/null || true
  for d in "$FREEZER"/slurm_n*; do [ ! -d "$d" ] || find "$d" -depth -type d -exec rmdir {} +; done
  rm -rf "$LAB"/{state,*.spool,*.slurmd.pid,munge*}
}

case "${1:-}" in
  up) up "${2:-2}" ;;
  down) down ;;
  kill-node) kill_node "$2" ;;
  start-node) start_node "$2" ;;
  *) sed -n '2,8s/^# //p' "$0"; exit 2 ;;
esac
