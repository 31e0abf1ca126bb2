# Functions for the other scripts, to be sourced: they download and unpack Debian packages without root's rights and without any
# change to the system. $work is a temporary folder of the caller.
# shellcheck shell=bash disable=SC2154

have() { command -v "$1" >/dev/null 2>&1; }

# Runs apt-get or apt-cache on private package lists, with the sources that copy_sources has prepared.
private_apt() {
  local tool=$1; shift
  "$tool" -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources" \
    -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root "$@"
}

release_of_system() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release; }

# Copies the system's apt sources into $work/sources and downloads their lists. With suites as arguments it copies only the main
# suite of the system's release, with these suites in its place.
copy_sources() {
  local suites=$* release='' file name
  [ -z "$suites" ] || release=$(release_of_system)
  rm -rf "$work/sources" "$work/lists" "$work/cache"
  mkdir -p "$work/sources" "$work/lists/partial" "$work/cache/archives/partial"
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    [ -f "$file" ] || continue
    name=$(basename "$file")
    if [ -z "$suites" ]; then
      cp "$file" "$work/sources/$name"
    elif [ "${name##*.}" = sources ]; then
      # An entry is a paragraph; only those with the release itself are kept.
      awk -v r="$release" -v s="$suites" 'BEGIN { RS = ""; ORS = "\n\n" }
        $0 ~ "(^|\n)Suites:([^\n]* )?" r "( [^\n]*)?(\n|$)" {
          sub("Suites:[^\n]*", "Suites: " s); print
        }' "$file" >"$work/sources/$name"
    else
      awk -v r="$release" -v s="$suites" '/^deb / {
          for (i = 2; i <= NF; i++) if ($i == r) { n = split(s, all, " "); for (k = 1; k <= n; k++) { $i = all[k]; print } break }
        }' "$file" >"$work/sources/$name"
    fi
    [ -s "$work/sources/$name" ] || rm -f "$work/sources/$name"
  done
  private_apt apt-get update >"$work/apt.log" 2>&1 || true
}

# Prints the version of package $1 in the private lists, without epoch and revision; nothing if there is none.
apt_version() {
  private_apt apt-cache policy "$1" | sed -n 's/^ *Candidate: *\([0-9]*:\)\{0,1\}\([0-9][0-9.]*\).*/\2/p'
}

# Downloads the packages named and unpacks them into $work/root.
unpack_debs() {
  local deb
  (cd "$work" && private_apt apt-get download "$@" >"$work/apt.log" 2>&1) ||
    die "cannot download: $* ($(tail -n 1 "$work/apt.log"))"
  for deb in "$work"/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
  rm -f "$work"/*.deb
}

# Does the same with all dependencies of the packages, libc included, as if nothing were installed.
unpack_debs_whole() {
  local deb
  : >"$work/status"
  private_apt apt-get -o Dir::State::status="$work/status" -y --no-install-recommends --download-only install \
    libc6 "$@" >"$work/apt.log" 2>&1 || die "cannot download: $* ($(tail -n 1 "$work/apt.log"))"
  for deb in "$work"/cache/archives/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
}

# Does the same with the dependencies that this system lacks.
unpack_debs_missing() {
  local deb
  private_apt apt-get -y --no-install-recommends --download-only install "$@" >"$work/apt.log" 2>&1 ||
    die "cannot download: $* ($(tail -n 1 "$work/apt.log"))"
  for deb in "$work"/cache/archives/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
}
