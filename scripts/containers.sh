#!/usr/bin/env bash
# Builds the image of the Dockerfile and tests docker-compose.yml with it: the commands in its head, the metrics in Prometheus, and a
# daemon that is killed in the middle of a sweep and resumes it. Then it tests the units of deploy/systemd under a systemd in a
# container: only there a program that is killed by their filters of system calls is noticed. There it also installs, upgrades, removes
# and purges the Debian package of `make packages`. It prints `SKIPPED what: why` for each step that cannot run here.
#
# Base images are pulled if possible. Otherwise replacements with the same names are built from Debian's packages and this machine's
# Rust, in a separate engine, which needs root: images of other engines are not touched. There is no replacement for Grafana.
#
#   containers.sh            run all tests; the engine and everything in it is removed at the end
#   KEEP=DIR containers.sh   keep the data of that engine in DIR, so that nothing is built twice
#   NO_BUILD=1 KEEP=DIR containers.sh   use the image that DIR has already
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PROJECT=ttlsweep-try
# Processors that the build may use.
CPUS=${CPUS:-1}
work=$(mktemp -d)
engine=
started=
box=
skipped=0

say() { echo "containers: $*" >&2; }
die() {
  [ -z "$started" ] || { compose ps --all && compose logs --tail 10; } >&2
  echo "FAILED: containers: $*" >&2
  exit 1
}
without() { echo "SKIPPED containers: $*"; skipped=$((skipped + 1)); }
skip() { without "$@"; exit 0; }
have() { command -v "$1" >/dev/null 2>&1; }
# Prints the images that the Dockerfile and docker-compose.yml name, without our own.
images() {
  { sed -n 's/^FROM \([^ ]*\).*/\1/p' Dockerfile; sed -n 's/^ *image: \([^ ]*\)$/\1/p' docker-compose.yml; } | grep -vE '^(ttlsweep:|scratch$)' | sort -u
}
compose() { "$COMPOSE" --project-name "$PROJECT" "$@"; }

stop() {
  [ -z "$box" ] || docker rm --force "$box" >/dev/null 2>&1 || true
  [ -z "$started" ] || compose down --volumes --timeout 5 >/dev/null 2>&1 || true
  if [ -n "$engine" ]; then
    kill "$engine" 2>/dev/null || true
    wait "$engine" 2>/dev/null || true
    umount "$work/exec/netns/default" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap stop EXIT

pull_all() {
  local image
  for image in $(images); do
    docker image inspect "$image" >/dev/null 2>&1 || timeout 600 docker pull --quiet "$image" >/dev/null 2>&1 || return 1
  done
}

# Starts a separate engine that does not change the machine's network: compose creates networks for its containers, ports are
# published by a proxy, and builds use the machine's network.
start_engine() {
  local data=${KEEP:-$work/engine}
  mkdir -p "$data"
  export DOCKER_HOST="unix://$work/docker.sock"
  dockerd --bridge none --iptables=false --ip-forward=false \
    --data-root "$data" --exec-root "$work/exec" --pidfile "$work/pid" --host "$DOCKER_HOST" \
    >"$work/dockerd.log" 2>&1 &
  engine=$!
  for _ in $(seq 60); do
    docker info >/dev/null 2>&1 && return
    kill -0 "$engine" 2>/dev/null || break
    sleep 0.5
  done
  skip "no engine can be started: $(grep -v level=info "$work/dockerd.log" | tail -n 1)"
}

# Builds in the separate engine with a limit on the processors, which BuildKit does not have.
build() {
  if [ -n "$engine" ]; then
    DOCKER_BUILDKIT=0 docker build --network host --cpu-period 100000 --cpu-quota $((CPUS * 100000)) "$@"
  else
    docker build "$@"
  fi >"$work/build.log" 2>&1 || die "docker build: $(tail -n 3 "$work/build.log")"
}

# Builds the images that the Dockerfile and docker-compose.yml name from Debian's packages.
stand_ins() {
  local image root="$work/root"
  for image in debian:bookworm-slim $(images); do
    docker image inspect "$image" >/dev/null 2>&1 && continue
    rm -rf "$work/context"
    mkdir "$work/context"
    case "$image" in
      debian:bookworm-slim)
        say "a stand-in for $image"
        debootstrap --variant=minbase bookworm "$root" >"$work/debootstrap.log" 2>&1 ||
          skip "debootstrap: $(tail -n 1 "$work/debootstrap.log")"
        tar -C "$root" -c . | docker import - "$image" >/dev/null
        rm -rf "$root"
        ;;
      rust:*)
        say "a stand-in for $image, with $(rustc --version)"
        cat >"$work/context/Dockerfile" <<'EOF'
