//! The loader thread fills slots. It reads a layer in pieces on several threads, computes their
//! checksums while they are in the cache (in the first load of a layer, or in every load), checks
//! scales at the same time, and uploads the pieces through staging buffers.
//!
//! The states of a slot:
//!
//! ```text
//!   ┌─────────┐  request  ┌─────────┐  reply: Ok  ┌───────┐
//!   │ Nothing │ ────────► │ Pending │ ──────────► │ Ready │ ──┐ return the layer
//!   └─────────┘           └─────────┘             └───────┘ ◄─┘
//!        ▲                  │     ▲                   │
//!        │       reply: Err ▼     │                   │ request for another layer
//!        │            ┌────────┐  └───────────────────┤
//!        └─────────── │ Failed │ ─────────────────────┘
//!    return the error └────────┘
//! ```
//!
//! The stream makes every transition: when its caller requests a layer, and when it takes a reply
//! of this thread. Each request has a new ticket, ends the lease of the slot, and starts a new
//! lease. A request may also replace the layer of a `Pending` slot; the stream then drops the
//! earlier reply, because no slot has its ticket. If all layers fit, a `Ready` slot stays `Ready`.
//!
//! While a slot is `Pending`, the device may still work on its old layer. That work was submitted
//! before the lease ended, and the copies are submitted after it ended. The device has one queue,
//! so the copies run after that work. Later work with buffers of the old lease is refused
//! ([`Commands::submit`](crate::gpu::Commands::submit)).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use rayon::prelude::*;

use crate::format::{Index, PieceCrc, Section, SectionKind, check, crc32};
use crate::gpu::{Buffer, BufferRange, Gpu, StagingArea, Uploader, wgpu};
use crate::io::AlignedBuf;
use crate::source::{PackSource, WindowBuf};

use super::error::StreamError;
use super::globals::HeadParts;
use super::group::Group;
use super::plan::StreamPlan;

/// Bytes of one read, checksum and copy. They stay in the L2 cache between the three steps.
const PIECE_LEN: u64 = 256 << 10;
/// Alignment of copies between buffers.
const COPY_ALIGN: u64 = wgpu::COPY_BUFFER_ALIGNMENT;

/// A group of sections of the pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GroupId {
    Globals,
    Layer(u32),
    /// A part of the output projection.
    HeadPart(u32),
}

/// A group to load, and its target buffers (as planned for the group).
#[derive(Debug)]
pub(super) struct Request {
    pub(super) group: GroupId,
    /// Distinguishes this request from earlier requests for the same group.
    pub(super) ticket: u64,
    pub(super) buffers: Vec<Buffer>,
}

/// The result of a request. Replies arrive in the order of the requests.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) group: GroupId,
    pub(super) ticket: u64,
    pub(super) result: Result<(), StreamError>,
}

/// A running loader. Dropping it stops the thread.
#[derive(Debug)]
pub(super) struct Loader {
    requests: Option<mpsc::Sender<Request>>,
    replies: mpsc::Receiver<Reply>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    pub(super) fn start(
        gpu: &Gpu,
        source: Arc<PackSource>,
        plan: Arc<StreamPlan>,
        threads: usize,
        verify: bool,
    ) -> Result<Self, StreamError> {
        let failed = |e: &dyn std::error::Error| StreamError::NoThread(e.to_string());
        let name = |i| format!("nf4pack-load-{i}");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build();
        let pool = pool.map_err(|e| failed(&e))?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut worker = Worker {
            uploader: Uploader::new(gpu, plan.chunk, plan.chunks()),
            scratch: (0..pool.current_num_threads()).map(|_| Mutex::default()).collect(),
            checked: vec![false; source.index().sections().len()],
            of_head: (0, PieceCrc::default()),
            pool,
            source,
            plan,
            verify,
            stop: stop.clone(),
        };
        let (requests, inbox) = mpsc::channel::<Request>();
        let (outbox, replies) = mpsc::channel();
        let run = move || {
            for request in inbox {
                let result = worker.load(&request);
                if outbox.send(Reply { group: request.group, ticket: request.ticket, result }).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("nf4pack-loader".to_owned()).spawn(run).map_err(|e| failed(&e))?;
        Ok(Self { requests: Some(requests), replies, stop, thread: Some(thread) })
    }

    /// Appends a request to the queue.
    pub(super) fn request(&self, request: Request) -> Result<(), StreamError> {
        let sent = self.requests.as_ref().is_some_and(|requests| requests.send(request).is_ok());
        if sent { Ok(()) } else { Err(ended()) }
    }

    /// Waits for the next reply.
    pub(super) fn reply(&self) -> Result<Reply, StreamError> {
        self.replies.recv().map_err(|_| ended())
    }
}

fn ended() -> StreamError {
    StreamError::Loader("its thread has ended".to_owned())
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread cannot be handled here.
            let _ = thread.join();
        }
    }
}

