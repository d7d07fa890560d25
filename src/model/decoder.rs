//! A decoder on the GPU: the embedding, the streamed layers of a pack, the head and its loss.

use crate::arch::config::ModelConfig;
use crate::arch::obstacle::Obstacle;
use crate::data::Tokenizer;
use crate::data::files::TokenizerFiles;
use crate::data::pack::{Batch, IGNORE_INDEX};
use crate::dequant::stream::{Direction, Globals, LayerStream, PackSource, StreamOptions, StreamPlan, StreamedLayer};
use crate::format::files::{GENERATION_CONFIG, template_name};
use crate::format::{Role, SectionKind};
use crate::gpu::{BufferRange, Commands, Gpu};
use crate::lora::gpu::GpuAdapter;
use crate::model::constants::Constants;
use crate::model::error::{ModelError, NonFiniteAt};
use crate::model::host_embedding::HostEmbedding;
use crate::model::kv_cache::{Past, attention_heads};
use crate::model::layer::Layer;
use crate::model::pass::{Angles, GpuBatch, Kernels, OwnAngles, Pass, PassInputs, positions};
use crate::model::residual::Residual;
use crate::model::weights::{elements, weight};
use crate::model::workspace::{Backward, Memory, Workspace, product_shapes};
use crate::ops::matmul::{Largest, Weight, Wide};
use crate::ops::{FiniteCheck, Mat, OpError};

/// Adds commands that read the residual stream before a layer, or after the last.
type Observe<'a> = &'a dyn Fn(&mut Commands, &Residual<Mat>, u32) -> Result<(), ModelError>;

impl ModelConfig {
    /// Reads a pack's own config.json, which must describe exactly the layers that the pack has.
    ///
    /// # Errors
    /// [`ModelError::Stream`], [`ModelError::MissingFile`], [`ModelError::Config`],
    /// [`ModelError::Obstacle`].
    pub fn of_pack(pack: &PackSource) -> Result<Self, ModelError> {
        let config = pack.file("config.json")?.ok_or(ModelError::MissingFile { name: "config.json" })?;
        Obstacle::check_layer_count(&config, pack.index().header().layer_count)?;
        Ok(Self::parse(&config, pack.file(GENERATION_CONFIG)?.as_deref())?)
    }
}

impl Tokenizer {
    /// Reads a pack's own tokenizer. `now` is the date that chat templates print, in seconds since
    /// 1970.
    ///
    /// # Errors
    /// [`ModelError::Stream`], [`ModelError::MissingFile`], [`ModelError::Data`].
    pub fn of_pack(pack: &PackSource, model: &ModelConfig, now: i64) -> Result<Self, ModelError> {
        let index = pack.index();
        let files = index.sections().iter().filter(|section| section.kind == Some(SectionKind::File));
        let names = files.map(|section| index.name(section)).filter(|name| is_of_tokenizer(name));
        let read = |name: &str| Ok::<_, ModelError>((name.to_owned(), pack.file(name)?.unwrap_or_default()));
        let files: Vec<(String, Vec<u8>)> = names.map(read).collect::<Result<_, _>>()?;
        let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        tokenizer_of(&files, model, now)
    }
}

/// The tokenizer of these files, which have their names in a pack; others may be among them.
///
/// # Errors
/// [`ModelError::MissingFile`], [`ModelError::Data`].
pub(crate) fn tokenizer_of(files: &[(&str, &[u8])], model: &ModelConfig, now: i64) -> Result<Tokenizer, ModelError> {
    let file = |name: &str| files.iter().find(|(found, _)| *found == name).map(|(_, bytes)| *bytes);
    let [tokenizer, config, special_tokens_map, added_tokens, chat_template, processor_template] = TOKENIZER_FILES.map(file);
    let additional: Vec<(&str, &[u8])> =
        files.iter().filter_map(|&(name, bytes)| Some((template_name(name)?, bytes))).collect();
    let files = TokenizerFiles {
        tokenizer: tokenizer.ok_or(ModelError::MissingFile { name: "tokenizer.json" })?,
        config,
        special_tokens_map,
        added_tokens,
        chat_template,
        additional_templates: &additional,
        processor_template,
    };
    Ok(Tokenizer::new(files, model, now)?)
}

/// The files of a tokenizer, besides additional chat templates.
const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