FROM debian:bookworm-slim
COPY toolchain /usr/local/rust
COPY certificates /usr/local/rust/certificates.crt
ENV CARGO_HTTP_CAINFO=/usr/local/rust/certificates.crt
ENV PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
EOF
        # The certificate authorities of this machine, for crates that are downloaded through its proxy.
        cp /etc/ssl/certs/ca-certificates.crt "$work/context/certificates"
        ln -s "$(rustc --print sysroot)" "$work/context/toolchain"
        tar -C "$work/context" --dereference --exclude=share/doc -c . | build --tag "$image" -
        ;;
      redis:*)
        say "a stand-in for $image"
        cat >"$work/context/Dockerfile" <<'EOF'
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends redis-server
EOF
        build --tag "$image" "$work/context"
        ;;
      prom/prometheus:*)
        say "a stand-in for $image"
        cat >"$work/context/Dockerfile" <<'EOF'
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends prometheus busybox && ln -s /bin/busybox /bin/wget \
    && mkdir /data && chown nobody /data
USER nobody
ENTRYPOINT ["prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/data"]
EOF
        build --tag "$image" "$work/context"
        ;;
      grafana/*) without "Grafana is left out: its image cannot be pulled here, and Debian has no package of it" ;;
      *) die "there is no replacement for $image" ;;
    esac
  done
}

api() { curl --silent --show-error --fail --max-time 20 -H 'X-Auth-Token: try-me' "$@"; }
field() { python3 -c 'import json, sys; print(eval("d" + sys.argv[1], {"d": json.load(sys.stdin)}))' "$1"; }
# Runs a command until its output matches a pattern; fails after a minute and a half.
until_says() {
  local pattern=$1 said=''
  shift
  for _ in $(seq 90); do
    said=$("$@" 2>&1) && grep -qE "$pattern" <<<"$said" && return
    sleep 1
  done
  die "no output matched $pattern in time: $* (last output: $said)"
}
task() { api "localhost:8080/api/v1/tasks/$1"; }
state_of() { task "$1" | field '["state"]'; }
reclaimed_of() { task "$1" | field '["reclaimed"]'; }
health_of() { docker inspect --format '{{.State.Health.Status}}' "$(compose ps --quiet "$1")"; }
figure() { api --get localhost:9090/api/v1/query --data-urlencode "query=$1" | field '["data"]["result"]'; }

# Tests the Debian package from installation to purge, in the container of the units, which it replaces.
try_package() {
  local deb=(target/packages/ttlsweep_*.deb) id before
  [ -f "${deb[0]}" ] || { without "there is no Debian package yet: make packages"; return 0; }
  inside sh -c 'rm -rf /etc/systemd/system/ttlsweep* /etc/ttlsweep /usr/local/bin/ttlsweep /var/lib/ttlsweep /var/lib/private/ttlsweep'
  inside systemctl daemon-reload
  docker cp "${deb[0]}" "$box:/root/first.deb"
  inside dpkg --install /root/first.deb >"$work/dpkg.log" 2>&1 || die "dpkg: $(tail -n 3 "$work/dpkg.log")"
  until_says '^ok$' inside ttlsweep health --ready
  [ "$(inside systemctl is-enabled ttlsweep.service)" = enabled ] || die "ttlsweep.service is not enabled"
  [ "$(inside systemctl is-enabled ttlsweep-scan.timer || true)" = disabled ] || die "ttlsweep-scan.timer is not disabled"
  [ "$(inside ps -o user= -p "$(main_process)")" = ttlsweep ] || die "the daemon runs as another user"
  inside sh -c 'gzip -t /usr/share/man/man1/ttlsweep-scan.1.gz && bash -n /usr/share/bash-completion/completions/ttlsweep' ||
    die "man pages or completions are missing"
  printf '[[instances]]\nid = "cache"\nproject_id = "demo"\nurl = "redis://127.0.0.1:6379"\n' >"$work/instance"
  docker exec --interactive "$box" sh -c 'cat >>/etc/ttlsweep/ttlsweep.toml' <"$work/instance"
  inside systemctl reload ttlsweep
  until_says cache inside ttlsweep instance list
  id=$(inside ttlsweep task create cache --watch --json | field '["id"]') || die "a task of the packaged daemon failed"

  # The next version: the same package with another version number.
  inside sh -c 'dpkg-deb --raw-extract /root/first.deb /root/next && sed -i "s/^Version: .*/&.1/" /root/next/DEBIAN/control \
    && dpkg-deb --build /root/next /root/next.deb' >/dev/null
  before=$(main_process)
  inside dpkg --install /root/next.deb >"$work/dpkg.log" 2>&1 || die "dpkg: $(tail -n 3 "$work/dpkg.log")"
  until_says '^ok$' inside ttlsweep health --ready
  [ "$(main_process)" != "$before" ] || die "the upgrade did not restart the daemon"
  inside ttlsweep task show "$id" >/dev/null || die "the upgrade lost the records, or the settings"

  inside dpkg --remove ttlsweep >"$work/dpkg.log" 2>&1 || die "dpkg: $(tail -n 3 "$work/dpkg.log")"
  ! inside pgrep -x ttlsweep >/dev/null || die "the daemon outlived its package"
  inside test -s /etc/ttlsweep/ttlsweep.toml -a -s /var/lib/ttlsweep/ttlsweep.db || die "remove deleted settings or records"
  inside dpkg --purge ttlsweep >"$work/dpkg.log" 2>&1 || die "dpkg: $(tail -n 3 "$work/dpkg.log")"
  inside sh -c '! test -e /etc/ttlsweep && ! test -e /var/lib/ttlsweep && ! getent passwd ttlsweep && ! systemctl cat ttlsweep.service' \
    >/dev/null 2>&1 || die "purge left something behind"
  say "$(basename "${deb[0]}"): installed, started, upgraded, removed and purged"
}

