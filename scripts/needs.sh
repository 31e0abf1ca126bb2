#!/usr/bin/env bash
# Installs the packages that the system needs, as root or by sudo. Without these rights it prints the command to install them, before
# anything is built.
#
#   needs.sh cc              a C compiler, which some of the crates need
#   needs.sh cc python       Python with pip and venv too, for the servers that come as wheels and for the clients of the tests
set -euo pipefail

# shellcheck source=scripts/apt.sh
. "$(dirname "${BASH_SOURCE[0]}")/apt.sh"
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; elif have sudo; then sudo "$@"; else return 1; fi; }

missing=
for need in "$@"; do
  case "$need" in
    cc) have cc || missing="$missing gcc libc6-dev" ;;
    python)
      if ! have python3 || ! python3 -m pip --version >/dev/null 2>&1 || ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        missing="$missing python3 python3-pip python3-venv"
      fi ;;
    *) echo "needs: unknown need '$need' (known: cc, python)" >&2; exit 2 ;;
  esac
done
[ -n "$missing" ] || exit 0
if have apt-get; then
  export DEBIAN_FRONTEND=noninteractive
  install="apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300$missing"
  # Try without apt-get update first: on a machine in use it is rarely needed.
  # shellcheck disable=SC2086
  if as_root $install >/dev/null 2>&1 || { as_root apt-get update >/dev/null 2>&1 && as_root $install >/dev/null 2>&1; }; then
    exit 0
  fi
fi
echo "FAILED: this machine lacks:$missing (as root, run: apt-get install$missing; or install your system's packages for them)" >&2
exit 1
