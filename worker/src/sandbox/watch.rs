//! The last filter for development: it names every call that is not on the list, and lets it through.
//!
//! A thread of the process itself is asked by the kernel for each such call, prints its number once for each part of the
//! worker's life, and has the call go on. Nothing is held back, so this is no wall, and `Hello` does not report one.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use seccompiler::BpfProgram;

use super::calls::{ALLOWED, REFUSED, REFUSED_OLD, REFUSED_WITHOUT_CARD};

/// Whether the worker has come to where its last filter would be.
static IS_SEALED: AtomicBool = AtomicBool::new(false);

/// Notes that what is named from here on would have ended the worker.
pub(super) fn seal() {
    IS_SEALED.store(true, Ordering::Relaxed);
}

/// Installs the filter, with its answer for calls that are not listed exchanged for a question to a thread.
///
/// # Errors
/// What the system says.
pub(super) fn install(mut filter: BpfProgram) -> Result<(), String> {
    for instruction in &mut filter {
        let is_answer = u32::from(instruction.code) == libc::BPF_RET | libc::BPF_K;
        if is_answer && instruction.k == libc::SECCOMP_RET_KILL_PROCESS {
            instruction.k = libc::SECCOMP_RET_USER_NOTIF;
        }
    }
    let (sender, receiver) = mpsc::channel::<OwnedFd>();
    let watch = move || {
        // Without a filter there is nothing to watch.
        if let Ok(questions) = receiver.recv() {
            answer_all(&questions);
        }
    };
    std::thread::Builder::new().name("sandbox-log".into()).spawn(watch).map_err(|error| error.to_string())?;
    let questions = load(&filter)?;
    sender.send(questions).map_err(|error| error.to_string())
}

fn load(filter: &BpfProgram) -> Result<OwnedFd, String> {
    let length = libc::c_ushort::try_from(filter.len()).map_err(|error| error.to_string())?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut().cast() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER
        | libc::SECCOMP_FILTER_FLAG_TSYNC
        | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH;
    // SAFETY: the program and the instructions that it points to live through the call, which copies them. There is no safe
    // wrapper for filters with a listener.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, std::ptr::from_ref(&program)) };
    let descriptor = RawFd::try_from(result).ok().filter(|descriptor| *descriptor >= 0);
    let descriptor = descriptor.ok_or_else(|| std::io::Error::last_os_error().to_string())?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn answer_all(questions: &OwnedFd) {
    let mut named = BTreeSet::new();
    loop {
        // SAFETY: all-zero bytes are a value of this plain C struct, and what the kernel wants to find.
        let mut question: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is a listener, and the place is one for the struct that this request writes.
        let asked = unsafe { libc::ioctl(questions.as_raw_fd(), RECEIVE, &raw mut question) };
        if asked != 0 {
            // The caller was gone before its question was read, or a signal came.
            continue;
        }
        let is_sealed = IS_SEALED.load(Ordering::Relaxed);
        if named.insert((is_sealed, question.data.nr)) {
            let number = i64::from(question.data.nr);
            let lists = ALLOWED.iter().chain(REFUSED).chain(REFUSED_OLD).chain(REFUSED_WITHOUT_CARD);
            let name = lists.into_iter().find(|entry| entry.1 == number).map_or("not in any table", |entry| entry.0);
            let part = if is_sealed { "behind the last filter" } else { "before the last filter" };
            eprintln!("sandbox: {part}: system call {number} ({name}), arguments {:x?}", question.data.args);
        }
        let flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
        let mut answer = libc::seccomp_notif_resp { id: question.id, val: 0, error: 0, flags };
        // SAFETY: the struct is a whole answer to the question that was just read.
        let _ = unsafe { libc::ioctl(questions.as_raw_fd(), SEND, &raw mut answer) };
    }
}

/// `SECCOMP_IOCTL_NOTIF_RECV` and `SECCOMP_IOCTL_NOTIF_SEND` of linux/seccomp.h: read and write, type `!`, numbers 0 and 1.
const RECEIVE: libc::Ioctl = request(0, size_of::<libc::seccomp_notif>());
const SEND: libc::Ioctl = request(1, size_of::<libc::seccomp_notif_resp>());

const fn request(number: libc::Ioctl, bytes: usize) -> libc::Ioctl {
    3 << 30 | (bytes as libc::Ioctl) << 16 | (b'!' as libc::Ioctl) << 8 | number
}