for program in docker curl python3; do have "$program" || skip "no $program on this machine"; done
COMPOSE=$(scripts/clients.sh compose)
[ -n "$COMPOSE" ] || skip "no Compose on this machine (make clients gets it from Debian's packages)"
COMPOSE_VERSION=$("$COMPOSE" version --short)

"$COMPOSE" --profile unswept config --quiet || die "docker-compose.yml is not well formed"
say "Compose $COMPOSE_VERSION takes docker-compose.yml"

if docker info >/dev/null 2>&1 && pull_all; then
  say "the engine $(docker info --format '{{.ServerVersion}}') that runs here, with images that were pulled"
else
  [ "$(id -u)" = 0 ] || skip "images cannot be pulled, and an engine of our own for stand-ins needs root"
  for program in dockerd debootstrap rustc; do
    have "$program" || skip "images cannot be pulled, and stand-ins need $program (apt-get install docker.io debootstrap)"
  done
  start_engine
  say "an engine of our own, $(docker info --format '{{.ServerVersion}}')"
  stand_ins
fi
[ -n "${NO_BUILD:-}" ] || build --tag ttlsweep:0.2.0 .
docker image inspect ttlsweep:0.2.0 >/dev/null 2>&1 || die "there is no image ttlsweep:0.2.0 yet: leave NO_BUILD out"
# The image must contain time zones and certificates, and no shell.
docker run --rm --network none --read-only --volume "$PWD/deploy/ttlsweep.toml:/t.toml:ro" ttlsweep:0.2.0 settings check /t.toml >/dev/null ||
  die "the image does not know the time zone of deploy/ttlsweep.toml"
! docker run --rm --network none --entrypoint /bin/sh ttlsweep:0.2.0 -c true >/dev/null 2>&1 || die "there is a shell in the image"
say "the image: $(docker image inspect --format '{{.Size}} bytes, user {{.Config.User}}' ttlsweep:0.2.0), $(docker run --rm --network none --read-only --cap-drop ALL ttlsweep:0.2.0 --version)"

services="redis workload ttlsweep prometheus"
docker image inspect "$(images | grep grafana)" >/dev/null 2>&1 && services="$services grafana"
started=yes
# shellcheck disable=SC2086
compose up --detach --no-build --quiet-pull $services >"$work/up.log" 2>&1 || die "compose up: $(tail -n 3 "$work/up.log")"
for service in $services; do until_says '^healthy$' health_of "$service"; done
say "healthy: $services"

