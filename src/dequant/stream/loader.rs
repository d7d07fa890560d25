//! The thread that fills slots: it reads a layer in pieces on several threads, sums them while they are in the cache where that is asked
//! for, checks scales beside, and sends all of it off in staging buffers.
//!
//! The states of a slot, and who changes them:
//!
//! ```text
//!              the stream asks for a layer                the loader's queue
//!   Nothing ───────────────────────────────► Pending ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─► reads the file, checks, fills
//!      ▲                                   (a ticket)                         staging memory, submits copies
//!      │ the stream returns                  │    ▲                                        │
//!      │ the error, once             reply   │    └ ─ ─ ─ ─ ─ ─ reply with the ticket ─ ─ ─ ┘
//!      │                          ┌──────────┴──────────┐
//!      │                      Err ▼                     ▼ Ok
//!      └────────────────────── Failed                 Ready ◄──── the caller asks for the layer again
//!                                 │                  (a lease)
//!                                 │                     │
//!                                 └─────────┬───────────┘
//!                                           │ another layer is wanted in this slot:
//!                                           ▼ the lease ends, a new one begins
//!                                        Pending
//! ```
//!
//! Where all layers fit, a slot that is `Ready` stays so. A reply whose ticket no slot has is dropped: the slot was given to
//! another layer in the meantime. While a slot is `Pending` the device may still work on its old layer. That work was submitted
//! before the lease ended, and the copies are submitted after it ended, so that they wait in the one queue of the device. Work
//! that comes later, with buffers of the old lease, is refused ([`Commands::submit`](crate::gpu::Commands::submit)).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use rayon::prelude::*;

use crate::format::{Index, PieceCrc, Section, SectionKind, check, crc32};
use crate::gpu::{Buffer, BufferRange, Gpu, StagingArea, Uploader, wgpu};
use crate::io::AlignedBuf;

use super::error::StreamError;
use super::plan::{Group, StreamPlan};
use super::source::PackSource;

/// Bytes that are read, summed and copied at a time: they stay in the second-level cache between the three.
const PIECE_LEN: u64 = 256 << 10;
/// Copies between buffers are multiples of this.
const COPY_ALIGN: u64 = wgpu::COPY_BUFFER_ALIGNMENT;

/// A group of sections of the pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GroupId {
    Globals,
    Layer(u32),
}

/// What is to be loaded, and into which buffers (those of the group's plan).
#[derive(Debug)]
pub(super) struct Request {
    pub(super) group: GroupId,
    /// Tells the reply to this request from one to an earlier request for the same group.
    pub(super) ticket: u64,
    pub(super) buffers: Vec<Buffer>,
}

/// What came of a request. Replies come in the order of their requests.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) group: GroupId,
    pub(super) ticket: u64,
    pub(super) result: Result<(), StreamError>,
}

/// A running loader; dropping it stops it.
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
        let failed = |e: &dyn std::error::Error| StreamError::Loader(e.to_string());
        let name = |i| format!("nf4pack-load-{i}");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build();
        let pool = pool.map_err(|e| failed(&e))?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut worker = Worker {
            uploader: Uploader::new(gpu, plan.chunk, plan.chunks()),
            scratch: (0..pool.current_num_threads()).map(|_| Mutex::default()).collect(),
            checked: vec![false; source.index().sections().len()],
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

    /// Puts a request at the end of the queue.
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
            // It has panicked or it has not; there is nothing to do about either here.
            let _ = thread.join();
        }
    }
}

/// The loader's side of it.
#[derive(Debug)]
struct Worker {
    source: Arc<PackSource>,
    plan: Arc<StreamPlan>,
    uploader: Uploader,
    pool: rayon::ThreadPool,
    /// A buffer for each thread of the pool, for sources that are read.
    scratch: Vec<Mutex<AlignedBuf>>,
    /// Sections whose contents have been checked.
    checked: Vec<bool>,
    verify: bool,
    stop: Arc<AtomicBool>,
}

/// A part of the file, from a place in a section on; it may go on past the section into the padding.
#[derive(Debug, Clone)]
struct Piece {
    section: usize,
    file: Range<u64>,
    /// Bytes of it that are the section's payload.
    payload: u64,
}

