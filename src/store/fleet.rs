//! What several daemons on one PostgreSQL database need of it: who is there, who has which task, and what they tell each other.
//!
//! A daemon has a row with a lease that it renews. Whoever finds a lease that has run out removes the row and frees the daemon's tasks,
//! under a lock of that row: a daemon that renews late either comes before that and loses nothing, or finds its row gone and knows that
//! all its tasks are others'. A task refers to its owner's row, so that a claim of a daemon that is gone fails. Whenever a task changes hands its fencing number is raised, and a write that names an older one changes
//! nothing. All times are the database's.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use sqlx::any::AnyRow;
use sqlx::postgres::PgListener;
use sqlx::{AnyConnection, AssertSqlSafe, Row};
use uuid::Uuid;

use crate::model::task::{Cause, Task, TaskId, TaskState};
use crate::store::rows::{self, TASK_COLUMNS, marks, number, task_of, time};
use crate::store::{Store, StoreError};

/// The channel on which daemons wake each other.
const CHANNEL: &str = "ttlsweep";
/// Tasks wait for an owner.
pub(super) const TASKS: &str = "tasks";
/// An order was given or answered.
const ORDERS: &str = "orders";
/// The automatic scan of an instance was changed.
pub(super) const SCHEDULES: &str = "schedules";
/// The database's time in milliseconds since 1970.
const NOW: &str = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)";
/// Held by whoever claims tasks where a cap over all daemons has to be kept. An arbitrary number.
const CLAIM_LOCK: i64 = 0x7474_6C73;
/// Orders that nobody fetched the answer of are kept for this long.
const ORDERS_KEPT: Duration = Duration::from_secs(600);

/// Names one run of a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DaemonId(pub Uuid);

impl DaemonId {
    /// A fresh id.
    pub fn generate() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for DaemonId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A daemon as the others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonRecord {
    /// Names this run of it.
    pub id: DaemonId,
    /// What people call it.
    pub name: String,
    /// The version of its program.
    pub version: String,
    /// Where its API listens.
    pub address: String,
    /// What its network reaches.
    pub labels: Vec<String>,
    /// A hash of its settings file.
    pub settings: String,
    /// When it began.
    pub started_at: Timestamp,
}

/// A daemon of the fleet now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PresentDaemon {
    /// What it says of itself.
    pub record: DaemonRecord,
    /// When it last renewed its lease.
    pub heartbeat_at: Timestamp,
    /// Until when it has its lease.
    pub lease_until: Timestamp,
    /// Its tasks, with their instances.
    pub tasks: Vec<(TaskId, String)>,
}

/// What the owner of a task is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenOrder {
    /// Names the order.
    pub id: Uuid,
    /// Of which task.
    pub task: TaskId,
    /// What, as the tasks' own JSON.
    pub what: String,
}

/// What is to be claimed.
#[derive(Debug, Clone)]
pub struct Claim {
    /// For whom.
    pub owner: DaemonId,
    /// What its network reaches.
    pub labels: Vec<String>,
    /// At most so many tasks.
    pub most: usize,
    /// Keep runs, or all other tasks.
    pub of_keeps: bool,
    /// No more than this over all daemons.
    pub most_of_all: Option<usize>,
    /// Not these.
    pub but: Vec<TaskId>,
}

/// Why a daemon is woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wake {
    /// Tasks may wait for an owner, or have ended.
    Tasks,
    /// An order was given or answered.
    Orders,
    /// A schedule was changed.
    Schedules,
}

/// The records as daemons share them.
#[derive(Debug, Clone)]
pub struct Fleet(pub(super) Store);

pub(super) async fn notify(conn: &mut AnyConnection, what: &str) -> Result<(), StoreError> {
    sqlx::query("SELECT pg_notify($1, $2)").bind(CHANNEL).bind(what).execute(conn).await?;
    Ok(())
}

