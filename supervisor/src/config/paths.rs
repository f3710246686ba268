//! Where things are when nobody says so: the worker, the built-in model, the folder of the admin socket.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use super::Environment;
use crate::walls::Identity;

/// The name of the built-in model in the API.
pub const DEMO_MODEL_ID: &str = "bulkhead-demo";

const WORKER: &str = "bulkhead-worker";
const WORKER_CUDA: &str = "bulkhead-worker-cuda";
const DEMO_IN_SOURCE: &str = "worker/demo-model/checkpoint";
const DEMO_INSTALLED: &str = "share/bulkhead/demo-model";

/// Why a path of the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// There is no such folder.
    #[error("model folder {} does not exist", .0.display())]
    NoModel(PathBuf),
    /// It is something else.
    #[error("model {} is not a folder", .0.display())]
    NotAFolder(PathBuf),
    /// It is no model.
    #[error("model folder {} has no config.json: it is not a Hugging Face model", .0.display())]
    NoConfig(PathBuf),
    /// The name cannot be sent to the worker.
    #[error("model folder {} has a name that is not UTF-8", .0.display())]
    NotText(PathBuf),
    /// There is no worker.
    #[error("worker {} does not exist: build or install bulkhead-worker, or name it with --worker FILE", .0.display())]
    NoWorker(PathBuf),
    /// The worker is not a program.
    #[error("worker {} is not an executable file", .0.display())]
    NotExecutable(PathBuf),
    /// The folder of the admin socket cannot be made.
    #[error("runtime folder {} cannot be used: {reason}; choose another one with --runtime-dir", path.display())]
    RuntimeDir {
        /// The folder.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// Gives the worker beside this executable.
pub(super) fn worker() -> PathBuf {
    executable().with_file_name(WORKER)
}

/// Gives the worker for cards beside this executable; it need not be there.
pub(super) fn worker_cuda() -> PathBuf {
    executable().with_file_name(WORKER_CUDA)
}

/// Finds the built-in model: installed beside this executable, in the source tree around it, or in the one it was built
/// from. Where there is none, gives the place where it would be installed.
pub(super) fn demo_model() -> PathBuf {
    let executable = executable();
    let installed = executable.parent().and_then(Path::parent).unwrap_or(Path::new("/")).join(DEMO_INSTALLED);
    let around = executable.ancestors().map(|folder| folder.join(DEMO_IN_SOURCE));
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(DEMO_IN_SOURCE);
    let mut candidates = std::iter::once(installed.clone()).chain(around).chain([built_from]);
    let found = candidates.find(|folder| folder.join("config.json").is_file());
    found.and_then(|folder| folder.canonicalize().ok()).unwrap_or(installed)
}

/// Chooses the folder of the admin socket: the session's, else the system's for root, else one of our own in /tmp.
#[must_use]
pub fn runtime_dir(environment: &Environment) -> PathBuf {
    let uid = nix::unistd::geteuid();
    let session = environment.get("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|folder| folder.is_dir());
    match session {
        Some(folder) => folder.join("bulkhead"),
        None if uid.is_root() => PathBuf::from("/run/bulkhead"),
        None => PathBuf::from(format!("/tmp/bulkhead-{uid}")),
    }
}

/// Checks that the model's folder can be handed to a worker; its files are the worker's to open.
///
/// # Errors
/// `NoModel`, `NotAFolder`, `NoConfig`, `NotText`.
pub fn check_model(folder: &Path) -> Result<String, PathError> {
    let absolute = folder.canonicalize().map_err(|_| PathError::NoModel(folder.to_owned()))?;
    if !absolute.is_dir() {
        return Err(PathError::NotAFolder(folder.to_owned()));
    }
    if !absolute.join("config.json").is_file() {
        return Err(PathError::NoConfig(folder.to_owned()));
    }
    absolute.to_str().map(str::to_owned).ok_or_else(|| PathError::NotText(folder.to_owned()))
}

/// Checks that the worker is a program.
///
/// # Errors
/// `NoWorker`, `NotExecutable`.
pub fn check_worker(file: &Path) -> Result<(), PathError> {
    let metadata = fs::metadata(file).map_err(|_| PathError::NoWorker(file.to_owned()))?;
    let is_program = metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
    is_program.then_some(()).ok_or_else(|| PathError::NotExecutable(file.to_owned()))
}

/// Makes the folder of the admin socket, or checks that it is its owner's alone; `owner` is who this process will be.
///
/// # Errors
/// `RuntimeDir` when it cannot be made, is no folder, belongs to someone else, or is open to others.
pub fn make_runtime_dir(folder: &Path, owner: &Identity) -> Result<(), PathError> {
    let refuse = |reason: String| Err(PathError::RuntimeDir { path: folder.to_owned(), reason });
    if let Some(parent) = folder.parent()
        && let Err(error) = fs::create_dir_all(parent)
    {
        return refuse(error.to_string());
    }
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => {
            if let Err(error) = lchown(folder, Some(owner.uid.as_raw()), Some(owner.gid.as_raw())) {
                return refuse(error.to_string());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return refuse(error.to_string()),
    }
    match fs::symlink_metadata(folder) {
        Err(error) => refuse(error.to_string()),
        Ok(metadata) if !metadata.is_dir() => refuse("it is not a folder".into()),
        Ok(metadata) if metadata.uid() != owner.uid.as_raw() => {
            refuse(format!("it belongs to user {} and not to {}", metadata.uid(), owner.name))
        }
        Ok(metadata) if metadata.mode() & 0o022 != 0 => {
            refuse(format!("others may write to it (mode {:o})", metadata.mode() & 0o777))
        }
        Ok(_) => Ok(()),
    }
}

fn executable() -> PathBuf {
    std::env::current_exe().and_then(|path| path.canonicalize()).unwrap_or_default()
}
