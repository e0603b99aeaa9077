#!/usr/bin/env bash
# Run dist-moe on the hosts of a host file: launch/cluster.sh HOSTFILE run -m STORE -p "..."
# The file may be of either dialect (`node1:2` or `node1 slots=2`) whichever mpirun this is; a bare name is one rank.
# MPI_IFACE=eth1 names the network to use, on all hosts alike; --dry-run before HOSTFILE prints the command.
set -euo pipefail

show=
if [ "${1:-}" = --dry-run ]; then
    show=1
    shift
fi
if [ "$#" -lt 2 ] || [ ! -r "$1" ]; then
    echo "usage: $0 [--dry-run] HOSTFILE COMMAND [OPTION...]: $0 hostfiles/mpich.example.txt run -m STORE -p Once" >&2
    exit 2
fi
hostfile=$1
shift

case $(mpirun --version 2>&1) in
    *"Open MPI"*) mpi=openmpi ;;
    *HYDRA* | *MPICH* | *"Intel(R) MPI"*) mpi=mpich ;;
    *)
        echo "$0: the mpirun on PATH is neither MPICH's, Intel MPI's nor Open MPI's: put one of them first" >&2
        exit 3
        ;;
esac

# Both take a list of host:ranks on the command line.
hosts=()
ranks=0
while read -r line || [ -n "$line" ]; do
    line=${line%%#*}
    if [[ $line =~ ^[[:space:]]*([^[:space:]:=]+)(:([0-9]+)|[[:space:]]+slots[[:space:]]*=[[:space:]]*([0-9]+))?([[:space:]].*)?$ ]]; then
        count=${BASH_REMATCH[3]:-${BASH_REMATCH[4]:-1}}
        hosts+=("${BASH_REMATCH[1]}:$count")
        ranks=$((ranks + count))
    elif [[ $line =~ [^[:space:]] ]]; then
        echo "$0: $hostfile: expected host, host:ranks or host slots=ranks, found: $line" >&2
        exit 2
    fi
done <"$hostfile"
if [ "$ranks" -eq 0 ]; then
    echo "$0: $hostfile names no host: write one per line" >&2
    exit 2
fi
list=$(IFS=, && echo "${hosts[*]}")

iface=${MPI_IFACE:-}
if [ "$mpi" = openmpi ]; then
    command=(mpirun --host "$list" --bind-to none)
    if [ -n "$iface" ]; then
        command+=(--prtemca prte_if_include "$iface" --mca btl_tcp_if_include "$iface")
    fi
    # Unlike Hydra it passes no variable on by itself.
    for name in $(compgen -e); do
        case $name in DIST_MOE_* | UCX_*) command+=(-x "$name") ;; esac
    done
else
    command=(mpirun -hosts "$list" -bind-to none)
    if [ -n "$iface" ]; then
        command+=(-iface "$iface")
    fi
fi
# By its full name: the shell that ssh starts on the other hosts need not know this PATH.
command+=(-n "$ranks" "$(command -v dist-moe)" "$@")
if [ -n "$show" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
