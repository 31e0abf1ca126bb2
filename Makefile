# Everything that a fresh machine needs: a Rust toolchain and apt (or brew) are enough.

SHELL := /bin/bash
CARGO ?= cargo
# The servers that `make matrix` runs against; leave one out with make matrix SERVERS='redis-7.0 valkey-8.0'.
SERVERS ?= redis-6.2 redis-7.0 redis-8.2 valkey-8.0
# `make test` runs a part of the tests against these too: what depends on the server most. None for make matrix by itself.
PART_SERVERS ?=
PART ?= exact:: touch:: walks:: rights:: check:: cluster:: cluster_forms:: keep:: forecast::
# What asks little of the server runs against the first one only.
ONCE ?= records:: chaos:: page:: instances:: doc_blocks:: daemons:: notify:: monitoring:: sdk:: deploy:: client:: traces:: logs:: fleet:: support_test::
# The small test crates beside tests/it, which need no server.
QUICK := $(patsubst tests/%.rs,--test %,$(wildcard tests/*.rs))

# One step: its name, and its command. A failure ends make with the name in the last line but make's own.
define step
@echo "== $(1)"
@$(2) || { echo "FAILED: $(1)" >&2; exit 1; }
endef
# The programs of redis-7.0 (redis-server, redis-cli, redis-benchmark) come first on the PATH.
with_redis = PATH="$$(scripts/servers.sh bin redis-7.0):$$PATH"
# The tests find the programs of PostgreSQL (postgres, initdb) in this folder.
with_postgres = TTLSWEEP_TEST_POSTGRES="$$(scripts/servers.sh bin postgres-16)"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help needs clients setup setup-demo cargo demo test fmt-check lint links docs unit matrix packages containers bench impact

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: setup-demo ## see the problem and the cure on a private server
	@$(with_redis) $(CARGO) run --release --quiet -- demo

test: PART_SERVERS = redis-8.0 valkey-8.1 valkey-9.1
test: needs setup clients fmt-check lint docs unit matrix ## format, lint, docs, tests, and the tests against every server

needs: cargo ## install what the system lacks for the tests, or name it
	$(call step,needs,scripts/needs.sh cc python)

clients: ## get the real clients for the tests: SDK, fuzzer, Prometheus, Helm, Compose, Chromium (cached outside the checkout)
	$(call step,clients,scripts/clients.sh fetch)

setup: cargo ## get the servers for the tests (cached outside the checkout)
	$(call step,setup: servers,scripts/servers.sh fetch redis-7.0 postgres-16 $(SERVERS) $(PART_SERVERS))

setup-demo: cargo ## get the C compiler and the one server for the demo
	$(call step,needs,scripts/needs.sh cc)
	$(call step,setup: redis-7.0,scripts/servers.sh fetch redis-7.0)

cargo:
	@command -v $(CARGO) >/dev/null || { echo "FAILED: no cargo on the PATH: install a Rust toolchain" >&2; exit 1; }

fmt-check: ## is the code formatted?
	$(call step,fmt-check,$(CARGO) fmt --all --check)

# Some errors, such as a cycle of constants, come up only in optimised builds. A release build would take minutes: this one optimises
# no dependency, and makes no machine code.
lint: ## clippy, warnings denied; what only a release build refuses; relative links, commands and settings in the docs; licences, duplicates and use of the crates, if `make clients` ran
	$(call step,lint,$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings)
	$(call step,what only a release build refuses,CARGO_INCREMENTAL=0 $(CARGO) rustc --lib --quiet -- -C opt-level=2 -C no-prepopulate-passes -C linker-plugin-lto -C debuginfo=0)
	$(call step,links and commands in the docs,$(CARGO) test --quiet --test docs)
	$(call step,supply,scripts/supply.sh)

links: ## does each external link in the docs answer? Needs curl and the internet, so no other target runs it
	$(call step,links,$(CARGO) test --quiet --test docs every_external_link_answers -- --ignored)

docs: ## rustdoc, warnings denied
	$(call step,docs,RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --document-private-items --quiet)

unit: ## the quick tests, without the matrix
	$(call step,unit tests,$(CARGO) test --lib --bins $(QUICK))
	$(call step,doc tests,$(CARGO) test --doc)

# All servers are tried before the failures are named. What was skipped is counted at the end, each with its line above; the last
# line is a sum in the form of the test runner's own.
matrix: setup clients ## the integration tests against each server
	@failed=; log=$$(mktemp); trap 'rm -f "$$log"' EXIT; set -o pipefail; \
	against() { \
	  local server=$$1 binary; shift; \
	  echo "== integration tests against $$server: $${*:-all}"; \
	  binary=$$(scripts/servers.sh path $$server) && \
	  { $(with_redis) $(with_postgres) TTLSWEEP_TEST_SERVER=$$binary $(CARGO) test --test it -- "$$@" 2>&1 | tee -a "$$log"; } || failed="$$failed $$server"; \
	}; \
	skip=; for server in $(SERVERS); do against $$server $$skip; skip="$(ONCE:%=--skip %)"; done; \
	for server in $(PART_SERVERS); do against $$server $(PART); done; \
	if [ -n "$$failed" ]; then \
	  echo "== failures, once more:"; sed -n '/^failures:$$/,/^test result: FAILED/p' "$$log"; \
	  echo "FAILED: integration tests against:$$failed" >&2; exit 1; \
	fi; \
	echo "== skipped, by reason:"; sed -n 's/.*SKIPPED [^ ]*: //p' "$$log" | sort | uniq -c; \
	awk '/^test result: ok/ { passed += $$4 } /SKIPPED / { skipped++ } \
	  END { printf "test result: ok. %d passed; 0 failed; %d skipped\n", passed, skipped }' "$$log"

packages: cargo ## make the archive and the Debian package, below target/packages
	$(call step,packages,scripts/packages.sh)

containers: clients packages ## build the image and run docker-compose.yml: a kill, the figures in Prometheus; the units and the Debian package under systemd
	$(call step,containers,scripts/containers.sh)

bench: setup-demo ## how fast the loop is, beside a bare socket and redis-cli
	$(call step,setup: PostgreSQL,scripts/servers.sh fetch postgres-16)
	@$(with_redis) $(CARGO) bench --bench batch
	@$(with_redis) $(CARGO) bench --bench scan_loop
	@$(with_redis) $(CARGO) bench --bench shards
	@$(with_redis) $(with_postgres) $(CARGO) bench --bench fleet
	@$(with_redis) $(CARGO) bench --bench round_trip

# The server of scenarios a and c is redis-7.0; b runs on each of these. See benches/impact/main.rs for what can be set.
IMPACT_SERVERS ?= redis-7.0 redis-8.2 valkey-8.0

impact: cargo ## what a sweep costs other clients, beside other ways to sweep (hours; see benches/impact/main.rs)
	$(call step,setup: servers,scripts/servers.sh fetch redis-7.0 $(IMPACT_SERVERS))
	$(call step,build,$(CARGO) build --release --workspace --bins)
	@paths=$$(for server in $(IMPACT_SERVERS); do scripts/servers.sh path $$server || exit 1; done) && \
	$(with_redis) TTLSWEEP_IMPACT_SERVERS="$${TTLSWEEP_IMPACT_SERVERS:-$$(echo $$paths | tr ' ' ,)}" \
	  $(CARGO) run --release --quiet --package ttlsweep-impact
