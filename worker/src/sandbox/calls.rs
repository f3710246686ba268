//! The system calls that a worker is answered, each with the line of ours, or of what we link, that needs it.
//!
//! To extend the list: run with `--sandbox log`, which names each call that is missing, add it here with its reason, and
//! narrow it by its arguments where they can tell use from misuse. What must never stand here: a way to make memory
//! executable, a process, a socket, a message with descriptors, or to write to a file that was not granted.

use libc::c_long;

/// When a call on the list is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    Always,
    /// The process has a card: its driver needs it.
    Card,
    /// The command has files to write.
    Writes,
    /// These bits of an argument, counted from 0, are clear.
    Clear(u8, u64),
    /// These bits of an argument are set.
    Set(u8, u64),
    /// An argument has one of these values.
    OneOf(u8, &'static [u64]),
    /// An argument has another value.
    OtherThan(u8, u64),
    /// An argument is the number of this process.
    OwnProcess(u8),
    /// Opens for reading alone, unless the command has a file to write.
    Reads(u8),
}

/// A call, when it is answered, and why.
pub(super) type Entry = (&'static str, c_long, When, &'static str);

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
const CLONE_THREAD: u64 = libc::CLONE_THREAD as u64;

/// Every way to open that is more than reading.
pub(super) const OPEN_TO_WRITE: u64 = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;

/// Every way to open that makes a file or empties one.
pub(super) const OPEN_TO_MAKE: u64 = (libc::O_CREAT | libc::O_TRUNC) as u64;

macro_rules! calls {
    ($($name:ident $when:expr, $why:literal;)*) => {
        // A macro and not a function, since the number of a call is a constant with its name.
        &[$((stringify!($name), libc::$name, $when, $why),)*]
    };
}

