//! Does what hostile model code would try, in the place where it would run: behind the worker's walls.
//!
//! `list` prints each attempt and what is expected of it without walls; any other first argument is the attempt to make. It ends
//! with 0 where the attempt went well, with 3 where it was refused, with 4 where the kernel looked at it and said
//! something else, so that it was not held back. `hold` waits behind the walls to be looked at, `stand-in` waits without
//! any as a supervisor would, `spy` reads the memory of another process.
//!
//! The scene of the attempts is given on the command line, as `name=value`.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Condvar, Mutex};

use bulkhead_shared::layers::{Layer, SandboxMode};
use bulkhead_shared::message::{CpuChoice, DeviceChoice};
use bulkhead_worker::checkpoint::Region;
use bulkhead_worker::prepare::behind_walls;
use bulkhead_worker::quant::cpu::Cpu;
use bulkhead_worker::sandbox::{ABI_MAX, Starter, Walls, of_model};

/// What an attempt came to, where it did not end the process.
type Tried = io::Result<()>;

/// What must happen without walls.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Control {
    /// It goes well.
    Works,
    /// The kernel looks at it: bad arguments are found to be bad.
    Reaches,
    /// As `Reaches` for root; ordinary users are, or may be, refused by the kernel.
    Root,
    /// Anything: whether it is there at all is a matter of how the kernel was built.
    Perhaps,
}
use Control::{Perhaps, Reaches, Root, Works};

/// The surroundings: paths, ports and a process to attack.
struct Scene {
    folder: PathBuf,
    values: HashMap<String, String>,
}

