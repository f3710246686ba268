//! A model's weights on a card: what lies where, in the form in which the file stores it.
//!
//! Owns: the layout of the one allocation that holds all weights, made before it is taken, and the descriptors by which
//! kernels find matrices. Refuses: shapes that the kernels have no code for. Invariant: 4-bit weights stay 4-bit; a matrix
//! is only converted (to 16-bit floats) where the file holds floats of another type or order, or an NF4 block size that
//! the kernels do not know.

use half::bf16;

use super::driver::Card;
pub use super::form::Form;
use super::transfer::Memory;
use super::upload::{Source, upload};
use crate::device::DeviceError;
use crate::model::config::Config;
use crate::model::weights::{DenseWeights, LayerWeights, Linear, MixtureWeights, MlpWeights, Weights};
use crate::quant::{FloatType, Matrix, Scales};

/// Every part begins at a multiple of this: what kernels load at once never crosses it. Units: bytes.
const ALIGNMENT: u64 = 256;

/// Columns that the kernels take at a time.
const COLUMNS_STEP: usize = 64;

/// Bytes of a matrix's descriptor: `Matrix` of worker/kernels/formats.cuh.
const DESCRIPTOR_BYTES: usize = 48;

/// In place of minus infinity, the sink of a head that has none: finite, for the kernels take differences of it.
const NO_SINK: f32 = -1e30;

/// Matrices that are multiplied with one activation, in one launch.
#[derive(Clone, Debug)]
pub struct Product {
    /// Their form.
    pub form: Form,
    /// The address of their descriptors.
    pub matrices: u64,
    /// How many there are.
    pub count: u32,
    /// Columns of each.
    pub columns: u32,
    /// Rows: of all together where they stand side by side, of each where they are experts.
    pub rows: u32,
    /// Rows of each, for counting pieces of work.
    each: Vec<u32>,
    /// The address of the 256 values of nested scales.
    pub scale_values: u64,
    /// Bytes that a product with all of them reads.
    pub bytes: u64,
}

impl Product {
    /// Counts pieces of `rows` rows, none of which belongs to two matrices.
    #[must_use]
    pub fn tiles(&self, rows: u32) -> u32 {
        self.each.iter().map(|each| each.div_ceil(rows)).sum()
    }
}

/// The mixture of one layer.
#[derive(Clone, Debug)]
pub struct Experts {
    /// The address of the router's matrix, [experts, hidden] bf16.
    pub router: u64,
    /// The address of its bias.
    pub router_bias: u64,
    /// Experts.
    pub count: u32,
    /// Experts of a token.
    pub used: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// The slope inside the sigmoid.
    pub alpha: f32,
    /// The bound of gate and up.
    pub limit: f32,
    /// The first product, one matrix for each expert.
    pub gate_up: Product,
    /// The second.
    pub down: Product,
    /// Bytes that the router's product reads.
    pub router_bytes: u64,
}

/// A dense network.
#[derive(Clone, Debug)]
pub struct Dense {
    /// The gate's matrix and the one that it gates, side by side.
    pub gate_up: Product,
    /// The matrix that leads back.
    pub down: Product,
}

/// What follows the attention of a layer.
#[derive(Clone, Debug)]
pub enum CardMlp {
    /// A mixture.
    Experts(Experts),
    /// A dense network.
    Dense(Dense),
}

/// One layer. Addresses.
#[derive(Clone, Debug)]
pub struct CardLayer {
    /// [hidden] f32.
    pub attention_norm: u64,
    /// Queries, keys and values.
    pub qkv: Product,
    /// [query heads] f32.
    pub sinks: u64,
    /// The output projection.
    pub o: Product,
    /// [hidden] f32.
    pub mlp_norm: u64,
    /// What follows; `None` where the host computes it.
    pub mlp: Option<CardMlp>,
}

/// All weights of a card.
#[derive(Debug)]
pub struct CardWeights {
    /// Holds what the addresses lead to.
    _memory: Memory,
    /// The layers.
    pub layers: Vec<CardLayer>,
    /// [hidden] f32.
    pub final_norm: u64,
    /// The output matrix.
    pub lm_head: Product,
    /// The address of the embedding, [vocabulary, hidden] bf16, where it lies on the card.
    pub embedding: Option<u64>,
}

/// Where the parts of a matrix lie, counted from the start of the allocation.
#[derive(Clone, Copy, Debug)]
struct Placed {
    form: Form,
    codes: u64,
    scales: Option<u64>,
    nested: Option<u64>,
    bias: Option<u64>,
    offset: f32,
    rows: u32,
    columns: u32,
    bytes: u64,
}

