//! The rows of tasks, shards and passes, and their statements. Model types know nothing of SQL: they are converted here.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Row};

use crate::model::failure::Failure;
use crate::model::progress::{PassFigures, ShardView, SliceSummary};
use crate::model::shard::{DbIndex, ShardId};
use crate::model::slots::CursorSpace;
use crate::model::task::{SweepTexts, Task, TaskId};
use crate::store::{StoreError, report};

pub(super) const TASK_COLUMNS: &str = "id, instance_id, project_id, target, sweep, respect_window, cause, state, created_at, \
                            started_at, finished_at, num, spent_us, failure_kind, failure_message, failure_hint, note, owner, fence, place";

/// Adds a task. Returns false if the instance has an unfinished one; only the index of PostgreSQL checks this.
pub(super) async fn insert_task(conn: &mut AnyConnection, task: &Task) -> Result<bool, StoreError> {
    let sql = format!("INSERT INTO tasks ({TASK_COLUMNS}) VALUES ({}) ON CONFLICT DO NOTHING", placeholders(1..21));
    let added = sqlx::query(AssertSqlSafe(sql))
        .bind(task.id.to_string())
        .bind(&task.instance_id)
        .bind(&task.project_id)
        .bind(&task.target)
        .bind(texts_to_json(&task.sweep))
        .bind(i64::from(task.respect_window))
        .bind(task.cause.as_str())
        .bind(task.state.as_str())
        .bind(task.created_at.as_millisecond())
        .bind(task.started_at.map(Timestamp::as_millisecond))
        .bind(task.finished_at.map(Timestamp::as_millisecond))
        .bind(signed(task.num))
        .bind(micros(task.spent))
        .bind(task.failure.as_ref().map(|f| f.kind.as_str()))
        .bind(task.failure.as_ref().map(|f| plain(&f.message)))
        .bind(task.failure.as_ref().and_then(|f| f.hint.as_deref()).map(plain))
        .bind(task.note.as_deref().map(plain))
        .bind(task.owner.as_ref())
        .bind(signed(task.fence))
        .bind(&task.place)
        .execute(conn)
        .await?;
    Ok(added.rows_affected() > 0)
}

/// Writes the columns of a task that may change, if it still has the fencing number that the caller knows.
///
/// # Errors
/// [`StoreError::Fenced`] if another daemon owns the task by now; nothing is written then.
pub(super) async fn update_task(conn: &mut AnyConnection, task: &Task) -> Result<(), StoreError> {
    let written = sqlx::query(
        "UPDATE tasks SET sweep = $1, state = $2, started_at = $3, finished_at = $4, num = $5, spent_us = $6, \
         failure_kind = $7, failure_message = $8, failure_hint = $9, note = $10, owner = $11 \
         WHERE id = $12 AND fence = $13",
    )
    .bind(texts_to_json(&task.sweep))
    .bind(task.state.as_str())
    .bind(task.started_at.map(Timestamp::as_millisecond))
    .bind(task.finished_at.map(Timestamp::as_millisecond))
    .bind(signed(task.num))
    .bind(micros(task.spent))
    .bind(task.failure.as_ref().map(|f| f.kind.as_str()))
    .bind(task.failure.as_ref().map(|f| plain(&f.message)))
    .bind(task.failure.as_ref().and_then(|f| f.hint.as_deref()).map(plain))
    .bind(task.note.as_deref().map(plain))
    // A task that has ended has no owner any more.
    .bind(task.owner.as_ref().filter(|_| !task.state.is_final()))
    .bind(task.id.to_string())
    .bind(signed(task.fence))
    .execute(conn)
    .await?;
    match written.rows_affected() {
        0 => Err(StoreError::Fenced(task.id)),
        _ => Ok(()),
    }
}

pub(super) async fn task(conn: &mut AnyConnection, id: TaskId) -> Result<Option<Task>, StoreError> {
    let sql = AssertSqlSafe(format!("SELECT {TASK_COLUMNS} FROM tasks WHERE id = $1"));
    let row = sqlx::query(sql).bind(id.to_string()).fetch_optional(&mut *conn).await?;
    row.as_ref().map(task_of).transpose()
}

pub(super) async fn latest(conn: &mut AnyConnection, instance_id: &str) -> Result<Option<Task>, StoreError> {
    let sql =
        AssertSqlSafe(format!("SELECT {TASK_COLUMNS} FROM tasks WHERE instance_id = $1 ORDER BY id DESC LIMIT 1"));
    let row = sqlx::query(sql).bind(instance_id).fetch_optional(&mut *conn).await?;
    row.as_ref().map(task_of).transpose()
}