/// The list for every worker.
pub(super) const ALLOWED: &[Entry] = calls! {
    SYS_read When::Always, "ipc: frames arrive; checkpoint and text: files are read";
    SYS_readv When::Always, "std: vectored reads of files";
    SYS_pread64 When::Always, "checkpoint: parts of a file";
    SYS_write When::Always, "ipc: frames leave; tracing: lines to standard error";
    SYS_writev When::Always, "std: a panic's message to standard error";
    SYS_recvfrom When::Always, "ipc: reads of the link, where std receives from sockets";
    SYS_sendto When::Always, "ipc: writes to the link, without SIGPIPE; the link is connected, so no address is taken";
    SYS_getpeername When::Always, "ipc: is standard input a socket";
    SYS_shutdown When::Always, "ipc: the engine wakes the thread that reads the link";
    SYS_close When::Always, "checkpoint: a shard's file is closed once it is mapped";
    SYS_fcntl When::OneOf(1, &[libc::F_DUPFD_CLOEXEC as u64, libc::F_GETFD as u64, libc::F_GETFL as u64, libc::F_SETFD as u64]),
        "ipc: a handle that closes the link; std: checks of descriptors in debug builds";
    SYS_openat When::Reads(2), "checkpoint, text: files of the model folder, which Landlock holds to that folder";
    SYS_lseek When::Always, "std: the size of a file that is read whole";
    SYS_fstat When::Always, "std: the size of an open file, in older C libraries";
    SYS_newfstatat When::Always, "std: the C library's stat";
    SYS_statx When::Always, "checkpoint: is it a regular file, and how long";
    SYS_readlink When::Always, "std: names of links in a hub's cache";
    SYS_getdents64 When::Always, "checkpoint: the listing of the model folder";
    SYS_getcwd When::Always, "std: paths that are made absolute";
    SYS_mmap When::Clear(2, PROT_EXEC), "checkpoint: weights are mapped; allocators and threads' stacks; never executable";
    SYS_mprotect When::Clear(2, PROT_EXEC), "allocators and guard pages of stacks; never executable";
    SYS_munmap When::Always, "allocators; weights that were replaced";
    SYS_mremap When::Always, "allocators: large vectors grow";
    SYS_brk When::Always, "allocators";
    SYS_madvise When::Always, "checkpoint: pages are brought in ahead; allocators give pages back";
    SYS_pwrite64 When::Writes, "convert: threads write parts of a file, which Landlock holds to the output's folder";
    SYS_fsync When::Writes, "convert: a file is on the disk before it gets its name, and the name before it is counted";
    SYS_renameat When::Writes, "convert: a finished file takes its name; Landlock holds both names to the output's folder";
    SYS_renameat2 When::Writes, "the same, where the C library takes the newer call";
    SYS_statfs When::Writes, "convert: is there room on the disk";
    SYS_mlock When::Card, "the driver pins memory of the host";
    SYS_munlock When::Card, "the driver pins memory of the host";
    SYS_mincore When::Card, "the driver looks at memory that it is to pin";
    SYS_ioctl When::Card, "the driver: all of its work; Landlock holds it to the card's device files";
    SYS_poll When::Card, "the driver waits for events; cuMemHostRegister";
    SYS_ppoll When::Card, "the driver waits for events";
    SYS_eventfd2 When::Card, "the driver: events of a graph or a stream";
    SYS_pipe2 When::Card, "the driver wakes its own thread";
    SYS_gettimeofday When::Card, "the driver's clock where the vDSO has none";
    SYS_getrusage When::Card, "the driver counts its time";
    SYS_futex When::Always, "std, rayon, crossbeam: locks, channels, waiting threads";
    SYS_sched_yield When::Always, "rayon and crossbeam: a thread that found nothing to do";
    SYS_sched_getaffinity When::Always, "std: the stack of a new thread; the number of cores";
    SYS_sched_setaffinity When::OneOf(0, &[0]), "compute threads may keep to their cores";
    SYS_set_mempolicy When::Always, "weights may be spread over memory nodes";
    SYS_membarrier When::Always, "crossbeam: epochs";
    SYS_clone When::Set(0, CLONE_THREAD), "engine, intake: threads that start when the model is loaded; never a process";
    SYS_clone3 When::Always, "answered ENOSYS by a filter of its own, upon which the C library takes clone";
    SYS_set_robust_list When::Always, "the C library: every new thread";
    SYS_rseq When::Always, "the C library: every new thread";
    SYS_sigaltstack When::Always, "std: the stack on which a thread's overflow is reported";
    SYS_prctl When::OneOf(0, &[libc::PR_SET_NAME as u64]), "std: names of threads";
    SYS_rt_sigaction When::Always, "std: the handler of a stack's overflow is put back before the end";
    SYS_rt_sigprocmask When::Always, "the C library: threads start and abort with signals blocked";
    SYS_rt_sigreturn When::Always, "the return from a handler";
    SYS_restart_syscall When::Always, "the kernel goes on with a wait after a stop";
    SYS_tgkill When::OwnProcess(0), "the C library: abort, by which a panic ends the process";
    SYS_getpid When::Always, "the C library: abort";
    SYS_gettid When::Always, "the C library: abort; names of threads";
    SYS_clock_gettime When::Always, "time, where the vDSO has no clock";
    SYS_clock_nanosleep When::Always, "engine: a delay that is asked for as a fault";
    SYS_nanosleep When::Always, "std: sleep";
    SYS_getrandom When::Always, "std: seeds of hash maps";
    SYS_exit When::Always, "the end of a thread";
    SYS_exit_group When::Always, "the end of the process";
};

