-- Times are milliseconds since 1970 in UTC, spans are microseconds, sizes are bytes. States and reasons are words.

-- One sweep of one instance.
CREATE TABLE tasks (
    id              TEXT NOT NULL PRIMARY KEY,  -- UUID version 7: sorts by time
    instance_id     TEXT NOT NULL,
    target          TEXT NOT NULL,              -- without any secret
    cause           TEXT NOT NULL,
    state           TEXT NOT NULL,
    created_at      BIGINT NOT NULL,
    started_at      BIGINT,
    finished_at     BIGINT,
    num             BIGINT NOT NULL DEFAULT 0,  -- expired keys that it freed
    failure_kind    TEXT,
    failure_message TEXT,
    failure_hint    TEXT
);

CREATE INDEX tasks_of_instance ON tasks (instance_id, id);

-- One master of a task.
CREATE TABLE shards (
    task_id         TEXT NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    shard           TEXT NOT NULL,
    PRIMARY KEY (task_id, shard)
);

-- One DB of a shard: its checkpoint and its figures.
CREATE TABLE passes (
    task_id         TEXT NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    shard           TEXT NOT NULL,
    db              INTEGER NOT NULL,
    position        TEXT NOT NULL,              -- `start`, a cursor, or `end`
    process         BIGINT,                     -- fingerprint of the run id that the position belongs to
    keys_at_start   BIGINT NOT NULL,
    scanned         BIGINT NOT NULL,
    reclaimed       BIGINT NOT NULL,
    touched         BIGINT NOT NULL,
    found_by_touch  BIGINT NOT NULL,
    batches         BIGINT NOT NULL,
    lost_replies    BIGINT NOT NULL,
    restarts        BIGINT NOT NULL,
    active_us       BIGINT NOT NULL,
    rested_us       BIGINT NOT NULL,
    slice_p50_us    BIGINT NOT NULL,
    slice_p99_us    BIGINT NOT NULL,
    slice_max_us    BIGINT NOT NULL,
    PRIMARY KEY (task_id, shard, db)
);

-- How long a pass held, by reason.
CREATE TABLE holds (
    task_id         TEXT NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    shard           TEXT NOT NULL,
    db              INTEGER NOT NULL,
    reason          TEXT NOT NULL,
    held_us         BIGINT NOT NULL,
    PRIMARY KEY (task_id, shard, db, reason)
);
