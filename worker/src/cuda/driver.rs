//! The CUDA driver behind safe types: a card, its memory, pinned memory of the host, kernels, graphs.
//!
//! Owns, with `transfer`, every call of the driver, and so all `unsafe` of this folder. Refuses: to know what a kernel
//! computes. Invariants:
//! one context and one stream for each card, so that whatever is put on the stream happens in its order; every call's code
//! is checked; memory of the host that the card may touch is reached by copies alone, never by reference; a handle is
//! given back before the context that it belongs to.
//!
//! Kernels get addresses of card memory and numbers, nothing else. One that reads or writes out of bounds makes the driver
//! fail with a sticky error, which ends the worker; it cannot reach this process's own memory, for nothing here is managed
//! or mapped memory but the pinned buffers, which hold plain numbers.
#![expect(clippy::wildcard_enum_match_arm, reason = "the codes are the driver's, which adds to them")]

use std::ffi::{CStr, CString, c_int, c_void};
use std::fmt;
use std::sync::Arc;

use bulkhead_shared::units::Bytes;
use cudarc::driver::sys::{self, CUresult};

use crate::device::DeviceError;

/// Where the driver's library may lie beside the places that the loader knows: containers mount it there.
const LIBRARY_PATHS: [&CStr; 4] = [
    c"libcuda.so.1",
    c"/usr/local/nvidia/lib64/libcuda.so.1",
    c"/usr/local/nvidia/lib/libcuda.so.1",
    c"/usr/lib/wsl/lib/libcuda.so.1",
];

/// The compute capability from which on a kernel may start while the one before it ends.
const DEPENDENT_LAUNCH_FROM: (u32, u32) = (9, 0);

/// A handle of the driver.
#[derive(Clone, Copy)]
pub(super) struct Handle<T>(pub(super) T);

// SAFETY: handles are opaque names for objects of the driver, whose functions may be called from any thread.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above; a shared handle gives no access to memory of this process.
unsafe impl<T> Sync for Handle<T> {}

impl<T> fmt::Debug for Handle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("handle")
    }
}

/// Turns a code of the driver into what it means for the worker.
pub(super) fn check(call: &'static str, code: CUresult) -> Result<(), DeviceError> {
    use CUresult as E;
    if code == E::CUDA_SUCCESS {
        return Ok(());
    }
    let (name, number) = (name_of(code), code as u32);
    // The codes with which the driver says that the card itself is the matter. All others that reach this function make
    // the context unusable or come from a fault of ours, and a new process is the remedy for both.
    let is_lost = matches!(
        code,
        E::CUDA_ERROR_DEVICE_UNAVAILABLE
            | E::CUDA_ERROR_NO_DEVICE
            | E::CUDA_ERROR_INVALID_DEVICE
            | E::CUDA_ERROR_ECC_UNCORRECTABLE
            | E::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | E::CUDA_ERROR_SYSTEM_NOT_READY
    );
    match is_lost {
        true => Err(DeviceError::Lost { name, code: number, call }),
        false => Err(DeviceError::Poisoned { name, code: number, call }),
    }
}

fn name_of(code: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: `text` is a place for one pointer; the driver sets it to a constant string or leaves it null.
    let found = unsafe { sys::cuGetErrorName(code, &raw mut text) };
    if found != CUresult::CUDA_SUCCESS || text.is_null() {
        return "an unknown error".into();
    }
    // SAFETY: the driver gave a constant string that ends with a zero.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Libraries that the driver's own loads when it needs them, which walls would keep it from: the compiler of PTX. It fails for
/// good where it finds it missing.
const OPTIONAL_LIBRARIES: [&CStr; 2] = [c"libnvidia-ptxjitcompiler.so.1", c"libnvidia-gpucomp.so"];

/// Opens the driver's libraries, which takes the right to run files: before the walls.
///
/// # Errors
/// `Unusable` where there is no driver.
pub fn open_libraries() -> Result<(), DeviceError> {
    let open = |path: &CStr| {
        // SAFETY: the path is a string that ends with a zero. The library is never closed: later look-ups by its short name
        // find the one that is open, wherever it came from.
        !unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null()
    };
    if !LIBRARY_PATHS.into_iter().any(open) {
        let reason = "the CUDA driver is not installed: libcuda.so.1 cannot be loaded";
        return Err(DeviceError::Unusable(reason.into()));
    }
    for path in OPTIONAL_LIBRARIES {
        // Our kernels are machine code; a driver without them runs those too.
        open(path);
    }
    Ok(())
}

/// Opens the driver's library and the driver.
fn open_driver() -> Result<(), DeviceError> {
    open_libraries()?;
    // SAFETY: the library is loaded, which the first call of a function needs.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(DeviceError::Unusable(format!(
            "the CUDA driver does not start: {} ({}); are the device files there, and is the driver loaded?",
            name_of(code),
            code as u32
        ))),
    }
}

