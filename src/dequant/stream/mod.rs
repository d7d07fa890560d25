//! Streams the layers of a pack through GPU memory, and prefetches them.
//!
//! If all layers fit the budget, each is loaded once and stays. If not, a ring of slots holds the
//! layer in use and the next layers: while the device works on one layer, the next is read from the
//! file. The device has one queue, so a slot is overwritten only after the submitted work on its
//! old layer. Later work is refused: the buffers of a layer are [leased](Lease), and the lease ends
//! when the slot is given to another layer.

mod error;
mod globals;
mod group;
mod loader;
mod plan;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use crate::format::{FloatType, Index, Role, SectionKind, Shape};
use crate::gpu::{Buffer, BufferRange, Gpu, GpuError, Lease};

use super::codec::Codec;
use super::weights::GpuWeights;
pub use crate::source::PackSource;
pub use error::StreamError;
use globals::PARTS;
pub use globals::{Globals, HeadParts};
use group::Group;
use loader::{GroupId, Loader, Reply, Request};
pub use plan::StreamPlan;

/// Maximum threads that fill staging memory, if the caller sets no number. More threads were not
/// faster on any measured machine.
const MAX_THREADS: usize = 8;

/// Options of a layer stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// Maximum GPU bytes for layers, globals and staging. `None`: [`default_budget`].
    pub budget: Option<u64>,
    /// The global tensors (embedding, final norm, lm_head) to load.
    pub globals: Globals,
    /// Check the CRC-32 of every payload in every load. By default, only the first load of a layer
    /// checks them; [`PackSource::unverified`] skips that, too.
    pub verify: bool,
    /// Threads that fill staging memory. 0: one per core, at most eight.
    pub threads: usize,
}

/// The order of layer requests. It determines which layers are prefetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// 0, 1, 2, ..
    Forward,
    /// .., 2, 1, 0
    Backward,
}

/// The tensors of a layer, or the global tensors, in GPU memory.
#[derive(Debug, Clone)]
pub struct StreamedLayer {
    /// The layer number. `None` for the global tensors.
    pub number: Option<u32>,
    /// Quantised tensors, in file order.
    pub quantized_tensors: Vec<StreamedQuantizedTensor>,
    /// Raw tensors (norms, biases, routers, embeddings), in file order.
    pub raw_tensors: Vec<StreamedTensor>,
}

/// A quantised tensor in GPU memory.
#[derive(Debug, Clone)]
pub struct StreamedQuantizedTensor {
    /// Name of the tensor in the checkpoint.
    pub name: String,
    /// Role of the tensor.
    pub role: Role,
    /// Its expert, if each expert has its own tensor.
    pub expert: Option<u32>,
    /// Shape in the checkpoint: [out, in], or [experts, ..] for stacked experts.
    pub shape: Shape,
    /// Codes and scales, ready for binding.
    pub weights: GpuWeights,
}

/// An unquantised tensor in GPU memory, in its float type.
#[derive(Debug, Clone)]
pub struct StreamedTensor {
    /// Name of the tensor in the checkpoint.
    pub name: String,
    /// Role of the tensor.
    pub role: Role,
    /// Its expert, if any.
    pub expert: Option<u32>,
    /// Shape in the checkpoint.
    pub shape: Shape,
    /// Element type.
    pub float_type: FloatType,
    /// Little-endian elements, row-major. In several parts if they exceed the largest buffer of the
    /// device. All parts except the last have the same size.
    pub parts: Vec<BufferRange>,
}

impl StreamedLayer {
    /// The quantised tensor with this role. With experts, the first one.
    pub fn quantized_tensor(&self, role: Role) -> Option<&StreamedQuantizedTensor> {
        self.quantized_tensors.iter().find(|p| p.role == role)
    }

    /// Whether the layer has a tensor with this role, quantised or raw.
    pub fn has(&self, role: Role) -> bool {
        self.quantized_tensor(role).is_some() || self.raw_tensor(role).is_some()
    }

    /// The raw tensor with this role.
    pub fn raw_tensor(&self, role: Role) -> Option<&StreamedTensor> {
        self.raw_tensors.iter().find(|t| t.role == role)
    }
}