impl Scene {
    fn read(arguments: &[String]) -> Scene {
        let pairs = arguments.iter().filter_map(|argument| argument.split_once('='));
        let values: HashMap<_, _> = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Scene { folder: values.get("folder").map(PathBuf::from).unwrap_or_default(), values }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn c_path(&self, name: &str) -> CString {
        CString::new(self.path(name).to_str().expect("the scene's paths are text")).expect("without a zero")
    }

    fn text(&self, name: &str) -> &str {
        self.values.get(name).map_or("", String::as_str)
    }

    fn number(&self, name: &str) -> i64 {
        self.text(name).parse().unwrap_or_else(|_| panic!("{name} is a number of the scene"))
    }

    fn victim(&self) -> i64 {
        self.number("victim")
    }
}

/// Makes a system call with numbers and addresses as arguments.
fn call<const N: usize>(number: i64, arguments: [i64; N]) -> io::Result<i64> {
    let mut all = [0; 6];
    all[..N].copy_from_slice(&arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: every caller here passes numbers, zeros, or addresses of memory that lives through the call and is as large as
    // the call wants it; what the calls do to the process itself is the end of this test program at worst.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

fn does<const N: usize>(number: i64, arguments: [i64; N]) -> Tried {
    call(number, arguments).map(drop)
}

fn address<T>(value: &T) -> i64 {
    std::ptr::from_ref(value) as i64
}

const PAGE: i64 = 4096;
const EXEC: i64 = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as i64;
const ANONYMOUS: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;

fn map(protection: i64) -> io::Result<i64> {
    call(libc::SYS_mmap, [0, PAGE, protection, ANONYMOUS, -1, 0])
}

fn abstract_address(scene: &Scene) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(scene.text("abstract"))
}

type Attempt = (&'static str, Control, fn(&Scene) -> Tried);

/// Attempts at files.
const FILES: &[Attempt] = &[
    ("read-passwd", Works, |_| fs::read("/etc/passwd").map(drop)),
    ("read-shadow", Root, |_| fs::read("/etc/shadow").map(drop)),
    ("read-other-model", Works, |scene| fs::read(scene.path("other-model/config.json")).map(drop)),
    ("read-hub-token", Works, |scene| fs::read(scene.path("token")).map(drop)),
    ("read-api-keys", Works, |scene| fs::read(scene.path("keys")).map(drop)),
    ("read-own-token", Works, |scene| fs::read(scene.path("home/.cache/huggingface/token")).map(drop)),
    ("read-credentials", Works, |scene| fs::read(scene.path("credentials/api-keys")).map(drop)),
    ("list-runtime-folder", Works, |scene| fs::read_dir(scene.path("run")).map(drop)),
    ("list-temporary-files", Works, |_| fs::read_dir("/tmp").map(drop)),
    ("list-working-folder", Works, |_| fs::read_dir(".").map(drop)),
    ("read-by-own-root", Works, |_| fs::read(["/proc/self/", "root", "/etc/passwd"].concat()).map(drop)),
    ("read-other-worker-command", Works, |scene| {
        fs::read(format!("/proc/{}/cmdline", scene.number("other"))).map(drop)
    }),
    ("read-other-worker-memory", Root, |scene| File::open(format!("/proc/{}/mem", scene.number("other"))).map(drop)),
    ("read-other-worker-files", Root, |scene| fs::read_dir(format!("/proc/{}/fd", scene.number("other"))).map(drop)),
    ("read-through-link", Works, |scene| fs::read(scene.path("model/link")).map(drop)),
    ("read-by-parent-folder", Works, |scene| fs::read(scene.path("model/../token")).map(drop)),
    ("list-root", Works, |_| fs::read_dir("/").map(drop)),
    ("list-home-of-models", Works, |scene| fs::read_dir(&scene.folder).map(drop)),
    ("read-victim-environment", Works, |scene| fs::read(format!("/proc/{}/environ", scene.victim())).map(drop)),
    ("read-victim-memory", Root, |scene| File::open(format!("/proc/{}/mem", scene.victim())).map(drop)),
    ("read-victim-command", Works, |scene| fs::read(format!("/proc/{}/cmdline", scene.victim())).map(drop)),
    ("list-victim-descriptors", Works, |scene| fs::read_dir(format!("/proc/{}/fd", scene.victim())).map(drop)),
    ("read-own-maps", Works, |_| fs::read("/proc/self/maps").map(drop)),
    ("write-own-memory", Works, |_| OpenOptions::new().write(true).open("/proc/self/mem").map(drop)),
    ("list-processes", Works, |_| fs::read_dir("/proc").map(drop)),
    ("write-model", Works, |scene| OpenOptions::new().append(true).open(scene.path("model/config.json")).map(drop)),
    ("make-in-model", Works, |scene| File::create(scene.path("model/new")).map(drop)),
    ("make-outside", Works, |scene| File::create(scene.path("new")).map(drop)),
    ("make-folder", Works, |scene| fs::create_dir(scene.path("model/folder"))),
    ("make-link", Works, |scene| std::os::unix::fs::symlink("/etc", scene.path("model/etc"))),
    ("hard-link", Works, |scene| fs::hard_link(scene.path("token"), scene.path("model/hard"))),
    ("make-pipe", Works, |scene| {
        let mode = i64::from(libc::S_IFIFO | 0o600);
        does(libc::SYS_mknodat, [libc::AT_FDCWD as i64, scene.c_path("pipe").as_ptr() as i64, mode, 0])
    }),
    ("remove", Works, |scene| fs::remove_file(scene.path("removable"))),
    ("rename", Works, |scene| fs::rename(scene.path("renamable"), scene.path("renamed"))),
    ("change-mode", Works, |scene| fs::set_permissions(scene.path("token"), PermissionsExt::from_mode(0o666))),
    ("change-owner", Works, |scene| std::os::unix::fs::chown(scene.path("token"), None, None)),
    ("truncate", Works, |scene| does(libc::SYS_truncate, [scene.c_path("model/config.json").as_ptr() as i64, 1])),
    ("change-times", Works, |scene| {
        does(libc::SYS_utimensat, [libc::AT_FDCWD as i64, scene.c_path("token").as_ptr() as i64, 0, 0])
    }),
    ("set-attribute", Reaches, |scene| {
        let path = scene.c_path("token");
        does(libc::SYS_setxattr, [path.as_ptr() as i64, c"user.x".as_ptr() as i64, c"y".as_ptr() as i64, 1, 0])
    }),
    ("write-device", Works, |_| OpenOptions::new().write(true).open("/dev/null").map(drop)),
    ("open-by-handle", Root, |_| does(libc::SYS_open_by_handle_at, [-1, 0, 0])),
    ("name-to-handle", Reaches, |_| does(libc::SYS_name_to_handle_at, [-1, 0, 0, 0, 0])),
    ("watch-files", Works, |_| does(libc::SYS_inotify_init1, [0])),
    ("watch-all-files", Root, |_| does(libc::SYS_fanotify_init, [i64::MAX, 0])),
    ("change-root", Root, |_| does(libc::SYS_chroot, [c"/".as_ptr() as i64])),
    ("inherited-descriptor", Works, |scene| {
        let mut byte = 0u8;
        let arguments = [scene.number("descriptor"), std::ptr::from_mut(&mut byte) as i64, 1];
        match call(libc::SYS_read, arguments) {
            Ok(1) => Ok(()),
            // There is no such descriptor any more.
            Ok(_) | Err(_) => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }),
    ("many-descriptors", Works, |scene| {
        let files: io::Result<Vec<File>> = (0..300).map(|_| File::open(scene.path("model/config.json"))).collect();
        files.map(drop)
    }),
    ("inherited-environment", Works, |_| match std::env::var_os("HF_TOKEN") {
        Some(_) => Ok(()),
        None => Err(io::ErrorKind::PermissionDenied.into()),
    }),
];

/// Attempts to speak to somebody.
const NETWORK: &[Attempt] = &[
    ("tcp-connect", Works, |scene| TcpStream::connect(("127.0.0.1", scene.number("tcp") as u16)).map(drop)),
    ("tcp-listen", Works, |_| TcpListener::bind("127.0.0.1:0").map(drop)),
    ("udp-send", Works, |_| UdpSocket::bind("127.0.0.1:0")?.send_to(b"x", "127.0.0.1:9").map(drop)),
    ("admin-socket", Works, |scene| UnixStream::connect(scene.path("admin.sock")).map(drop)),
    ("abstract-socket", Works, |scene| UnixStream::connect_addr(&abstract_address(scene)?).map(drop)),
    ("netlink", Works, |_| does(libc::SYS_socket, [libc::AF_NETLINK as i64, libc::SOCK_RAW as i64, 0])),
    ("vsock", Perhaps, |_| does(libc::SYS_socket, [libc::AF_VSOCK as i64, libc::SOCK_STREAM as i64, 0])),
    ("kernel-crypto", Perhaps, |_| does(libc::SYS_socket, [libc::AF_ALG as i64, libc::SOCK_SEQPACKET as i64, 0])),
    ("raw-packets", Root, |_| does(libc::SYS_socket, [libc::AF_PACKET as i64, libc::SOCK_RAW as i64, 0])),
    ("socket-pair", Works, |_| UnixStream::pair().map(drop)),
    ("send-descriptor", Works, |_| send_descriptor()),
    ("receive-descriptor", Reaches, |_| does(libc::SYS_recvmsg, [0, 0, libc::MSG_DONTWAIT as i64])),
    ("control-descriptor", Works, |_| {
        let mut count = 0i32;
        does(libc::SYS_ioctl, [0, libc::FIONREAD as i64, std::ptr::from_mut(&mut count) as i64])
    }),
    ("duplicate-descriptor", Works, |_| does(libc::SYS_dup3, [0, 77, 0])),
];

/// Attempts at other processes.
const PROCESSES: &[Attempt] = &[
    ("signal-victim", Works, |scene| does(libc::SYS_kill, [scene.victim(), 0])),
    ("signal-victim-thread", Works, |scene| does(libc::SYS_tgkill, [scene.victim(), scene.victim(), 0])),
    ("signal-thread-of-victim", Works, |scene| does(libc::SYS_tkill, [scene.victim(), 0])),
    ("queue-signal", Reaches, |scene| does(libc::SYS_rt_sigqueueinfo, [scene.victim(), 0, 0])),
    ("trace-victim", Root, |scene| does(libc::SYS_ptrace, [0x4206, scene.victim(), 0, 0])),
    ("be-traced", Works, |_| does(libc::SYS_ptrace, [0, 0, 0, 0])),
    ("limit-victim", Works, |scene| does(libc::SYS_prlimit64, [scene.victim(), libc::RLIMIT_NOFILE as i64, 0, 0])),
    ("open-victim", Works, |scene| does(libc::SYS_pidfd_open, [scene.victim(), 0])),
    ("take-descriptor", Reaches, |_| does(libc::SYS_pidfd_getfd, [-1, 0, 0])),
    ("signal-by-descriptor", Reaches, |_| does(libc::SYS_pidfd_send_signal, [-1, 0, 0, 0])),
    ("signal-other-worker", Works, |scene| does(libc::SYS_kill, [scene.number("other"), 0])),
    ("read-other-worker", Root, |scene| does(libc::SYS_process_vm_readv, [scene.number("other"), 0, 0, 0, 0, 0])),
    ("read-victim", Root, |scene| does(libc::SYS_process_vm_readv, [scene.victim(), 0, 0, 0, 0, 0])),
    ("write-victim", Root, |scene| does(libc::SYS_process_vm_writev, [scene.victim(), 0, 0, 0, 0, 0])),
    ("advise-victim", Reaches, |_| does(libc::SYS_process_madvise, [-1, 0, 0, 0, 0])),
    ("compare-with-victim", Works, |scene| does(libc::SYS_kcmp, [scene.victim(), scene.victim(), 0, 0, 0])),
    ("slow-victim", Works, |scene| does(libc::SYS_setpriority, [0, scene.victim(), 19])),
    ("schedule-victim", Reaches, |scene| does(libc::SYS_sched_setscheduler, [scene.victim(), 0, 0])),
    ("place-victim", Reaches, |scene| does(libc::SYS_sched_setaffinity, [scene.victim(), 0, 0])),
    ("move-pages-of-victim", Reaches, |scene| does(libc::SYS_migrate_pages, [scene.victim(), 0, 0, 0])),
    ("fork", Works, |_| child(call(libc::SYS_clone, [libc::SIGCHLD as i64, 0, 0, 0, 0]))),
    ("clone3", Reaches, |_| does(libc::SYS_clone3, [0, 0])),
    ("run-program", Works, |_| {
        let (path, end) = (c"/bin/true", 0i64);
        let arguments = [path.as_ptr() as i64, end];
        does(libc::SYS_execve, [path.as_ptr() as i64, address(&arguments), address(&end)])
    }),
    ("run-program-at", Reaches, |_| does(libc::SYS_execveat, [-1, 0, 0, 0, 0])),
    ("outlive-supervisor", Works, |_| does(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as i64, 0])),
    ("become-readable", Works, |_| does(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as i64, 1])),
    ("has-no-end-with-supervisor", Works, |_| {
        let mut signal = 0i32;
        call(libc::SYS_prctl, [libc::PR_GET_PDEATHSIG as i64, std::ptr::from_mut(&mut signal) as i64])?;
        if signal == 0 { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }),
    ("may-gain-privileges", Works, |_| match call(libc::SYS_prctl, [libc::PR_GET_NO_NEW_PRIVS as i64, 0, 0, 0, 0])? {
        0 => Ok(()),
        _ => Err(io::ErrorKind::PermissionDenied.into()),
    }),
];

/// Attempts at the kernel.
const KERNEL: &[Attempt] = &[
    ("new-user-namespace", Reaches, |_| does(libc::SYS_unshare, [libc::CLONE_NEWUSER as i64])),
    ("enter-namespace", Reaches, |_| does(libc::SYS_setns, [-1, 0])),
    ("mount", Reaches, |_| does(libc::SYS_mount, [0, 0, 0, 0, 0])),
    ("unmount", Reaches, |_| does(libc::SYS_umount2, [0, 0])),
    ("pivot-root", Root, |_| does(libc::SYS_pivot_root, [0, 0])),
    ("new-mount", Root, |_| does(libc::SYS_fsopen, [0, 0])),
    ("bpf", Root, |_| does(libc::SYS_bpf, [0, 0, 0])),
    ("session-keys", Works, |_| does(libc::SYS_keyctl, [0, -3, 1])),
    ("add-key", Reaches, |_| does(libc::SYS_add_key, [0, 0, 0, 0, 0])),
    ("request-key", Reaches, |_| does(libc::SYS_request_key, [0, 0, 0, 0])),
    ("counters", Reaches, |_| does(libc::SYS_perf_event_open, [0, 0, -1, -1, 0])),
    ("io-uring", Root, |_| does(libc::SYS_io_uring_setup, [1, 0])),
    ("faults-in-user-space", Works, |_| does(libc::SYS_userfaultfd, [1])),
    ("personality", Works, |_| does(libc::SYS_personality, [0xffff_ffff])),
    ("secret-memory", Perhaps, |_| does(libc::SYS_memfd_secret, [i64::MAX])),
    ("memory-file", Works, |_| does(libc::SYS_memfd_create, [c"x".as_ptr() as i64, 0])),
    ("shared-memory", Works, |_| does(libc::SYS_shmget, [0, PAGE, 0o1600])),
    ("message-queue", Works, |_| does(libc::SYS_msgget, [0, 0o1600])),
    ("semaphores", Works, |_| does(libc::SYS_semget, [0, 1, 0o1600])),
    ("new-code", Works, |_| map(EXEC).map(drop)),
    ("data-to-code", Works, |_| {
        let page = map((libc::PROT_READ | libc::PROT_WRITE) as i64)?;
        does(libc::SYS_mprotect, [page, PAGE, (libc::PROT_READ | libc::PROT_EXEC) as i64])
    }),
    ("data-to-code-by-key", Works, |_| {
        let page = map((libc::PROT_READ | libc::PROT_WRITE) as i64)?;
        does(libc::SYS_pkey_mprotect, [page, PAGE, (libc::PROT_READ | libc::PROT_EXEC) as i64, -1])
    }),
    ("weights-as-code", Works, |scene| {
        let file = File::open(scene.path("model/config.json"))?;
        let protection = (libc::PROT_READ | libc::PROT_EXEC) as i64;
        does(libc::SYS_mmap, [0, PAGE, protection, libc::MAP_PRIVATE as i64, file.as_raw_fd().into(), 0])
    }),
    ("become-user", Reaches, |_| does(libc::SYS_setuid, [-1])),
    ("set-capabilities", Reaches, |_| does(libc::SYS_capset, [0, 0])),
    ("load-module", Perhaps, |_| does(libc::SYS_finit_module, [-1, 0, 0])),
    ("reboot", Root, |_| does(libc::SYS_reboot, [0, 0, 0, 0])),
    ("host-name", Root, |_| does(libc::SYS_sethostname, [0, -1])),
    ("set-clock", Root, |_| does(libc::SYS_clock_settime, [0, 0])),
    ("kernel-log", Root, |_| does(libc::SYS_syslog, [3, 0, 0])),
    ("swap", Root, |_| does(libc::SYS_swapon, [0, 0])),
    ("own-filter", Reaches, |_| does(libc::SYS_seccomp, [libc::SECCOMP_SET_MODE_FILTER as i64, 0, 0])),
    ("splice", Reaches, |_| does(libc::SYS_splice, [-1, 0, -1, 0, 1, 0])),
    ("timer-descriptor", Works, |_| does(libc::SYS_timerfd_create, [0, 0])),
    #[cfg(target_arch = "x86_64")]
    ("segments", Perhaps, |_| does(libc::SYS_modify_ldt, [0, 0, 0])),
    #[cfg(target_arch = "x86_64")]
    ("old-fork", Works, |_| child(call(libc::SYS_fork, []))),
    #[cfg(target_arch = "x86_64")]
    ("32-bit-call", Perhaps, |_| old_gate()),
    #[cfg(target_arch = "x86_64")]
    ("x32-call", Perhaps, |_| does(libc::SYS_getpid | 0x4000_0000, [])),
];

/// What Landlock does not hold back, and no filter can tell from what a worker needs: names, sizes and times of files.
const KNOWN: &[Attempt] = &[
    ("known-size-of-other-model", Works, |scene| fs::metadata(scene.path("other-model/config.json")).map(drop)),
    ("known-target-of-link", Works, |scene| fs::read_link(scene.path("model/link")).map(drop)),
    ("known-working-folder", Works, |_| std::env::current_dir().map(drop)),
];

/// What must work behind the walls.
const WORK: &[Attempt] = &[
    ("works-thread", Works, |_| {
        let thread = std::thread::Builder::new().name("new".into()).spawn(|| 7)?;
        assert_eq!(thread.join().expect("it does not panic"), 7);
        Ok(())
    }),
    ("works-allocation", Works, |_| {
        let mut bytes = vec![1u8; 64 << 20];
        bytes.extend_from_slice(&[2; 4096]);
        assert_eq!(std::hint::black_box(bytes).last(), Some(&2));
        Ok(())
    }),
    ("works-weights", Works, |scene| {
        let region = Region::map_file(&scene.path("model/config.json"))?;
        let mut read = [0; 2];
        region.copy_to(0..2, &mut read);
        assert_eq!((region.bytes(), &read), (&b"{}"[..], b"{}"));
        Ok(())
    }),
    ("works-read", Works, |scene| fs::read(scene.path("model/config.json")).map(drop)),
    ("works-list", Works, |scene| {
        assert!(fs::read_dir(scene.path("model"))?.count() >= 1);
        Ok(())
    }),
    ("works-link", Works, |_| {
        let mut byte = [0];
        (&nix_stdin()?).write_all(b"x")?;
        (&nix_stdin()?).read_exact(&mut byte)?;
        assert_eq!(&byte, b"y");
        Ok(())
    }),
    ("works-memory-facts", Works, |_| fs::read_to_string("/proc/meminfo").map(drop)),
    ("works-sleep", Works, |_| {
        std::thread::sleep(std::time::Duration::from_millis(1));
        Ok(())
    }),
];

fn attempts() -> impl Iterator<Item = &'static Attempt> {
    [FILES, NETWORK, PROCESSES, KERNEL, KNOWN, WORK].into_iter().flatten()
}

fn nix_stdin() -> io::Result<UnixStream> {
    use std::os::fd::AsFd;
    Ok(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?))
}

/// A process that was made ends at once; whoever made it went well.
fn child(made: io::Result<i64>) -> Tried {
    if made? == 0 {
        // Without the end of a Rust program, which belongs to the parent.
        does(libc::SYS_exit_group, [0])?;
    }
    Ok(())
}

/// Sends a descriptor over the link: the link itself, since one of a pipe on its way would keep that open. The structures are those of sendmsg(2), in words of 64 bits.
fn send_descriptor() -> Tried {
    let byte = 7u8;
    let part = [address(&byte), 1];
    let (level, kind) = (i64::from(libc::SOL_SOCKET), i64::from(libc::SCM_RIGHTS));
    let control = [20, level | kind << 32, 0];
    let message = [0, 0, address(&part), 1, address(&control), 24, 0];
    does(libc::SYS_sendmsg, [0, address(&message), 0])
}

/// Asks for the process's number through the gate of 32-bit programs, whose numbers of calls are others.
#[cfg(target_arch = "x86_64")]
fn old_gate() -> Tried {
    let mut number: i64 = 20;
    // SAFETY: this call has no arguments and changes no memory; the gate keeps every register but the one that is named.
    unsafe { std::arch::asm!("int 0x80", inout("rax") number, out("r8") _, out("r9") _, out("r10") _, out("r11") _) };
    if number == i64::from(std::process::id()) { Ok(()) } else { Err(io::Error::from_raw_os_error(-number as i32)) }
}

fn become_user(scene: &Scene) -> anyhow::Result<()> {
    let uid: u32 = scene.text("uid").parse()?;
    if nix::unistd::getuid().as_raw() != uid {
        nix::unistd::setgroups(&[])?;
        nix::unistd::setgid(uid.into())?;
        nix::unistd::setuid(uid.into())?;
        // The kernel has taken it away, as it does for setuid programs.
        nix::sys::prctl::set_dumpable(true)?;
    }
    Ok(())
}

/// The walls that a worker of the scene's model has, less what the scene leaves out.
fn walls(scene: &Scene) -> anyhow::Result<Walls> {
    let left_out = scene.text("without").split(',').filter(|word| !word.is_empty());
    let layer = |word: &str| Layer::ALL.into_iter().find(|layer| layer.as_str() == word);
    let left_out: Vec<_> =
        left_out.map(|word| layer(word).ok_or(anyhow::anyhow!("no layer {word}"))).collect::<Result<_, _>>()?;
    Ok(Walls {
        starter: Starter::Supervisor(nix::unistd::getppid().as_raw()),
        landlock_abi_max: scene.text("abi").parse().unwrap_or(ABI_MAX),
        left_out,
        ..Walls::of_person(SandboxMode::Full, DeviceChoice::Cpu, of_model(&scene.path("model")))
    })
}

fn stay() -> ! {
    println!("ready");
    loop {
        std::thread::park();
    }
}

fn run() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let name = arguments.first().map(String::as_str).unwrap_or_default();
    if name == "list" {
        attempts().for_each(|(name, control, _)| println!("{name} {control:?}"));
        return Ok(ExitCode::SUCCESS);
    }
    let scene = Scene::read(&arguments);
    become_user(&scene)?;
    match name {
        "stand-in" => stay(),
        "spy" => {
            let spied = File::open(format!("/proc/{}/mem", scene.victim()));
            return Ok(ExitCode::from(if spied.is_ok() { 0 } else { 3 }));
        }
        _ => {}
    }
    let attempt = attempts().find(|(known, _, _)| *known == name).map(|(_, _, attempt)| *attempt);
    if scene.text("walls") == "none" {
        return Ok(judge(attempt.expect("a known attempt")(&scene)));
    }
    let (sealed, prepared) = behind_walls(walls(&scene)?, CpuChoice::Auto, 2);
    let (_proof, prepared) = (sealed.demand()?, prepared?);
    let Some(attempt) = attempt else { stay() };
    // On a thread that was there before the last filter, as those that compute are, or on the first.
    let on_thread = scene.text("on") == "compute";
    Ok(judge(if on_thread { on_computing_thread(&prepared.cpu, || attempt(&scene)) } else { attempt(&scene) }))
}

/// Makes an attempt on a thread of the processor's that is not this one: of two pieces of work one waits for the other.
fn on_computing_thread(cpu: &Cpu, attempt: impl Fn() -> Tried + Sync) -> Tried {
    let first = std::thread::current().id();
    let (tried, made) = (Mutex::new(None), Condvar::new());
    cpu.for_each_chunk(&mut [0.0; 2], 1, |_, _| {
        let mut tried = tried.lock().expect("nobody panics");
        if std::thread::current().id() == first {
            drop(made.wait_while(tried, |tried| tried.is_none()).expect("nobody panics"));
        } else if tried.is_none() {
            *tried = Some(attempt());
            made.notify_all();
        }
    });
    tried.into_inner().expect("nobody panics").expect("one of two threads is not the first")
}

fn judge(tried: Tried) -> ExitCode {
    let Err(error) = tried else { return ExitCode::SUCCESS };
    eprintln!("{error}");
    let is_refusal = error.kind() == io::ErrorKind::PermissionDenied
        || [Some(libc::ENOSYS), Some(libc::EMFILE)].contains(&error.raw_os_error());
    ExitCode::from(if is_refusal { 3 } else { 4 })
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("sandbox-probe: {error}");
        ExitCode::from(9)
    })
}
