//! Tasks whose panics count: an executor keeps a panic for whoever awaits the task, and nobody awaits these.

use std::cell::RefCell;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;

use async_executor::LocalExecutor;
use futures_lite::FutureExt;

/// What the first task that panicked said.
#[derive(Clone, Default)]
pub struct Panicked(Rc<RefCell<Option<String>>>);

impl Panicked {
    /// Runs `task` to its end, beside others.
    pub fn spawn(&self, executor: &LocalExecutor<'static>, task: impl Future<Output = ()> + 'static) {
        let panicked = Rc::clone(&self.0);
        let guarded = async move {
            if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await {
                panicked.borrow_mut().get_or_insert_with(|| told(&*panic));
            }
        };
        executor.spawn(guarded).detach();
    }

    /// Fails when a task has panicked.
    pub fn check(&self) -> Result<(), String> {
        self.0.borrow().clone().map_or(Ok(()), Err)
    }
}

/// What a panic says.
pub fn told(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or_default())
}
