#!/bin/sh
# Writes many keys that live for an hour and a few that live for seconds, which active expiry leaves behind. Each round prints what the
# server at $1 holds; the share of expired keys is the server's own estimate, which is often too low from Redis 7.2 on.
set -eu
host=$1

field() { redis-cli -h "$host" info "$1" | tr -d '\r' | sed -n "s/^$2://p"; }

# redis-benchmark may exit with 0 although the server is gone; this check exits with 1 then.
redis-cli -h "$host" ping | grep -q PONG
redis-benchmark -h "$host" -n 500000 -r 400000 -P 16 -d 200 -q set key:long:__rand_int__ x ex 3600 >/dev/null
while redis-cli -h "$host" ping | grep -q PONG; do
  redis-benchmark -h "$host" -n 20000 -r 1000000 -P 4 -q set key:short:__rand_int__ x ex 20 >/dev/null
  echo "$(date +%T) $host: $(redis-cli -h "$host" dbsize) keys, $(field memory used_memory_human) used," \
    "about $(field stats expired_stale_perc) % of the keys with a TTL have expired"
  date >/tmp/said
  sleep 5
done
exit 1
