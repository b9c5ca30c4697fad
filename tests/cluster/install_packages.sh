#!/usr/bin/env bash
# The Debian packages that tests/cluster, the tests of the sandbox and of pages in a browser, and the check of shell scripts need, if they are missing: part of `make test`.
# Where they cannot be installed, it says so, and those tests are skipped. They are not installed unasked on a machine that
# runs systemd, unless in CI, since servers for ssh and Slurm would be running there from then on.
set -euo pipefail
declare -A package_of=(
    [ip]=iproute2 [ssh]=openssh-client [sshd]=openssh-server [pdsh]=pdsh [munged]=munge [slurmctld]=slurmctld
    [slurmd]=slurmd [sbatch]=slurm-client [mpirun]=openmpi-bin [shellcheck]=shellcheck
    [bwrap]=bubblewrap [chromium]=chromium
)
PATH=$PATH:/usr/sbin:/sbin
packages=()
for program in "${!package_of[@]}"; do
    command -v "$program" >/dev/null || packages+=("${package_of[$program]}")
done
[ "${#packages[@]}" -gt 0 ] || exit 0
install="apt-get install -y --no-install-recommends ${packages[*]}"
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests/cluster: not installed, and no root or no apt-get: ${packages[*]}; tests that need them are skipped"
elif [ -d /run/systemd/system ] && [ -z "${CI:-}" ]; then
    echo "tests/cluster: tests are skipped that need: $install"
else
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet=2
    $install --quiet=2 >/dev/null
fi