/// The layout while it is made.
#[derive(Debug, Default)]
pub struct Layout {
    parts: Vec<(u64, Source)>,
    bytes: u64,
    descriptors: Vec<(Placed, u32)>,
    maps: Vec<(Box<[f32; 256]>, u64)>,
}

/// A model's layout: everything but the addresses.
#[derive(Debug)]
pub struct Planned {
    layout: Layout,
    layers: Vec<CardLayer>,
    final_norm: u64,
    lm_head: Product,
    embedding: Option<u64>,
    descriptors_at: u64,
}

/// Which parts of a model lie on the card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// For each layer of the card, whether the host computes what follows its attention.
    pub host_mlps: Vec<bool>,
    /// Whether an embedding of its own lies on the card.
    pub is_embedding_on_card: bool,
}

impl Planned {
    /// Lays a model's weights out.
    ///
    /// # Errors
    /// `Unusable` for shapes or mixtures of forms that the kernels have no code for.
    pub fn new(config: &Config, weights: &Weights, places: &Places) -> Result<Planned, DeviceError> {
        let mut layout = Layout::default();
        let layer = |(layer, on_host): (&LayerWeights, &bool)| layout.layer(config, layer, *on_host);
        let layers = weights.layers.iter().zip(&places.host_mlps).map(layer).collect::<Result<_, _>>()?;
        let final_norm = layout.floats(&weights.final_norm);
        let lm_head = layout.side_by_side(&[(&weights.lm_head, None)], "the output matrix")?;
        let embedding = match weights.is_tied() {
            // One table serves both where it is as steps gather from it.
            true => layout.descriptors.last().filter(|(head, _)| head.form == Form::Bf16).map(|(head, _)| head.codes),
            false => places.is_embedding_on_card.then(|| layout.bf16(&weights.embedding)),
        };
        let descriptors_at = layout.take(layout.descriptors.len() * DESCRIPTOR_BYTES);
        Ok(Planned { layout, layers, final_norm, lm_head, embedding, descriptors_at })
    }

    /// Gives the forms of all products.
    #[must_use]
    pub fn forms(&self) -> Vec<Form> {
        let mut forms: Vec<Form> = Vec::new();
        for (placed, _) in &self.layout.descriptors {
            if !forms.contains(&placed.form) {
                forms.push(placed.form);
            }
        }
        forms
    }

    /// Takes the allocation and brings the weights there. `progress` is told how many bytes are there.
    ///
    /// # Errors
    /// `OutOfMemory` and the driver's.
    pub fn bring(mut self, card: &Card, progress: &mut dyn FnMut(u64, u64)) -> Result<CardWeights, DeviceError> {
        let memory = Memory::take(card, self.layout.bytes, "weights")?;
        let base = memory.at(0);
        let descriptors = self.layout.descriptors.iter().flat_map(|(placed, output)| placed.descriptor(base, *output));
        let descriptors: Vec<u8> = descriptors.collect();
        self.layout.parts.push((self.descriptors_at, Source::Owned(descriptors)));
        upload(card, &memory, &self.layout.parts, progress)?;
        let matrices = base + self.descriptors_at;
        self.layers.iter_mut().for_each(|layer| layer.rebase(base, matrices));
        self.lm_head.rebase(base, matrices);
        Ok(CardWeights {
            _memory: memory,
            layers: self.layers,
            final_norm: base + self.final_norm,
            lm_head: self.lm_head,
            embedding: self.embedding.map(|at| base + at),
        })
    }
}

impl CardLayer {
    fn rebase(&mut self, base: u64, matrices: u64) {
        for place in [&mut self.attention_norm, &mut self.sinks, &mut self.mlp_norm] {
            *place += base;
        }
        self.qkv.rebase(base, matrices);
        self.o.rebase(base, matrices);
        match &mut self.mlp {
            Some(CardMlp::Experts(experts)) => {
                experts.router += base;
                experts.router_bias += base;
                experts.gate_up.rebase(base, matrices);
                experts.down.rebase(base, matrices);
            }
            Some(CardMlp::Dense(dense)) => {
                dense.gate_up.rebase(base, matrices);
                dense.down.rebase(base, matrices);
            }
            None => {}
        }
    }
}

impl Product {
    /// Turns places into addresses.
    fn rebase(&mut self, base: u64, matrices: u64) {
        self.scale_values += base;
        // Until now the index of the first descriptor.
        self.matrices = matrices + self.matrices * DESCRIPTOR_BYTES as u64;
    }
}