/// What a card is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardFacts {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// By what NVML and nvidia-smi know it: `GPU-` and a UUID.
    pub uuid: String,
    /// Its compute capability.
    pub capability: (u32, u32),
    /// Its memory.
    pub memory: Bytes,
    /// Its multiprocessors.
    pub processors: u32,
    /// Shared memory that a block may have.
    pub shared_bytes_max: u32,
    /// Shared memory of a multiprocessor.
    pub shared_bytes_processor: u32,
}

/// Lists the cards that the driver knows.
///
/// # Errors
/// `Unusable` where there is no driver or it does not start.
pub fn list_cards() -> Result<Vec<CardFacts>, DeviceError> {
    open_driver()?;
    let mut count: c_int = 0;
    // SAFETY: `count` is a place for one number.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    (0..count).map(facts_of).collect()
}

fn facts_of(index: c_int) -> Result<CardFacts, DeviceError> {
    use sys::CUdevice_attribute_enum as A;
    let (mut device, mut bytes, mut name) = (0, 0usize, [0u8; 128]);
    // SAFETY: `device` is a place for one number.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, index) })?;
    // SAFETY: the name is written into a buffer whose length is passed, and ends with a zero.
    check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 128, device) })?;
    // SAFETY: `bytes` is a place for one number.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&raw mut bytes, device) })?;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: `uuid` is a place for sixteen bytes.
    check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) })?;
    let attribute = |which| -> Result<u32, DeviceError> {
        let mut value: c_int = 0;
        // SAFETY: `value` is a place for one number.
        check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) })?;
        Ok(value.unsigned_abs())
    };
    Ok(CardFacts {
        index: index.unsigned_abs(),
        name: CStr::from_bytes_until_nul(&name).map_or_else(|_| String::new(), |n| n.to_string_lossy().into_owned()),
        capability: (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        memory: Bytes(bytes as u64),
        uuid: uuid_text(uuid.bytes.map(|byte| byte as u8)),
        processors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_max: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_bytes_processor: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
    })
}

/// Writes a UUID as NVML does.
fn uuid_text(bytes: [u8; 16]) -> String {
    let hex = |range: std::ops::Range<usize>| bytes[range].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    format!("GPU-{}-{}-{}-{}-{}", hex(0..4), hex(4..6), hex(6..8), hex(8..10), hex(10..16))
}

