//! `nf4pack inspect`.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

use super::args::InspectArgs;
use super::open;
use super::outcome::Outcome;
use super::ui::{self, Table, Ui};
use crate::arch::{ModelConfig, Obstacle};
use crate::convert::plan::scale_type_name;
use crate::format::files::CONFIG;
use crate::format::layout::{FEATURE_FUSED_PROJECTIONS, FEATURE_OUTPUT_NORMS, FEATURE_SIGNED_SCALES, MAJOR_VERSION};
use crate::format::{Index, Provenance, Role, Section, SectionKind};
use crate::{LayerError, PackSource, ReadError};

pub fn run(args: &InspectArgs) -> Result<Outcome> {
    let ui = Ui::new(args.json);
    let pack = open::read(&args.file, args.read)?;
    let document = Document::new(args, pack.index())?;
    if document.provenance.is_none() {
        ui.warning("the metadata is not the provenance record of the specification; --json shows it as it is");
    }
    if let Some(obstacle) = layer_count(&pack)? {
        ui.warning(&obstacle.to_string());
    }
    ui.result(&document, || document.text())?;
    Ok(Outcome::Good)
}

/// Why config.json does not describe the layers of the pack. Of what else is wrong with it, verify
/// reports.
fn layer_count(pack: &PackSource) -> Result<Option<Obstacle>> {
    let config = match pack.file(CONFIG) {
        Ok(config) => config,
        // Damage of payloads is not the subject of this command.
        Err(ReadError::Damaged { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    Ok(config.and_then(|config| Obstacle::check_layer_count(&config, pack.index().header().layer_count).err()))
}

/// The contents of a pack's index.
#[derive(Serialize)]
struct Document<'a> {
    file: String,
    version: String,
    required_features: Vec<String>,
    optional_features: u64,
    bytes: u64,
    layers: u32,
    sections: u64,
    provenance: Option<Provenance>,
    /// The metadata, if it is not a provenance record.
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Value>,
    sizes: Sizes,
    roles: Vec<RoleSize>,
    files: Vec<FileEntry<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<LayerEntry>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<TensorEntry<'a>>>,
}

/// Bytes by kind of section.
#[derive(Debug, Default, Serialize)]
struct Sizes {
    codes: u64,
    scales: u64,
    raw: u64,
    files: u64,
    unknown: u64,
    /// Header, index, metadata and the gaps between sections.
    rest: u64,
}

#[derive(Debug, Serialize)]
struct RoleSize {
    role: &'static str,
    r#type: String,
    tensors: u64,
    elements: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct FileEntry<'a> {
    name: &'a str,
    offset: u64,
    bytes: u64,
    crc32: u32,
}

#[derive(Debug, Serialize)]
struct LayerEntry {
    number: u32,
    offset: u64,
    bytes: u64,
}

/// A range of the file.
#[derive(Debug, Serialize)]
struct Payload {
    offset: u64,
    bytes: u64,
    crc32: u32,
}

#[derive(Debug, Serialize)]
struct TensorEntry<'a> {
    name: &'a str,
    role: &'static str,
    layer: Option<u32>,
    expert: Option<u32>,
    shape: &'a [u64],
    r#type: String,
    /// Where its first payload starts.
    offset: u64,
    /// Of all its payloads, without the gap between them.
    bytes: u64,
    /// The elements, or their codes.
    data: Payload,
    #[serde(skip_serializing_if = "Option::is_none")]
    scales: Option<Payload>,
}

/// How a tensor's elements are stored: `nf4/64 bf16` or `bf16`.
fn type_name(section: &Section) -> String {
    match section.scale_type {
        Some(scales) => format!("nf4/{} {}", section.block_size, scale_type_name(scales)),
        None => section.element_type.name().to_owned(),
    }
}

fn payload(section: &Section) -> Payload {
    Payload { offset: section.offset, bytes: section.length, crc32: section.crc }
}

impl<'a> Document<'a> {
    fn new(args: &InspectArgs, index: &'a Index) -> Result<Self> {
        let header = index.header();
        let layer = args.layer.map(|number| layer_entry(index, number)).transpose()?;
        let listed = |section: &&Section| args.layer.is_none() || section.layer == args.layer;
        let tensors = (args.tensors || layer.is_some()).then(|| tensors(index, listed));
        let provenance = Provenance::from_json(index.metadata()).ok();
        let as_it_is = || serde_json::from_str(index.metadata()).unwrap_or_else(|_| Value::from(index.metadata()));
        let metadata = provenance.is_none().then(as_it_is);
        let files = index.sections().iter().filter(|s| s.kind == Some(SectionKind::File));
        let file = |s: &'a Section| FileEntry { name: index.name(s), offset: s.offset, bytes: s.length, crc32: s.crc };
        Ok(Self {
            file: args.file.display().to_string(),
            version: format!("{MAJOR_VERSION}.{}", header.minor_version),
            required_features: features(header.required_features),
            optional_features: header.optional_features,
            bytes: header.file_len,
            layers: header.layer_count,
            sections: header.section_count,
            provenance,
            metadata,
            sizes: Sizes::new(index),
            roles: role_sizes(index),
            files: files.map(file).collect(),
            layer,
            tensors,
        })
    }

    fn text(&self) -> String {
        let mut text = String::new();
        // A list of tensors is input for other programs, so nothing else is printed.
        match (&self.tensors, &self.layer) {
            (Some(tensors), None) => list(&mut text, tensors),
            (Some(tensors), Some(layer)) => {
                list(&mut text, tensors);
                let (offset, size) = (ui::grouped(layer.offset), ui::grouped(layer.bytes));
                let _ = writeln!(text, "\nlayer {}: {size} bytes from offset {offset}", layer.number);
            }
            _ => self.overview(&mut text),
        }
        text
    }

    fn overview(&self, text: &mut String) {
        let features = if self.required_features.is_empty() { "none".into() } else { self.required_features.join(", ") };
        let _ = writeln!(text, "{}: nf4pack format {}, features: {features}", ui::one_line(&self.file), self.version);
        let (layers, sections) = (ui::plural(u64::from(self.layers), "layer"), ui::plural(self.sections, "section"));
        let _ = writeln!(text, "{} bytes, {layers}, {sections}\n", ui::grouped(self.bytes));
        if let Some(provenance) = &self.provenance {
            let tied = self.roles.iter().all(|sizes| sizes.role != Role::LmHead.name());
            origin(text, provenance, tied);
        }
        let mut table = Table::new(&["role", "stored as", ">tensors", ">elements", ">bytes"]);
        for role in &self.roles {
            let elements = ui::count(role.elements as f64);
            table.row([&role.role, &role.r#type, &role.tensors, &elements, &ui::grouped(role.bytes)]);
        }
        let _ = writeln!(text, "{table}");
        let mut table = Table::new(&["kind", ">bytes"]);
        let Sizes { codes, scales, raw, files, unknown, rest } = &self.sizes;
        let kinds = [("codes", codes), ("scales", scales), ("raw tensors", raw), ("files", files), ("unknown", unknown)];
        for (kind, bytes) in kinds.into_iter().filter(|(_, bytes)| **bytes > 0) {
            table.row([&kind, &ui::grouped(*bytes)]);
        }
        table.row([&"index and padding", &ui::grouped(*rest)]);
        let _ = writeln!(text, "{table}");
        let mut table = Table::new(&["file inside", ">offset", ">bytes"]);
        for file in &self.files {
            table.row([&file.name, &file.offset, &ui::grouped(file.bytes)]);
        }
        let _ = write!(text, "{table}");
    }
}

/// The origin of the pack; `tied` if it has no lm_head.
fn origin(text: &mut String, p: &Provenance, tied: bool) {
    let tied = if tied { ", lm_head tied to the embedding" } else { "" };
    let class = ModelConfig::class_of(&p.model_type).unwrap_or("no family that this version runs");
    let _ = writeln!(text, "model        {} ({class}){tied}", ui::one_line(&p.model_type));
    let [tool, encoder, scales] = [&p.tool, &p.encoder, &p.scales].map(|text| ui::one_line(text));
    let _ = writeln!(text, "made by      {tool}, encoder {encoder}, {scales} scales, block size {}", p.block_size);
    for (option, pattern) in [("keep", &p.keep), ("quantize", &p.quantize)] {
        if let Some(pattern) = pattern {
            let _ = writeln!(text, "{option:<12} {}", ui::one_line(pattern));
        }
    }
    if !p.dropped.is_empty() {
        let _ = writeln!(text, "left out     {}", ui::one_line(&ui::first_of(&p.dropped)));
    }
    let mut table = Table::new(&["source", ">bytes", "sha256"]);
    for source in &p.sources {
        table.row([&source.file, &ui::grouped(source.bytes), &source.sha256]);
    }
    let _ = writeln!(text, "\n{table}");
}

fn list(text: &mut String, tensors: &[TensorEntry<'_>]) {
    let mut table = Table::new(&["tensor", "role", "shape", "type", ">offset", ">bytes"]);
    for tensor in tensors {
        let shape = format!("{:?}", tensor.shape);
        table.row([&tensor.name, &tensor.role, &shape, &tensor.r#type, &tensor.offset, &tensor.bytes]);
    }
    let _ = write!(text, "{table}");
}

fn layer_entry(index: &Index, number: u32) -> Result<LayerEntry> {
    let range = index.layer_range(number);
    let range = range.ok_or(LayerError::OutOfRange { layer: number, count: index.header().layer_count })?;
    Ok(LayerEntry { number, offset: range.start, bytes: range.end - range.start })
}

fn features(bits: u64) -> Vec<String> {
    let name = |bit: u64| match bit {
        FEATURE_SIGNED_SCALES => "signed scales".to_owned(),
        FEATURE_FUSED_PROJECTIONS => "fused projections".to_owned(),
        FEATURE_OUTPUT_NORMS => "output norms".to_owned(),
        bit => format!("{bit:#x}"),
    };
    (0..u64::BITS).map(|i| 1 << i).filter(|bit| bits & bit != 0).map(name).collect()
}

impl Sizes {
    fn new(index: &Index) -> Self {
        let mut sizes = Self::default();
        for section in index.sections() {
            let sum = match section.kind {
                Some(SectionKind::Codes) => &mut sizes.codes,
                Some(SectionKind::Scales) => &mut sizes.scales,
                Some(SectionKind::Raw) => &mut sizes.raw,
                Some(SectionKind::File) => &mut sizes.files,
                None => &mut sizes.unknown,
            };
            *sum += section.length;
        }
        let known = sizes.codes + sizes.scales + sizes.raw + sizes.files + sizes.unknown;
        sizes.rest = index.header().file_len - known;
        sizes
    }
}

/// Sums by role and type, in the order of roles.
fn role_sizes(index: &Index) -> Vec<RoleSize> {
    let mut sums = BTreeMap::new();
    for section in index.sections() {
        let first = match section.kind {
            Some(SectionKind::Codes | SectionKind::Raw) => true,
            Some(SectionKind::Scales) => false,
            Some(SectionKind::File) | None => continue,
        };
        // The scales of a tensor have the same role, block size and scale type as its codes.
        let key = (section.role, type_name(section));
        let sum: &mut (u64, u64, u64) = sums.entry(key).or_default();
        sum.0 += u64::from(first);
        sum.1 += if first { section.shape.elements() } else { 0 };
        sum.2 += section.length;
    }
    let size = |((role, r#type), (tensors, elements, bytes)): ((crate::format::Role, String), (u64, u64, u64))| RoleSize {
        role: role.name(),
        r#type,
        tensors,
        elements,
        bytes,
    };
    sums.into_iter().map(size).collect()
}

fn tensors<'a>(index: &'a Index, listed: impl Fn(&&Section) -> bool) -> Vec<TensorEntry<'a>> {
    let mut entries: Vec<TensorEntry<'a>> = Vec::new();
    for section in index.sections().iter().filter(listed) {
        match section.kind {
            Some(SectionKind::Codes | SectionKind::Raw) => entries.push(TensorEntry {
                name: index.name(section),
                role: section.role.name(),
                layer: section.layer,
                expert: section.expert,
                shape: section.shape.dims(),
                r#type: type_name(section),
                offset: section.offset,
                bytes: section.length,
                data: payload(section),
                scales: None,
            }),
            // Validation ensures that a scale table directly follows its codes.
            Some(SectionKind::Scales) => {
                if let Some(entry) = entries.last_mut() {
                    entry.bytes += section.length;
                    entry.scales = Some(payload(section));
                }
            }
            Some(SectionKind::File) | None => {}
        }
    }
    entries
}
