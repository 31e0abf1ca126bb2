//! A webhook of a test's own: a real HTTP server that keeps what it is sent and answers as the test says.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::{PATIENCE, free_port, probe};

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Call {
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Call {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }

    #[track_caller]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name}: {:?}", self.headers)).to_str().expect("text")
    }
}

/// What an answer is.
#[derive(Debug, Clone, Copy)]
pub enum Answer {
    Status(u16),
    /// None, ever.
    Never,
}

/// A running webhook; ends on drop.
pub struct Hook {
    url: String,
    calls: Arc<Mutex<Vec<Call>>>,
    server: JoinHandle<()>,
}

impl Hook {
    /// One that gives these answers, and 204 after them.
    pub async fn start(answers: &[Answer]) -> Self {
        Self::start_at(free_port(), answers).await
    }

    /// The same at this port.
    pub async fn start_at(port: u16, answers: &[Answer]) -> Self {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let answers = Arc::new(Mutex::new(answers.iter().copied().collect::<VecDeque<_>>()));
        let kept = calls.clone();
        let handler = move |headers: HeaderMap, body: Bytes| {
            let (kept, answers) = (kept.clone(), answers.clone());
            async move {
                let answer = answers.lock().expect("no panic").pop_front().unwrap_or(Answer::Status(204));
                kept.lock().expect("no panic").push(Call { headers, body });
                match answer {
                    Answer::Status(status) => StatusCode::from_u16(status).expect("a status"),
                    Answer::Never => std::future::pending().await,
                }
            }
        };
        let router = axum::Router::new().route("/{*path}", post(handler));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.expect("a port");
        let url = format!("http://{}/hooks/geheim", listener.local_addr().expect("its address"));
        let server = tokio::spawn(async move { drop(axum::serve(listener, router).await) });
        Self { url, calls, server }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// What arrived so far.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().expect("no panic").clone()
    }

    /// Waits for so many requests.
    pub async fn wait_for(&self, calls: usize) -> Vec<Call> {
        probe(&format!("{calls} requests arrive"), PATIENCE, async || self.calls().len() >= calls).await;
        self.calls()
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        self.server.abort();
    }
}