fn is_of_tokenizer(name: &str) -> bool {
    TOKENIZER_FILES.contains(&name) || template_name(name).is_some()
}

/// A model with layers in GPU memory, or streamed to it.
#[derive(Debug)]
pub struct Model {
    gpu: Gpu,
    config: ModelConfig,
    stream: LayerStream,
    globals: StreamedLayer,
    /// The embedding table, if it is not in GPU memory.
    embedding: Option<HostEmbedding>,
    final_norm: Mat,
    /// The largest magnitude of the output projection, for matrix units.
    head_largest: Largest,
    /// Of each layer.
    constants: Vec<Constants>,
    rotary: Angles,
    kernels: Kernels,
}

impl Model {
    /// Opens the model of a pack for samples of at most `max_length` tokens. With
    /// [`Globals::None`], all global tensors are loaded.
    ///
    /// # Errors
    /// Errors of the pack and of the device.
    pub fn new(gpu: &Gpu, pack: PackSource, max_length: u32, options: &StreamOptions) -> Result<Self, ModelError> {
        let config = ModelConfig::of_pack(&pack)?;
        config.check_runnable()?;
        let rotary = Angles::upload(gpu, &config, max_length.max(1))?;
        let kernels = Kernels::new(gpu, &config)?;
        let globals = if options.globals == Globals::None { Globals::All } else { options.globals };
        let options = StreamOptions { globals, ..options.clone() };
        let mut stream = LayerStream::of(gpu, pack, &options)?;
        let missing = ModelError::MissingTensor { layer: None, role: Role::Embedding };
        let globals = stream.globals()?.cloned().ok_or(missing)?;
        let final_norm = Mat::new(gpu, "final norm", 1, config.hidden)?;
        let mut commands = gpu.commands("final norm");
        kernels.gather.to_f32(&mut commands, elements(&globals, Role::FinalNorm, &[config.hidden.into()])?, &final_norm)?;
        kernels.scale.offset(&mut commands, config.family.norm.weight_offset as f32, &final_norm)?;
        let head_largest = Largest { range: BufferRange::whole(gpu.storage("largest magnitude", 16)?), at: 0 };
        // The parts of one outside of GPU memory are measured as they are used.
        if stream.plan().head().is_none() {
            commands.clear(&head_largest.range);
            kernels.matmul.measure(&mut commands, &head(&globals, &config, config.vocab)?, &head_largest)?;
        }
        commands.submit()?;
        let constants = Constants::reserve(gpu, &config)?;
        let on_host = stream.plan().embedding_on_host;
        let embedding = on_host.then(|| HostEmbedding::new(gpu, stream.source().clone(), &config)).transpose()?;
        let gpu = gpu.clone();
        Ok(Self { gpu, config, stream, globals, embedding, final_norm, head_largest, constants, rotary, kernels })
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Names of the products' kernels on matrix units that were used.
    #[cfg(test)]
    pub fn used_mixed_kernels(&self) -> Vec<String> {
        self.kernels.matmul.used_mixed_kernels()
    }

    /// The pack's config.json.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The plan of the layer stream.
    pub fn plan(&self) -> &StreamPlan {
        self.stream.plan()
    }

    /// Reserves the scratch memory of the products in passes of at most `tokens` tokens, with an
    /// adapter of `rank`.
    pub(super) fn reserve_products(&self, tokens: u32, rank: u32) -> Result<(), ModelError> {
        Ok(self.kernels.matmul.reserve(tokens, &product_shapes(&self.config, tokens), rank)?)
    }

    /// Reserves the scratch memory of attention: queries of at most `window` of `tokens` tokens.
    pub(super) fn reserve_attention(&self, window: u32, tokens: u32, training: bool) -> Result<(), ModelError> {
        Ok(self.kernels.attention.reserve([window, tokens], &attention_heads(&self.config, 0), training)?)
    }

    /// Checks tokens and labels against the vocabulary, and the lengths of samples against the
    /// rotary table.
    fn check(&self, batch: &Batch) -> Result<(), ModelError> {
        let vocab = self.config.vocab;
        let labels = batch.labels.iter().filter(|&&label| label != IGNORE_INDEX);
        if let Some(&id) = batch.tokens.iter().chain(labels).find(|&&id| id >= vocab) {
            return Err(crate::data::DataError::TokenId { line: None, id, token: String::new(), vocab }.into());
        }
        let length = |(token, &start): (usize, &u32)| (token as u32).saturating_sub(start) + 1;
        self.check_length(batch.starts.iter().enumerate().map(length).max().unwrap_or(0))
    }

    /// Checks the length of a sample against the rotary table.
    fn check_length(&self, length: u32) -> Result<(), ModelError> {
        let positions = self.rotary.positions();
        if length > positions {
            let (expected, what) = (positions.into(), "the tokens of a sample");
            return Err(OpError::Shape { operation: "a pass", what, expected, found: length.into() }.into());
        }
        Ok(())
    }

    /// The inputs of a pass over `batch`.
    pub(crate) fn begin<'a>(
        &self,
        memory: &Memory,
        batch: &Batch,
        adapter: Option<&'a GpuAdapter>,
    ) -> Result<PassInputs<'a>, ModelError> {
        self.begin_at(memory, batch, &positions(batch), adapter)
    }

    /// As [`Model::begin`], for a batch of one sample after the cached tokens of `past`, of a text
    /// of `length` tokens.
    pub(super) fn begin_after<'a>(
        &self,
        memory: &Memory,
        batch: &Batch,
        past: Past<'a>,
        length: u32,
        adapter: Option<&'a GpuAdapter>,
    ) -> Result<PassInputs<'a>, ModelError> {
        let (expected, found) = (memory.sizes().window.into(), batch.tokens.len() as u64);
        if found > expected {
            let what = "the number of new tokens";
            return Err(OpError::Shape { operation: "a pass over a cache", what, expected, found }.into());
        }
        let positions: Vec<_> = (past.tokens..).take(batch.tokens.len()).map(|position| (position, length)).collect();
        Ok(PassInputs { past: Some(past), ..self.begin_at(memory, batch, &positions, adapter)? })
    }

    /// As [`Model::begin_after`], for one token with its id in GPU memory. The caller knows that
    /// the vocabulary has it.
    pub(super) fn begin_token<'a>(
        &self,
        memory: &Memory,
        id: &BufferRange,
        past: Past<'a>,
        length: u32,
        adapter: Option<&'a GpuAdapter>,
    ) -> Result<PassInputs<'a>, ModelError> {
        self.check_length(past.tokens.saturating_add(1))?;
        let own_angles = OwnAngles::new(&self.gpu, &self.config, &[(past.tokens, length)])?;
        let (work, batch) = (memory.workspace(&self.config, 1)?, GpuBatch::of_token(id, own_angles));
        Ok(PassInputs { work, batch, adapter, mask: None, past: Some(past) })
    }

    fn begin_at<'a>(
        &self,
        memory: &Memory,
        batch: &Batch,
        positions: &[(u32, u32)],
        adapter: Option<&'a GpuAdapter>,
    ) -> Result<PassInputs<'a>, ModelError> {
        self.check(batch)?;
        let tokens = u32::try_from(batch.tokens.len()).unwrap_or(u32::MAX);
        let own_angles = OwnAngles::new(&self.gpu, &self.config, positions)?;
        let work = memory.workspace(&self.config, tokens)?;
        let batch = GpuBatch::new(&self.gpu, batch, own_angles)?;
        Ok(PassInputs { work, batch, adapter, mask: None, past: None })
    }

    /// Submits the embedding and all layers. The residual stream of each layer is then in the
    /// workspace, in a training step also those that are offloaded.
    pub(crate) fn forward(&mut self, inputs: &PassInputs<'_>) -> Result<(), ModelError> {
        // Every layer is submitted, and nothing follows them.
        self.record_forward(inputs, false, &|_, _, _| Ok(())).map(drop)
    }

    /// Records the embedding and all layers. Each layer is submitted alone, because a slot may then
    /// be given to another layer, unless all layers are resident and `together` is set. Returns the
    /// list of what is not submitted yet.
    ///
    /// `observe` adds commands that read each residual stream: before layer 0, 1, .. and after the
    /// last layer. It reads them at once, because without training the stream after the next one
    /// overwrites each.
    pub(super) fn record_forward(
        &mut self,
        inputs: &PassInputs<'_>,
        together: bool,
        observe: Observe<'_>,
    ) -> Result<Commands, ModelError> {
        let work = &inputs.work;
        let mut commands = self.gpu.commands("forward");
        self.embed(&mut commands, inputs)?;
        observe(&mut commands, work.before(0)?, 0)?;
        let Self { gpu, config, stream, constants, rotary, kernels, .. } = self;
        // Constants count as converted when their list is submitted.
        let together = together && stream.plan().resident && constants.iter().all(Constants::is_converted);
        let pass = Pass { kernels, model: config, rotary, inputs };
        for (number, constants) in (0..config.layers).zip(constants) {
            let streamed = stream.layer(number, Direction::Forward)?;
            constants.record(kernels, config, &mut commands, streamed)?;
            let layer = Layer::new(&pass, streamed, constants, Direction::Forward)?;
            let out = work.before(number + 1)?;
            layer.forward(&mut commands, work.before(number)?, out, &|commands| submit(gpu, commands))?;
            observe(&mut commands, out, number + 1)?;
            if let Some(host) = inputs.is_training().then(|| work.offloaded.get(number as usize)).flatten() {
                work.before(number)?.copy_to(&mut commands, host);
            }
            if !together {
                submit(gpu, &mut commands)?;
                constants.submitted();
            }
        }
        Ok(commands)
    }

    /// Runs a batch forward again, as [`Model::forward`] does, to find where the first non-finite
    /// number arises. `None` if all numbers are finite.
    pub(super) fn first_non_finite(&mut self, inputs: &PassInputs<'_>) -> Result<Option<NonFiniteAt>, ModelError> {
        let check = FiniteCheck::new(&self.gpu, self.config.layers + 1)?;
        let look = |commands: &mut Commands, x: &Residual<Mat>, number: u32| -> Result<(), ModelError> {
            Ok(check.record(commands, x.windows(), number)?)
        };
        self.record_forward(inputs, false, &look)?;
        let first = check.read()?.iter().position(Option::is_some);
        Ok(first.map(|at| match at {
            0 => NonFiniteAt::Embedding,
            layer => NonFiniteAt::Layer(layer as u32 - 1),
        }))
    }

    fn embed(&mut self, commands: &mut Commands, inputs: &PassInputs<'_>) -> Result<(), ModelError> {
        let (mut ids, mut tokens) = (inputs.batch.ids.clone(), inputs.batch.tokens.as_slice());
        for x in inputs.work.before(0)?.windows() {
            if let Some(host) = &mut self.embedding {
                let (of_window, others) = tokens.split_at(tokens.len().min(x.rows as usize));
                // It is submitted at once, and `commands` later.
                host.upload(of_window, x)?;
                tokens = others;
            } else {
                let table = weight(&self.globals, Role::Embedding, self.config.vocab, self.config.hidden)?;
                self.kernels.gather.embed(commands, &table, &ids, x)?;
            }
            self.kernels.scale.record(commands, self.config.embedding_multiplier as f32, x)?;
            ids = after(&ids, x.rows);
        }
        Ok(())
    }

    /// Submits the backward pass of all layers, the last layer first, after [`Model::forward`] and
    /// [`Model::loss`] with gradients.
    pub(crate) fn backward(&mut self, inputs: &PassInputs<'_>) -> Result<(), ModelError> {
        let Self { gpu, config, stream, constants, rotary, kernels, .. } = self;
        let pass = Pass { kernels, model: config, rotary, inputs };
        for (number, constants) in (0..config.layers).zip(constants).rev() {
            let streamed = stream.layer(number, Direction::Backward)?;
            let x = inputs.work.before(number)?;
            let mut commands = gpu.commands("layer backward");
            // The stream of the next layer arrives during this one, in the place of a later stream.
            if let Some((next, host)) = number.checked_sub(1).and_then(|n| Some((n, inputs.work.offloaded.get(n as usize)?)))
            {
                host.copy_to(&mut commands, inputs.work.before(next)?);
            }
            constants.record(kernels, config, &mut commands, streamed)?;
            let layer = Layer::new(&pass, streamed, constants, Direction::Backward)?;
            layer.backward(&mut commands, x, &|commands| submit(gpu, commands))?;
            commands.submit()?;
            constants.submitted();
        }
        Ok(())
    }

    /// Records the logits [tokens, columns] of each chunk of the vocabulary, from `normed`, the
    /// norm of a window. In order, `then` submits each, after further commands. It gets the logits,
    /// the first token of the chunk and its rows of the output projection.
    fn for_chunks(
        &mut self,
        work: &Workspace<Mat>,
        normed: &Mat,
        mut then: impl FnMut(&Kernels, Commands, &Mat, u32, &Weight<'_>) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let Self { gpu, config, stream, globals, head_largest, kernels, .. } = self;
        let (vocab, step) = (config.vocab, work.logits.cols.max(1));
        let in_parts = stream.plan().head().is_some();
        for (number, first) in (0..).zip((0..vocab).step_by(step as usize)) {
            let columns = step.min(vocab - first);
            let rows = match in_parts {
                true => head(stream.head_part(number)?, config, columns)?,
                false => head(globals, config, vocab)?.measured(head_largest.clone()).rows(first..first + columns),
            };
            let logits = work.logits.narrow(normed.rows, columns);
            let mut commands = gpu.commands("logits");
            kernels.matmul.forward(&mut commands, normed, &rows, None, false, &logits)?;
            then(kernels, commands, &logits, first, &rows)?;
        }
        Ok(())
    }

    /// Submits the loss of a batch after [`Model::forward`]: the sum over its loss tokens, divided
    /// by `normalizer`, is added to the loss of the workspace. With `gradients`, a part of the
    /// workspace, the gradient of the residual stream after the last layer is then there.
    ///
    /// The head takes windows of tokens, one after the other, and each chunk of the vocabulary
    /// once: the gradient of its input is summed as the loss is.
    pub(crate) fn loss(
        &mut self,
        inputs: &PassInputs<'_>,
        gradients: Option<&Backward<Mat>>,
        normalizer: u64,
    ) -> Result<(), ModelError> {
        let PassInputs { work, batch, .. } = inputs;
        let (windows, epsilon) = (work.before(self.config.layers)?.windows(), self.config.rms_norm_eps as f32);
        let mut labels = batch.labels.clone();
        for (number, x) in windows.iter().enumerate() {
            let normed = work.normed.narrow(x.rows, x.cols);
            let mut commands = self.gpu.commands("final norm");
            self.kernels.norm.forward(&mut commands, x, &self.final_norm, epsilon, &normed)?;
            commands.submit()?;
            let residual = gradients.and_then(|gradients| gradients.residual.windows().get(number));
            let d_normed = gradients.map(|gradients| gradients.normed.narrow(x.rows, x.cols));
            let mut commands = self.loss_of_window(work, &normed, &labels, d_normed.as_ref(), normalizer)?;
            if let (Some(d_normed), Some(residual)) = (&d_normed, residual) {
                self.kernels.norm.backward(&mut commands, x, &self.final_norm, epsilon, d_normed, residual, false)?;
            }
            commands.submit()?;
            labels = after(&labels, x.rows);
        }
        Ok(())
    }

    /// Submits the chunks of a window, and records its loss and the gradient of `normed`.
    fn loss_of_window(
        &mut self,
        work: &Workspace<Mat>,
        normed: &Mat,
        labels: &BufferRange,
        d_normed: Option<&Mat>,
        normalizer: u64,
    ) -> Result<Commands, ModelError> {
        let state = work.loss_state.narrow(normed.rows, work.loss_state.cols);
        // The label's row of the output projection for each token.
        let label_rows = work.hidden_scratch().narrow(normed.rows, normed.cols);
        let in_parts = self.stream.plan().head().is_some();
        self.for_chunks(work, normed, |kernels, mut commands, logits, first, rows| {
            let Some(d_normed) = d_normed else {
                kernels.loss.accumulate(&mut commands, logits, first, labels, &state)?;
                return Ok(commands.submit().map(drop)?);
            };
            kernels.loss.exponentials(&mut commands, logits, first, labels, &state)?;
            if first > 0 {
                kernels.loss.rescale(&mut commands, d_normed, labels, &state)?;
            }
            kernels.matmul.backward(&mut commands, logits, rows, first > 0, d_normed)?;
            if in_parts {
                kernels.gather.rows_from(&mut commands, (rows, first), labels, &label_rows)?;
            }
            Ok(commands.submit().map(drop)?)
        })?;
        let Self { gpu, config, globals, kernels, .. } = self;
        let mut commands = gpu.commands("loss");
        kernels.loss.finish(&mut commands, labels, &state, normalizer, &work.loss)?;
        if let Some(d_normed) = d_normed {
            if !in_parts {
                kernels.gather.rows_from(&mut commands, (&head(globals, config, config.vocab)?, 0), labels, &label_rows)?;
            }
            let matrices = [d_normed, &label_rows];
            kernels.loss.gradient(&mut commands, matrices, labels, &state, head_factor(config), normalizer)?;
        }
        Ok(commands)
    }

    /// The logits of every token after [`Model::forward`], [tokens, vocabulary] row-major.
    pub(crate) fn logits(&mut self, work: &Workspace<Mat>) -> Result<Vec<f32>, ModelError> {
        let (vocab, gpu) = (self.config.vocab as usize, self.gpu.clone());
        let mut all = vec![0.0; vocab * work.tokens as usize];
        let mut rest = all.as_mut_slice();
        for x in work.before(self.config.layers)?.windows() {
            let normed = work.normed.narrow(x.rows, x.cols);
            let mut commands = gpu.commands("final norm");
            let epsilon = self.config.rms_norm_eps as f32;
            self.kernels.norm.forward(&mut commands, x, &self.final_norm, epsilon, &normed)?;
            commands.submit()?;
            let of_window = rest.split_off_mut(..vocab * x.rows as usize).unwrap_or_default();
            self.for_chunks(work, &normed, |_, commands, logits, first, _| {
                commands.submit()?;
                let chunk = logits.read(&gpu)?;
                for (row, part) in of_window.chunks_mut(vocab).zip(chunk.chunks(logits.cols as usize)) {
                    let target = row.iter_mut().skip(first as usize);
                    target.zip(part).for_each(|(to, &from)| *to = from);
                }
                Ok(())
            })?;
        }
        Ok(all)
    }

    /// Records the logits of the last token to `logits` [1, vocabulary], after the layers. `last`
    /// is the workspace of one token in the memory of `work`.
    pub(super) fn record_last_logits(
        &self,
        commands: &mut Commands,
        work: &Workspace<Mat>,
        last: &Workspace<Mat>,
        logits: &Mat,
    ) -> Result<(), ModelError> {
        let epsilon = self.config.rms_norm_eps as f32;
        let stream = work.before(self.config.layers)?;
        let (expected, found, what) = (1, 0, "the number of windows");
        let mut x = stream.windows().last().ok_or(OpError::Shape { operation: "logits", what, expected, found })?;
        if x.rows > 1 {
            let stream = last.hidden_scratch();
            let row = stream.range.size;
            commands.copy(&x.range.slice(u64::from(x.rows - 1) * row, row), &stream.range);
            x = stream;
        }
        let (matmul, head) = (&self.kernels.matmul, head(&self.globals, &self.config, self.config.vocab)?);
        let weights = [&head];
        let wide = Wide { norm: Some((&self.final_norm, epsilon)), ..Wide::of(&weights) };
        if matmul.wide(commands, x, &wide, logits)? {
            return Ok(());
        }
        self.kernels.norm.forward(commands, x, &self.final_norm, epsilon, &last.normed)?;
        Ok(matmul.forward(commands, &last.normed, &head, None, false, logits)?)
    }
}

/// Submits the commands so far, and begins others.
fn submit(gpu: &Gpu, commands: &mut Commands) -> Result<(), OpError> {
    std::mem::replace(commands, gpu.commands("layer")).submit()?;
    Ok(())
}

/// What follows the words of `count` tokens.
fn after(words: &BufferRange, count: u32) -> BufferRange {
    let bytes = 4 * u64::from(count);
    words.slice(bytes, words.size.saturating_sub(bytes))
}

/// `rows` rows of the output projection: all, or a part of it. It is a stored `lm_head`, else the
/// embedding (spec section 4). `tie_word_embeddings` is ignored. Its products are scaled as the
/// logits are.
fn head<'a>(layer: &'a StreamedLayer, model: &ModelConfig, rows: u32) -> Result<Weight<'a>, ModelError> {
    let role = if layer.has(Role::LmHead) { Role::LmHead } else { Role::Embedding };
    let head = weight(layer, role, rows, model.hidden)?;
    Ok(head.times(head_factor(model)))
}

/// The factor of the logits.
fn head_factor(model: &ModelConfig) -> f32 {
    (1.0 / model.logits_scaling) as f32
}
