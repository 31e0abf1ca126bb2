-- What the daemon needs beside the sweep itself.

ALTER TABLE tasks ADD COLUMN project_id TEXT NOT NULL DEFAULT '';
ALTER TABLE tasks ADD COLUMN sweep TEXT NOT NULL DEFAULT '{}';           -- settings used, as text by key, in JSON
ALTER TABLE tasks ADD COLUMN respect_window BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE tasks ADD COLUMN spent_us BIGINT NOT NULL DEFAULT 0;         -- of the time allowed
ALTER TABLE tasks ADD COLUMN note TEXT;                                  -- why it ended as it did, where that is no failure

CREATE INDEX tasks_by_state ON tasks (state, id);
CREATE INDEX tasks_by_end ON tasks (finished_at);

-- The automatic scan of an instance as the API set it.
CREATE TABLE auto_scans (
    instance_id     TEXT NOT NULL PRIMARY KEY,
    enabled         BOOLEAN NOT NULL,
    first_scan_at   BIGINT,
    interval_s      BIGINT NOT NULL,
    cron            TEXT,                       -- instead of first_scan_at and interval_s
    zone            TEXT,
    timeout_s       BIGINT NOT NULL,
    count           BIGINT NOT NULL,
    updated_at      BIGINT
);

-- Due times up to this one were dealt with. Written in one transaction with the task that one of them caused.
CREATE TABLE dues (
    instance_id     TEXT NOT NULL PRIMARY KEY,
    handled         BIGINT NOT NULL
);