/// A card with its context and stream.
#[derive(Clone, Debug)]
pub struct Card {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    facts: CardFacts,
    device: sys::CUdevice,
    context: Handle<sys::CUcontext>,
    stream: Handle<sys::CUstream>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the stream is ours, and nothing refers to it any more. Errors say that the context is broken already.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.stream.0) };
        // SAFETY: the context was retained once by `open`.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl Card {
    /// Opens a card by its number.
    ///
    /// # Errors
    /// `Unusable` where there is no driver or no such card; `OutOfMemory` when the card has no room for a context.
    pub fn open(index: u32) -> Result<Card, DeviceError> {
        let mut cards = list_cards()?;
        let count = cards.len();
        if index as usize >= count {
            let reason = format!("there is no CUDA device {index}: the driver knows {count}");
            return Err(DeviceError::Unusable(reason));
        }
        let facts = cards.swap_remove(index as usize);
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: `device` is a place for one number, and the card of this number exists.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, index as c_int) })?;
        // SAFETY: `context` is a place for one handle.
        match unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                return Err(DeviceError::OutOfMemory { wanted: Bytes(0), what: "a context", free: Bytes(0) });
            }
            code => check("cuDevicePrimaryCtxRetain", code)?,
        }
        // SAFETY: the context was just retained.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(context) })?;
        let stream = new_stream()?;
        Ok(Card { inner: Arc::new(Inner { facts, device, context: Handle(context), stream }) })
    }

    /// Gives what the card is.
    #[must_use]
    pub fn facts(&self) -> &CardFacts {
        &self.inner.facts
    }

    /// Makes the card's context that of the calling thread, which every other call here needs.
    ///
    /// # Errors
    /// The driver's.
    pub fn enter(&self) -> Result<(), DeviceError> {
        // SAFETY: the context lives as long as `inner`.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.inner.context.0) })
    }

    /// Gives the memory that is free on the card.
    ///
    /// # Errors
    /// The driver's.
    pub fn free_memory(&self) -> Result<Bytes, DeviceError> {
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: both are places for one number, and the context is current.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok(Bytes(free as u64))
    }

    /// Makes a stream beside the card's own, for the calling thread to give back.
    pub(super) fn new_stream(&self) -> Result<Handle<sys::CUstream>, DeviceError> {
        self.enter()?;
        new_stream()
    }

    /// Gives the stream.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.inner.stream.0
    }

    /// Waits until everything on the stream is done.
    ///
    /// # Errors
    /// The driver's, those of kernels that ran since the last wait among them.
    pub fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream lives as long as `inner`.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.inner.stream.0) })
    }

    /// Loads a module from a cubin.
    ///
    /// # Errors
    /// `Unusable` where the driver is too old for the cubin; the driver's.
    pub fn load_module(&self, image: &[u8]) -> Result<Module, DeviceError> {
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a whole cubin of our own, whose header tells the driver its length.
        match unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) } {
            code @ (CUresult::CUDA_ERROR_INVALID_IMAGE
            | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION) => Err(DeviceError::Unusable(format!(
                "the CUDA driver does not take this worker's kernels ({}): it must be of release 580 or later",
                name_of(code)
            ))),
            code => {
                check("cuModuleLoadData", code)?;
                Ok(Module { card: self.clone(), module: Handle(module) })
            }
        }
    }

    /// Puts a kernel on the stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(&self, launch: &Launch<'_>, arguments: &[Argument]) -> Result<(), DeviceError> {
        let mut words: [u64; ARGUMENTS_MAX] = [0; ARGUMENTS_MAX];
        let mut pointers: [*mut c_void; ARGUMENTS_MAX] = [std::ptr::null_mut(); ARGUMENTS_MAX];
        assert!(arguments.len() <= ARGUMENTS_MAX, "no kernel takes so many arguments");
        assert!(arguments.len() == launch.kernel.arguments, "{} takes other arguments", launch.kernel.name);
        for ((word, pointer), argument) in words.iter_mut().zip(&mut pointers).zip(arguments) {
            // Little endian: the low bytes of a word are the number of 4 bytes.
            *word = match *argument {
                Argument::Address(address) => address,
                Argument::Number(number) => u64::from(number),
                Argument::Float(float) => u64::from(float.to_bits()),
            };
            *pointer = std::ptr::from_mut(word).cast();
        }
        let is_dependent = launch.is_dependent && self.inner.facts.capability >= DEPENDENT_LAUNCH_FROM;
        // SAFETY: all-zero bytes are a value of this plain C struct.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let [x, y, z] = launch.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.inner.stream.0,
            attrs: &raw mut attribute,
            numAttrs: u32::from(is_dependent),
        };
        // SAFETY: the config, the attribute and the arguments live through the call, which copies them; there are as many
        // arguments as the kernel takes. What the kernel does to the card's memory is no matter of this process's safety.
        let code = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                launch.kernel.function.0,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check("cuLaunchKernelEx", code)
    }

    /// Records what `work` puts on the stream as a graph instead of running it.
    ///
    /// # Errors
    /// Those of `work`; `OutOfMemory` when the graph has no room; the driver's.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), DeviceError>) -> Result<Graph, DeviceError> {
        let stream = self.inner.stream.0;
        const MODE: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `inner`.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream, MODE) })?;
        let worked = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: `graph` is a place for one handle, and the stream is being captured.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(stream, &raw mut graph) });
        worked.and(ended)?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: `executable` is a place for one handle, and the graph was just made.
        let code = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0) };
        // SAFETY: the graph is ours, and what was instantiated from it needs it no more.
        let destroyed = check("cuGraphDestroy", unsafe { sys::cuGraphDestroy(graph) });
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(DeviceError::OutOfMemory { wanted: Bytes(0), what: "a graph", free: self.free_memory()? });
        }
        check("cuGraphInstantiate", code).and(destroyed)?;
        Ok(Graph { card: self.clone(), executable: Handle(executable) })
    }
}

