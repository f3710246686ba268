//! The command `bulkhead`: turns its arguments into a configuration, and the end of the supervisor into an exit code.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use bulkhead_supervisor::config::{self, Environment, flags};
use bulkhead_supervisor::logging;
use bulkhead_supervisor::serve::{self, Ended};
use bulkhead_supervisor::walls;
use clap::{Arg, Command, value_parser};

/// The configuration, or something that it names, cannot be used.
const EXIT_CANNOT_START: u8 = 2;

/// The subcommand that the worker answers, and what it is given.
const PLAN: &str = "plan";
const PLAN_ARGUMENTS: &str = "arguments";

/// A second signal ended the supervisor at once.
const EXIT_AT_ONCE: u8 = 1;

fn main() -> ExitCode {
    let matches = command().get_matches();
    let environment = Environment::read();
    let (name, matches) = matches.subcommand().expect("clap requires a subcommand");
    if name == PLAN {
        let arguments = matches.get_many::<OsString>(PLAN_ARGUMENTS).unwrap_or_default();
        return plan(&environment, arguments);
    }
    let begun = match walls::begin() {
        Ok(begun) => begun,
        Err(error) => return refuse(&error.to_string()),
    };
    let loaded = match config::load(matches, &environment) {
        Ok(loaded) => loaded,
        Err(error) => return refuse(&error.to_string()),
    };
    if name == "config" {
        print!("{}", loaded.listing());
        return ExitCode::SUCCESS;
    }
    let recent = logging::start(loaded.config.log_format, &loaded.config.log_level);
    // Before the first thread: each gets the walls of the one that starts it.
    let gate = match serve::enclose(begun, &loaded.config) {
        Ok(gate) => gate,
        Err(error) => return refuse(&error.to_string()),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return refuse(&format!("cannot start threads: {error}")),
    };
    let ended = runtime.block_on(serve::serve(loaded, recent, gate));
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
    // The options, and the help for them, are the worker's: it alone reads model files.
    let arguments = Arg::new(PLAN_ARGUMENTS).value_parser(value_parser!(OsString)).num_args(0..);
    let plan = Command::new(PLAN)
        .about("Plan the memory of a model on cards of given sizes, without loading it")
        .disable_help_flag(true)
        .arg(arguments.trailing_var_arg(true).allow_hyphen_values(true).value_name("MODEL OPTIONS"));
    Command::new("bulkhead")
        .about("Serves gpt-oss in 4 bits behind the OpenAI API")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(flags(serve))
        .subcommand(flags(config))
        .subcommand(plan)
}

/// Lets the worker plan, and passes on what it says.
fn plan<'a>(environment: &Environment, arguments: impl Iterator<Item = &'a OsString>) -> ExitCode {
    let no_flags = flags(Command::new(PLAN)).get_matches_from([PLAN]);
    let worker = match config::load(&no_flags, environment) {
        Ok(loaded) => loaded.config.worker,
        Err(error) => return refuse(&error.to_string()),
    };
    let mut command = std::process::Command::new(&worker);
    // Its help and its complaints then name the command that was typed.
    command.arg0("bulkhead").arg(PLAN).args(arguments).env_clear();
    match command.status().map(|status| status.code()) {
        Ok(Some(code)) => ExitCode::from(u8::try_from(code).unwrap_or(EXIT_CANNOT_START)),
        Ok(None) => refuse("the worker was killed while it planned"),
        Err(error) => refuse(&format!("cannot start {}: {error}", worker.display())),
    }
}

fn refuse(reason: &str) -> ExitCode {
    eprintln!("bulkhead: {reason}");
    ExitCode::from(EXIT_CANNOT_START)
}