pub(super) async fn in_states(conn: &mut AnyConnection, words: &[&str]) -> Result<Vec<Task>, StoreError> {
    let sql =
        format!("SELECT {TASK_COLUMNS} FROM tasks WHERE state IN ({}) ORDER BY id", placeholders(1..words.len() + 1));
    let mut query = sqlx::query(AssertSqlSafe(sql));
    for word in words {
        query = query.bind(*word);
    }
    query.fetch_all(&mut *conn).await?.iter().map(task_of).collect()
}

pub(super) async fn upsert_shard(
    conn: &mut AnyConnection,
    id: TaskId,
    shard: &ShardId,
    view: &ShardView,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO shards (task_id, shard, report) VALUES ($1, $2, $3) \
         ON CONFLICT (task_id, shard) DO UPDATE SET report = excluded.report",
    )
    .bind(id.to_string())
    .bind(&shard.0)
    .bind(report::to_json(view))
    .execute(&mut *conn)
    .await?;
    Ok(())
}

pub(super) async fn upsert_pass(
    conn: &mut AnyConnection,
    id: TaskId,
    shard: &ShardId,
    db: DbIndex,
    figures: &PassFigures,
) -> Result<(), StoreError> {
    sqlx::query(AssertSqlSafe(format!(
        "INSERT INTO passes (task_id, shard, db, position, keys_at_start, scanned, reclaimed, touched, found_by_touch, \
         batches, lost_replies, restarts, active_us, rested_us, slice_p50_us, slice_p99_us, slice_max_us, process) \
         VALUES ({}) \
         ON CONFLICT (task_id, shard, db) DO UPDATE SET position = excluded.position, \
         keys_at_start = excluded.keys_at_start, scanned = excluded.scanned, reclaimed = excluded.reclaimed, \
         touched = excluded.touched, found_by_touch = excluded.found_by_touch, batches = excluded.batches, \
         lost_replies = excluded.lost_replies, restarts = excluded.restarts, active_us = excluded.active_us, \
         rested_us = excluded.rested_us, slice_p50_us = excluded.slice_p50_us, \
         slice_p99_us = excluded.slice_p99_us, slice_max_us = excluded.slice_max_us, process = excluded.process",
        placeholders(1..19)
    )))
    .bind(id.to_string())
    .bind(&shard.0)
    .bind(i64::from(db.0))
    .bind(figures.position.to_string())
    .bind(signed(figures.keys_at_start))
    .bind(signed(figures.scanned))
    .bind(signed(figures.reclaimed))
    .bind(signed(figures.touched))
    .bind(signed(figures.found_by_touch))
    .bind(signed(figures.batches))
    .bind(signed(figures.lost_replies))
    .bind(signed(figures.restarts))
    .bind(micros(figures.active))
    .bind(micros(figures.rested))
    .bind(signed(figures.slice.p50_us))
    .bind(signed(figures.slice.p99_us))
    .bind(signed(figures.slice.max_us))
    .bind(figures.process.map(u64::cast_signed))
    .execute(&mut *conn)
    .await?;
    for (reason, held) in &figures.held {
        sqlx::query(
            "INSERT INTO holds (task_id, shard, db, reason, held_us) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (task_id, shard, db, reason) DO UPDATE SET held_us = excluded.held_us",
        )
        .bind(id.to_string())
        .bind(&shard.0)
        .bind(i64::from(db.0))
        .bind(reason.as_str())
        .bind(micros(*held))
        .execute(&mut *conn)
        .await?;
    }
    Ok(())
}

/// The shards of each of these tasks, with passes, holds and reports. A task without shards is left out.
pub(super) async fn shards(
    conn: &mut AnyConnection,
    ids: &[TaskId],
) -> Result<BTreeMap<TaskId, BTreeMap<ShardId, ShardView>>, StoreError> {
    let mut tasks: BTreeMap<TaskId, BTreeMap<ShardId, ShardView>> = BTreeMap::new();
    for row in of_tasks(conn, "passes", ids).await? {
        let shard = shard_in(&mut tasks, &row)?;
        shard.passes.insert(db_of(&row)?, figures_of(&row)?);
    }
    for row in of_tasks(conn, "holds", ids).await? {
        let shard = shard_in(&mut tasks, &row)?;
        let figures = shard.passes.entry(db_of(&row)?).or_default();
        figures.held.insert(word(&row, "reason")?, span(&row, "held_us")?);
    }
    for row in of_tasks(conn, "shards", ids).await? {
        let shard = shard_in(&mut tasks, &row)?;
        if let Some(text) = row.try_get::<Option<String>, _>("report")? {
            report::complete(shard, &text);
        }
    }
    Ok(tasks)
}

/// All rows of these tasks in a table.
async fn of_tasks(conn: &mut AnyConnection, table: &str, ids: &[TaskId]) -> Result<Vec<AnyRow>, StoreError> {
    let sql = format!("SELECT * FROM {table} WHERE task_id IN ({})", placeholders(1..ids.len() + 1));
    let mut query = sqlx::query(AssertSqlSafe(sql));
    for id in ids {
        query = query.bind(id.to_string());
    }
    Ok(query.fetch_all(conn).await?)
}

