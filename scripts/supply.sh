#!/usr/bin/env bash
# Looks at the crates that the program is made of: their licences, where they come from, which of them are in it twice (deny.toml says
# what is accepted), and which are named in Cargo.toml and not used. `make clients` gets what looks; without it this says SKIPPED.
#
# Known faults (`cargo deny check advisories`) are looked up by the release workflow: their database is not in a package registry.
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
