//! What a worker does to itself before it reads its first byte.
//!
//! Each step returns the layer that it put in force; `Hello` reports them, and the supervisor decides whether they are
//! enough. The order matters: nothing of a model file, prompt or frame is read before `enter` has returned.

#[expect(unsafe_code, reason = "no safe wrapper closes a range of descriptors")]
mod limits;

use bulkhead_shared::message::Layer;

/// Proof that the process stands behind its walls: only `enter` makes one, and whoever reads from the link or from a model
/// folder asks for it.
#[derive(Debug)]
pub struct Sandboxed {
    layers: Vec<Layer>,
}

impl Sandboxed {
    /// Gives the layers in force.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }
}

/// A layer that the system refused.
#[derive(Debug, thiserror::Error)]
#[error("the sandbox layer {} could not be put in force: {reason}", layer.as_str())]
pub struct SandboxError {
    /// The layer.
    pub layer: Layer,
    /// What the system said.
    pub reason: String,
}

/// Puts one layer in force, or says what the system answered.
type Step = fn() -> Result<(), String>;

/// Gives up what a worker does not need.
///
/// # Errors
/// When the system refuses a layer; the process must end then.
pub fn enter() -> Result<Sandboxed, SandboxError> {
    let steps: [(Layer, Step); 7] = [
        (Layer::ParentDeathSignal, limits::die_with_parent),
        (Layer::NotDumpable, limits::not_dumpable),
        (Layer::NoNewPrivileges, limits::no_new_privileges),
        (Layer::NoCapabilities, limits::no_capabilities),
        (Layer::ClosedDescriptors, limits::close_descriptors),
        (Layer::EmptyEnvironment, limits::empty_environment),
        (Layer::ResourceLimits, limits::resource_limits),
    ];
    let mut layers = Vec::with_capacity(steps.len());
    for (layer, step) in steps {
        step().map_err(|reason| SandboxError { layer, reason })?;
        layers.push(layer);
    }
    Ok(Sandboxed { layers })
}
