//! The command line of the worker, the same for every binary that is built from this library.
//!
//! Errors become exit codes here and nowhere else. A panic ends the process at once: the supervisor starts another one.

use std::process::ExitCode;

use bulkhead_shared::exit::WorkerExit;
use bulkhead_shared::message::DeviceChoice;
use clap::{Args, Parser, Subcommand};
use tracing::error;

use crate::device::parse_device;
use crate::{bench, eval, plan, sandbox, serve};

/// The process that holds a model. `bulkhead` starts it; by hand it computes logits for comparison,
/// and measures speed.
#[derive(Debug, Parser)]
#[command(name = "bulkhead-worker", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model to the supervisor at the other end of standard input.
    Serve(ServeArgs),
    /// Compute the logits of a prompt and write them to a file.
    Eval(eval::EvalArgs),
    /// Measure how fast a model computes here, and how much of the memory's bandwidth that uses.
    Bench(bench::BenchArgs),
    /// Measure how fast single products are here, beside what the memory's bandwidth allows.
    Products(bench::products::ProductsArgs),
    /// List the CUDA devices that this worker can use.
    #[cfg(feature = "cuda")]
    Devices(crate::cuda::devices::DevicesArgs),
    /// Plan the memory of a model on cards of given sizes, without loading it.
    Plan(plan::PlanArgs),
}

/// The arguments of `serve`.
#[derive(Args, Clone, Copy, Debug)]
struct ServeArgs {
    /// Where the model will compute: cpu or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = parse_device)]
    device: DeviceChoice,
}

/// Does what the arguments of the process say, and gives its exit code.
pub fn main() -> ExitCode {
    end_at_panic();
    match Cli::parse().command {
        Command::Serve(args) => serve(args.device),
        Command::Eval(args) => end_by_hand(eval::run(&args)),
        #[cfg(feature = "cuda")]
        Command::Devices(args) => end_by_hand(crate::cuda::devices::run(&args, &mut std::io::stdout())),
        Command::Plan(args) => end_by_hand(plan::run(&args, &mut std::io::stdout())),
        Command::Products(args) => end_by_hand(bench::products::run(&args, &mut std::io::stdout())),
        Command::Bench(args) => end_by_hand(bench::run(&args, &mut std::io::stdout())),
    }
}

/// Ends a command that a person started.
fn end_by_hand(result: Result<(), impl std::fmt::Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-worker: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve(device: DeviceChoice) -> ExitCode {
    // The supervisor puts time and incarnation in front of each line that it carries on.
    let format = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).without_time();
    format.with_max_level(tracing::Level::INFO).with_target(false).init();
    let exit = match sandbox::enter() {
        Err(refused) => {
            error!(%refused, "the worker does not start");
            WorkerExit::SandboxIncomplete
        }
        Ok(proof) => match serve::run(&proof, device) {
            Ok(()) => WorkerExit::Orderly,
            Err(end) => {
                error!(%end, "the worker ends");
                end.exit()
            }
        },
    };
    ExitCode::from(exit.code())
}

/// Turns a panic on any thread into the end of the process: a worker that lost a thread must not look alive.
fn end_at_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        std::process::abort();
    }));
}
