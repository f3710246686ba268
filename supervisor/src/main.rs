//! The command `bulkhead`: turns its arguments into a configuration, and the end of the supervisor into an exit code.

use std::process::ExitCode;

use bulkhead_supervisor::config::{self, Environment, flags};
use bulkhead_supervisor::logging;
use bulkhead_supervisor::serve::{self, Ended};
use clap::Command;

/// The configuration, or something that it names, cannot be used.
const EXIT_CANNOT_START: u8 = 2;

/// A second signal ended the supervisor at once.
const EXIT_AT_ONCE: u8 = 1;

fn main() -> ExitCode {
    let matches = command().get_matches();
    let environment = Environment::read();
    let (name, matches) = matches.subcommand().expect("clap requires a subcommand");
    let loaded = match config::load(matches, &environment) {
        Ok(loaded) => loaded,
        Err(error) => return refuse(&error.to_string()),
    };
    if name == "config" {
        print!("{}", loaded.listing());
        return ExitCode::SUCCESS;
    }
    logging::start(loaded.config.log_format, &loaded.config.log_level);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return refuse(&format!("cannot start threads: {error}")),
    };
    let ended = runtime.block_on(serve::serve(loaded));
    runtime.shutdown_background();
    match ended {
        Ok(Ended::InOrder) => ExitCode::SUCCESS,
        Ok(Ended::AtOnce) => ExitCode::from(EXIT_AT_ONCE),
        Err(error) => refuse(&error.to_string()),
    }
}

fn command() -> Command {
    let serve = Command::new("serve").about("Serve a model until SIGTERM or Ctrl-C");
    let config = Command::new("config").about("Print the configuration, and where each value came from");
    Command::new("bulkhead")
        .about("Serves gpt-oss in 4 bits behind the OpenAI API")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(flags(serve))
        .subcommand(flags(config))
}

fn refuse(reason: &str) -> ExitCode {
    eprintln!("bulkhead: {reason}");
    ExitCode::from(EXIT_CANNOT_START)
}
