//! How many masters are swept at a time: a seat each. Who waits for a server that is away gives the seat to another, so
//! that one bad shard holds up nobody.

use std::collections::HashMap;
use std::future::poll_fn;
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::model::shard::NodeAddr;

/// The seats of one task.
#[derive(Debug, Clone)]
pub(super) struct Seats(Arc<Kind>);

#[derive(Debug)]
enum Kind {
    /// So many in all, wherever their masters are.
    InAll(Arc<Semaphore>),
    /// One for each host.
    OnEachHost(Mutex<HashMap<String, Arc<Semaphore>>>),
}

/// A place in the line for a seat.
pub(super) type Line = Pin<Box<dyn Future<Output = Seat> + Send + Sync>>;

/// The right to sweep. Given back on drop.
#[derive(Debug)]
pub(super) struct Seat {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Seats {
    pub(super) fn new(parallel: Option<NonZeroUsize>) -> Self {
        Self(Arc::new(match parallel {
            Some(all) => Kind::InAll(Arc::new(Semaphore::new(all.get().min(Semaphore::MAX_PERMITS)))),
            None => Kind::OnEachHost(Mutex::default()),
        }))
    }

    /// Stands in line for a seat now, in the order of the calls, whenever the line is awaited.
    pub(super) async fn line_up(&self, master: &NodeAddr) -> Line {
        let seats = self.clone();
        let master = master.clone();
        let mut line: Line = Box::pin(async move { seats.take(&master).await });
        // The semaphore knows of those who were polled once.
        match poll_fn(|cx| Poll::Ready(line.as_mut().poll(cx))).await {
            Poll::Ready(seat) => Box::pin(std::future::ready(seat)),
            Poll::Pending => line,
        }
    }

    /// Waits for a seat to sweep the master at this address.
    pub(super) async fn take(&self, master: &NodeAddr) -> Seat {
        // The semaphore is never closed; if it were, nobody would be kept from sweeping.
        Seat { _permit: self.of(master).acquire_owned().await.ok() }
    }

    /// A seat, where one is free and nobody waits for it.
    pub(super) fn take_now(&self, master: &NodeAddr) -> Option<Seat> {
        self.of(master).try_acquire_owned().ok().map(|permit| Seat { _permit: Some(permit) })
    }

    fn of(&self, master: &NodeAddr) -> Arc<Semaphore> {
        match &*self.0 {
            Kind::InAll(semaphore) => semaphore.clone(),
            Kind::OnEachHost(hosts) => {
                let mut hosts = hosts.lock().unwrap_or_else(PoisonError::into_inner);
                hosts.entry(host(master)).or_insert_with(|| Arc::new(Semaphore::new(1))).clone()
            }
        }
    }
}

/// The host of an address, by which masters that share a machine are told.
fn host(addr: &NodeAddr) -> String {
    match addr {
        NodeAddr::Tcp { host, .. } => host.clone(),
        NodeAddr::Unix(_) => "localhost".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(host: &str, port: u16) -> NodeAddr {
        NodeAddr::Tcp { host: host.into(), port }
    }

    async fn is_free(seats: &Seats, addr: &NodeAddr) -> bool {
        tokio::time::timeout(std::time::Duration::from_millis(1), seats.take(addr)).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn masters_on_one_host_take_turns_and_others_do_not_wait() {
        let seats = Seats::new(None);
        let first = seats.take(&addr("a", 1)).await;
        assert!(!is_free(&seats, &addr("a", 2)).await);
        assert!(is_free(&seats, &addr("b", 1)).await);
        drop(first);
        assert!(is_free(&seats, &addr("a", 2)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn the_line_is_in_the_order_of_calls_not_of_awaits() {
        let seats = Seats::new(None);
        let first = seats.line_up(&addr("a", 1)).await;
        let second = seats.line_up(&addr("a", 2)).await;
        let third = tokio::spawn(seats.line_up(&addr("a", 3)).await);
        let seat = first.await;
        tokio::task::yield_now().await;
        assert!(!third.is_finished());
        drop(seat);
        drop(second.await);
        third.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_number_counts_whatever_the_host() {
        let seats = Seats::new(NonZeroUsize::new(2));
        let _first = seats.take(&addr("a", 1)).await;
        let second = seats.take(&addr("a", 2)).await;
        assert!(!is_free(&seats, &addr("b", 1)).await);
        drop(second);
        assert!(is_free(&seats, &addr("b", 1)).await);
    }
}
