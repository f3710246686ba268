//! The command line of the worker, the same for every binary that is built from this library.
//!
//! Errors become exit codes here and nowhere else. A panic ends the process at once: the supervisor starts another one.

use std::path::Path;
use std::process::ExitCode;

use bulkhead_shared::exit::WorkerExit;
use bulkhead_shared::layers::SandboxMode;
use bulkhead_shared::message::{CpuChoice, DeviceChoice};
use clap::{Args, Parser, Subcommand};
use tracing::error;

use crate::device::{parse_cpu, parse_device, parse_sandbox};
use crate::prepare::{self, Prepared};
use crate::sandbox::{Sandboxed, Starter, Walls, of_model};
use crate::serve::StartedFor;
use crate::{bench, convert, eval, plan, serve};

/// The process that holds a model. `bulkhead` starts it; by hand it computes logits for comparison,
/// and measures speed.
#[derive(Debug, Parser)]
#[command(name = "bulkhead-worker", version, arg_required_else_help = true)]
struct Cli {
    /// The walls around whatever reads a model: full, best-effort, off, or log to name missing system calls
    #[arg(long, value_name = "MODE", default_value = "full", global = true, value_parser = parse_sandbox)]
    sandbox: SandboxMode,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model to the supervisor at the other end of standard input.
    Serve(ServeArgs),
    /// Compute the logits of a prompt and write them to a file.
    Eval(eval::EvalArgs),
    /// Write a model in four bits.
    Convert(convert::ConvertArgs),
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
#[derive(Args, Clone, Debug)]
struct ServeArgs {
    /// The folder of the model that may be read
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Where the model will compute: cpu or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = parse_device)]
    device: DeviceChoice,
    /// Threads that compute; 0 is one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: u32,
    /// Instructions to compute with: auto, scalar, avx2, avxvnni, avx512 or amx
    #[arg(long, value_name = "INSTRUCTIONS", default_value = "auto", value_parser = parse_cpu)]
    cpu: CpuChoice,
    /// The process that started this one, with which it ends
    #[arg(long, value_name = "PID")]
    supervisor: i32,
    /// The least interface of Landlock that is enough
    #[arg(long, value_name = "N", default_value_t = 1)]
    landlock_abi_min: u32,
}

/// Does what the arguments of the process say, and gives its exit code.
pub fn main() -> ExitCode {
    end_at_panic();
    let Cli { command, sandbox } = Cli::parse();
    match command {
        Command::Serve(args) => serve(&args, sandbox),
        Command::Eval(args) => behind_walls(eval::walls(&args, sandbox), (args.cpu, 0), |proof, prepared| {
            eval::run(proof, prepared, &args, &mut std::io::stdout())
        }),
        #[cfg(feature = "cuda")]
        Command::Devices(args) => end_by_hand(crate::cuda::devices::run(&args, &mut std::io::stdout())),
        Command::Plan(args) => behind_walls(plan::walls(&args, sandbox), (CpuChoice::Auto, 1), |proof, _| {
            plan::run(proof, &args, &mut std::io::stdout())
        }),
        Command::Convert(args) => match convert::begin(&args, sandbox) {
            Ok((walls, begun)) => behind_walls(walls, (CpuChoice::Auto, 1), |proof, _| {
                convert::run(proof, begun, &args, &mut std::io::stdout())
            }),
            Err(error) => end_by_hand(Err(error)),
        },
        Command::Products(args) => end_by_hand(bench::products::run(&args, &mut std::io::stdout())),
        Command::Bench(args) => {
            behind_walls(bench::walls(&args, sandbox), (args.cpu, args.threads), |proof, prepared| {
                bench::run(proof, prepared, &args, &mut std::io::stdout())
            })
        }
    }
}

/// Runs a command that a person started behind its walls.
fn behind_walls<E: std::fmt::Display>(
    walls: Walls,
    (cpu, threads): (CpuChoice, u32),
    run: impl FnOnce(&Sandboxed, Prepared) -> Result<(), E>,
) -> ExitCode {
    let (sealed, prepared) = prepare::behind_walls(walls, cpu, threads as usize);
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return end_by_hand(Err(error)),
    };
    for refused in sealed.refused() {
        eprintln!("bulkhead-worker: {refused}");
    }
    match sealed.demand() {
        Ok(proof) => end_by_hand(run(&proof, prepared)),
        Err(_) => ExitCode::from(WorkerExit::SandboxIncomplete.code()),
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

fn serve(args: &ServeArgs, mode: SandboxMode) -> ExitCode {
    // The supervisor puts time and incarnation in front of each line that it carries on.
    let format = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).without_time();
    format.with_max_level(tracing::Level::INFO).with_target(false).init();
    let walls = Walls {
        starter: Starter::Supervisor(args.supervisor),
        landlock_abi_min: args.landlock_abi_min,
        ..Walls::of_person(mode, args.device, of_model(Path::new(&args.model)))
    };
    let (sealed, prepared) = prepare::behind_walls(walls, args.cpu, args.threads as usize);
    let started_for = StartedFor { device: args.device, model_dir: &args.model };
    let exit = match serve::run(sealed, prepared, started_for) {
        Ok(()) => WorkerExit::Orderly,
        Err(end) => {
            error!(%end, "the worker ends");
            end.exit()
        }
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
