//! A panic as an error, where the same input would bring it about again, and another process would be started for nothing.

use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Does work on this thread, and gives the panic that ended it, as text. What the work had in its hands is gone then. Panics
/// of other threads go where they went before, to the end of the process in a worker.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let (here, usual) = (thread::current().id(), Arc::new(panic::take_hook()));
    let said = Arc::new(Mutex::new(String::new()));
    let (elsewhere, note) = (usual.clone(), said.clone());
    panic::set_hook(Box::new(move |panic| {
        if thread::current().id() == here {
            *note.lock().unwrap_or_else(PoisonError::into_inner) = describe(panic);
        } else {
            elsewhere(panic);
        }
    }));
    // Nothing that the work had begun is looked at after a panic.
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    panic::set_hook(Box::new(move |panic| usual(panic)));
    result.map_err(|_| std::mem::take(&mut *said.lock().unwrap_or_else(PoisonError::into_inner)))
}

fn describe(panic: &PanicHookInfo<'_>) -> String {
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let place = panic.location().map(|place| format!("{}:{}", place.file(), place.line()));
    format!("{} at {}", text.unwrap_or("a panic"), place.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_text_and_place() {
        assert_eq!(caught(|| 7), Ok(7));
        let index = std::hint::black_box(3);
        let text = caught(|| [1, 2][index]).expect_err("there are two");
        assert!(text.contains("index is 3") && text.contains("unforeseen.rs:"), "{text}");
        assert!(caught(|| panic!("{}", "formatted")).is_err_and(|text: String| text.starts_with("formatted at ")));
        let elsewhere = caught(|| thread::spawn(|| panic!("on a thread of its own")).join().is_err());
        assert_eq!(elsewhere, Ok(true));
    }
}
