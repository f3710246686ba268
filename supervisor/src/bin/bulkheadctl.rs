//! The command `bulkheadctl`: asks a running supervisor.

use std::path::PathBuf;
use std::process::ExitCode;

use bulkhead_supervisor::admin::{SOCKET, client};
use bulkhead_supervisor::config::{Environment, paths};
use clap::{Parser, Subcommand};

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
    /// Show the workers and the queue; exits with 3 when something is not running
    Status,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let environment = Environment::read();
    let configured = || environment.get("BULKHEAD_RUNTIME_DIR").map(PathBuf::from);
    let runtime_dir = arguments.runtime_dir.or_else(configured).unwrap_or_else(|| paths::runtime_dir(&environment));
    let socket = arguments.socket.unwrap_or_else(|| runtime_dir.join(SOCKET));
    let answer = match arguments.command {
        Command::Status => client::status(&socket),
    };
    match answer {
        Ok(status) => {
            let (text, outcome) = client::print(&status);
            if arguments.json {
                println!("{status}")
            } else {
                print!("{text}")
            }
            ExitCode::from(outcome.code())
        }
        Err(error) => {
            eprintln!("bulkheadctl: {error}");
            ExitCode::from(error.code())
        }
    }
}
