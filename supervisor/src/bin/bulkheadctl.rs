//! The command `bulkheadctl`: asks a running supervisor, in supervisorctl's words and with its exit codes.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bulkhead_supervisor::admin::SOCKET;
use bulkhead_supervisor::admin::client::{self, ClientError, Outcome, Wish};
use bulkhead_supervisor::config::{Environment, paths};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};

/// Asks a running bulkhead.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The admin socket [admin.sock in the runtime folder]
    #[arg(long, global = true, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// The runtime folder [BULKHEAD_RUNTIME_DIR, or where bulkhead looks for it]
    #[arg(long, global = true, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the workers and the queue; exits with 3 when something is not running, with 4 for an unknown name
    Status {
        /// Models; all of them by default
        names: Vec<String>,
    },
    /// Start a worker that was stopped or given up; exits with 7 when it does not get ready
    Start {
        /// Models; all of them by default
        names: Vec<String>,
    },
    /// End a worker when its requests have ended; new ones are refused
    Stop {
        /// End it at once; its requests end with an error that says when to try again
        #[arg(long)]
        now: bool,
        /// Models; all of them by default
        names: Vec<String>,
    },
    /// End a worker and start another one; its requests go on with that
    Restart {
        /// Models; all of them by default
        names: Vec<String>,
    },
    /// List the requests that wait or run
    Queue,
    /// Give up a request by its number in the queue
    Cancel {
        /// The number
        id: u64,
    },
    /// Show the end of the log
    Tail {
        /// Go on as the log does
        #[arg(short, long)]
        follow: bool,
        /// How many lines to begin with
        #[arg(short = 'n', long, default_value_t = 20)]
        lines: u64,
    },
    /// Have the file with API keys read anew
    Reread,
    /// Show the version of the running bulkhead
    Version,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let environment = Environment::read();
    let configured = || environment.get("BULKHEAD_RUNTIME_DIR").map(PathBuf::from);
    let runtime_dir = arguments.runtime_dir.or_else(configured).unwrap_or_else(|| paths::runtime_dir(&environment));
    let socket = arguments.socket.unwrap_or_else(|| runtime_dir.join(SOCKET));
    match run(&socket, arguments.command, arguments.json) {
        Ok(outcome) => ExitCode::from(outcome.code()),
        Err(error) => {
            eprintln!("bulkheadctl: {error}");
            ExitCode::from(error.code())
        }
    }
}

fn run(socket: &Path, command: Command, is_json: bool) -> Result<Outcome, ClientError> {
    let (answer, text, outcome) = match command {
        Command::Status { names } => {
            let status = client::ask(socket, &json!({"command": "status"}))?;
            let (text, outcome) = client::print_status(&status, &names);
            (status, text, outcome)
        }
        Command::Start { names } => client::control(socket, Wish::Start, &names)?,
        Command::Stop { now: false, names } => client::control(socket, Wish::Stop, &names)?,
        Command::Stop { now: true, names } => client::control(socket, Wish::StopNow, &names)?,
        Command::Restart { names } => client::control(socket, Wish::Restart, &names)?,
        Command::Queue => {
            let queue = client::ask(socket, &json!({"command": "queue"}))?;
            let text = client::print_queue(&queue);
            (queue, text, Outcome::Well)
        }
        Command::Cancel { id } => {
            let answer = client::ask(socket, &json!({"command": "cancel", "id": id}))?;
            (answer, format!("{id}: cancelled\n"), Outcome::Well)
        }
        Command::Tail { follow: true, lines } => {
            let request = json!({"command": "tail", "lines": lines, "follow": true});
            client::follow(socket, &request, |answer| show(&answer, &client::print_lines(&answer), is_json))?;
            return Ok(Outcome::Well);
        }
        Command::Tail { follow: false, lines } => {
            let answer = client::ask(socket, &json!({"command": "tail", "lines": lines}))?;
            let text = client::print_lines(&answer);
            (answer, text, Outcome::Well)
        }
        Command::Reread => {
            let answer = client::ask(socket, &json!({"command": "reread"}))?;
            let warning = answer["warning"].as_str().map_or(String::new(), |warning| format!("WARNING: {warning}\n"));
            let text = format!("{warning}{} API keys\n", answer["keys"]);
            (answer, text, Outcome::Well)
        }
        Command::Version => {
            let answer = client::ask(socket, &json!({"command": "version"}))?;
            let text = format!("{}\n", answer["version"].as_str().unwrap_or("unknown"));
            (answer, text, Outcome::Well)
        }
    };
    show(&answer, &text, is_json);
    Ok(outcome)
}

/// Prints an answer. False when nobody reads any more.
fn show(answer: &Value, text: &str, is_json: bool) -> bool {
    let text = if is_json { format!("{answer}\n") } else { text.to_owned() };
    let mut out = io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
}
