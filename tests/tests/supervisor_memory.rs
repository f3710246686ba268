//! Workers that want more memory than there is: who ended them, by which counter it is told, and what the next one gets.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::process;
use bulkhead_tests::server::Server;
use bulkhead_tests::skip;
use bulkhead_tests::talk::Reply;
use bulkhead_tests::wait;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const NO_GROUP: &str = "this machine gives no control group with a limit of memory";

/// Less than what a fake worker takes before it stops by itself.
const LIMIT_BYTES: u64 = 256 << 20;

fn worker_pid(server: &Server) -> i32 {
    server.wait_for("a worker runs", |health| i32::try_from(health["workers"][0]["pid"].as_i64()?).ok())
}

/// Asks whole and streamed, with a worker that wants more memory than there is, and checks that both get what an undisturbed
/// request gets.
fn check(server: &Server) {
    let request = |text: &str| json!({"messages": [{"role": "user", "content": text}]});
    let script = "[think=2] [call] one two three four";
    let without_usage = |reply: Reply| Reply { usage: Value::Null, ..reply };
    let undisturbed = without_usage(server.ask(&request(script)));
    let disturbed = request(&format!("[oom=2] [once] {script}"));
    for reply in [server.ask(&disturbed), server.ask_stream(&disturbed)] {
        assert_eq!(without_usage(reply), undisturbed);
    }
}

fn count_of(server: &Server, cause: &str) -> u64 {
    let label = format!("cause=\"{cause}\"}} ");
    let text = server.get("/metrics").text().expect("metrics are text");
    let line = text.lines().find_map(|line| line.split_once(label.as_str()));
    line.map_or(0, |(_, count)| count.parse().unwrap_or_else(|_| panic!("{text}")))
}

/// Gives the folder of the group that counts the memory of a process.
fn group_of(pid: &str) -> Option<(PathBuf, &'static str)> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, name) = (parts.next()?, parts.next()?.trim_start_matches('/'));
        let (root, limit) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            list if list.split(',').any(|one| one == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => return None,
        };
        Some((Path::new(root).join(name), limit))
    })
}

/// A control group with little memory, which is removed when it is empty again.
struct SmallGroup(PathBuf);

impl SmallGroup {
    /// Makes one below the test's own; `None` where the machine does not let it.
    fn make(name: &str) -> Option<SmallGroup> {
        let (folder, limit) = group_of("self")?;
        let group = SmallGroup(folder.join(format!("bulkhead-test-{name}-{}", std::process::id())));
        fs::create_dir(&group.0).ok()?;
        fs::write(group.0.join(limit), LIMIT_BYTES.to_string()).is_ok().then_some(group)
    }

    fn take_in(&self, pid: i32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).expect("the group is ours");
    }

    /// Has the kernel kill a process here for want of memory.
    fn kill_one(&self) {
        let script = "echo $$ > \"$0\" && exec tail /dev/zero";
        let mut command = Command::new("sh");
        let status = command.args(["-c", script]).arg(self.0.join("cgroup.procs")).status().expect("a shell starts");
        assert!(!status.success(), "it cannot have got all that it wanted");
    }
}

impl Drop for SmallGroup {
    fn drop(&mut self) {
        // It may hold a process that is just ending; what is left is empty and harmless.
        wait::within(wait::DEADLINE, || fs::remove_dir(&self.0).ok());
    }
}

fn machine_kills() -> u64 {
    let text = fs::read_to_string("/proc/vmstat").expect("Linux has it");
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")).expect("Linux counts them");
    count.parse().expect("a number")
}

/// A server whose worker has a control group of its own, with little memory; `None` where the machine gives none.
fn with_own_group() -> Option<Server> {
    let server = Server::start_fake(&["--sequences-max", "8", "--host-memory", "256MiB"]);
    let told_by = server.health()["workers"][0]["oom_told_by"].clone();
    if told_by != "worker's control group" {
        skip(&format!("{NO_GROUP} to a worker: {}", server.wait_for_log("control group of their own")));
        return None;
    }
    Some(server)
}

#[test]
fn a_kill_by_the_kernel_in_the_workers_own_group_is_told() {
    let Some(server) = with_own_group() else { return };
    let (group, limit) = group_of(&worker_pid(&server).to_string()).expect("it has a group");
    assert_eq!(fs::read_to_string(group.join(limit)).expect("is there").trim(), LIMIT_BYTES.to_string());
    check(&server);
    server.wait_for_log("killed by the kernel for want of memory");
    assert_eq!(count_of(&server, "out_of_memory"), 2);
    let given_up = server.health()["workers"][0]["given_up"].clone();
    assert_eq!(given_up, json!(["2 requests at once instead of 8, since a worker ran out of memory"]));
    // Each worker is alone in it, and it goes with the supervisor.
    let members = fs::read_to_string(group.join("cgroup.procs")).expect("is there");
    assert_eq!(members.trim(), worker_pid(&server).to_string());
    drop(server);
    assert!(!group.exists(), "{} is left", group.display());
}

#[test]
fn a_kill_from_outside_is_not_taken_for_one_by_the_kernel() {
    let Some(server) = with_own_group() else { return };
    let Some(other) = SmallGroup::make("other") else { return skip(NO_GROUP) };
    // Elsewhere on the machine, and in a group beside the worker's, the kernel kills at the same time.
    let before = machine_kills();
    other.kill_one();
    assert!(machine_kills() > before);
    process::signal(worker_pid(&server), Signal::SIGKILL);
    server.wait_for_health("/workers/0/incarnation", &json!(2));
    server.wait_for_health("/workers/0/last_end", &json!("killed from outside"));
    server.wait_until_loaded();
    assert_eq!(
        (count_of(&server, "killed_from_outside"), server.health()["workers"][0]["given_up"].clone()),
        (1, json!([]))
    );
}

#[test]
fn without_a_group_of_the_workers_the_supervisors_tells() {
    let Some(group) = SmallGroup::make("supervisor") else { return skip(NO_GROUP) };
    let server = Server::start_fake(&["--sequences-max", "8", "--worker-cgroup", "off"]);
    server.wait_for_log("workers have no control group of their own");
    group.take_in(server.pid());
    // The next worker is born in the group.
    process::signal(worker_pid(&server), Signal::SIGKILL);
    server.wait_for_health("/workers/0/incarnation", &json!(2));
    server.wait_until_loaded();
    assert_eq!(server.health()["workers"][0]["oom_told_by"], "supervisor's control group");
    check(&server);
    server.wait_for_log("killed by the kernel for want of memory");
    assert_eq!(count_of(&server, "out_of_memory"), 2);
}

#[test]
fn a_worker_that_passes_its_plan_is_replaced_by_one_that_gets_less() {
    let server = Server::start_fake(&["--sequences-max", "8"]);
    // Without a limit of the kernel's it takes a gibibyte, of which no plan knew.
    check(&server);
    server.wait_for_log("of the host's memory where its plan allows");
    assert!(count_of(&server, "over_budget") > 0);
    let given_up = server.health()["workers"][0]["given_up"].clone();
    assert!(given_up[0].as_str().is_some_and(|words| words.contains("since a worker ran out of memory")), "{given_up}");
}

#[test]
fn a_bound_on_the_hosts_memory_holds_without_a_group() {
    let server = Server::start_fake(&["--sequences-max", "8", "--host-memory", "300MiB", "--worker-cgroup", "off"]);
    check(&server);
    let line = server.wait_for_log("of the host's memory where");
    assert!(line.contains("allows 300.0 MiB"), "{line}");
}