impl Fleet {
    /// Says that a daemon is there, with a lease from now on. Hears the database's time.
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
        self.0.hear_time().await
    }

    /// Renews a daemon's lease and says which settings it has. Hears the database's time. Returns false where the daemon is there no
    /// more: its lease had run out, and its tasks were given away.
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

    /// Removes the daemons whose lease has run out and frees their tasks. Returns which.
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
                    free(&mut *conn, id).await?;
                }
                if !gone.is_empty() {
                    notify(conn, TASKS).await?;
                }
                Ok(gone)
            })
            .await
    }

    /// Takes a daemon out that ends, and frees what it still had.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn leave(&self, id: DaemonId) -> Result<(), StoreError> {
        self.0
            .transact(async |conn| {
                free(&mut *conn, &id.to_string()).await?;
                notify(conn, TASKS).await
            })
            .await
    }

    /// Takes tasks that have no owner, the oldest first, and those of others never. One that the owner has already, and is not told to
    /// leave, was claimed by an answer that was lost on its way: it is given again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn claim(&self, claim: &Claim) -> Result<Vec<Task>, StoreError> {
        // The empty text in front stands for "anywhere", and for no task at all.
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
            marks(3..behind_places),
            marks(behind_places..behind_places + but.len()),
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

    /// How many tasks are swept over all daemons. Nobody claims one until the transaction ends.
    async fn running(&self, conn: &mut AnyConnection) -> Result<usize, StoreError> {
        sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(CLAIM_LOCK).execute(&mut *conn).await?;
        let sql = "SELECT COUNT(*) AS tasks FROM tasks WHERE finished_at IS NULL AND owner IS NOT NULL AND state <> $1 AND cause <> $2";
        let row = sqlx::query(sql).bind(TaskState::Paused.as_str()).bind(Cause::Keep.as_str()).fetch_one(conn).await?;
        Ok(usize::try_from(number(&row, "tasks")?).unwrap_or(usize::MAX))
    }

    /// The daemons that are there, the oldest first.
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

    /// Asks the owner of a task for something.
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

    /// The orders to the owner of tasks that it has not answered, the oldest first.
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

    /// Answers an order, in the tasks' own JSON.
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

    /// The answer to an order, if it came.
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

    /// Takes an order back, and others that nobody waits for any more. Returns whether it was not answered.
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

    /// Listens for what other daemons have done. What happens while the connection is lost is missed: look again now and then.
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

/// Hears what other daemons have done.
#[derive(Debug)]
pub struct Ears(PgListener);

impl Ears {
    /// Waits for the next thing that was done.
    ///
    /// # Errors
    /// [`StoreError::Sql`] where the connection was lost.
    pub async fn next(&mut self) -> Result<Wake, StoreError> {
        loop {
            match self.0.recv().await?.payload() {
                TASKS => return Ok(Wake::Tasks),
                ORDERS => return Ok(Wake::Orders),
                SCHEDULES => return Ok(Wake::Schedules),
                // Of another version.
                _ => {}
            }
        }
    }
}

impl Store {
    /// Hears the database's time.
    pub(super) async fn hear_time(&self) -> Result<(), StoreError> {
        let sql = format!("SELECT {NOW} AS at");
        let row = self.run(async |conn| Ok(sqlx::query(AssertSqlSafe(sql)).fetch_one(conn).await?)).await?;
        self.clock.set(time(row.try_get("at")?)?);
        Ok(())
    }
}

/// Frees the tasks of a daemon and removes it.
async fn free(conn: &mut AnyConnection, id: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE tasks SET owner = NULL, fence = fence + 1 WHERE owner = $1")
        .bind(id)
        .execute(&mut *conn)
        .await?;
    sqlx::query("DELETE FROM daemons WHERE id = $1").bind(id).execute(conn).await?;
    Ok(())
}

fn daemon_of(row: &AnyRow) -> Result<PresentDaemon, StoreError> {
    let id: String = row.try_get("id")?;
    let id = id.parse().map(DaemonId).map_err(|_| StoreError::Damaged(format!("`{id}` is no daemon's id")))?;
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
    let id = id.parse().map_err(|_| StoreError::Damaged(format!("`{id}` is no order's id")))?;
    Ok(GivenOrder { id, task: rows::task_id(row.try_get("task_id")?)?, what: row.try_get("what")? })
}

fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}
