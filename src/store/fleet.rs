//! The operations for daemons that share a PostgreSQL database: which daemons there are, which of them owns which task, and how they
//! send each other orders.
//!
//! Each daemon has a row with a lease that it renews. A daemon that finds an expired lease removes the row and releases the tasks of that
//! daemon, with the row locked. So a late renewal either comes before that and loses nothing, or finds the row gone, and its daemon knows
//! that it owns no task any more. A task refers to the row of its owner, so a removed daemon cannot claim one. Each change of the owner
//! raises the fencing number of the task, and a write with an older number changes nothing. All times are the database's.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use sqlx::any::AnyRow;
use sqlx::postgres::PgListener;
use sqlx::{AnyConnection, AssertSqlSafe, Row};
use uuid::Uuid;

use crate::model::task::{Cause, Task, TaskId, TaskState};
use crate::store::rows::{self, TASK_COLUMNS, number, placeholders, task_of, time};
use crate::store::{Store, StoreError};

/// The channel of LISTEN and NOTIFY by which daemons wake each other.
const CHANNEL: &str = "ttlsweep";
/// Payload: tasks may wait for an owner, or have ended.
pub(super) const TASKS: &str = "tasks";
/// Payload: an order was given or answered.
const ORDERS: &str = "orders";
/// Payload: the automatic scan or the bounds of an instance were changed.
pub(super) const SCHEDULES: &str = "schedules";
/// SQL for the database's time in milliseconds since 1970.
const NOW: &str = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)";
/// The advisory lock for claims under a bound over all daemons (`at-once-of-all`). An arbitrary number.
const CLAIM_LOCK: i64 = 0x7474_6C73;
/// How long an order is kept whose sender did not fetch the answer.
const ORDERS_KEPT: Duration = Duration::from_secs(600);

/// The id of one run of a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DaemonId(pub Uuid);

impl DaemonId {
    /// A new random id, for the start of a daemon.
    pub fn generate() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for DaemonId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a daemon writes about itself when it joins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonRecord {
    /// Id of this run of the daemon.
    pub id: DaemonId,
    /// Name of the daemon, by option, settings or host.
    pub name: String,
    /// Version of the program that it runs.
    pub version: String,
    /// Address of its API, as it sees that itself.
    pub address: String,
    /// Labels of what its network reaches.
    pub labels: Vec<String>,
    /// Hash of its settings files.
    pub settings: String,
    /// When this run of it started.
    pub started_at: Timestamp,
}

/// A daemon that has a row now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PresentDaemon {
    /// What it wrote about itself.
    pub record: DaemonRecord,
    /// When it last renewed its lease.
    pub heartbeat_at: Timestamp,
    /// When its lease expires unless it is renewed.
    pub lease_until: Timestamp,
    /// The tasks that it owns, with the ids of their instances.
    pub tasks: Vec<(TaskId, String)>,
}

/// An order for a task, given by a daemon that does not own it and carried out by the owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenOrder {
    /// Id by which the answer is found.
    pub id: Uuid,
    /// The task that the order is for.
    pub task: TaskId,
    /// The order, in JSON that only `tasks` reads and writes.
    pub what: String,
}

/// Which tasks to claim, and for whom.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The daemon that becomes the owner.
    pub owner: DaemonId,
    /// Labels of what its network reaches.
    pub labels: Vec<String>,
    /// Most tasks to claim with this call.
    pub most: usize,
    /// True: keep runs only; false: all other tasks only.
    pub of_keeps: bool,
    /// Most running tasks over all daemons; `None`: no bound.
    pub most_of_all: Option<usize>,
    /// Tasks that are not claimed: this daemon runs them, or its settings lack their instance.
    pub but: Vec<TaskId>,
}

/// Why a daemon is woken by another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wake {
    /// Tasks may wait for an owner, or have ended.
    Tasks,
    /// An order was given or answered.
    Orders,
    /// An automatic scan or bounds were changed.
    Schedules,
}

/// The operations for daemons that share a database.
#[derive(Debug, Clone)]
pub struct Fleet(pub(super) Store);

pub(super) async fn notify(conn: &mut AnyConnection, what: &str) -> Result<(), StoreError> {
    sqlx::query("SELECT pg_notify($1, $2)").bind(CHANNEL).bind(what).execute(conn).await?;
    Ok(())
}