# Compose has a health check of its own; this runs that of the image.
docker exec "$(compose ps --quiet ttlsweep)" ttlsweep health --ready >/dev/null || die "ttlsweep health failed in the container"

# Waits for some rounds of the workload, each of which adds keys that live for 20 s.
rounds() { compose logs --no-log-prefix workload | grep -c ' redis: '; }
dead_keys() {
  local now
  now=$(rounds || true)
  for _ in $(seq 120); do
    [ "$(rounds || true)" -ge $((now + 7)) ] && return
    sleep 1
  done
  die "the workload does not run"
}

# The commands in the head of docker-compose.yml.
dead_keys
grep -E '^#   curl ' docker-compose.yml | cut -c5- | while read -r line; do
  bash -c "${line/curl/curl --silent --show-error --fail}" >"$work/answer" || die "$line"
  python3 -m json.tool <"$work/answer" >/dev/null || die "$line: $(cat "$work/answer")"
  say "$line: $(head -c 100 "$work/answer")"
done
history() { api localhost:8080/v2/demo/instances/cache/auto-expire/histories | field '["records"][0]'; }
until_says "'status': 'success'.*'num': [1-9]" history
say "swept: $(history)"

# A slow sweep, with SIGKILL to the daemon in the middle of it.
dead_keys
id=$(api -X POST localhost:8080/api/v1/tasks -H 'Content-Type: application/json' \
  -d '{"instance_id": "cache", "max_keys_per_sec": 50000}' | field '["id"]')
until_says '^[1-9]' reclaimed_of "$id"
before=$(docker inspect --format '{{.State.Pid}}' "$(compose ps --quiet ttlsweep)")
[ "$(state_of "$id")" = running ] || die "the sweep ended before the daemon could be killed"
kill -9 "$before"
until_says '^healthy$' health_of ttlsweep
after=$(docker inspect --format '{{.State.Pid}}' "$(compose ps --quiet ttlsweep)")
[ "$before" != "$after" ] || die "the daemon was not killed"
until_says '^succeeded$' state_of "$id"
say "killed in the middle of a sweep, the daemon came back and ended it: $(reclaimed_of "$id") keys reclaimed"

# An orderly stop in the middle of another sweep. Compose would kill the daemon after ten seconds.
dead_keys
id=$(api -X POST localhost:8080/api/v1/tasks -H 'Content-Type: application/json' \
  -d '{"instance_id": "cache", "max_keys_per_sec": 50000}' | field '["id"]')
until_says '^[1-9]' reclaimed_of "$id"
begun=$(date +%s)
compose stop ttlsweep >/dev/null 2>&1
took=$(($(date +%s) - begun))
[ "$took" -lt 8 ] || die "the daemon took $took s to stop"
code=$(docker inspect --format '{{.State.ExitCode}}' "$(compose ps --all --quiet ttlsweep)")
[ "$code" = 0 ] || die "the daemon ended with $code on SIGTERM"
compose start ttlsweep >/dev/null 2>&1
until_says '^healthy$' health_of ttlsweep
until_says '^succeeded$' state_of "$id"
say "stopped by SIGTERM in the middle of a sweep within $took s, the daemon came back and ended it"

until_says '[1-9]' figure 'sum(ttlsweep_keys_reclaimed_total) > 0'
until_says 'TtlsweepDown' api localhost:9090/api/v1/rules
say "Prometheus has the figures and the alerts"
if [[ $services = *grafana* ]]; then
  until_says '"uid": ?"ttlsweep"' api localhost:3000/api/dashboards/uid/ttlsweep
  until_says '"status": ?"OK"' api localhost:3000/api/datasources/uid/prometheus/health
  say "Grafana has the dashboard and its source"
fi

# The units. systemd needs a hierarchy of control groups, which the container creates for itself.
mkdir "$work/units"
cp deploy/systemd/ttlsweep* "$work/units"
cat >"$work/units/Dockerfile" <<'EOF'
FROM ttlsweep:0.2.0 AS program
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends systemd-sysv procps redis-server
COPY --from=program /usr/local/bin/ttlsweep /usr/local/bin/
COPY ttlsweep* /etc/systemd/system/
RUN mkdir /etc/ttlsweep && echo TTLSWEEP_URL=redis://127.0.0.1:6379 >/etc/ttlsweep/scan.env && printf '%s\n' \
    '[store]' 'path = "/var/lib/ttlsweep/ttlsweep.db"' \
    '[[instances]]' 'id = "cache"' 'project_id = "demo"' 'url = "redis://127.0.0.1:6379"' >/etc/ttlsweep/ttlsweep.toml