/// Memory for one layer.
#[derive(Debug)]
struct Slot {
    buffers: Vec<Buffer>,
    content: Content,
    /// The lease of the present content.
    lease: Lease,
}

impl Slot {
    fn new(gpu: &Gpu, label: &str, sizes: impl Iterator<Item = u64>) -> Result<Self, GpuError> {
        let buffers = sizes.map(|size| gpu.storage(label, size)).collect::<Result<_, _>>()?;
        Ok(Self { buffers, content: Content::Nothing, lease: Lease::default() })
    }

    /// Gives the slot to another layer. From here on, work with the old layer is refused.
    fn give_to(&mut self, group: GroupId, ticket: u64) -> Request {
        std::mem::take(&mut self.lease).end();
        self.content = Content::Pending(group.number(), ticket);
        Request { group, ticket, buffers: self.buffers.clone() }
    }

    /// The buffers under the present lease.
    fn leased(&self) -> Vec<Buffer> {
        self.buffers.iter().map(|buffer| buffer.leased(&self.lease)).collect()
    }
}

/// What the slots of a ring hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ring {
    Layers,
    /// Parts of the output projection.
    Head,
}

impl Ring {
    fn group(self, number: u32) -> GroupId {
        match self {
            Self::Layers => GroupId::Layer(number),
            Self::Head => GroupId::HeadPart(number),
        }
    }
}

impl GroupId {
    /// The number of the layer or part. `None` for the global tensors.
    fn number(self) -> Option<u32> {
        match self {
            Self::Globals => None,
            Self::Layer(number) | Self::HeadPart(number) => Some(number),
        }
    }
}

#[derive(Debug)]
enum Content {
    Nothing,
    /// The requested layer (`None`: the global tensors), and the ticket of the request.
    Pending(Option<u32>, u64),
    Ready(StreamedLayer),
    /// The layer that could not be loaded, and the error.
    Failed(Option<u32>, StreamError),
}

impl Content {
    /// The layer that this slot holds, waits for or failed to load.
    fn layer(&self) -> Option<u32> {
        match self {
            Self::Nothing => None,
            Self::Pending(number, _) | Self::Failed(number, _) => *number,
            Self::Ready(layer) => layer.number,
        }
    }

    /// Takes the error. The slot is then empty.
    fn take_error(&mut self) -> Option<StreamError> {
        let failed = matches!(self, Self::Failed(..));
        match failed.then(|| std::mem::replace(self, Self::Nothing)) {
            Some(Self::Failed(_, error)) => Some(error),
            _ => None,
        }
    }
}

/// An open pack with layers that are streamed through GPU memory.
///
/// ```no_run
/// use nf4pack::dequant::stream::{Direction, LayerStream, StreamOptions};
/// use nf4pack::gpu::{Gpu, Options};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let gpu = Gpu::open(&Options::from_env())?;
/// let mut stream = LayerStream::open(&gpu, "model.nf4pack", &StreamOptions::default())?;
/// for number in 0..stream.layer_count() {
///     let layer = stream.layer(number, Direction::Forward)?;
///     println!("{} quantised tensors", layer.quantized_tensors.len());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct LayerStream {
    gpu: Gpu,
    source: Arc<PackSource>,
    plan: Arc<StreamPlan>,
    slots: Vec<Slot>,
    globals: Option<Slot>,
    /// Parts of the output projection.
    head: Vec<Slot>,
    loader: Loader,
    /// Number of requests so far.
    tickets: u64,
}

impl LayerStream {
    /// Opens a pack for reading, allocates the memory of its plan and starts to load: all layers if
    /// they fit, else the first ones.
    ///
    /// # Errors
    /// [`StreamError::Read`], [`StreamError::Budget`], [`StreamError::Gpu`].
    pub fn open(gpu: &Gpu, path: impl AsRef<Path>, options: &StreamOptions) -> Result<Self, StreamError> {
        Self::of(gpu, PackSource::open(path)?, options)
    }