impl Fleet {
    /// Adds the row of a daemon, with a lease from now on, and sets the clock to the database's time.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn join(&self, daemon: &DaemonRecord, lease: Duration) -> Result<(), StoreError> {
        let sql = format!(
            "INSERT INTO daemons (id, name, version, address, labels, settings, started_at, heartbeat_at, lease_until) \
             SELECT $1, $2, $3, $4, $5, $6, $7, at, at + $8 FROM (SELECT {NOW} AS at) AS clock"
        );
        let insert = async |conn: &mut AnyConnection| {
            sqlx::query(AssertSqlSafe(sql))
                .bind(daemon.id.to_string())
                .bind(&daemon.name)
                .bind(&daemon.version)
                .bind(&daemon.address)
                .bind(daemon.labels.join(","))
                .bind(&daemon.settings)
                .bind(daemon.started_at.as_millisecond())
                .bind(millis(lease))
                .execute(conn)
                .await?;
            Ok(())
        };
        self.0.run(insert).await?;
        self.0.sync_clock().await
    }

    /// Renews the lease of a daemon, writes the hash of its settings, and sets the clock to the database's time. Returns false if the row
    /// is gone: the lease had expired, and the tasks were released.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn renew(&self, id: DaemonId, settings: &str, lease: Duration) -> Result<bool, StoreError> {
        let sql = format!(
            "UPDATE daemons SET heartbeat_at = clock.at, lease_until = clock.at + $1, settings = $2 \
             FROM (SELECT {NOW} AS at) AS clock WHERE id = $3 RETURNING heartbeat_at"
        );
        let row = self
            .0
            .run(async |conn| {
                let query = sqlx::query(AssertSqlSafe(sql)).bind(millis(lease)).bind(settings).bind(id.to_string());
                Ok(query.fetch_optional(conn).await?)
            })
            .await?;
        if let Some(row) = &row {
            self.0.clock.set(time(row.try_get("heartbeat_at")?)?);
        }
        Ok(row.is_some())
    }

    /// Removes the daemons whose lease has expired, and releases their tasks. Returns the ids of these daemons.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn reap(&self) -> Result<Vec<String>, StoreError> {
        let sql = format!("SELECT id FROM daemons WHERE lease_until < {NOW} FOR UPDATE SKIP LOCKED");
        self.0
            .transact(async |conn| {
                let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *conn).await?;
                let gone: Vec<String> = rows.iter().map(|row| row.try_get("id")).collect::<Result<_, _>>()?;
                for id in &gone {
                    remove(&mut *conn, id).await?;
                }
                if !gone.is_empty() {
                    notify(conn, TASKS).await?;
                }
                Ok(gone)
            })
            .await
    }

    /// Removes a daemon that stops, and releases the tasks that it still owns.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn leave(&self, id: DaemonId) -> Result<(), StoreError> {
        self.0
            .transact(async |conn| {
                remove(&mut *conn, &id.to_string()).await?;
                notify(conn, TASKS).await
            })
            .await
    }

    /// Claims tasks that have no owner, the oldest first. It also returns tasks of this owner that are not in `but`: they were claimed
    /// before, and the reply was lost.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn claim(&self, claim: &Claim) -> Result<Vec<Task>, StoreError> {
        // The empty text in front matches tasks without a label, and no task id. So neither list is ever empty, which SQL would refuse.
        let places: Vec<_> = std::iter::once(String::new()).chain(claim.labels.iter().cloned()).collect();
        let but: Vec<_> = std::iter::once(String::new()).chain(claim.but.iter().map(TaskId::to_string)).collect();
        let behind_places = 3 + places.len();
        let sql = format!(
            "UPDATE tasks SET owner = $1, fence = fence + 1 WHERE id IN (SELECT id FROM tasks WHERE finished_at IS NULL \
             AND (owner IS NULL OR owner = $1) AND state <> '{}' AND cause {} '{}' AND place IN ({}) AND id NOT IN ({}) ORDER BY id LIMIT $2 \
             FOR UPDATE SKIP LOCKED) RETURNING {TASK_COLUMNS}",
            TaskState::Paused,
            if claim.of_keeps { "=" } else { "<>" },
            Cause::Keep,
            placeholders(3..behind_places),
            placeholders(behind_places..behind_places + but.len()),
        );
        let mut tasks = self
            .0
            .transact(async |conn| {
                let most = match claim.most_of_all {
                    None => claim.most,
                    Some(all) => claim.most.min(all.saturating_sub(self.running(&mut *conn).await?)),
                };
                if most == 0 {
                    return Ok(Vec::new());
                }
                let mut query = sqlx::query(AssertSqlSafe(sql));
                query = query.bind(claim.owner.to_string()).bind(i64::try_from(most).unwrap_or(i64::MAX));
                for text in places.into_iter().chain(but) {
                    query = query.bind(text);
                }
                query.fetch_all(conn).await?.iter().map(task_of).collect::<Result<Vec<_>, _>>()
            })
            .await?;
        tasks.sort_by_key(|task| task.id);
        Ok(tasks)
    }

    /// The number of running tasks over all daemons, without keep runs. Locks out other claims until the transaction ends.
    async fn running(&self, conn: &mut AnyConnection) -> Result<usize, StoreError> {
        sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(CLAIM_LOCK).execute(&mut *conn).await?;
        let sql = "SELECT COUNT(*) AS tasks FROM tasks WHERE finished_at IS NULL AND owner IS NOT NULL AND state <> $1 AND cause <> $2";
        let row = sqlx::query(sql).bind(TaskState::Paused.as_str()).bind(Cause::Keep.as_str()).fetch_one(conn).await?;
        Ok(usize::try_from(number(&row, "tasks")?).unwrap_or(usize::MAX))
    }

    /// All daemons that have a row, the oldest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn daemons(&self) -> Result<Vec<PresentDaemon>, StoreError> {
        self.0
            .run(async |conn| {
                let rows = sqlx::query("SELECT * FROM daemons ORDER BY started_at, id").fetch_all(&mut *conn).await?;
                let mut daemons: Vec<_> = rows.iter().map(daemon_of).collect::<Result<_, _>>()?;
                let sql = "SELECT id, instance_id, owner FROM tasks WHERE owner IS NOT NULL ORDER BY id";
                for row in sqlx::query(sql).fetch_all(conn).await? {
                    let owner: String = row.try_get("owner")?;
                    let of = daemons.iter_mut().find(|daemon| daemon.record.id.to_string() == owner);
                    if let Some(daemon) = of {
                        daemon.tasks.push((rows::task_id(row.try_get("id")?)?, row.try_get("instance_id")?));
                    }
                }
                Ok(daemons)
            })
            .await
    }

    /// Gives an order to the owner of a task.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn give(&self, order: &GivenOrder) -> Result<(), StoreError> {
        let sql = format!("INSERT INTO orders (id, task_id, what, given_at) VALUES ($1, $2, $3, {NOW})");
        self.0
            .transact(async |conn| {
                sqlx::query(AssertSqlSafe(sql))
                    .bind(order.id.to_string())
                    .bind(order.task.to_string())
                    .bind(&order.what)
                    .execute(&mut *conn)
                    .await?;
                notify(conn, ORDERS).await
            })
            .await
    }

    /// The orders to an owner of tasks that are not answered yet, the oldest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn orders_to(&self, owner: DaemonId) -> Result<Vec<GivenOrder>, StoreError> {
        let sql = "SELECT orders.id, task_id, what FROM orders JOIN tasks ON tasks.id = task_id \
                   WHERE answer IS NULL AND owner = $1 ORDER BY given_at";
        let query = async |conn: &mut AnyConnection| {
            Ok(sqlx::query(sql).bind(owner.to_string()).fetch_all(conn).await?.iter().map(order_of).collect())
        };
        let orders: Vec<Result<_, _>> = self.0.run(query).await?;
        orders.into_iter().collect()
    }

    /// Answers an order, in JSON that only `tasks` reads and writes.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn answer(&self, order: Uuid, answer: &str) -> Result<(), StoreError> {
        self.0
            .transact(async |conn| {
                let update = sqlx::query("UPDATE orders SET answer = $1 WHERE id = $2");
                update.bind(answer).bind(order.to_string()).execute(&mut *conn).await?;
                notify(conn, ORDERS).await
            })
            .await
    }

    /// The answer to an order; `None`: there is none yet.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn answer_to(&self, order: Uuid) -> Result<Option<String>, StoreError> {
        let query = async |conn: &mut AnyConnection| {
            let query = sqlx::query("SELECT answer FROM orders WHERE id = $1").bind(order.to_string());
            Ok(query.fetch_optional(conn).await?.map(|row| row.try_get("answer")).transpose()?.flatten())
        };
        self.0.run(query).await
    }

    /// Takes an order back, and removes old ones whose sender is gone. Returns true if the order was not answered before.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn take_back(&self, order: Uuid) -> Result<bool, StoreError> {
        let old = format!("DELETE FROM orders WHERE given_at < {NOW} - $1");
        self.0
            .transact(async |conn| {
                let gone = sqlx::query("DELETE FROM orders WHERE id = $1 RETURNING answer").bind(order.to_string());
                let gone = gone.fetch_optional(&mut *conn).await?;
                sqlx::query(AssertSqlSafe(old)).bind(millis(ORDERS_KEPT)).execute(conn).await?;
                let answer: Option<Option<String>> = gone.map(|row| row.try_get("answer")).transpose()?;
                Ok(answer == Some(None))
            })
            .await
    }

    /// Listens for wake-ups by other daemons. Those sent while the connection is lost are missed, so callers must also poll.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn listen(&self) -> Result<Ears, StoreError> {
        let url = self.0.shared.as_ref().map(|url| url.expose()).unwrap_or_default();
        let mut listener = PgListener::connect(url).await?;
        listener.listen(CHANNEL).await?;
        Ok(Ears(listener))
    }
}

