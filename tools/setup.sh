#!/bin/bash
# setup.sh [system|fuzz|e2e]: make .venv from requirements.lock with $PYTHON (python3); with "fuzz" also put atheris into build/fuzz/atheris,
# where there is one for this Python and machine; with "system" also see to the Debian packages that the namespace tests, the compiler
# and the demo need; with "e2e" those that a cluster on this machine needs. As root on Debian it installs what is missing; otherwise it says the command.
# Done already: takes milliseconds.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

fail() { echo "setup: $*" >&2; exit 1; }

command -v "$PYTHON" >/dev/null || fail "$PYTHON is not there: install Python 3.11 or later, or name one with make PYTHON=…"
mapfile -t about < <("$PYTHON" -c '
import importlib.util, sys, sysconfig
print(int(sys.version_info >= (3, 11)), sys.version.split()[0], sysconfig.get_path("include"), sep="\n")
print(importlib.util.find_spec("ensurepip") or "", sys.base_prefix, sep="\n")')
[ "${about[0]}" = 1 ] || fail "$PYTHON is Python ${about[1]}, too old: 3.11 or later is needed; name one with make PYTHON=…"

missing=()
need_command() { command -v "$1" >/dev/null || missing+=("$2"); }
need_file() { [ -e "$1" ] || missing+=("$2"); }

[ -n "${about[3]}" ] || missing+=(python3-venv)
if [ "${1:-}" = system ]; then
  need_command nft nftables
  need_command ip iproute2
  need_command conntrack conntrack
  need_command tcpdump tcpdump
  need_command gcc gcc
  need_file /usr/include/stdio.h libc6-dev
  need_file "${about[2]}/Python.h" python3-dev
elif [ "${1:-}" = e2e ]; then
  need_command nft nftables
  need_command ip iproute2
  need_command conntrack conntrack
  need_command iptables iptables
  need_command runc runc
  need_command mmdebstrap mmdebstrap
  need_command buildah buildah
  need_command prometheus prometheus
  need_command openssl openssl
  need_file /usr/lib/cni/ptp containernetworking-plugins
fi
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "setup: installing ${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq -o DPkg::Lock::Timeout=600 update
    apt-get -qq -y -o DPkg::Lock::Timeout=600 install --no-install-recommends "${missing[@]}" >/dev/null
  else
    fail "missing: ${missing[*]}; as root: apt-get install ${missing[*]}"
  fi
fi

# One set-up at a time; .venv counts as made only when its stamp says from what.
mkdir -p build
exec 9>build/.setup.lock
flock 9
stamp=$({ echo "${about[1]} ${about[4]}"; cat requirements.lock; } | sha256sum)
if [ "$(cat .venv/.stamp 2>/dev/null)" != "$stamp" ]; then
  echo "setup: making .venv with Python ${about[1]}" >&2
  rm -rf .venv
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements.lock
  echo "$stamp" >.venv/.stamp
fi

if [ "${1:-}" = fuzz ]; then
  stamp=$({ echo "${about[1]}"; cat fuzz/requirements.lock; } | sha256sum)
  if [ "$(cat build/fuzz/atheris/.stamp 2>/dev/null)" != "$stamp" ]; then
    rm -rf build/fuzz/atheris
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: \
      --target build/fuzz/atheris -r fuzz/requirements.lock && echo "$stamp" >build/fuzz/atheris/.stamp ||
      echo "setup: atheris cannot be had for this Python or machine; inputs are made without coverage" >&2
  fi
fi
