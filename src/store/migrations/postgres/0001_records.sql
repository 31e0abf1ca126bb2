-- The records of several daemons. Times are milliseconds since 1970 in UTC, spans are microseconds, sizes are bytes. States and
-- reasons are words, and booleans the numbers 0 and 1, as in SQLite. Ids sort bytewise.

-- The daemons that are there. A lease that has run out frees the tasks of its daemon for the others.
CREATE TABLE daemons (
    id              TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    name            TEXT NOT NULL,
    version         TEXT NOT NULL,
    address         TEXT NOT NULL,
    labels          TEXT NOT NULL,              -- separated by commas
    settings        TEXT NOT NULL,              -- a hash of its settings file
    started_at      BIGINT NOT NULL,
    heartbeat_at    BIGINT NOT NULL,
    lease_until     BIGINT NOT NULL
);

-- One sweep of one instance.
CREATE TABLE tasks (
    id              TEXT COLLATE "C" NOT NULL PRIMARY KEY,  -- UUID version 7: sorts by time
    instance_id     TEXT COLLATE "C" NOT NULL,
    project_id      TEXT NOT NULL,
    target          TEXT NOT NULL,              -- without any secret
    sweep           TEXT NOT NULL,              -- settings used, as text by key, in JSON
    respect_window  BIGINT NOT NULL,
    cause           TEXT NOT NULL,
    state           TEXT NOT NULL,
    created_at      BIGINT NOT NULL,
    started_at      BIGINT,
    finished_at     BIGINT,
    num             BIGINT NOT NULL,            -- expired keys that it freed
    spent_us        BIGINT NOT NULL,            -- of the time allowed
    failure_kind    TEXT,
    failure_message TEXT,
    failure_hint    TEXT,
    note            TEXT,                       -- why it ended as it did, where that is no failure
    owner           TEXT COLLATE "C" REFERENCES daemons (id),   -- who sweeps it; a daemon that is gone can claim nothing
    fence           BIGINT NOT NULL DEFAULT 0,  -- raised whenever the owner changes: a late write names an older one
    place           TEXT NOT NULL DEFAULT ''    -- the label that a daemon needs to reach the instance
);

CREATE INDEX tasks_of_instance ON tasks (instance_id, id);
CREATE INDEX tasks_by_state ON tasks (state, id);
CREATE INDEX tasks_by_end ON tasks (finished_at);
-- Never two sweeps of one instance.
CREATE UNIQUE INDEX one_unfinished_task ON tasks (instance_id) WHERE finished_at IS NULL;
-- What waits for an owner, the oldest first.
CREATE INDEX tasks_to_claim ON tasks (id) WHERE finished_at IS NULL AND owner IS NULL;
CREATE INDEX tasks_of_owner ON tasks (owner) WHERE owner IS NOT NULL;

-- One master of a task.
CREATE TABLE shards (
    task_id         TEXT COLLATE "C" NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    shard           TEXT NOT NULL,
    report          TEXT,                       -- everything beside the checkpoint, in JSON that names its version
    PRIMARY KEY (task_id, shard)
);

-- One DB of a shard: its checkpoint and its figures.
CREATE TABLE passes (
    task_id         TEXT COLLATE "C" NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    shard           TEXT NOT NULL,
    db              BIGINT NOT NULL,
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
    task_id         TEXT COLLATE "C" NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    shard           TEXT NOT NULL,
    db              BIGINT NOT NULL,
    reason          TEXT NOT NULL,
    held_us         BIGINT NOT NULL,
    PRIMARY KEY (task_id, shard, db, reason)
);

-- The automatic scan of an instance as the API set it.
CREATE TABLE auto_scans (
    instance_id     TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    project_id      TEXT NOT NULL,
    enabled         BIGINT NOT NULL,
    first_scan_at   BIGINT,
    interval_s      BIGINT NOT NULL,
    cron            TEXT,                       -- instead of first_scan_at and interval_s
    zone            TEXT,
    timeout_s       BIGINT NOT NULL,
    count           BIGINT NOT NULL,
    updated_at      BIGINT
);

-- Due times up to this one were dealt with. NULL as schedule: whichever is in force.
CREATE TABLE dues (
    instance_id     TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    handled         BIGINT NOT NULL,
    schedule        TEXT
);

CREATE INDEX dues_by_mark ON dues (handled);

-- What became of each due time: it was run, or skipped, and why. Whoever adds the row has dealt with it; there is one row for each.
CREATE TABLE due_times (
    instance_id     TEXT COLLATE "C" NOT NULL,
    due             BIGINT NOT NULL,
    outcome         TEXT NOT NULL,              -- `run`, or why it was skipped
    task_id         TEXT,                       -- what it caused
    PRIMARY KEY (instance_id, due)
);

-- What a daemon was asked to tell the owner of a task: pause, resume, cancel, other limits.
CREATE TABLE orders (
    id              TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    task_id         TEXT COLLATE "C" NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    what            TEXT NOT NULL,              -- JSON
    given_at        BIGINT NOT NULL,
    answer          TEXT                        -- JSON
);

CREATE INDEX orders_of_task ON orders (task_id);
