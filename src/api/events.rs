//! A task's progress as Server-Sent Events: the latest view, a few times a second, until the task has ended.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::{Stream, StreamExt, stream};
use tokio::sync::watch;

use crate::api::auth::Caller;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::task_dto::TaskDetails;
use crate::api::{App, At};
use crate::tasks::TaskView;

/// Shortest time between two events: more than people can follow is noise.
const EVENT_EVERY: Duration = Duration::from_millis(200);
/// A comment is sent after this much silence, so that a proxy does not take the stream for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// After this long a stream ends although its task has not: whoever reads on comes again, and is asked who that is. Sooner
/// where the settings change, which may have taken the reader's token away.
const LONGEST: Duration = Duration::from_hours(1);

/// One event.
#[derive(utoipa::ToSchema)]
#[allow(dead_code, reason = "the schema of what the stream's own writer writes")]
pub struct TaskEvent {
    /// `task`.
    event: String,
    /// The task's details, as `GET /api/v1/tasks/{task_id}` gives them, in JSON.
    data: String,
}

/// Follows a task: an event `task` with the task's details whenever they change, and an end after the last. The stream may end
/// before the task does, after an hour or a reload: ask again.
#[utoipa::path(
    get, path = "/api/v1/tasks/{task_id}/events", tag = "tasks", operation_id = "follow_task",
    params(("task_id" = uuid::Uuid, Path)),
    responses(
        (status = 200, body = TaskEvent, content_type = "text/event-stream"), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 413, body = ErrorBody), (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody),
    )
)]
pub async fn follow_task(
    State(app): State<App>,
    caller: Caller,
    At(id): At<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let view = app.view(&caller, &id).await?;
    // One that has ended meanwhile has one view left, its last.
    let views = app.service.follow(view);
    let events = events(views).take_until(until_asked_again(app));
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

/// Completes when a stream is to end, whatever its task does.
async fn until_asked_again(app: App) {
    let mut settings = app.settings.clone();
    settings.mark_unchanged();
    tokio::select! {
        () = app.stopping.cancelled() => {}
        _ = settings.changed() => {}
        () = tokio::time::sleep(LONGEST) => {}
    }
}

/// A slow reader is asked for the next event only once it has taken the one before: nothing piles up.
fn events(mut views: watch::Receiver<std::sync::Arc<TaskView>>) -> impl Stream<Item = Result<Event, Infallible>> {
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
