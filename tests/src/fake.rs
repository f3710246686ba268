//! A server with the fake worker, which loads nothing and answers from scripts: for tests of the supervisor alone.
//!
//! Owns: the folder of the model that is none, with the script of the load in it, and the program that is started as the
//! worker. What the scripts may say stands in the fake worker itself.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use crate::server::{Server, WORKER, add_defaults, binary, command};

/// The name of the fake worker's program.
pub const FAKE_WORKER: &str = "fake-worker";

/// What a fake worker does before it takes requests; by default it is ready at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fake<'a> {
    /// The script of the load: the lines of `fake.txt`.
    pub load: &'a str,
    /// Words in front of its command line.
    pub words: &'a str,
}

impl Fake<'_> {
    /// Prepares `bulkhead serve` with this worker, unless the arguments name another one.
    ///
    /// # Panics
    /// When the folder cannot be written.
    #[must_use]
    pub fn command(&self, folder: &Path, arguments: &[&str]) -> Command {
        self.install(folder).expect("the folder can be written");
        let mut command = command(folder, arguments);
        let (model, worker) = (folder.join("fake-model"), folder.join(WORKER));
        add_defaults(&mut command, arguments, &[("--model", model.as_os_str()), ("--worker", worker.as_os_str())]);
        command
    }

    fn install(&self, folder: &Path) -> io::Result<()> {
        let model = folder.join("fake-model");
        fs::create_dir(&model)?;
        fs::write(model.join("config.json"), "{}")?;
        fs::write(model.join("fake.txt"), self.load)?;
        let worker = folder.join(WORKER);
        if self.words.is_empty() {
            return symlink(binary(FAKE_WORKER), worker);
        }
        // The supervisor alone chooses a worker's arguments, so words go in between.
        let script = format!("#!/bin/sh\nexec '{}' {} \"$@\"\n", binary(FAKE_WORKER).display(), self.words);
        fs::write(&worker, script)?;
        fs::set_permissions(worker, PermissionsExt::from_mode(0o755))
    }
}

impl Server {
    /// Starts a server with a fake worker and waits until that is ready.
    ///
    /// # Panics
    /// When it is not ready before the deadline.
    #[must_use]
    pub fn start_fake(arguments: &[&str]) -> Server {
        let server = Server::spawn_fake(Fake::default(), arguments);
        server.wait_until_loaded();
        server
    }

    /// Starts a server with a fake worker and waits until the server listens.
    ///
    /// # Panics
    /// When it ends instead.
    #[must_use]
    pub fn spawn_fake(fake: Fake<'_>, arguments: &[&str]) -> Server {
        Server::launch(|folder| fake.command(folder, arguments))
    }
}
