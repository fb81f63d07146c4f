//! The engine thread's mailbox: other threads hand it work and wait for the answer.
//!
//! The engine is single-threaded and sleeps in its ring; an eventfd that is kept posted there wakes it.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use async_executor::LocalExecutor;
use rustix::event::{EventfdFlags, eventfd};

use crate::error::{Error, Result};
use crate::io::Wakeup;

type Work<C> = Box<dyn FnOnce(Rc<C>) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// The way to the engine thread. A clone is another way to the same one.
pub struct Remote<C> {
    sender: Sender<Work<C>>,
    wake: Arc<OwnedFd>,
}

impl<C> Clone for Remote<C> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), wake: Arc::clone(&self.wake) }
    }
}

/// The engine thread's end.
pub struct Mailbox<C> {
    receiver: Receiver<Work<C>>,
    wake: Arc<OwnedFd>,
}

/// Makes a mailbox and a way to it.
///
/// # Errors
/// When the process has no descriptor left.
pub fn mailbox<C>() -> Result<(Remote<C>, Mailbox<C>)> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| Error::io("eventfd", error.into()))?;
    let wake = Arc::new(wake);
    let (sender, receiver) = mpsc::channel();
    Ok((Remote { sender, wake: Arc::clone(&wake) }, Mailbox { receiver, wake }))
}

impl<C: 'static> Remote<C> {
    /// Has the engine thread do `work` as a task beside its others, and waits for what it answers. Never called on the
    /// engine thread itself.
    ///
    /// # Errors
    /// [`Error::Busy`] when the engine thread has ended, or ends before the work does.
    pub fn call<T, F>(&self, work: impl FnOnce(Rc<C>) -> F + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let stopping = || Error::Busy("the engine is stopping; try again".into());
        let (answer, answered) = mpsc::sync_channel(1);
        let work: Work<C> = Box::new(move |context| {
            let work = work(context);
            Box::pin(async move {
                // Nobody waits any more when the connection has gone; the work is done all the same.
                let _ = answer.send(work.await);
            })
        });
        self.sender.send(work).map_err(|_| stopping())?;
        rustix::io::write(&*self.wake, &1_u64.to_ne_bytes()).map_err(|error| Error::io("eventfd", error.into()))?;
        answered.recv().map_err(|_| stopping())
    }
}

impl<C: 'static> Mailbox<C> {
    /// The eventfd to be watched in the engine thread's ring.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn descriptor(&self) -> Result<Rc<OwnedFd>> {
        let descriptor = self.wake.try_clone().map_err(|error| Error::io("eventfd", error))?;
        Ok(Rc::new(descriptor))
    }

    /// Spawns what comes, for ever.
    ///
    /// # Errors
    /// When the eventfd cannot be read any more.
    pub async fn deliver(&self, wakeup: &Wakeup, executor: &LocalExecutor<'static>, context: &Rc<C>) -> io::Result<()> {
        loop {
            while let Ok(work) = self.receiver.try_recv() {
                executor.spawn(work(Rc::clone(context))).detach();
            }
            wakeup.wait().await?;
        }
    }
}
