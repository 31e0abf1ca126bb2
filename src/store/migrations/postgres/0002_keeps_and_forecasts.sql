-- What the API set for an instance to be kept to. A row without any bound: it is not kept, whatever the settings file says.
CREATE TABLE keeps (
    instance_id     TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    project_id      TEXT NOT NULL,
    max_backlog     TEXT,                       -- such as `5%`, `100000` (keys) or `65536KiB`; NULL: no bound
    max_delay_us    BIGINT,                     -- NULL: no bound
    updated_at      BIGINT NOT NULL
);

-- The last forecast of an instance, in the API's JSON.
CREATE TABLE forecasts (
    instance_id     TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    project_id      TEXT NOT NULL,
    made_at         BIGINT NOT NULL,
    forecast        TEXT NOT NULL
);
