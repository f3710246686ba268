//! The worker's walls, attacked from where model code runs: each attempt beside the same one without walls.

mod scene;
mod secrets;
mod service;

use bulkhead_shared::layers::Layer;
use scene::{Identity, Outcome, Scene, Way, attempts, identities, is_filtered, threads};

fn is_an_escape(name: &str) -> bool {
    !name.starts_with("works-") && !name.starts_with("known-")
}

/// Makes every attempt as each identity: without walls, behind them on the first thread, and behind them on a thread that is
/// older than the last filter.
#[test]
fn every_attempt_is_held_back() {
    let is_filtered = is_filtered();
    let mut faults = Vec::new();
    let mut count = 0;
    for identity in identities() {
        let scene = Scene::new(identity);
        for (attempt, control) in attempts().iter().filter(|(name, _)| is_an_escape(name)) {
            count += 1;
            for on_compute_thread in [false, true] {
                let outcome = scene.attempt(attempt, Way { on_compute_thread, ..Way::FULL });
                if !outcome.is_held_back() {
                    faults.push(format!("{attempt} as {identity:?} behind walls: {outcome:?}"));
                }
            }
            // Against root's supervisor an ordinary user can do little without any wall.
            let is_comparable = identity != Identity::ROOTS_CHILD && !is_filtered;
            let bare = scene.attempt(attempt, Way::BARE);
            let is_shown = match control.as_str() {
                "Works" => bare == Outcome::Worked,
                "Reaches" => !bare.is_held_back(),
                "Root" => identity != Identity::ROOT || !bare.is_held_back(),
                "Perhaps" => true,
                other => panic!("{other} is no expectation"),
            };
            if is_comparable && !is_shown {
                faults.push(format!("{attempt} as {identity:?} without walls: {bare:?}, and {control} is expected"));
            }
        }
    }
    println!("{count} attempts");
    assert!(count > 50, "the probe knows its attempts: {count}");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// The oldest interface of Landlock holds no signals and no ports: the filter of system calls does.
#[test]
fn an_older_kernel_holds_as_much_back() {
    let scene = Scene::new(Identity::ordinary());
    let attempts = attempts();
    for abi in [1, 2, 4] {
        for (attempt, _) in attempts.iter().filter(|(name, _)| is_an_escape(name)) {
            let outcome = scene.attempt(attempt, Way { abi, ..Way::FULL });
            assert!(outcome.is_held_back(), "{attempt} with interface {abi}: {outcome:?}");
        }
    }
}

#[test]
fn what_serving_takes_still_works() {
    for identity in identities() {
        let scene = Scene::new(identity);
        let attempts = attempts();
        let work: Vec<_> = attempts.iter().filter(|(name, _)| name.starts_with("works-")).collect();
        assert!(work.len() >= 8, "{work:?}");
        for (name, _) in work {
            for on_compute_thread in [false, true] {
                let outcome = scene.attempt(name, Way { on_compute_thread, ..Way::FULL });
                assert_eq!(outcome, Outcome::Worked, "{name} as {identity:?}");
            }
        }
    }
}

/// What the page of the walls says they let through, they let through: where a kernel comes to hold it back, the page is to say so.
#[test]
fn what_is_let_through_is_known() {
    for identity in identities() {
        let scene = Scene::new(identity);
        for (name, _) in attempts().iter().filter(|(name, _)| name.starts_with("known-")) {
            assert_eq!(scene.attempt(name, Way::FULL), Outcome::Worked, "{name} as {identity:?}");
        }
    }
}

/// The page lists every layer, and for each what would notice its loss: attempts of the probe, and tests.
#[test]
fn the_page_of_the_walls_names_every_layer_and_its_test() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(folder.join(path)).expect("it is in the source tree");
    let tests = ["main.rs", "service.rs", "secrets.rs"].map(|name| read(&format!("tests/sandbox/{name}"))).concat();
    let attempts = attempts();
    let page = read("../worker/src/sandbox/README.md");
    let mut layers = Vec::new();
    for line in page.lines().filter(|line| line.starts_with("| `") && line.matches('|').count() == 5) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let words = |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
        layers.extend(words(cells[1]));
        let noticed_by = words(cells[4]);
        assert!(!noticed_by.is_empty(), "{line}");
        for name in noticed_by {
            let is_attempt = attempts.iter().any(|(attempt, _)| *attempt == name);
            let is_test = tests.contains(&format!("fn {name}(")) || folder.join(format!("tests/{name}.rs")).is_file();
            assert!(is_attempt || is_test, "{name} is neither an attempt nor a test");
        }
    }
    let mut all: Vec<_> = Layer::ALL.iter().map(|layer| layer.as_str().to_owned()).collect();
    all.sort();
    layers.sort();
    assert_eq!(layers, all);
}