/// The shard that a row belongs to, added if it is the first row of it.
fn shard_in<'a>(
    tasks: &'a mut BTreeMap<TaskId, BTreeMap<ShardId, ShardView>>,
    row: &AnyRow,
) -> Result<&'a mut ShardView, StoreError> {
    let shards = tasks.entry(task_id(row.try_get("task_id")?)?).or_default();
    Ok(shards.entry(ShardId(row.try_get("shard")?)).or_default())
}

fn figures_of(row: &AnyRow) -> Result<PassFigures, StoreError> {
    let number = |column| number(row, column);
    Ok(PassFigures {
        position: word(row, "position")?,
        process: row.try_get::<Option<i64>, _>("process")?.map(i64::cast_unsigned),
        space: CursorSpace::default(),
        keys_at_start: number("keys_at_start")?,
        scanned: number("scanned")?,
        reclaimed: number("reclaimed")?,
        touched: number("touched")?,
        found_by_touch: number("found_by_touch")?,
        batches: number("batches")?,
        lost_replies: number("lost_replies")?,
        restarts: number("restarts")?,
        active: span(row, "active_us")?,
        rested: span(row, "rested_us")?,
        slice: SliceSummary {
            p50_us: number("slice_p50_us")?,
            p99_us: number("slice_p99_us")?,
            max_us: number("slice_max_us")?,
        },
        ..PassFigures::default()
    })
}

pub(super) fn task_of(row: &AnyRow) -> Result<Task, StoreError> {
    let failure = match row.try_get::<Option<String>, _>("failure_kind")? {
        Some(_) => Some(Failure {
            kind: word(row, "failure_kind")?,
            message: row.try_get("failure_message")?,
            hint: row.try_get("failure_hint")?,
        }),
        None => None,
    };
    Ok(Task {
        id: task_id(row.try_get("id")?)?,
        instance_id: row.try_get("instance_id")?,
        project_id: row.try_get("project_id")?,
        target: row.try_get("target")?,
        sweep: texts_of_json(row.try_get("sweep")?)?,
        respect_window: number(row, "respect_window")? != 0,
        cause: word(row, "cause")?,
        state: word(row, "state")?,
        created_at: time(row.try_get("created_at")?)?,
        started_at: row.try_get::<Option<i64>, _>("started_at")?.map(time).transpose()?,
        finished_at: row.try_get::<Option<i64>, _>("finished_at")?.map(time).transpose()?,
        num: number(row, "num")?,
        spent: span(row, "spent_us")?,
        failure,
        note: row.try_get("note")?,
        owner: row.try_get("owner")?,
        fence: number(row, "fence")?,
        place: row.try_get("place")?,
    })
}

/// Placeholders with these numbers, such as `$1, $2`; the first placeholder of a statement is 1. Both databases take this form.
pub(super) fn placeholders(numbers: Range<usize>) -> String {
    numbers.map(|number| format!("${number}")).collect::<Vec<_>>().join(", ")
}

/// A text from outside, such as a server's error, without NUL, which PostgreSQL refuses in text.
fn plain(text: &str) -> String {
    text.replace('\0', "")
}

pub(super) fn task_id(text: String) -> Result<TaskId, StoreError> {
    text.parse().map(TaskId).map_err(|_| StoreError::Damaged(format!("`{text}` is not a task id")))
}

fn texts_to_json(texts: &SweepTexts) -> String {
    serde_json::to_string(texts).unwrap_or_default()
}

fn texts_of_json(json: &str) -> Result<SweepTexts, StoreError> {
    serde_json::from_str(json).map_err(|e| StoreError::Damaged(format!("the settings of a task: {e}")))
}

pub(super) fn word<T: FromStr<Err: Display>>(row: &AnyRow, column: &str) -> Result<T, StoreError> {
    let text: String = row.try_get(column)?;
    text.parse().map_err(|e: T::Err| StoreError::Damaged(e.to_string()))
}

pub(super) fn number(row: &AnyRow, column: &str) -> Result<u64, StoreError> {
    let number: i64 = row.try_get(column)?;
    u64::try_from(number).map_err(|_| StoreError::Damaged(format!("{column} is {number}")))
}

fn span(row: &AnyRow, column: &str) -> Result<Duration, StoreError> {
    number(row, column).map(Duration::from_micros)
}

fn db_of(row: &AnyRow) -> Result<DbIndex, StoreError> {
    let db = number(row, "db")?;
    u32::try_from(db).map(DbIndex).map_err(|_| StoreError::Damaged(format!("db is {db}")))
}

pub(super) fn time(ms: i64) -> Result<Timestamp, StoreError> {
    Timestamp::from_millisecond(ms).map_err(|_| StoreError::Damaged(format!("{ms} is not a time")))
}

pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}
