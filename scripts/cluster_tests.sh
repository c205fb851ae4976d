#!/usr/bin/env bash
# Tests on a real Slurm and on several hosts, all within this machine (namespaces): bash scripts/cluster_tests.sh [pytest arguments]
# Needs root; on Debian and Ubuntu, what is missing is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "$(id -u)" = 0 ] || { echo "error: namespaces, slurmd and sshd need root; run this as root, in a container for instance" >&2; exit 2; }
PATH="$PATH:/usr/sbin:/sbin"
missing=()
for pair in slurmctld:slurm-wlm munged:munge sshd:openssh-server ssh:openssh-client pdsh:pdsh ip:iproute2 nsenter:util-linux bwrap:bubblewrap; do
  command -v "${pair%%:*}" > /dev/null || missing+=("${pair##*:}")
done
[ -e /etc/profile.d/modules.sh ] || missing+=(environment-modules)
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get > /dev/null || { echo "error: install ${missing[*]} first" >&2; exit 2; }
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
source scripts/setup.sh test
export WTN_CLUSTER=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m pytest tests/cluster "$@"