EOF
build --tag ttlsweep-units "$work/units"
box=$(docker run --detach --cap-add ALL --cap-drop SYS_RESOURCE --security-opt seccomp=unconfined --cgroupns private --network none \
  --tmpfs /run --tmpfs /tmp --tmpfs /sys/fs/cgroup:rw ttlsweep-units \
  sh -c 'mkdir /sys/fs/cgroup/systemd && mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd && exec /sbin/init')
inside() { docker exec "$box" "$@"; }
main_process() { inside systemctl show --property MainPID --value ttlsweep; }
said=
for _ in $(seq 20); do
  said=$(inside systemctl is-system-running 2>&1 || true)
  [ "$said" = running ] && break
  sleep 1
done
if [ "$said" != running ]; then
  without "the units are left out: no systemd runs in a container here ($said)"
else
  journal() { inside journalctl --no-pager --output cat --lines 5 --unit "$1" >&2; }
  inside systemctl start redis-server
  for priority in normal low idle; do
    inside sed -i "s/^Environment=TTLSWEEP_PRIORITY=.*/Environment=TTLSWEEP_PRIORITY=$priority/" /etc/systemd/system/ttlsweep-scan.service
    inside systemctl daemon-reload
    inside systemctl start ttlsweep-scan.service || { journal ttlsweep-scan; die "ttlsweep-scan.service with priority $priority"; }
  done
  inside systemctl start ttlsweep-scan.timer ttlsweep.service || { journal ttlsweep; die "ttlsweep.service"; }
  until_says cache inside ttlsweep instance list
  inside ttlsweep task create cache --watch >/dev/null || { journal ttlsweep; die "a task under ttlsweep.service"; }
  before=$(main_process)
  inside systemctl kill --signal KILL ttlsweep
  until_says cache inside ttlsweep instance list
  [ "$(main_process)" != "$before" ] || die "ttlsweep.service was not killed"
  inside systemctl reload ttlsweep || { journal ttlsweep; die "ttlsweep.service cannot be reloaded"; }

  # A stop in the middle of a sweep, which must be resumed afterwards.
  inside redis-cli EVAL "for i = 1, 100000 do redis.call('SET', 'k' .. i, 'x', 'EX', 3600) end" 0 >/dev/null
  id=$(inside ttlsweep task create cache --max-keys-per-sec 2000 --json | field '["id"]')
  shown() { inside ttlsweep task show "$id" --json | field "$1"; }
  until_says '^[1-9]' shown '["scanned"]'
  inside systemctl stop ttlsweep
  [ "$(inside systemctl show --property Result --value ttlsweep)" = success ] || { journal ttlsweep; die "ttlsweep.service does not stop in order"; }
  inside systemctl start ttlsweep
  until_says '^running$' shown '["state"]'
  inside ttlsweep task tune "$id" --max-keys-per-sec 0 >/dev/null
  until_says '^succeeded$' shown '["state"]'

  # The timer, set to fire every five seconds for this test.
  inside sh -c 'mkdir -p /etc/systemd/system/ttlsweep-scan.timer.d && printf "[Timer]\nOnCalendar=\nOnCalendar=*:*:0/5\nRandomizedDelaySec=0\n" \
    >/etc/systemd/system/ttlsweep-scan.timer.d/often.conf && systemctl daemon-reload && systemctl restart ttlsweep-scan.timer'
  began() { inside systemctl show --property ExecMainStartTimestampMonotonic --value ttlsweep-scan.service; }
  before=$(began)
  for _ in $(seq 40); do
    [ "$(began)" != "$before" ] && break
    sleep 0.5
  done
  [ "$(began)" != "$before" ] || { journal ttlsweep-scan; die "ttlsweep-scan.timer does not fire"; }
  until_says '^success$' inside systemctl show --property Result --value ttlsweep-scan.service
  inside systemctl stop ttlsweep-scan.timer ttlsweep
  [ "$(inside systemctl show --property Result --value ttlsweep)" = success ] || { journal ttlsweep; die "ttlsweep.service does not stop in order"; }
  say "the units work under $(inside systemctl --version | head -n 1)"
  try_package
fi
echo "containers: all passed, $skipped skipped"