/// Makes a stream in the current context.
fn new_stream() -> Result<Handle<sys::CUstream>, DeviceError> {
    const NON_BLOCKING: u32 = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
    let mut stream = std::ptr::null_mut();
    // SAFETY: `stream` is a place for one handle, and a context is current.
    check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut stream, NON_BLOCKING) })?;
    Ok(Handle(stream))
}

/// Arguments that a kernel takes at most.
const ARGUMENTS_MAX: usize = 32;

/// One argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument {
    /// An address on the card, or 0 for none.
    Address(u64),
    /// An unsigned number of 32 bits.
    Number(u32),
    /// A float.
    Float(f32),
}

/// A kernel on its way to the stream.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Blocks along each axis.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory of a block beyond what the kernel declares.
    pub shared_bytes: u32,
    /// Whether it may start before what stands before it has ended: never behind a copy.
    pub is_dependent: bool,
}

/// A loaded module.
#[derive(Debug)]
pub struct Module {
    card: Card,
    module: Handle<sys::CUmodule>,
}

impl Module {
    /// Finds a kernel that takes `arguments` arguments, and allows it all the shared memory that the card has for a block.
    ///
    /// # Errors
    /// The driver's.
    pub fn kernel(&self, name: &str, arguments: usize) -> Result<Kernel, DeviceError> {
        use sys::CUfunction_attribute_enum as A;
        let text = CString::new(name).expect("names of kernels hold no zero");
        let (mut function, mut declared) = (std::ptr::null_mut(), 0);
        // SAFETY: `function` is a place for one handle, the name ends with a zero, and the module is loaded.
        let code = unsafe { sys::cuModuleGetFunction(&raw mut function, self.module.0, text.as_ptr()) };
        check("cuModuleGetFunction", code)?;
        // SAFETY: `declared` is a place for one number, and the function was just found.
        let code =
            unsafe { sys::cuFuncGetAttribute(&raw mut declared, A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function) };
        check("cuFuncGetAttribute", code)?;
        let most = self.card.facts().shared_bytes_max as c_int - declared;
        // SAFETY: the function was just found.
        let code =
            unsafe { sys::cuFuncSetAttribute(function, A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most) };
        check("cuFuncSetAttribute", code)?;
        Ok(Kernel { name: name.into(), arguments, function: Handle(function) })
    }
}

/// A kernel of a module. Modules stay loaded for the life of the process.
#[derive(Clone, Debug)]
pub struct Kernel {
    name: Box<str>,
    arguments: usize,
    function: Handle<sys::CUfunction>,
}

/// Work that was recorded, to be run many times.
#[derive(Debug)]
pub struct Graph {
    card: Card,
    executable: Handle<sys::CUgraphExec>,
}

impl Graph {
    /// Puts the work on the stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(&self) -> Result<(), DeviceError> {
        // SAFETY: graph and stream live, and belong to one context.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.executable.0, self.card.inner.stream.0) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the graph is ours. One that still runs is freed by the driver when it is done.
        let _ = unsafe { sys::cuGraphExecDestroy(self.executable.0) };
    }
}
