#!/usr/bin/env bash
# Run dist-moe on this machine: launch/local.sh RANKS run -m STORE -p "..."
# Works with both launchers; Open MPI is told not to bind, since each rank starts its own threads.
set -euo pipefail

if [ "$#" -lt 2 ]; then
    echo "usage: $0 RANKS COMMAND [OPTION...], for example: $0 4 run --prompt 'Once upon a time'" >&2
    exit 2
fi
ranks=$1
shift
export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none}
exec mpirun -n "$ranks" dist-moe "$@"
