//! The shell around the queue: admits requests, hands them to the child, and carries its reports into the journals.
//!
//! Owns: every admitted request with its journal, from the ticket to its end. Refuses: HTTP, and the policies, which are
//! `queue`'s and `blame`'s. Invariants: each admitted request gets exactly one end; dropping its ticket gives it up; when an
//! incarnation ends, what it was handed waits for the next one and goes on behind its last token; nothing here waits for a
//! client.

mod book;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_shared::generate::Generate;
use bulkhead_shared::message::Failure;
use bulkhead_shared::units::RequestId;
use tokio::sync::{Notify, mpsc, watch};

use crate::child::{Command, Report};
use crate::journal::{Cursor, End, Journal, News};
use crate::metrics::Metrics;
use crate::queue::{Bounds, Client, Full, Place};
use book::Book;

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The model was never ready.
    #[error("the model is being loaded")]
    Loading,
    /// No worker will come.
    #[error("the model cannot be served: {0}")]
    Unserved(String),
    /// The worker ends when the requests that it has have ended.
    #[error("the model is being stopped")]
    Stopping,
    /// The supervisor is ending.
    #[error("the server is shutting down")]
    Draining,
    /// A bound of the queue is reached.
    #[error("{full}")]
    Full {
        /// Which.
        full: Full,
        /// When there may be room, by the rate at which requests have ended.
        retry_after: Duration,
    },
}

impl Refusal {
    /// Gives the word for metrics.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Refusal::Loading => "loading",
            Refusal::Unserved(_) => "unserved",
            Refusal::Stopping => "stopping",
            Refusal::Draining => "draining",
            Refusal::Full { .. } => "full",
        }
    }
}

/// One request as the private door lists it. Nothing of its text is here.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its id.
    pub id: RequestId,
    /// What becomes of it now: `waiting`, `running`, `leaving`, `parking`, `holding` or `held`.
    pub standing: &'static str,
    /// Tokens that it has.
    pub tokens: usize,
    /// Since when it was admitted.
    pub age: Duration,
}

/// All admitted requests.
#[derive(Debug)]
pub struct Tickets {
    book: Mutex<Book>,
    wake: Notify,
    /// Requests that have not ended: zero lets a drain end.
    open: watch::Sender<usize>,
    /// The last incarnation that took requests.
    up: watch::Sender<u32>,
    timeout: Duration,
    metrics: Arc<Metrics>,
}

/// The handle on an admitted request. Dropping it cancels, unless the request has ended.
#[derive(Debug)]
pub struct Ticket {
    id: RequestId,
    journal: Arc<Journal>,
    tickets: Arc<Tickets>,
}

impl Ticket {
    /// Waits for what the request has produced since the last time. For one reader at a time.
    ///
    /// Cancel safety: nothing is lost, the cursor moves only with the result.
    pub async fn read(&self, cursor: &mut Cursor) -> News {
        let news = self.journal.read(cursor).await;
        if self.journal.is_held() {
            self.tickets.change(|book| book.release(self.id));
        }
        news
    }

    /// Gives the id under which the log speaks of the request.
    #[must_use]
    pub fn id(&self) -> RequestId {
        self.id
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.tickets.cancel(self.id);
    }
}

impl Tickets {
    /// Begins with a closed door and no requests. `timeout` is the time from admission to the end of a request.
    #[must_use]
    pub fn new(bounds: Bounds, timeout: Duration, metrics: Arc<Metrics>) -> Arc<Tickets> {
        let book = Mutex::new(Book::new(bounds, metrics.clone()));
        Arc::new(Tickets {
            book,
            wake: Notify::new(),
            open: watch::Sender::new(0),
            up: watch::Sender::new(0),
            timeout,
            metrics,
        })
    }

    /// Says whether a request would be taken now, as far as the state of the service goes.
    ///
    /// # Errors
    /// The `Refusal` that a request would meet.
    pub fn check_door(&self) -> Result<(), Refusal> {
        self.lock().check_door()
    }