impl Placed {
    fn descriptor(&self, base: u64, output: u32) -> [u8; DESCRIPTOR_BYTES] {
        let address = |place: Option<u64>| place.map_or(0, |place| base + place);
        let addresses = [Some(self.codes), self.scales, self.nested, self.bias].map(address);
        let mut bytes = [0; DESCRIPTOR_BYTES];
        for (to, address) in bytes.chunks_exact_mut(8).zip(addresses) {
            to.copy_from_slice(&address.to_le_bytes());
        }
        let rest = [self.offset.to_bits(), self.rows, output, 0];
        for (to, number) in bytes[32..].chunks_exact_mut(4).zip(rest) {
            to.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }
}

impl Layout {
    /// Gives the place of the next part.
    fn take(&mut self, bytes: usize) -> u64 {
        let at = self.bytes;
        self.bytes = (at + bytes as u64).next_multiple_of(ALIGNMENT);
        at
    }

    fn part(&mut self, source: Source) -> u64 {
        let at = self.take(source.card_bytes());
        self.parts.push((at, source));
        at
    }

    fn floats(&mut self, values: &[f32]) -> u64 {
        self.part(Source::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect()))
    }

    /// Places a matrix as 16-bit floats by rows.
    fn bf16(&mut self, matrix: &Matrix) -> u64 {
        match matrix {
            Matrix::Dense(dense) if dense.float_type() == FloatType::Bf16 && dense.col_stride() == 1 => {
                self.part(Source::Region(dense.region().clone()))
            }
            Matrix::Dense(_) | Matrix::Nf4(_) | Matrix::Mxfp4(_) => self.part(Source::Converted(matrix.clone())),
        }
    }

    fn layer(&mut self, config: &Config, layer: &LayerWeights, on_host: bool) -> Result<CardLayer, DeviceError> {
        let attention = &layer.attention;
        let linear = |linear: &'_ Linear| (linear.weight.clone(), linear.bias.clone());
        let qkv = [&attention.q, &attention.k, &attention.v].map(linear);
        let qkv: Vec<_> = qkv.iter().map(|(weight, bias)| (weight, bias.as_deref())).collect();
        let mlp = match &layer.mlp {
            _ if on_host => None,
            MlpWeights::Experts(mixture) => Some(CardMlp::Experts(self.experts(config, mixture)?)),
            MlpWeights::Dense(dense) => Some(CardMlp::Dense(self.dense(dense)?)),
        };
        let sinks: Vec<f32> = attention.sinks.iter().map(|sink| sink.max(NO_SINK)).collect();
        Ok(CardLayer {
            attention_norm: self.floats(&layer.attention_norm),
            qkv: self.side_by_side(&qkv, "the projections of attention")?,
            sinks: self.floats(&sinks),
            o: self.side_by_side(&[(&attention.o.weight, attention.o.bias.as_deref())], "the output of attention")?,
            mlp_norm: self.floats(&layer.mlp_norm),
            mlp,
        })
    }

    fn dense(&mut self, dense: &DenseWeights) -> Result<Dense, DeviceError> {
        let linear = |linear: &'_ Linear| (linear.weight.clone(), linear.bias.clone());
        let gate_up = [&dense.gate, &dense.up].map(linear);
        let gate_up: Vec<_> = gate_up.iter().map(|(weight, bias)| (weight, bias.as_deref())).collect();
        Ok(Dense {
            gate_up: self.side_by_side(&gate_up, "gate and up of a layer")?,
            down: self
                .side_by_side(&[(&dense.down.weight, dense.down.bias.as_deref())], "the last matrix of a layer")?,
        })
    }

    fn experts(&mut self, config: &Config, mixture: &MixtureWeights) -> Result<Experts, DeviceError> {
        let number = |value: usize| u32::try_from(value).expect("dimensions are bounded");
        let experts = config.experts().expect("weights have the shape of their config");
        let router = self.bf16(&mixture.router.weight);
        let bias = mixture.router.bias.clone().unwrap_or_else(|| vec![0.0; experts.count]);
        let router_bias = self.floats(&bias);
        let gate_up: Vec<_> = mixture.experts.iter().map(|expert| &expert.gate_up).collect();
        let down: Vec<_> = mixture.experts.iter().map(|expert| &expert.down).collect();
        Ok(Experts {
            router,
            router_bias,
            count: number(experts.count),
            used: number(experts.per_token),
            hidden: number(config.hidden_size),
            alpha: experts.swiglu_alpha,
            limit: experts.swiglu_limit,
            gate_up: self.alternatives(&gate_up)?,
            down: self.alternatives(&down)?,
            router_bytes: (mixture.router.weight.rows() * mixture.router.weight.cols() * 2 + bias.len() * 4) as u64,
        })
    }

