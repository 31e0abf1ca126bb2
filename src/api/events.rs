//! Progress as Server-Sent Events: a stream of one task until it ends, and a stream of all unfinished tasks.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::{Stream, StreamExt, stream};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use crate::api::auth::Caller;
use crate::api::error::ApiError;
use crate::api::responses::{Guarded, Missing};
use crate::api::task_dto::{TaskDetails, TaskProgress};
use crate::api::{App, PathParams};
use crate::model::task::{Task, TaskId};
use crate::tasks::TaskView;

/// Shortest time between two events of one task; more would be too fast to read.
const EVENT_EVERY: Duration = Duration::from_millis(200);
/// Shortest time between two events in the stream of all tasks.
const EVENT_OF_ALL_EVERY: Duration = Duration::from_millis(500);
/// Time between two reads of the tasks of other daemons.
const ELSEWHERE_EVERY: Duration = Duration::from_secs(2);
/// After this silence a comment is sent, so that a proxy does not close the stream as idle.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Longest stream: its reader has to connect again, and its credentials are checked again. A reload of the settings ends streams too,
/// since it may have removed the reader's token.
const LONGEST: Duration = Duration::from_hours(1);

/// One event of the stream of a task.
#[derive(utoipa::ToSchema)]
#[allow(dead_code, reason = "the schema of what the stream's own writer writes")]
pub(crate) struct TaskEvent {
    /// Name of the event: always `task`.
    event: String,
    /// The task's details, as `GET /api/v1/tasks/{task_id}` gives them, in JSON.
    data: String,
}