/// What is refused, without an end of the process, from Landlock on until the list is in force: the start of a card's
/// driver meets some of them and goes on without. Calls that another call number can replace stand here with it.
pub(super) const REFUSED: &[Entry] = calls! {
    SYS_execve When::Always, "no program";
    SYS_execveat When::Always, "no program";
    SYS_clone When::Clear(0, CLONE_THREAD), "no process";
    SYS_mmap When::Set(2, PROT_EXEC), "no new code";
    SYS_mprotect When::Set(2, PROT_EXEC), "no new code";
    SYS_pkey_mprotect When::Always, "no new code";
    SYS_socket When::Always, "no network";
    SYS_connect When::Always, "no network";
    SYS_accept When::Always, "no network";
    SYS_accept4 When::Always, "no network";
    SYS_sendmsg When::Always, "no descriptors over the link";
    SYS_sendmmsg When::Always, "no descriptors over the link";
    SYS_ptrace When::Always, "no other process";
    SYS_process_vm_readv When::Always, "no other process";
    SYS_process_vm_writev When::Always, "no other process";
    SYS_process_madvise When::Always, "no other process";
    SYS_pidfd_open When::Always, "no other process";
    SYS_pidfd_getfd When::Always, "no other process";
    SYS_pidfd_send_signal When::Always, "no other process";
    SYS_kcmp When::Always, "no other process";
    SYS_kill When::Always, "no other process";
    SYS_tkill When::Always, "no other process";
    SYS_rt_sigqueueinfo When::Always, "no other process";
    SYS_rt_tgsigqueueinfo When::Always, "no other process";
    SYS_unshare When::Always, "no namespaces";
    SYS_setns When::Always, "no namespaces";
    SYS_mount When::Always, "no mounts";
    SYS_umount2 When::Always, "no mounts";
    SYS_pivot_root When::Always, "no mounts";
    SYS_chroot When::Always, "no mounts";
    SYS_open_tree When::Always, "no mounts";
    SYS_move_mount When::Always, "no mounts";
    SYS_fsopen When::Always, "no mounts";
    SYS_fsconfig When::Always, "no mounts";
    SYS_fsmount When::Always, "no mounts";
    SYS_fspick When::Always, "no mounts";
    SYS_mount_setattr When::Always, "no mounts";
    SYS_bpf When::Always, "no programs in the kernel";
    SYS_perf_event_open When::Always, "no counters of others";
    SYS_userfaultfd When::Always, "a help for attacks on the kernel";
    SYS_io_uring_setup When::Always, "system calls past every filter";
    SYS_io_uring_enter When::Always, "system calls past every filter";
    SYS_io_uring_register When::Always, "system calls past every filter";
    SYS_keyctl When::Always, "no keys";
    SYS_add_key When::Always, "no keys";
    SYS_request_key When::Always, "no keys";
    SYS_personality When::Always, "no weaker memory layout";
    SYS_memfd_secret When::Always, "no memory that nobody counts";
    SYS_open_by_handle_at When::Always, "no files past Landlock";
    SYS_fanotify_init When::Always, "no watching of files";
    SYS_truncate When::Always, "older Landlock does not hold it";
    SYS_fchmod When::Always, "Landlock does not hold it";
    SYS_fchmodat When::Always, "Landlock does not hold it";
    SYS_fchown When::Always, "Landlock does not hold it";
    SYS_fchownat When::Always, "Landlock does not hold it";
    SYS_setxattr When::Always, "Landlock does not hold it";
    SYS_lsetxattr When::Always, "Landlock does not hold it";
    SYS_fsetxattr When::Always, "Landlock does not hold it";
    SYS_utimensat When::Always, "Landlock does not hold it";
    SYS_init_module When::Always, "no code in the kernel";
    SYS_finit_module When::Always, "no code in the kernel";
    SYS_delete_module When::Always, "no code in the kernel";
    SYS_kexec_load When::Always, "no other kernel";
    SYS_reboot When::Always, "no end of the machine";
    SYS_setuid When::Always, "no other user";
    SYS_setgid When::Always, "no other user";
    SYS_setresuid When::Always, "no other user";
    SYS_setresgid When::Always, "no other user";
    SYS_setgroups When::Always, "no other user";
    SYS_capset When::Always, "no capabilities";
};

/// Older calls that only this architecture has.
#[cfg(target_arch = "x86_64")]
pub(super) const REFUSED_OLD: &[Entry] = calls! {
    SYS_fork When::Always, "no process";
    SYS_vfork When::Always, "no process";
    SYS_chmod When::Always, "Landlock does not hold it";
    SYS_chown When::Always, "Landlock does not hold it";
    SYS_lchown When::Always, "Landlock does not hold it";
    SYS_utime When::Always, "Landlock does not hold it";
    SYS_utimes When::Always, "Landlock does not hold it";
    SYS_modify_ldt When::Always, "a help for attacks on the kernel";
    SYS_iopl When::Always, "no ports of the machine";
    SYS_ioperm When::Always, "no ports of the machine";
};

#[cfg(not(target_arch = "x86_64"))]
pub(super) const REFUSED_OLD: &[Entry] = &[];

/// Refused unless there is a card, whose driver needs them to start.
pub(super) const REFUSED_WITHOUT_CARD: &[Entry] = calls! {
    SYS_socketpair When::Always, "no network";
    SYS_bind When::Always, "no network";
    SYS_listen When::Always, "no network";
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_is_listed_once_with_its_reason() {
        for list in [ALLOWED, REFUSED] {
            for (index, (name, number, _, why)) in list.iter().enumerate() {
                assert!(!why.is_empty(), "{name}");
                assert!(list[..index].iter().all(|(_, other, _, _)| other != number), "{name} is listed twice");
            }
        }
    }

    #[test]
    fn nothing_is_both_answered_and_refused_whatever_its_arguments() {
        for (name, number, when, _) in REFUSED {
            let answered = ALLOWED.iter().find(|(_, other, _, _)| other == number);
            assert!(*when != When::Always || answered.is_none(), "{name}");
        }
    }
}
