#!/usr/bin/env bash
# Builds what a release contains, below target/packages: a Debian package, an archive, and their SHA-256. `make containers` installs,
# upgrades and purges the Debian package under a systemd.
#
# The program is compiled here (profile `dist`). In the archive it is linked statically and so runs on any Linux: with musl if this
# toolchain has a standard library for it, else with glibc. In the Debian package it is linked to Debian's libc.
#
#   packages.sh            build for this machine's architecture
#   packages.sh BINARY     package an existing program
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=target/packages
CARGO=${CARGO:-cargo}
say() { echo "packages: $*" >&2; }
die() { echo "FAILED: packages: $*" >&2; exit 1; }

VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
HOST=$(rustc -vV | sed -n 's/^host: //p')
MUSL=${HOST/-gnu/-musl}
# Fixed times, so that the same input makes the same files.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$OUT"
mkdir -p "$OUT"

# Builds the program for target $1 and puts it into $work, under the name $2 if one is given.
compile() {
  "$CARGO" build --profile dist --locked --quiet --bin ttlsweep --target "$1" &&
    cp "${CARGO_TARGET_DIR:-target}/$1/dist/ttlsweep" "$work/ttlsweep-${2:-$1}"
}
has_std() { [ -d "$(rustc --print sysroot)/lib/rustlib/$1/lib" ]; }

if [ -n "${1:-}" ]; then
  cp "$1" "$work/ttlsweep-$HOST"
else
  say "compiling for $HOST"
  compile "$HOST"
fi
program="$work/ttlsweep-$HOST"

# Completions and man pages, which the program itself generates.
"$program" man "$work/man"
for shell in bash zsh fish; do "$program" completions "$shell" >"$work/completions.$shell"; done

archive() {
  local name="ttlsweep-$VERSION-$1" binary=$2 root="$work/$1"
  root="$root/$name"
  mkdir -p "$root/completions"
  install -m 755 "$binary" "$root/ttlsweep"
  cp -r README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT docs "$root/"
  cp -r deploy/systemd "$root/systemd"
  cp deploy/ttlsweep.toml "$root/ttlsweep.toml"
  cp -r "$work/man" "$root/man"
  for shell in bash zsh fish; do cp "$work/completions.$shell" "$root/completions/ttlsweep.$shell"; done
  tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner -C "$work/$1" -c "$name" |
    gzip -9n >"$OUT/$name.tar.gz"
  say "$OUT/$name.tar.gz: $(stat -c %s "$OUT/$name.tar.gz") bytes"
}

debian_package() {
  local root="$work/deb" architecture libc file
  case "$HOST" in
    x86_64-*) architecture=amd64 ;;
    aarch64-*) architecture=arm64 ;;
    *) die "no Debian architecture for $HOST" ;;
  esac
  # The newest version of a libc symbol that the program needs.
  libc=$(objdump -T "$program" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)
  [ -n "$libc" ] || die "the program needs no version of libc: it is linked statically"
  install -D -m 755 "$program" "$root/usr/bin/ttlsweep"
  for file in deploy/systemd/*; do
    # Debian's paths, and the package's own user, so that files can belong to it.
    install -D -m 644 "$file" "$root/usr/lib/systemd/system/$(basename "$file")"
    sed -i -e 's|/usr/local/bin/|/usr/bin/|' -e 's|^DynamicUser=yes$|User=ttlsweep|' \
      -e '/^# The daemon\. Copy to/,/systemctl enable/c # The daemon.' -e '/^# The program: /d' "$root/usr/lib/systemd/system/$(basename "$file")"
  done
  install -D -m 644 deploy/deb/ttlsweep.toml "$root/etc/ttlsweep/ttlsweep.toml"
  install -D -m 644 "$work/completions.bash" "$root/usr/share/bash-completion/completions/ttlsweep"
  install -D -m 644 "$work/completions.zsh" "$root/usr/share/zsh/vendor-completions/_ttlsweep"
  install -D -m 644 "$work/completions.fish" "$root/usr/share/fish/vendor_completions.d/ttlsweep.fish"
  for file in "$work"/man/*; do
    install -D -m 644 "$file" "$root/usr/share/man/man1/$(basename "$file")"
    gzip -9n "$root/usr/share/man/man1/$(basename "$file")"
  done
  install -D -m 644 deploy/ttlsweep.toml "$root/usr/share/doc/ttlsweep/examples/ttlsweep.toml"
  cp README.md docs/operations.md docs/reference.md "$root/usr/share/doc/ttlsweep/"
  gzip -9n <CHANGELOG.md >"$root/usr/share/doc/ttlsweep/changelog.gz"
  {
    printf 'ttlsweep\n\nCopyright %s\n\n' "$(sed -n 's/^Copyright (c) //p' LICENSE-MIT)"
    printf 'Licence: Apache-2.0 or Expat, as you choose. On Debian systems the text of the first is in\n'
    printf '/usr/share/common-licenses/Apache-2.0. The second:\n\n'
    sed -n '/^Permission/,$p' LICENSE-MIT
  } >"$root/usr/share/doc/ttlsweep/copyright"
  chmod -R u=rwX,go=rX "$root"
  mkdir "$root/DEBIAN"
  install -m 755 deploy/deb/postinst deploy/deb/prerm deploy/deb/postrm "$root/DEBIAN/"
  (cd "$root" && find etc -type f -printf '/%p\n' | sort) >"$root/DEBIAN/conffiles"
  (cd "$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
  sed -e "s/@VERSION@/$VERSION-1/" -e "s/@ARCHITECTURE@/$architecture/" -e "s/@LIBC@/${libc#GLIBC_}/" \
    -e "s/@SIZE@/$(du -sk --apparent-size "$root" | cut -f 1)/" deploy/deb/control >"$root/DEBIAN/control"
  dpkg-deb --root-owner-group -Zxz --build "$root" "$OUT/ttlsweep_$VERSION-1_$architecture.deb" >/dev/null
  say "$OUT/ttlsweep_$VERSION-1_$architecture.deb: $(stat -c %s "$OUT"/*.deb) bytes, needs libc ${libc#GLIBC_}"
}

if has_std "$MUSL"; then
  static=$MUSL
  say "compiling for $MUSL"
  compile "$MUSL"
else
  static=$HOST-static
  say "compiling for $HOST, with its C library inside"
  CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/static" RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" compile "$HOST" "$static"
fi
! ldd "$work/ttlsweep-$static" 2>&1 | grep -q "=>" || die "the program in the archive needs libraries of the system"
"$work/ttlsweep-$static" --version >/dev/null || die "the program in the archive does not run"
archive "$static" "$work/ttlsweep-$static"
if command -v dpkg-deb >/dev/null && command -v objdump >/dev/null; then
  debian_package
else
  echo "SKIPPED packages: no Debian package: dpkg-deb or objdump is not on this machine"
fi
sums=$(cd "$OUT" && find . -type f -printf '%P\0' | sort -z | xargs -0 sha256sum)
echo "$sums" | tee "$OUT/SHA256SUMS"