    /// Places matrices whose results stand side by side.
    fn side_by_side(&mut self, matrices: &[(&Matrix, Option<&[f32]>)], what: &str) -> Result<Product, DeviceError> {
        let first = self.descriptors.len();
        let mut output = 0;
        for (matrix, bias) in matrices {
            let placed = self.matrix(matrix, *bias)?;
            self.descriptors.push((placed, output));
            output += placed.rows;
        }
        self.product(first, output, matrices.iter().map(|(matrix, _)| *matrix), what)
    }

    /// Places matrices of which each token picks some.
    fn alternatives(&mut self, linears: &[&Linear]) -> Result<Product, DeviceError> {
        let first = self.descriptors.len();
        for linear in linears {
            let placed = self.matrix(&linear.weight, linear.bias.as_deref())?;
            self.descriptors.push((placed, 0));
        }
        let rows = linears.first().map_or(0, |linear| linear.weight.rows() as u32);
        self.product(first, rows, linears.iter().map(|linear| &linear.weight), "the experts of a layer")
    }

    fn product<'m>(
        &mut self,
        first: usize,
        rows: u32,
        matrices: impl Iterator<Item = &'m Matrix>,
        what: &str,
    ) -> Result<Product, DeviceError> {
        let placed: Vec<Placed> = self.descriptors[first..].iter().map(|(placed, _)| *placed).collect();
        let (form, columns) = (placed[0].form, placed[0].columns);
        if placed.iter().any(|other| other.form != form || other.columns != columns) {
            return Err(DeviceError::Unusable(format!("{what} are stored in different forms: a card needs one")));
        }
        let mut scale_values = None;
        for map in matrices.filter(|_| form == Form::Nf4Nested).filter_map(nested_map) {
            let at = self.map(map);
            if *scale_values.get_or_insert(at) != at {
                return Err(DeviceError::Unusable(format!("{what} have different maps of nested scales")));
            }
        }
        Ok(Product {
            form,
            matrices: first as u64,
            count: placed.len() as u32,
            columns,
            rows,
            each: placed.iter().map(|placed| placed.rows).collect(),
            scale_values: scale_values.unwrap_or(0),
            bytes: placed.iter().map(|placed| placed.bytes).sum(),
        })
    }

    /// Places a map of nested scales, each once.
    fn map(&mut self, map: &[f32; 256]) -> u64 {
        let bits = |values: &[f32; 256]| values.map(f32::to_bits);
        if let Some((_, at)) = self.maps.iter().find(|(known, _)| bits(known) == bits(map)) {
            return *at;
        }
        let at = self.floats(map);
        self.maps.push((Box::new(*map), at));
        at
    }

    fn matrix(&mut self, matrix: &Matrix, bias: Option<&[f32]>) -> Result<Placed, DeviceError> {
        let (rows, columns) = (matrix.rows(), matrix.cols());
        if !columns.is_multiple_of(COLUMNS_STEP) {
            let reason = format!("a matrix of {columns} columns: a card needs a multiple of {COLUMNS_STEP}");
            return Err(DeviceError::Unusable(reason));
        }
        let form = Form::of(matrix);
        let (mut nested_at, mut offset) = (None, 0.0);
        let (codes, scales) = match matrix {
            Matrix::Mxfp4(mxfp4) => {
                let codes = self.part(Source::Region(mxfp4.blocks().clone()));
                (codes, Some(self.part(Source::Region(mxfp4.scales().clone()))))
            }
            Matrix::Nf4(nf4) if form != Form::Bf16 => {
                let codes = self.part(Source::Region(nf4.packed().clone()));
                let scales = match nf4.scales() {
                    Scales::Plain(scales) => self.part(Source::Region(scales.clone())),
                    Scales::Nested(nested) => {
                        nested_at = Some(self.floats(&nested.absmax));
                        offset = nested.offset;
                        self.part(Source::Region(nested.codes.clone()))
                    }
                };
                (codes, Some(scales))
            }
            Matrix::Nf4(_) | Matrix::Dense(_) => (self.bf16(matrix), None),
        };
        let bias_bytes = bias.map_or(0, size_of_val);
        let stored = if form == Form::Bf16 { rows * columns * size_of::<bf16>() } else { matrix.stored_bytes() };
        let (rows, columns) = (rows as u32, columns as u32);
        let bias = bias.map(|bias| self.floats(bias));
        let bytes = (stored + bias_bytes) as u64;
        Ok(Placed { form, codes, scales, nested: nested_at, bias, offset, rows, columns, bytes })
    }
}

fn nested_map(matrix: &Matrix) -> Option<&[f32; 256]> {
    match matrix {
        Matrix::Nf4(nf4) => match nf4.scales() {
            Scales::Nested(nested) => Some(&nested.map),
            Scales::Plain(_) => None,
        },
        Matrix::Dense(_) | Matrix::Mxfp4(_) => None,
    }
}