impl Worker {
    fn load(&mut self, request: &Request) -> Result<(), StreamError> {
        let plan = self.plan.clone();
        let group = match request.group {
            GroupId::Globals => plan.globals.as_ref(),
            GroupId::Layer(number) => plan.groups.get(number as usize),
        };
        let Some(group) = group else { return Ok(()) };
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
                self.send(group, &chunk, &target, &mut crcs)?;
            }
        }
        self.checked.get_mut(group.sections.clone()).into_iter().for_each(|checked| checked.fill(true));
        self.check_crcs(group, &crcs)
    }

    /// Uploads one chunk; the checksums of its pieces go to `crcs`, by section of the group. The contents of sections that start in the
    /// chunk are checked on the way, the first time they are loaded.
    fn send(
        &mut self,
        group: &Group,
        chunk: &Range<u64>,
        target: &BufferRange,
        crcs: &mut [PieceCrc],
    ) -> Result<(), StreamError> {
        let index = self.source.index();
        let pieces = pieces(index, group, chunk);
        let starts_here = |n: &usize| index.sections().get(*n).is_some_and(|s| chunk.contains(&s.offset));
        let unchecked = |n: &usize| self.checked.get(*n) == Some(&false);
        let to_check: Vec<usize> = group.sections.clone().filter(starts_here).filter(unchecked).collect();
        let Self { uploader, pool, source, scratch, verify, .. } = self;
        let one = |piece: &Piece, area: &StagingArea<'_>| {
            let thread = rayon::current_thread_index().unwrap_or(0) % scratch.len();
            let mut scratch = scratch[thread].lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = source.bytes(piece.file.start, (piece.file.end - piece.file.start) as usize, &mut scratch)?;
            let crc = if *verify { crc32(bytes.get(..piece.payload as usize).unwrap_or(bytes)) } else { 0 };
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
        for (piece, crc) in pieces.iter().zip(sums) {
            if let Some(sum) = crcs.get_mut(piece.section - group.sections.start) {
                sum.push(crc, piece.payload);
            }
        }
        Ok(())
    }

    /// Compares the checksums of a group's payloads with the index, where that was asked for.
    fn check_crcs(&self, group: &Group, crcs: &[PieceCrc]) -> Result<(), StreamError> {
        if !self.verify {
            return Ok(());
        }
        let index = self.source.index();
        group.sections.clone().zip(crcs).try_for_each(|(number, crc)| match index.sections().get(number) {
            Some(section) => check::checksum(index, number, section, crc.value()).map_err(|e| self.source.damaged(e)),
            None => Ok(()),
        })
    }
}

/// Checks scales and code padding of a section: what a kernel reads must be what the specification allows.
fn check_contents(source: &PackSource, number: usize) -> Result<(), StreamError> {
    let index = source.index();
    let Some(section) = index.sections().get(number).filter(|s| has_contents(s)) else { return Ok(()) };
    let mut buf = AlignedBuf::default();
    let payload = source.bytes(section.offset, section.length as usize, &mut buf)?;
    check::contents(index, number, section, payload).map_err(|e| source.damaged(e))
}

/// Whether [`check::contents`] has anything to look at: scales, and codes with padding.
fn has_contents(section: &Section) -> bool {
    match section.kind {
        Some(SectionKind::Scales) => true,
        Some(SectionKind::Codes) => section.shape.elements() < 2 * section.length,
        _ => false,
    }
}

/// Cuts a range into runs of `len` bytes and a rest.
fn cut(range: Range<u64>, len: u64) -> impl Iterator<Item = Range<u64>> {
    let count = (range.end - range.start).div_ceil(len.max(1));
    (0..count).map(move |i| range.start + i * len..range.end.min(range.start + (i + 1) * len))
}

/// The pieces of a chunk of the file, which lies in a buffer of the group. Each starts at the start of a section or of the
/// chunk, or [`PIECE_LEN`] after another: always on a multiple of 256.
fn pieces(index: &Index, group: &Group, chunk: &Range<u64>) -> Vec<Piece> {
    let sections = index.sections().get(group.sections.clone()).unwrap_or_default();
    let nexts = sections.iter().skip(1).map(|s| s.offset).chain([u64::MAX]);
    let mut pieces = Vec::new();
    for ((number, section), next) in group.sections.clone().zip(sections).zip(nexts) {
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
