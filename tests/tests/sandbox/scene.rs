//! The scene of the attempts: files, sockets and a process to attack, and what an attempt came to.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use bulkhead_tests::process;
use bulkhead_tests::server::binary;
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// The user that is nobody in particular.
const NOBODY: u32 = 65534;

/// Who attacks whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The worker's user.
    pub(crate) worker: u32,
    /// The supervisor's user.
    pub(crate) supervisor: u32,
}

impl Identity {
    /// Everybody is root.
    pub(crate) const ROOT: Identity = Identity { worker: 0, supervisor: 0 };
    /// The worker is root's child under another user.
    pub(crate) const ROOTS_CHILD: Identity = Identity { worker: NOBODY, supervisor: 0 };

    /// An ordinary user's worker, which has the user of its supervisor.
    pub(crate) fn ordinary() -> Identity {
        let own = nix::unistd::getuid().as_raw();
        let user = if own == 0 { NOBODY } else { own };
        Identity { worker: user, supervisor: user }
    }
}

/// Lists the identities that this process can take, and says which it cannot.
pub(crate) fn identities() -> Vec<Identity> {
    if nix::unistd::getuid().is_root() {
        return vec![Identity::ROOT, Identity::ROOTS_CHILD, Identity::ordinary()];
    }
    eprintln!("skipped: workers of root and under another user than the supervisor's: this test does not run as root");
    vec![Identity::ordinary()]
}

/// What an attempt came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Worked,
    /// The kernel looked at it and found something wrong with its arguments.
    Reached,
    Refused,
    /// The filter of system calls ended the process.
    Ended,
}

impl Outcome {
    pub(crate) fn is_held_back(self) -> bool {
        matches!(self, Outcome::Refused | Outcome::Ended)
    }
}

/// How an attempt is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way<'a> {
    pub(crate) has_walls: bool,
    /// Layers that are left out, with commas.
    pub(crate) without: &'a str,
    /// The newest interface of Landlock.
    pub(crate) abi: u32,
    pub(crate) on_compute_thread: bool,
}

impl Way<'_> {
    pub(crate) const FULL: Way<'static> = Way { has_walls: true, without: "", abi: 6, on_compute_thread: false };
    pub(crate) const BARE: Way<'static> = Way { has_walls: false, ..Way::FULL };
}

pub(crate) struct Scene {
    identity: Identity,
    folder: TempDir,
    victim: Child,
    /// A worker of the same user, behind walls of its own: it holds other requests.
    other: Child,
    tcp: TcpListener,
    _admin: UnixListener,
    _abstract: UnixListener,
    abstract_name: String,
    leaked: OwnedFd,
}

impl Scene {
    pub(crate) fn new(identity: Identity) -> Scene {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let path = folder.path();
        for name in ["model", "other-model"] {
            fs::create_dir(path.join(name)).expect("made");
            fs::write(path.join(name).join("config.json"), "{}").expect("written");
        }
        for name in ["token", "keys", "removable", "renamable"] {
            fs::write(path.join(name), "secret").expect("written");
        }
        for folder in ["home/.cache/huggingface", "credentials", "run"] {
            fs::create_dir_all(path.join(folder)).expect("made");
        }
        for name in ["home/.cache/huggingface/token", "credentials/api-keys", "run/state"] {
            fs::write(path.join(name), "secret").expect("written");
        }
        symlink(path.join("token"), path.join("model/link")).expect("linked");
        let admin = UnixListener::bind(path.join("admin.sock")).expect("bound");
        fs::set_permissions(path.join("admin.sock"), PermissionsExt::from_mode(0o777)).expect("ours");
        give(path, identity.worker);
        let abstract_name = format!("bulkhead-test-{}", path.display());
        let address = SocketAddr::from_abstract_name(&abstract_name).expect("a good name");
        let mut victim = probe("stand-in", &[format!("uid={}", identity.supervisor)]);
        victim.env("HF_TOKEN", "secret");
        let other = probe("hold", &[format!("uid={}", identity.worker), format!("folder={}", path.display())]);
        Scene {
            identity,
            victim: started(victim),
            other: started(other),
            tcp: TcpListener::bind("127.0.0.1:0").expect("bound"),
            _admin: admin,
            _abstract: UnixListener::bind_addr(&address).expect("bound"),
            abstract_name,
            leaked: fs::File::open(path.join("token")).expect("it is there").into(),
            folder,
        }
    }