    /// As [`LayerStream::open`], for a source that is already open.
    ///
    /// # Errors
    /// [`StreamError::Budget`], [`StreamError::Gpu`].
    pub fn of(gpu: &Gpu, source: PackSource, options: &StreamOptions) -> Result<Self, StreamError> {
        let source = Arc::new(source);
        let max_buffer = gpu.limits().max_buffer_size;
        let mut budget = options.budget.or_else(|| default_budget(gpu));
        loop {
            let plan = StreamPlan::new(source.index(), max_buffer, budget, options.globals)?;
            let smaller = (plan.needed_bytes / 2).max(plan.minimum_bytes);
            match Self::start(gpu, source.clone(), plan, options) {
                // Without a budget, the plan was a guess. If it does not fit, try half of it.
                Err(StreamError::Gpu(GpuError::OutOfMemory { .. }))
                    if options.budget.is_none() && budget.is_none_or(|tried| smaller < tried) =>
                {
                    budget = Some(smaller);
                    // The submitted work of the failed attempt still holds its memory.
                    gpu.wait()?;
                }
                result => return result,
            }
        }
    }

    /// Allocates the memory of a plan. The loader fills each slot while the next one is allocated.
    fn start(gpu: &Gpu, source: Arc<PackSource>, plan: StreamPlan, options: &StreamOptions) -> Result<Self, StreamError> {
        let plan = Arc::new(plan);
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS),
            threads => threads,
        };
        let loader = Loader::start(gpu, source.clone(), plan.clone(), threads, options.verify)?;
        let (slots, head) = (Vec::new(), Vec::new());
        let mut stream = Self { gpu: gpu.clone(), source, plan, slots, globals: None, head, loader, tickets: 0 };
        if let Some(group) = &stream.plan.globals {
            let sizes = (0..group.buffers.len()).map(|i| group.buffer_len(i));
            stream.globals = Some(Slot::new(gpu, "global tensors", sizes)?);
            stream.request_globals()?;
        }
        for number in 0..stream.plan.slots {
            let sizes = stream.plan.slot_buffers(number as usize);
            stream.slots.push(Slot::new(gpu, "layer", sizes.into_iter())?);
            stream.request(Ring::Layers, number, number as usize)?;
        }
        if let Some(bytes) = stream.plan.head.as_ref().map(HeadParts::slot_bytes) {
            let slot = |_| Slot::new(gpu, "part of the output projection", [bytes].into_iter());
            stream.head = (0..PARTS).map(slot).collect::<Result<_, _>>()?;
        }
        Ok(stream)
    }

    /// The memory plan.
    pub fn plan(&self) -> &StreamPlan {
        &self.plan
    }

    /// The pack.
    #[cfg(feature = "train")]
    pub(crate) fn source(&self) -> &Arc<PackSource> {
        &self.source
    }

    /// The pack's index.
    pub fn index(&self) -> &Index {
        self.source.index()
    }

    /// Layers of the pack.
    pub fn layer_count(&self) -> u32 {
        self.plan.layers
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Waits for layer `number` and returns it. Prefetches the next layers in `direction`.
    ///
    /// Submit work with the buffers of a layer before you request the next layer. After that
    /// request, the slot may be given to another layer, and
    /// [`Commands::submit`](crate::gpu::Commands::submit) refuses such work with
    /// [`GpuError::Overwritten`]. A clone of the layer does not change this. If all layers are
    /// resident, this never happens.
    ///
    /// # Errors
    /// [`StreamError::OutOfRange`]; any error of the loader. The next call tries again.
    pub fn layer(&mut self, number: u32, direction: Direction) -> Result<&StreamedLayer, StreamError> {
        let count = self.plan.layers;
        if number >= count {
            return Err(StreamError::OutOfRange { layer: number, count });
        }
        let wanted = wanted(number, direction, count, self.plan.slots);
        self.load(Ring::Layers, number, &wanted)
    }

    /// Waits for part `number` of the output projection ([`StreamPlan::head`]) and returns it: some
    /// rows of the tensor, with its role. Prefetches the next part. As for [`LayerStream::layer`],
    /// submit work with a part before you request another one.
    ///
    /// # Errors
    /// As [`LayerStream::layer`].
    pub fn head_part(&mut self, number: u32) -> Result<&StreamedLayer, StreamError> {
        let count = self.plan.head.as_ref().map_or(0, HeadParts::count);
        if number >= count {
            return Err(StreamError::OutOfRange { layer: number, count });
        }
        // The first part follows the last one: a pass for the loss, and one for its gradient.
        self.load(Ring::Head, number, &[number, (number + 1) % count])
    }

    /// Waits for layer or part `number`, and requests those in `wanted`.
    fn load(&mut self, ring: Ring, number: u32, wanted: &[u32]) -> Result<&StreamedLayer, StreamError> {
        for &layer in wanted {
            self.make_room(ring, layer, wanted)?;
        }
        let slot = self.wait_for(ring, number)?;
        match self.ring(ring).get(slot).map(|s| &s.content) {
            Some(Content::Ready(layer)) => Ok(layer),
            _ => Err(StreamError::Loader(format!("{:?} has no slot", ring.group(number)))),
        }
    }

    fn ring(&mut self, ring: Ring) -> &mut Vec<Slot> {
        match ring {
            Ring::Layers => &mut self.slots,
            Ring::Head => &mut self.head,
        }
    }

    /// The global tensors in GPU memory. `None` if [`StreamOptions::globals`] requests none.
    ///
    /// # Errors
    /// Any error of the loader. The next call tries again.
    pub fn globals(&mut self) -> Result<Option<&StreamedLayer>, StreamError> {
        let is = |stream: &Self, wanted: fn(&Content) -> bool| stream.globals.as_ref().is_some_and(|s| wanted(&s.content));
        if is(self, |content| matches!(content, Content::Nothing)) {
            self.request_globals()?;
        }
        while is(self, |content| matches!(content, Content::Pending(..))) {
            self.take_reply()?;
        }
        let Some(slot) = &mut self.globals else { return Ok(None) };
        if let Some(error) = slot.content.take_error() {
            return Err(error);
        }
        match &slot.content {
            Content::Ready(layer) => Ok(Some(layer)),
            _ => Ok(None),
        }
    }

    /// Waits until all requested layers are in GPU memory. If all layers are resident, these are
    /// all layers.
    ///
    /// # Errors
    /// The first error.
    pub fn wait_loaded(&mut self) -> Result<(), StreamError> {
        self.globals()?;
        let pending: Vec<u32> = self.slots.iter().filter_map(|slot| slot.content.layer()).collect();
        for number in pending {
            self.wait_for(Ring::Layers, number)?;
        }
        Ok(self.gpu.wait()?)
    }

    /// Requests `layer`, unless a slot has it or waits for it. It replaces a layer that is not in
    /// `wanted`.
    fn make_room(&mut self, ring: Ring, layer: u32, wanted: &[u32]) -> Result<(), StreamError> {
        if self.slot_of(ring, layer).is_some() {
            return Ok(());
        }
        let free = |slot: &Slot| slot.content.layer().is_none_or(|held| !wanted.contains(&held));
        match self.ring(ring).iter().position(free) {
            Some(slot) => self.request(ring, layer, slot),
            None => Ok(()),
        }
    }

    /// The slot that has layer or part `number` or waits for it.
    fn slot_of(&mut self, ring: Ring, number: u32) -> Option<usize> {
        self.ring(ring).iter().position(|slot| slot.content.layer() == Some(number))
    }

    fn request(&mut self, ring: Ring, layer: u32, slot: usize) -> Result<(), StreamError> {
        self.tickets += 1;
        let ticket = self.tickets;
        let Some(slot) = self.ring(ring).get_mut(slot) else { return Ok(()) };
        let request = slot.give_to(ring.group(layer), ticket);
        self.loader.request(request)
    }

    fn request_globals(&mut self) -> Result<(), StreamError> {
        let Some(slot) = &mut self.globals else { return Ok(()) };
        self.tickets += 1;
        self.loader.request(slot.give_to(GroupId::Globals, self.tickets))
    }

    /// Takes replies until layer or part `number` is loaded. Returns its slot.
    fn wait_for(&mut self, ring: Ring, number: u32) -> Result<usize, StreamError> {
        loop {
            let Some(at) = self.slot_of(ring, number) else {
                return Err(StreamError::Loader(format!("{:?} was not requested", ring.group(number))));
            };
            let content = &mut self.ring(ring)[at].content;
            match content {
                Content::Ready(_) => return Ok(at),
                Content::Pending(..) => self.take_reply()?,
                Content::Failed(..) | Content::Nothing => {
                    let lost = || StreamError::Loader(format!("{:?} is lost", ring.group(number)));
                    return Err(content.take_error().unwrap_or_else(lost));
                }
            }
        }
    }

    /// Takes one reply. Drops it if its slot was given to another layer.
    fn take_reply(&mut self) -> Result<(), StreamError> {
        let Reply { group, ticket, result } = self.loader.reply()?;
        let pending = |slot: &&mut Slot| matches!(slot.content, Content::Pending(_, held) if held == ticket);
        let slots = self.slots.iter_mut().chain(&mut self.globals).chain(&mut self.head);
        let Some(slot) = { slots }.find(pending) else { return Ok(()) };
        if let Err(error) = result {
            slot.content = Content::Failed(group.number(), error);
            return Ok(());
        }
        let (plan, index, buffers) = (&self.plan, self.source.index(), slot.leased());
        let layer = match group {
            GroupId::Layer(number) => plan.groups.get(number as usize).map(|g| streamed(index, g, Some(number), &buffers)),
            GroupId::Globals => plan.globals.as_ref().map(|g| streamed(index, g, None, &buffers)),
            GroupId::HeadPart(number) => plan.head.as_ref().map(|head| head_part(index, head, number, &buffers)),
        };
        if let Some(layer) = layer {
            slot.content = Content::Ready(layer);
        }
        Ok(())
    }
}

