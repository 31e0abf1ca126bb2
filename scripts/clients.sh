#!/usr/bin/env bash
# Makes sure that the real clients exist which the tests run against the daemon, in pinned versions: the public Python
# SDK of DCS, schemathesis (a fuzzer that reads openapi.json), and promtool; and kubernetes-validate, which knows the
# schemas of the manifests that are shipped.
#
# They live in a cache outside the checkout; nothing is installed into the system but what Python itself needs.
#
#   clients.sh fetch        get what is missing
#   clients.sh python       print the path of a python that has the SDK, schemathesis and kubernetes-validate
#   clients.sh promtool     print the path of promtool, empty where this system's packages have none
set -euo pipefail

CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/ttlsweep/clients"
SDK=3.1.219
SCHEMATHESIS=4.32.5
KUBERNETES_VALIDATE=1.37.0
VENV="$CACHE/venv-$SDK-$SCHEMATHESIS"

say() { echo "clients: $*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; elif have sudo; then sudo "$@"; else return 1; fi; }

fetch_python() {
  [ -f "$VENV/complete" ] && return
  have python3 || die "python3 is missing: install it with its venv module"
  rm -rf "$VENV"
  if ! python3 -m venv "$VENV" >/dev/null 2>&1; then
    have apt-get && as_root apt-get install -y --no-install-recommends python3-venv >/dev/null 2>&1 ||
      die "python3 has no venv: install python3-venv"
    python3 -m venv "$VENV"
  fi
  say "fetching the Python SDK $SDK and schemathesis $SCHEMATHESIS"
  "$VENV/bin/pip" install --quiet --disable-pip-version-check \
    "huaweicloudsdkdcs==$SDK" "huaweicloudsdkcore==$SDK" "schemathesis==$SCHEMATHESIS" >"$CACHE/pip.log" 2>&1 ||
    die "pip failed: $(tail -n 1 "$CACHE/pip.log")"
  touch "$VENV/complete"
}

fetch_kubernetes_validate() {
  local done="$VENV/kubernetes-validate-$KUBERNETES_VALIDATE"
  [ -f "$done" ] && return
  say "fetching kubernetes-validate $KUBERNETES_VALIDATE"
  "$VENV/bin/pip" install --quiet --disable-pip-version-check "kubernetes-validate==$KUBERNETES_VALIDATE" \
    >"$CACHE/pip.log" 2>&1 || die "pip failed: $(tail -n 1 "$CACHE/pip.log")"
  touch "$done"
}

# Debian's package is downloaded and unpacked, not installed: it would start a service.
fetch_promtool() {
  [ -x "$CACHE/promtool" ] && return
  if have promtool; then ln -sf "$(command -v promtool)" "$CACHE/promtool"; return; fi
  have apt-get || { say "no promtool: the test of the figures' form leaves it out"; return; }
  say "fetching promtool"
  local work
  work=$(mktemp -d)
  (cd "$work" && apt-get download prometheus >apt.log 2>&1) || {
    as_root apt-get update >/dev/null 2>&1 || true
    (cd "$work" && apt-get download prometheus >apt.log 2>&1) || die "cannot download the package prometheus"
  }
  dpkg-deb -x "$work"/prometheus_*.deb "$work/root"
  cp "$work/root/usr/bin/promtool" "$CACHE/promtool"
  rm -rf "$work"
}

mkdir -p "$CACHE"
case "${1:-}" in
  fetch) fetch_python; fetch_kubernetes_validate; fetch_promtool ;;
  python) echo "$VENV/bin/python" ;;
  promtool) [ ! -x "$CACHE/promtool" ] || echo "$CACHE/promtool" ;;
  *) die "usage: clients.sh fetch|python|promtool" ;;
esac
