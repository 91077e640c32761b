#!/bin/bash
# setup.sh: install the peers and build the drivers. Run as root on Debian. Safe to repeat.
# Packages come from the configured sources; everything else goes to .bench/ beside this folder.
set -euo pipefail

bench=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
work=$(dirname "$bench")/.bench
packages=(haproxy nginx libnginx-mod-stream squid-openssl nftables iproute2 gcc libc6-dev make openssl util-linux)

die() { echo "bench/setup.sh: $*" >&2; exit 1; }

missing_packages() {
    for package in "${packages[@]}"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || echo "$package"
    done
}

# Debian starts a daemon when its package is installed; a policy-rc.d that exits 101 forbids it.
forbid_services() {
    local guard=/usr/sbin/policy-rc.d
    [ -e $guard ] && return
    trap "rm -f $guard" EXIT
    printf '#!/bin/sh\nexit 101\n' > $guard
    chmod +x $guard
}

install_packages() {
    python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
    local missing
    missing=$(missing_packages)
    [ -z "$missing" ] && return
    forbid_services
    apt-get -qq -o DPkg::Lock::Timeout=600 update
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install -y --no-install-recommends $missing
    [ -d /run/systemd/system ] || return 0
    for service in haproxy nginx squid; do
        case $missing in *$service*) systemctl disable "$service" || true ;; esac # nor at the next boot
    done
}

install_python_peers() {
    [ -x "$work/venv/bin/python" ] || python3 -m venv "$work/venv"
    cmp -s "$bench/requirements.lock" "$work/venv/installed.lock" && return
    "$work/venv/bin/pip" -q install --disable-pip-version-check --require-hashes -r "$bench/requirements.lock"
    cp "$bench/requirements.lock" "$work/venv/installed.lock"
}

[ "$(id -u)" = 0 ] || die "needs root (packages; the bench itself needs it for namespaces and cgroups)"
command -v apt-get >/dev/null || die "needs Debian's apt-get"
mkdir -p "$work/bin"
install_packages
install_python_peers
make -s -C "$bench/drivers" OUT="$work/bin"
echo "ready: python3 -m bench.run --list"