    /// Prepares the probe to make an attempt, or to `hold` behind its walls.
    fn command(&self, attempt: &str, way: Way<'_>) -> Command {
        let mut arguments = vec![
            format!("folder={}", self.folder.path().display()),
            format!("victim={}", self.victim.id()),
            format!("other={}", self.other.id()),
            format!("uid={}", self.identity.worker),
            format!("tcp={}", self.tcp.local_addr().expect("bound").port()),
            format!("abstract={}", self.abstract_name),
            format!("descriptor={}", self.leaked.as_raw_fd()),
            format!("without={}", way.without),
            format!("abi={}", way.abi),
        ];
        arguments.extend((!way.has_walls).then(|| "walls=none".to_owned()));
        arguments.extend(way.on_compute_thread.then(|| "on=compute".to_owned()));
        let mut command = probe(attempt, &arguments);
        // As the supervisor does, unless it forgets.
        if !way.has_walls || way.without.contains("empty-environment") {
            command.env("HF_TOKEN", "secret");
        }
        command
    }

    /// Makes an attempt in a process of its own.
    pub(crate) fn attempt(&self, attempt: &str, way: Way<'_>) -> Outcome {
        use nix::fcntl::{FcntlArg, FdFlag, fcntl};
        self.reset();
        // What a careless supervisor would hand on.
        fcntl(&self.leaked, FcntlArg::F_SETFD(FdFlag::empty())).expect("ours");
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        (&ours).write_all(b"y").expect("there is room");
        let mut command = self.command(attempt, way);
        let output = command.stdin(Stdio::from(OwnedFd::from(theirs))).output().expect("the probe starts");
        let said = String::from_utf8_lossy(&output.stderr);
        match (output.status.code(), output.status.signal()) {
            (Some(0), _) => Outcome::Worked,
            (Some(3), _) => Outcome::Refused,
            (Some(4), _) => Outcome::Reached,
            (_, Some(signal)) if signal == Signal::SIGSYS as i32 => Outcome::Ended,
            _ => panic!("{attempt} of {:?} with {way:?} ended with {}: {said}", self.identity, output.status),
        }
    }

    /// Starts a process that stays behind its walls.
    pub(crate) fn hold(&self, way: Way<'_>) -> Held {
        Held(started(self.command("hold", way)))
    }

    /// Says whether a process of the supervisor's user can look into another one's memory.
    pub(crate) fn can_spy(&self, on: u32) -> bool {
        let arguments = [format!("uid={}", self.identity.supervisor), format!("victim={on}")];
        let status = probe("spy", &arguments).status().expect("the probe starts");
        status.success()
    }

    /// Puts back what an attempt that went well has changed.
    fn reset(&self) {
        let path = self.folder.path();
        for name in ["new", "renamed", "pipe", "model/new", "model/etc", "model/hard"] {
            let _ = fs::remove_file(path.join(name));
        }
        let _ = fs::remove_dir(path.join("model/folder"));
        for name in ["removable", "renamable"] {
            fs::write(path.join(name), "secret").expect("written");
        }
        fs::write(path.join("model/config.json"), "{}").expect("written");
        give(path, self.identity.worker);
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        end(&mut self.victim);
        end(&mut self.other);
    }
}

/// A process behind its walls.
pub(crate) struct Held(Child);

impl Held {
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

fn end(child: &mut Child) {
    // It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}

/// Gives a folder and all that is in it to a user, if that is another one.
fn give(path: &Path, user: u32) {
    if nix::unistd::getuid().as_raw() == user {
        return;
    }
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("ours") {
            let path = entry.expect("ours").path();
            if !path.is_symlink() {
                give(&path, user);
            }
        }
    }
    chown(path, Some(user), Some(user)).expect("root may");
}

fn probe(attempt: &str, arguments: &[String]) -> Command {
    let mut command = Command::new(binary("sandbox-probe"));
    command.arg(attempt).args(arguments).env_clear().stdin(Stdio::null());
    command
}

/// Starts a process and waits until it says that it is ready.
fn started(mut command: Command) -> Child {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the probe starts");
    let mut line = String::new();
    let output = child.stdout.as_mut().expect("piped");
    BufReader::new(output).read_line(&mut line).expect("readable");
    if line != "ready\n" {
        let mut said = String::new();
        child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
        panic!("the probe did not start: {said}");
    }
    child
}

/// Reads what the kernel says of each thread of a process.
pub(crate) fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process runs");
    tasks.map(|task| fs::read_to_string(task.expect("it runs").path().join("status")).expect("everybody may")).collect()
}

/// Lists the attempts of the probe with what must happen without walls.
pub(crate) fn attempts() -> Vec<(String, String)> {
    let output = probe("list", &[]).output().expect("the probe starts");
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().filter_map(|line| line.split_once(' ')).map(|(name, control)| (name.into(), control.into())).collect()
}

/// Says whether somebody filters the system calls of this very test, as containers do: what the kernel would say without
/// walls can then not be asked.
pub(crate) fn is_filtered() -> bool {
    let own = i32::try_from(std::process::id()).expect("process ids fit");
    let is_filtered = process::status(own)["Seccomp"] != "0";
    if is_filtered {
        eprintln!("skipped: attempts without walls: the system calls of this test are filtered already");
    }
    is_filtered
}