    /// Admits a request of so many bytes; its id is set here.
    ///
    /// # Errors
    /// A `Refusal`; the request has left no trace then but in the metrics.
    pub fn admit(self: &Arc<Self>, generate: Generate, bytes: usize, client: Client) -> Result<Ticket, Refusal> {
        let now = Instant::now();
        let mut book = self.lock();
        let place = Place { bytes, deadline: Some(now + self.timeout), client };
        match book.admit(generate, place, now) {
            Ok((id, journal)) => {
                self.settle(book);
                Ok(Ticket { id, journal, tickets: self.clone() })
            }
            Err(refusal) => {
                self.metrics.counts().refusal(refusal.label());
                Err(refusal)
            }
        }
    }

    /// Counts the requests that run and that wait.
    #[must_use]
    pub fn lengths(&self) -> (usize, usize) {
        self.lock().lengths()
    }

    /// Lists the requests that have not ended, by their ids.
    #[must_use]
    pub fn list(&self) -> Vec<Listed> {
        self.lock().list(Instant::now())
    }

    /// Gives up a request that has not ended. True when there was one.
    pub fn cancel(&self, id: RequestId) -> bool {
        let mut book = self.lock();
        let is_known = book.leave(id, End::Failed(Failure::Cancelled));
        self.settle(book);
        is_known
    }

    /// Refuses new requests from now on.
    pub fn drain(&self) {
        let mut book = self.lock();
        book.drain();
        self.settle(book);
    }

    /// Refuses new requests until the worker has been stopped or is wanted again. False where the supervisor is ending.
    #[must_use]
    pub fn stop(&self) -> bool {
        self.lock().stop()
    }

    /// Takes requests again that were refused by `stop`: true for that.
    pub fn stop_not(&self) -> bool {
        self.lock().stop_not()
    }

    /// Waits until the last request has ended and calls `then`, unless the worker is wanted again by then. Whoever calls
    /// `stop_not` comes before or after that as a whole.
    pub async fn when_stopped(&self, then: impl FnOnce()) {
        self.wait_until_idle().await;
        let book = self.lock();
        if book.is_stopping() && book.open() == 0 {
            then();
        }
    }

    /// Ends every request that is left.
    pub fn end_all(&self) {
        let mut book = self.lock();
        book.end_all();
        self.settle(book);
    }

    /// Waits until every admitted request has ended.
    pub async fn wait_until_idle(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        drop(self.open.subscribe().wait_for(|open| *open == 0).await);
    }

    /// Waits until an incarnation that runs takes requests.
    pub async fn wait_until_up(&self, incarnation: u32) {
        drop(self.up.subscribe().wait_for(|up| *up >= incarnation).await);
    }

    /// Serves one child until its reports end.
    pub async fn run(self: Arc<Self>, commands: mpsc::Sender<Command>, mut reports: mpsc::Receiver<Report>) {
        loop {
            let (has_work, deadline) = {
                let book = self.lock();
                (book.has_work(), book.next_deadline())
            };
            tokio::select! {
                report = reports.recv() => match report {
                    Some(report) => self.change(|book| book.take_report(report)),
                    None => return,
                },
                permit = commands.reserve(), if has_work => match permit {
                    Ok(permit) => if let Some(command) = self.lock().next_command(Instant::now()) { permit.send(command) },
                    // The child has ended; its last report is on the way.
                    Err(_) => self.lock().no_child(),
                },
                () = self.wake.notified() => {}
                () = sleep_until(deadline) => self.change(|book| book.expire(Instant::now())),
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut Book)) {
        let mut book = self.lock();
        change(&mut book);
        self.settle(book);
    }

    /// Publishes the number of open requests, lets go of the lock and wakes the loop.
    fn settle(&self, book: MutexGuard<'_, Book>) {
        let (open, up) = (book.open(), book.last_up());
        drop(book);
        self.open.send_if_modified(|known| std::mem::replace(known, open) != open);
        self.up.send_if_modified(|known| std::mem::replace(known, up) != up);
        self.wake.notify_one();
    }

    /// A panic while the lock was held ended one request; the lists are changed whole or not at all.
    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