/// The state of the loader thread.
#[derive(Debug)]
struct Worker {
    source: Arc<PackSource>,
    plan: Arc<StreamPlan>,
    uploader: Uploader,
    pool: rayon::ThreadPool,
    /// One buffer per thread of the pool, for sources without a mapping.
    scratch: Vec<Mutex<AlignedBuf>>,
    /// Sections with checked contents and checksums.
    checked: Vec<bool>,
    /// The checksum of the first parts of the output projection, and their number.
    of_head: (u32, PieceCrc),
    /// Whether every load checks the checksums.
    verify: bool,
    stop: Arc<AtomicBool>,
}

/// A part of the file that starts in a section. It may extend into the padding after the section.
#[derive(Debug, Clone)]
struct Piece {
    /// The place of the section in the group.
    section: usize,
    file: Range<u64>,
    /// Bytes that belong to the payload of the section.
    payload: u64,
}

impl Worker {
    fn load(&mut self, request: &Request) -> Result<(), StreamError> {
        let plan = self.plan.clone();
        let part;
        let group = match request.group {
            GroupId::Globals => plan.globals.as_ref(),
            GroupId::Layer(number) => plan.groups.get(number as usize),
            GroupId::HeadPart(number) => {
                part = plan.head.as_ref().map(|head| head.group(number));
                part.as_ref()
            }
        };
        let Some(group) = group else { return Ok(()) };
        let with_crcs = self.with_crcs(group);
        let mut crcs = vec![PieceCrc::default(); group.sections.len()];
        for (file, buffer) in group.buffers.iter().zip(&request.buffers) {
            for chunk in cut(file.clone(), self.uploader.chunk()) {
                if self.stop.load(Ordering::Relaxed) {
                    return Err(StreamError::Loader("it was stopped".to_owned()));
                }
                self.source.check_len()?;
                let target = BufferRange {
                    buffer: buffer.clone(),
                    offset: chunk.start - file.start,
                    size: (chunk.end - chunk.start).next_multiple_of(COPY_ALIGN),
                };
                self.send(group, &chunk, &target, with_crcs.then_some(&mut crcs))?;
            }
        }
        match (request.group, &plan.head) {
            (GroupId::HeadPart(number), Some(head)) if with_crcs => {
                if !self.add_part(head, number, &crcs) {
                    return Ok(());
                }
                let (_, sum) = std::mem::take(&mut self.of_head);
                self.check_crcs(group, &[sum])?;
            }
            _ if with_crcs => self.check_crcs(group, &crcs)?,
            _ => {}
        }
        for &number in &group.sections {
            self.checked.get_mut(number).into_iter().for_each(|checked| *checked = true);
        }
        Ok(())
    }

    /// Adds the checksum of part `number` of the output projection to that of the parts before it.
    /// Returns whether all parts are there. Passes load the parts in order, from part 0 on.
    fn add_part(&mut self, head: &HeadParts, number: u32, crcs: &[PieceCrc]) -> bool {
        if number == 0 {
            self.of_head = Default::default();
        }
        let (next, sum) = &mut self.of_head;
        if *next == number {
            *next += 1;
            crcs.iter().for_each(|crc| sum.push(crc.value(), crc.len()));
        }
        *next == head.count()
    }

    /// Whether this load of a group computes checksums: the first load, unless the source skips
    /// them, or every load if `verify` is set.
    fn with_crcs(&self, group: &Group) -> bool {
        let unchecked = |number: &usize| self.checked.get(*number) == Some(&false);
        self.verify || (self.source.verifies() && group.sections.iter().any(unchecked))
    }