/// Follows a task: an event `task` with the task's details whenever they change. The stream ends after the last event of the task, and
/// also after an hour and at a reload: then connect again.
#[utoipa::path(
    get, path = "/api/v1/tasks/{task_id}/events", tag = "tasks", operation_id = "follow_task",
    params(("task_id" = uuid::Uuid, Path)),
    responses((status = 200, body = TaskEvent, content_type = "text/event-stream"), Missing, Guarded)
)]
pub(crate) async fn follow_task(
    State(app): State<App>,
    caller: Caller,
    PathParams(id): PathParams<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let view = app.view(&caller, &id).await?;
    // For a task that has ended meanwhile this is a stream of its last view.
    let views = app.service.follow(view);
    let events = events(views).take_until(until_expired(app));
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

/// One event of the stream of all tasks.
#[derive(utoipa::ToSchema)]
#[allow(dead_code, reason = "the schema of what the stream's own writer writes")]
pub(crate) struct TasksEvent {
    /// Name of the event: always `tasks`.
    event: String,
    /// A list of [`TaskProgress`] in JSON: at first all unfinished tasks, then those that have changed or ended.
    data: Vec<TaskProgress>,
}

/// Follows all unfinished tasks that the caller may see, in one stream: first an event `tasks` with all of them, then, at most twice a
/// second, one with those that have changed. The stream ends after an hour and at a reload: then connect again.
#[utoipa::path(
    get, path = "/api/v1/events", tag = "tasks", operation_id = "follow_all",
    responses((status = 200, body = TasksEvent, content_type = "text/event-stream"), Guarded)
)]
pub(crate) async fn follow_all(
    State(app): State<App>,
    caller: Caller,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let all = AllTasks::new(app.clone(), caller);
    let events = stream::unfold(all, |mut all| async move {
        let changed: Vec<_> = all.next().await.iter().map(|view| TaskProgress::from(view.as_ref())).collect();
        Some((Ok(Event::default().event("tasks").json_data(changed).unwrap_or_default()), all))
    });
    Ok(Sse::new(events.take_until(until_expired(app))).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

/// A stream of all tasks, with what it has sent so far.
struct AllTasks {
    app: App,
    caller: Caller,
    /// The tasks of this daemon.
    here: BTreeMap<TaskId, watch::Receiver<Arc<TaskView>>>,
    arrivals: watch::Receiver<()>,
    /// The tasks of other daemons, as they were last sent.
    elsewhere: BTreeMap<TaskId, Arc<TaskView>>,
    /// When the tasks of other daemons were last read.
    elsewhere_read: Option<Instant>,
    tick: tokio::time::Interval,
    is_first: bool,
}

impl AllTasks {
    fn new(app: App, caller: Caller) -> Self {
        let mut tick = tokio::time::interval(EVENT_OF_ALL_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let arrivals = app.service.arrivals();
        let (here, elsewhere) = (BTreeMap::new(), BTreeMap::new());
        Self { app, caller, here, arrivals, elsewhere, elsewhere_read: None, tick, is_first: true }
    }

    /// Waits for changes, and returns the views that changed since the last call; the first call returns all of them.
    async fn next(&mut self) -> Vec<Arc<TaskView>> {
        loop {
            tokio::select! {
                _ = self.tick.tick() => {
                    self.take_in();
                    let mut changed = self.changed_here();
                    changed.extend(self.changed_elsewhere().await);
                    if !changed.is_empty() || std::mem::take(&mut self.is_first) {
                        self.is_first = false;
                        return changed;
                    }
                }
                // So a task that begins and ends between two ticks is sent too.
                Ok(()) = self.arrivals.changed() => self.take_in(),
            }
        }
    }

    fn may_see(&self, task: &Task) -> bool {
        self.caller.0.allows(&task.project_id)
    }

    /// Adds the new tasks of this daemon.
    fn take_in(&mut self) {
        self.arrivals.mark_unchanged();
        for (id, mut view) in self.app.service.active_views() {
            if !self.here.contains_key(&id) && self.may_see(&view.borrow().task) {
                view.mark_changed();
                self.elsewhere.remove(&id);
                self.here.insert(id, view);
            }
        }
    }

    fn changed_here(&mut self) -> Vec<Arc<TaskView>> {
        let mut changed = Vec::new();
        self.here.retain(|_, view| {
            let is_open = match view.has_changed() {
                Ok(false) => return true,
                Ok(true) => true,
                // The sender is gone: the task has ended, and this is its last view.
                Err(_) => false,
            };
            changed.push(view.borrow_and_update().clone());
            is_open
        });
        changed
    }

    async fn changed_elsewhere(&mut self) -> Vec<Arc<TaskView>> {
        if self.elsewhere_read.is_some_and(|at| at.elapsed() < ELSEWHERE_EVERY) {
            return Vec::new();
        }
        self.elsewhere_read = Some(Instant::now());
        // While the records cannot be read, no changes are reported.
        let Ok(views) = self.app.service.elsewhere().await else { return Vec::new() };
        let mut changed = Vec::new();
        let mut before = std::mem::take(&mut self.elsewhere);
        for view in views {
            if !self.may_see(&view.task) {
                continue;
            }
            let id = view.task.id;
            let same = before.remove(&id).is_some_and(|old| old.task == view.task && old.snapshot == view.snapshot);
            if !same {
                changed.push(view.clone());
            }
            self.elsewhere.insert(id, view);
        }
        for id in before.into_keys().filter(|id| !self.here.contains_key(id)) {
            if let Ok(Some(last)) = self.app.service.find(id).await {
                changed.push(last);
            }
        }
        changed
    }
}

/// Completes when a stream has to end before its task does: see [`LONGEST`].
async fn until_expired(app: App) {
    let mut settings = app.settings.clone();
    settings.mark_unchanged();
    tokio::select! {
        () = app.stopping.cancelled() => {}
        _ = settings.changed() => {}
        () = tokio::time::sleep(LONGEST) => {}
    }
}

/// The events of one task. The next one is made only when the reader has taken the one before, so nothing piles up for a slow reader.
fn events(mut views: watch::Receiver<Arc<TaskView>>) -> impl Stream<Item = Result<Event, Infallible>> {
    views.mark_changed();
    stream::unfold((views, false, false), |(mut views, pace, ended)| async move {
        if ended {
            return None;
        }
        if pace {
            tokio::time::sleep(EVENT_EVERY).await;
        }
        let open = views.changed().await.is_ok();
        let view = views.borrow_and_update().clone();
        let event = Event::default().event("task").json_data(TaskDetails::from(view.as_ref())).unwrap_or_default();
        Some((Ok(event), (views, true, !open || view.task.state.is_final())))
    })
}
