#!/usr/bin/env bash
# A real SLURM of N nodes on one machine. Root, Debian/Ubuntu; no systemd needed.
#   slurm.sh install          packages (45 s the first time)
#   slurm.sh up DIR [N [M]]   N nodes (default 2) up and idle, and M more (default 0) that only partition "all" has;
#                             writes all into DIR (on a disk that the nodes share: any)
#   slurm.sh ctl DIR CMD...   run a command where sbatch/srun/scancel/squeue work
#   slurm.sh node DIR n1 CMD  run a command inside a node
#   slurm.sh linkdown|linkup DIR n2   cut / restore a node's switch port
#   slurm.sh kill DIR n2      power off a node;  slurm.sh addnode DIR 2 brings it back
#   slurm.sh down DIR         ends everything that `up` started, by pid, and removes namespaces, cgroups
# Each node is its own network, UTS, mount, PID and IPC namespace; a bridge in a control namespace joins them. PREFIX names
# the namespaces and NODE the nodes (default n: n1, n2, ...), so that several clusters fit on one machine.
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}")
say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
[ $# -ge 1 ] || { sed -n 2,13p "$self"; exit 2; }
act=$1; shift
prefix=${PREFIX:-dcx} net=10.77.0 node=${NODE:-n}

if [ "$act" = install ]; then
    need=(); for pair in slurmctld:slurmctld slurmd:slurmd srun:slurm-client munged:munge ip:iproute2 pgrep:procps; do
        PATH=$PATH:/usr/sbin command -v "${pair%%:*}" >/dev/null || need+=("${pair##*:}"); done
    [ ${#need[@]} -eq 0 ] && exit 0
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
    exit 0
fi
D=$(readlink -f "$1" 2>/dev/null || echo "$1"); shift
ctlns=$prefix-ctl
[ "$(id -u)" = 0 ] || die "must be root (namespaces, munge, slurmd)"

wait_idle() {  # wait until N nodes are idle, at most 30 s
    for _ in $(seq 300); do
        [ "$("$self" ctl "$D" sinfo -h -t idle -p all -o %D 2>/dev/null | head -1)" = "$1" ] && return 0; sleep 0.1
    done; die "not $1 idle nodes after 30 s; see $D/log"
}

case $act in
up)
    N=${1:-2} T=$((${1:-2} + ${2:-0}))
    ip netns list | grep -q "^$ctlns" && die "a cluster with prefix $prefix is up already"
    mkdir -p "$D"/{munge,state,log,run}; chmod 700 "$D/munge"
    rm -f "$D"/run/*.initpid
    { echo "127.0.0.1 localhost"; echo "$net.254 ctl"; for i in $(seq "$T"); do echo "$net.$i $node$i"; done; } > "$D/hosts"
    ip netns add $ctlns; ip -n $ctlns link set lo up
    ip -n $ctlns link add br0 type bridge; ip -n $ctlns addr add "$net.254/24" dev br0; ip -n $ctlns link set br0 up
    [ -f "$D/munge/key" ] || { head -c 1024 /dev/urandom > "$D/munge/key"; chmod 600 "$D/munge/key"; }
    munged --force --key-file="$D/munge/key" --socket="$D/munge/sock" --pid-file="$D/munge/pid" --log-file="$D/munge/log" --seed-file="$D/munge/seed" 2>"$D/log/munged.start" || { cat "$D/log/munged.start"; exit 1; }
    # cgroup v1 (freezer) where mounted, so that a step's orphans are ended; else /proc ancestry.
    if mountpoint -q /sys/fs/cgroup/freezer; then track=proctrack/cgroup; else track=proctrack/linuxproc; fi
    cat > "$D/slurm.conf" <<CONF
ClusterName=$prefix
SlurmctldHost=ctl($net.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge/sock,cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/run/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=${PROCTRACK:-$track}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=${SLURMD_TIMEOUT:-10}
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=${KILLWAIT:-30}
UnkillableStepTimeout=60
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.log
SlurmctldDebug=info
SlurmdDebug=info
$(for i in $(seq "$T"); do echo "NodeName=$node$i NodeAddr=$net.$i CPUs=8 RealMemory=4000 State=UNKNOWN"; done)
PartitionName=main Nodes=$node[1-$N] Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=${GRACE:-20} PreemptMode=REQUEUE
PartitionName=urgent Nodes=$node[1-$N] MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
PartitionName=all Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    cat > "$D/cgroup.conf" <<CONF
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
CONF
    nsenter --net=/run/netns/$ctlns unshare --uts --mount --propagation private bash -c \
        "hostname ctl; mount --bind '$D/hosts' /etc/hosts; exec slurmctld -f '$D/slurm.conf'" </dev/null >"$D/log/ctld.start" 2>&1 || { cat "$D/log/ctld.start"; exit 1; }
    for i in $(seq "$T"); do "$self" addnode "$D" "$i"; done
    wait_idle "$T"; "$self" ctl "$D" sinfo ;;
addnode)
    i=$1 n=$prefix-$node$1
    [ -e "/run/netns/$n" ] || {
        ip netns add "$n"; ip -n "$n" link set lo up
        ip link add "vh$i" netns $ctlns type veth peer name eth0 netns "$n"
        ip -n $ctlns link set "vh$i" master br0 up; ip -n "$n" addr add "$net.$i/24" dev eth0; ip -n "$n" link set eth0 up; }
    mkdir -p "$D/run/$node$i"
    nsenter --net="/run/netns/$n" unshare --uts --ipc --mount --pid --fork --propagation private bash -c "
        hostname $node$i; mount -t proc proc /proc; mount --bind '$D/hosts' /etc/hosts; mount -t tmpfs tmpfs /dev/shm
        export SLURM_CONF='$D/slurm.conf'; slurmd -N $node$i -D & trap : TERM; while kill -0 \$! 2>/dev/null; do wait; done" </dev/null >"$D/log/init.$node$i" 2>&1 &
    for _ in $(seq 50); do child=$(pgrep -P $! || true); [ -n "$child" ] && break; sleep 0.05; done
    echo "$child" > "$D/run/$node$i.initpid" ;;
ctl)  exec nsenter --net=/run/netns/$ctlns env SLURM_CONF="$D/slurm.conf" "$@" ;;
node) n=$1; shift; exec nsenter --target "$(cat "$D/run/$n.initpid")" --net --uts --mount --pid --ipc env SLURM_CONF="$D/slurm.conf" "$@" ;;
linkdown) ip -n $ctlns link set "vh${1#"$node"}" down ;;
linkup)   ip -n $ctlns link set "vh${1#"$node"}" up ;;
kill)     kill -9 "$(cat "$D/run/$1.initpid")" ;;
down)
    for f in "$D"/run/*.initpid; do [ -e "$f" ] && kill -9 "$(cat "$f")" 2>/dev/null || true; done
    kill -9 "$(cat "$D/run/slurmctld.pid")" 2>/dev/null || true; kill "$(cat "$D/munge/pid")" 2>/dev/null || true; sleep 0.5
    for x in $(ip netns list | awk '{print $1}' | grep "^$prefix-" || true); do
        for p in $(ip netns pids "$x"); do kill -9 "$p" 2>/dev/null || true; done; ip netns del "$x"; done
    for c in /sys/fs/cgroup/freezer/slurm_"$node"*; do [ -d "$c" ] && find "$c" -depth -type d -exec rmdir {} \; 2>/dev/null || true; done ;;
*) die "unknown action $act" ;;
esac