/// A connection that receives the wake-ups by other daemons.
#[derive(Debug)]
pub struct Ears(PgListener);

impl Ears {
    /// Waits for the next wake-up.
    ///
    /// # Errors
    /// [`StoreError::Sql`] if the connection is lost.
    pub async fn next(&mut self) -> Result<Wake, StoreError> {
        loop {
            match self.0.recv().await?.payload() {
                TASKS => return Ok(Wake::Tasks),
                ORDERS => return Ok(Wake::Orders),
                SCHEDULES => return Ok(Wake::Schedules),
                // The payload is one of another version of the program.
                _ => {}
            }
        }
    }
}

impl Store {
    /// Sets the clock to the database's time.
    pub(super) async fn sync_clock(&self) -> Result<(), StoreError> {
        let sql = format!("SELECT {NOW} AS at");
        let row = self.run(async |conn| Ok(sqlx::query(AssertSqlSafe(sql)).fetch_one(conn).await?)).await?;
        self.clock.set(time(row.try_get("at")?)?);
        Ok(())
    }
}

/// Releases the tasks of a daemon and removes its row.
async fn remove(conn: &mut AnyConnection, id: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE tasks SET owner = NULL, fence = fence + 1 WHERE owner = $1")
        .bind(id)
        .execute(&mut *conn)
        .await?;
    sqlx::query("DELETE FROM daemons WHERE id = $1").bind(id).execute(conn).await?;
    Ok(())
}

fn daemon_of(row: &AnyRow) -> Result<PresentDaemon, StoreError> {
    let id: String = row.try_get("id")?;
    let id = id.parse().map(DaemonId).map_err(|_| StoreError::Damaged(format!("`{id}` is not the id of a daemon")))?;
    let labels: String = row.try_get("labels")?;
    Ok(PresentDaemon {
        record: DaemonRecord {
            id,
            name: row.try_get("name")?,
            version: row.try_get("version")?,
            address: row.try_get("address")?,
            labels: labels.split(',').filter(|label| !label.is_empty()).map(str::to_owned).collect(),
            settings: row.try_get("settings")?,
            started_at: time(row.try_get("started_at")?)?,
        },
        heartbeat_at: time(row.try_get("heartbeat_at")?)?,
        lease_until: time(row.try_get("lease_until")?)?,
        tasks: Vec::new(),
    })
}

fn order_of(row: &AnyRow) -> Result<GivenOrder, StoreError> {
    let id: String = row.try_get("id")?;
    let id = id.parse().map_err(|_| StoreError::Damaged(format!("`{id}` is not the id of an order")))?;
    Ok(GivenOrder { id, task: rows::task_id(row.try_get("task_id")?)?, what: row.try_get("what")? })
}

fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}
