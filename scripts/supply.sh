#!/usr/bin/env bash
# Checks the crates that the program depends on: their licences, sources and duplicates (deny.toml says what is accepted), and those in
# Cargo.toml that are not used. `make clients` downloads the checkers; without them this prints SKIPPED.
#
# Known vulnerabilities (`cargo deny check advisories`) are checked by the release workflow: their database is in no package registry.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

deny=$(scripts/clients.sh cargo-deny)
shear=$(scripts/clients.sh cargo-shear)
if [ -z "$deny" ] || [ -z "$shear" ]; then
  echo "SKIPPED supply: cargo-deny and cargo-shear are not on this machine (make clients gets them)"
  exit 0
fi
"$deny" --log-level error --locked check --hide-inclusion-graph licenses bans sources
"$shear"