/// The layers that should be in GPU memory: one per slot, from `number` on.
fn wanted(number: u32, direction: Direction, count: u32, slots: u32) -> Vec<u32> {
    let slots = slots.max(1);
    match direction {
        Direction::Forward => (number..count.min(number.saturating_add(slots))).collect(),
        Direction::Backward => (number.saturating_sub(slots - 1)..=number).rev().collect(),
    }
}

/// The budget of a stream if the caller sets none: the available memory of the device (or its total
/// memory, if the driver does not report what is available), minus a tenth for other needs of the
/// caller. `None` if the driver reports neither.
pub fn default_budget(gpu: &Gpu) -> Option<u64> {
    gpu.memory().map(|memory| memory.available.unwrap_or(memory.total) / 10 * 9)
}

/// The tensors of a group in `buffers`.
fn streamed(index: &Index, group: &Group, number: Option<u32>, buffers: &[Buffer]) -> StreamedLayer {
    let mut layer = StreamedLayer { number, quantized_tensors: Vec::new(), raw_tensors: Vec::new() };
    for &section_number in &group.sections {
        let Some(section) = index.sections().get(section_number) else { continue };
        let name = || index.name(section).to_owned();
        let (role, expert, shape) = (section.role, section.expert, section.shape);
        match section.kind {
            Some(SectionKind::Raw) => {
                if let Some(float_type) = section.element_type.float_type() {
                    let parts = group.place(section, buffers);
                    layer.raw_tensors.push(StreamedTensor { name: name(), role, expert, shape, float_type, parts });
                }
            }
            // Validation ensures that every codes section directly precedes its scales.
            Some(SectionKind::Codes) => {
                let scales = index.sections().get(section_number + 1);
                let scales = scales.and_then(|s| group.place(s, buffers).into_iter().next());
                if let (Some(scales), Some(codec)) = (scales, Codec::of(section.element_type, section.scale_type)) {
                    let weights = GpuWeights {
                        codes: group.place(section, buffers),
                        scales,
                        codec,
                        block_size: section.block_size,
                        elements: shape.elements(),
                    };
                    layer.quantized_tensors.push(StreamedQuantizedTensor { name: name(), role, expert, shape, weights });
                }
            }
            _ => {}
        }
    }
    layer
}

/// Part `number` of the output projection, in the one buffer of a slot.
fn head_part(index: &Index, head: &HeadParts, number: u32, buffers: &[Buffer]) -> StreamedLayer {
    let group = head.group(number);
    let mut part = streamed(index, &group, Some(number), buffers);
    for tensor in &mut part.raw_tensors {
        let bytes = tensor.parts.iter().map(|part| part.size).sum();
        if let Some(shape) = Shape::new(&head.shape(bytes)) {
            tensor.shape = shape;
        }
    }
    part
}