    /// Uploads one chunk. The checksums of its pieces go to `crcs` if it is there, one entry per
    /// section of the group. The first time, it also checks the contents of the sections that start
    /// in the chunk.
    fn send(
        &mut self,
        group: &Group,
        chunk: &Range<u64>,
        target: &BufferRange,
        crcs: Option<&mut Vec<PieceCrc>>,
    ) -> Result<(), StreamError> {
        let index = self.source.index();
        let pieces = pieces(index, group, chunk);
        let starts_here = |n: &usize| index.sections().get(*n).is_some_and(|s| chunk.contains(&s.offset));
        let unchecked = |n: &usize| self.checked.get(*n) == Some(&false);
        let to_check: Vec<usize> = group.sections.iter().copied().filter(starts_here).filter(unchecked).collect();
        let Self { uploader, pool, source, scratch, .. } = self;
        let with_crcs = crcs.is_some();
        let one = |piece: &Piece, area: &StagingArea<'_>| {
            let thread = rayon::current_thread_index().unwrap_or(0) % scratch.len();
            let mut scratch = scratch[thread].lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = source.bytes(piece.file.start, piece.file.end - piece.file.start, &mut scratch)?;
            let crc = if with_crcs { crc32(bytes.get(..piece.payload as usize).unwrap_or(bytes)) } else { 0 };
            area.write(piece.file.start - chunk.start, bytes)?;
            Ok::<_, StreamError>(crc)
        };
        let mut sums = Vec::new();
        uploader.copy(target, |area| {
            let copy = || pieces.par_iter().map(|piece| one(piece, area)).collect::<Result<Vec<u32>, _>>();
            let check = || to_check.par_iter().try_for_each(|&number| check_contents(source, number));
            let (copied, checked) = pool.install(|| rayon::join(copy, check));
            sums = copied?;
            checked
        })?;
        let Some(crcs) = crcs else { return Ok(()) };
        for (piece, crc) in pieces.iter().zip(sums) {
            if let Some(sum) = crcs.get_mut(piece.section) {
                sum.push(crc, piece.payload);
            }
        }
        Ok(())
    }

    /// Compares the checksums of the payloads with the index.
    fn check_crcs(&self, group: &Group, crcs: &[PieceCrc]) -> Result<(), StreamError> {
        let index = self.source.index();
        group.sections.iter().zip(crcs).try_for_each(|(&number, crc)| match index.sections().get(number) {
            Some(section) => check::checksum(index, number, section, crc.value()).map_err(|e| self.source.damaged(e).into()),
            None => Ok(()),
        })
    }
}

/// Checks scales and code padding of a section against the specification.
fn check_contents(source: &PackSource, number: usize) -> Result<(), StreamError> {
    let index = source.index();
    if !index.sections().get(number).is_some_and(has_contents) {
        return Ok(());
    }
    Ok(source.check_contents(number, &mut WindowBuf::default(), || true)?)
}

/// Whether [`check::contents`] checks this section: scales, or codes with padding.
fn has_contents(section: &Section) -> bool {
    match section.kind {
        Some(SectionKind::Scales) => true,
        Some(SectionKind::Codes) => section.shape.elements() < 2 * section.length,
        _ => false,
    }
}

/// Cuts a range into pieces of `len` bytes and a remainder.
fn cut(range: Range<u64>, len: u64) -> impl Iterator<Item = Range<u64>> {
    let count = (range.end - range.start).div_ceil(len.max(1));
    (0..count).map(move |i| range.start + i * len..range.end.min(range.start + (i + 1) * len))
}

/// The pieces of a chunk of the file. A piece starts at the start of a section or of the chunk, or
/// [`PIECE_LEN`] after another piece. So each offset is a multiple of 256.
fn pieces(index: &Index, group: &Group, chunk: &Range<u64>) -> Vec<Piece> {
    let sections: Vec<&Section> = group.sections.iter().filter_map(|&number| index.sections().get(number)).collect();
    let nexts = sections.iter().skip(1).map(|s| s.offset).chain([u64::MAX]);
    let mut pieces = Vec::new();
    for ((number, section), next) in sections.iter().enumerate().zip(nexts) {
        let within = section.offset.max(chunk.start)..next.min(chunk.end);
        if within.start >= within.end {
            continue;
        }
        pieces.extend(cut(within, PIECE_LEN).map(|file| {
            let payload = section.end().clamp(file.start, file.end) - file.start;
            Piece { section: number, file, payload }
        }));
    }
    pieces
}
