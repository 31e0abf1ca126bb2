-- What several daemons need of the records. With SQLite there is one daemon, and these columns keep their defaults; statements are
-- the same with both databases.
ALTER TABLE tasks ADD COLUMN owner TEXT;                       -- the daemon that sweeps it
ALTER TABLE tasks ADD COLUMN fence BIGINT NOT NULL DEFAULT 0;  -- raised whenever the owner changes: a late write names an older one
ALTER TABLE tasks ADD COLUMN place TEXT NOT NULL DEFAULT '';   -- the label that a daemon needs to reach the instance

-- Booleans are the numbers 0 and 1: one type that both databases have.
ALTER TABLE tasks RENAME COLUMN respect_window TO respect_window_bool;
ALTER TABLE tasks ADD COLUMN respect_window BIGINT NOT NULL DEFAULT 0;
UPDATE tasks SET respect_window = respect_window_bool;
ALTER TABLE tasks DROP COLUMN respect_window_bool;
ALTER TABLE auto_scans RENAME COLUMN enabled TO enabled_bool;
ALTER TABLE auto_scans ADD COLUMN enabled BIGINT NOT NULL DEFAULT 0;
UPDATE auto_scans SET enabled = enabled_bool;
ALTER TABLE auto_scans DROP COLUMN enabled_bool;

-- What became of each due time: it was run, or skipped, and why. Whoever adds the row has dealt with it; there is one row for each.
CREATE TABLE due_times (
    instance_id     TEXT NOT NULL,
    due             BIGINT NOT NULL,
    outcome         TEXT NOT NULL,              -- `run`, or why it was skipped
    task_id         TEXT,                       -- what it caused
    PRIMARY KEY (instance_id, due)
);
