//! How many masters are swept at a time: each needs a permit. A sweep that holds gives its permit to another shard, so that one shard
//! in trouble delays no other.

use std::collections::HashMap;
use std::future::poll_fn;
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::model::shard::NodeAddr;

/// The permits of one task.
#[derive(Debug, Clone)]
pub(in crate::engine) struct Permits(Arc<Pool>);

#[derive(Debug)]
enum Pool {
    /// This many, wherever the masters are.
    InTotal(Arc<Semaphore>),
    /// One master at a time on each host, since masters on one host share a machine.
    PerHost(Mutex<HashMap<String, Arc<Semaphore>>>),
}

/// A place in the queue for a permit.
pub(in crate::engine) type Turn = Pin<Box<dyn Future<Output = Permit> + Send + Sync>>;

/// The permission to sweep one master. Given back on drop.
#[derive(Debug)]
pub(in crate::engine) struct Permit {
    _semaphore: Option<OwnedSemaphorePermit>,
}

impl Permits {
    /// `parallel` permits in total; `None`: one for each host.
    pub(in crate::engine) fn new(parallel: Option<NonZeroUsize>) -> Self {
        Self(Arc::new(match parallel {
            Some(all) => Pool::InTotal(Arc::new(Semaphore::new(all.get().min(Semaphore::MAX_PERMITS)))),
            None => Pool::PerHost(Mutex::default()),
        }))
    }

    /// A permit for every master at once.
    pub(in crate::engine) fn for_all() -> Self {
        Self(Arc::new(Pool::InTotal(Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)))))
    }

    /// Queues for a permit now. The queue is in the order of these calls, whenever the turns are awaited.
    pub(in crate::engine) async fn queue_up(&self, master: &NodeAddr) -> Turn {
        let permits = self.clone();
        let master = master.clone();
        let mut turn: Turn = Box::pin(async move { permits.take(&master).await });
        // The semaphore queues a future when it is first polled.
        match poll_fn(|cx| Poll::Ready(turn.as_mut().poll(cx))).await {
            Poll::Ready(permit) => Box::pin(std::future::ready(permit)),
            Poll::Pending => turn,
        }
    }

    /// Waits for a permit to sweep the master at this address.
    pub(in crate::engine) async fn take(&self, master: &NodeAddr) -> Permit {
        // The semaphore is never closed; if it were, every sweep would get a permit.
        Permit { _semaphore: self.semaphore(master).acquire_owned().await.ok() }
    }

    /// A permit, if one is free and no other shard waits for it.
    pub(in crate::engine) fn take_now(&self, master: &NodeAddr) -> Option<Permit> {
        self.semaphore(master).try_acquire_owned().ok().map(|permit| Permit { _semaphore: Some(permit) })
    }

    fn semaphore(&self, master: &NodeAddr) -> Arc<Semaphore> {
        match &*self.0 {
            Pool::InTotal(semaphore) => semaphore.clone(),
            Pool::PerHost(hosts) => {
                let mut hosts = hosts.lock().unwrap_or_else(PoisonError::into_inner);
                hosts.entry(host(master)).or_insert_with(|| Arc::new(Semaphore::new(1))).clone()
            }
        }
    }
}

/// The host of an address. Masters with the same host share a machine.
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

    async fn is_free(permits: &Permits, addr: &NodeAddr) -> bool {
        tokio::time::timeout(std::time::Duration::from_millis(1), permits.take(addr)).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn masters_on_one_host_take_turns_and_others_do_not_wait() {
        let permits = Permits::new(None);
        let first = permits.take(&addr("a", 1)).await;
        assert!(!is_free(&permits, &addr("a", 2)).await);
        assert!(is_free(&permits, &addr("b", 1)).await);
        drop(first);
        assert!(is_free(&permits, &addr("a", 2)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn the_queue_is_in_the_order_of_calls_not_of_awaits() {
        let permits = Permits::new(None);
        let first = permits.queue_up(&addr("a", 1)).await;
        let second = permits.queue_up(&addr("a", 2)).await;
        let third = tokio::spawn(permits.queue_up(&addr("a", 3)).await);
        let permit = first.await;
        tokio::task::yield_now().await;
        assert!(!third.is_finished());
        drop(permit);
        drop(second.await);
        third.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_total_number_counts_masters_of_all_hosts() {
        let permits = Permits::new(NonZeroUsize::new(2));
        let _first = permits.take(&addr("a", 1)).await;
        let second = permits.take(&addr("a", 2)).await;
        assert!(!is_free(&permits, &addr("b", 1)).await);
        drop(second);
        assert!(is_free(&permits, &addr("b", 1)).await);
    }
}