#[test]
fn every_thread_is_behind_the_walls() {
    for identity in identities() {
        let scene = Scene::new(identity);
        let held = scene.hold(Way::FULL);
        let threads = threads(held.id());
        assert!(threads.len() > 1, "threads that compute are there");
        for thread in threads {
            let value = |name: &str| thread.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            assert_eq!(value("Seccomp:"), Some("2"), "{thread}");
            assert_eq!(value("NoNewPrivs:"), Some("1"), "{thread}");
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
                // The bounding set is emptied by those alone who hold a capability to begin with.
                let is_root = identity.worker == 0;
                if set != "CapBnd:" || is_root {
                    assert_eq!(value(set), Some("0000000000000000"), "{set} {thread}");
                }
            }
        }
        assert!(!scene.can_spy(held.id()) || identity.supervisor == 0, "{identity:?}: its memory is its own");
    }
}

/// Each layer is left out in turn, and something that it holds back then works: its loss would be seen.
#[test]
fn each_layer_is_needed() {
    // What else must be left out for this layer to stand alone.
    const CASES: [(&str, &str, &str, bool); 9] = [
        ("landlock-files", "", "read-passwd", false),
        ("landlock-files", "", "read-other-model", false),
        ("system-call-filter", "", "udp-send", false),
        ("system-call-filter", "", "new-code", false),
        ("empty-environment", "", "inherited-environment", false),
        ("closed-descriptors", "", "inherited-descriptor", false),
        ("resource-limits", "", "many-descriptors", false),
        ("parent-death-signal", "system-call-filter", "has-no-end-with-supervisor", false),
        ("no-capabilities", "system-call-filter", "change-root", true),
    ];
    let is_root = nix::unistd::getuid().is_root();
    let ordinary = Scene::new(Identity::ordinary());
    for (layer, others, attempt, needs_root) in CASES {
        if needs_root && !is_root {
            eprintln!("skipped: {layer}: this test does not run as root");
            continue;
        }
        let root = needs_root.then(|| Scene::new(Identity::ROOT));
        let scene = root.as_ref().unwrap_or(&ordinary);
        let with = scene.attempt(attempt, Way { without: others, ..Way::FULL });
        assert!(with.is_held_back(), "{attempt} with {layer}: {with:?}");
        let left_out = format!("{layer},{others}");
        let without = scene.attempt(attempt, Way { without: &left_out, ..Way::FULL });
        assert_eq!(without, Outcome::Worked, "{attempt} without {layer}");
    }
    // This one is below, and those need another kernel, or somebody else who looks.
    const ELSEWHERE: [&str; 4] = ["no-new-privileges", "landlock-tcp", "landlock-scope", "not-dumpable"];
    for layer in Layer::ALL.map(Layer::as_str) {
        assert!(
            CASES.iter().any(|(case, ..)| *case == layer) || ELSEWHERE.contains(&layer),
            "{layer} is left out never"
        );
    }
    // The other filters set it for themselves, so it alone is left where they are.
    let all = "no-new-privileges,landlock-files,system-call-filter";
    assert_eq!(ordinary.attempt("may-gain-privileges", Way { without: all, ..Way::FULL }), Outcome::Worked);
    let filters = "landlock-files,system-call-filter";
    assert_eq!(ordinary.attempt("may-gain-privileges", Way { without: filters, ..Way::FULL }), Outcome::Refused);
}

/// The layers of newer kernels are a second wall behind the filter of system calls.
#[test]
fn the_second_walls_hold_by_themselves() {
    let scene = Scene::new(Identity::ordinary());
    for (attempt, before, since) in
        [("tcp-connect", 3, 4), ("tcp-listen", 3, 4), ("abstract-socket", 5, 6), ("signal-victim", 5, 6)]
    {
        let way = |abi| Way { without: "system-call-filter", abi, ..Way::FULL };
        assert_eq!(scene.attempt(attempt, way(before)), Outcome::Worked, "{attempt}");
        assert_eq!(scene.attempt(attempt, way(since)), Outcome::Refused, "{attempt}");
    }
}

#[test]
fn its_memory_is_closed_to_others_of_its_user() {
    let scene = Scene::new(Identity::ordinary());
    assert!(!scene.can_spy(scene.hold(Way::FULL).id()));
    let open = scene.hold(Way { without: "not-dumpable", ..Way::FULL });
    // Where the kernel lets nobody look into what is not their child, the control says nothing.
    let is_restricted =
        std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").is_ok_and(|scope| scope.trim() != "0");
    if is_restricted {
        eprintln!("skipped: the control: this kernel restricts who may trace whom (yama)");
    } else {
        assert!(scene.can_spy(open.id()), "without the layer the test would see it");
    }
}
