#!/usr/bin/env bash
# Makes sure that the real clients exist which the tests run against the daemon, in pinned versions: the public Python
# SDK of DCS, schemathesis (a fuzzer that reads openapi.json), Prometheus and its promtool; and kubernetes-validate, which knows
# the schemas of the manifests that are shipped.
#
# They live in a cache outside the checkout; nothing is installed into the system but what Python itself needs.
#
#   clients.sh fetch        get what is missing
#   clients.sh python       print the path of a python that has the SDK, schemathesis and kubernetes-validate
#   clients.sh promtool     print the path of promtool, empty where this system's packages have none
#   clients.sh prometheus   the same of Prometheus
set -euo pipefail

CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/ttlsweep/clients"
SDK=3.1.219
SCHEMATHESIS=4.32.5
KUBERNETES_VALIDATE=1.37.0
VENV="$CACHE/venv-$SDK-$SCHEMATHESIS"

say() { echo "clients: $*" >&2; }
die() { say "$*"; exit 1; }
# shellcheck source=scripts/apt.sh
. "$(dirname "${BASH_SOURCE[0]}")/apt.sh"

fetch_python() {
  [ -f "$VENV/complete" ] && return
  "$(dirname "${BASH_SOURCE[0]}")/needs.sh" python
  rm -rf "$VENV"
  python3 -m venv "$VENV"
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
fetch_prometheus() {
  local program work
  [ -x "$CACHE/promtool" ] && [ -x "$CACHE/prometheus" ] && return
  if have promtool && have prometheus; then
    for program in promtool prometheus; do ln -sf "$(command -v "$program")" "$CACHE/$program"; done
    return
  fi
  have apt-get || { say "no Prometheus: the tests of metrics, alerts and dashboard are skipped"; return; }
  say "fetching Prometheus"
  work=$(mktemp -d)
  # shellcheck disable=SC2119
  copy_sources
  unpack_debs prometheus
  for program in promtool prometheus; do cp "$work/root/usr/bin/$program" "$CACHE/$program"; done
  rm -rf "$work"
}

mkdir -p "$CACHE"
case "${1:-}" in
  fetch) fetch_python; fetch_kubernetes_validate; fetch_prometheus ;;
  python) echo "$VENV/bin/python" ;;
  promtool | prometheus) [ ! -x "$CACHE/$1" ] || echo "$CACHE/$1" ;;
  *) die "usage: clients.sh fetch|python|promtool|prometheus" ;;
esac
