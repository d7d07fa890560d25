//! A stable code for every error, for scripts that read `--json`: sentences may change, codes do
//! not.
//!
//! A new variant of an error does not compile without a code here, and a test requires its row in
//! `docs/error-codes.md`. A code is never renamed, and never given to another error.

use std::error::Error;

use super::super::args::Usage;
use super::super::process::{Bug, NoThreads};
use super::super::ui::Cancelled;
use crate::arch::{ArchError, ConfigError, Obstacle};
use crate::convert::ConvertError;
use crate::convert::encode::NotFinite;
use crate::convert::plan::PlanError;
use crate::convert::source::{HeaderError, Quantised, SourceError};
use crate::data::DataError;
use crate::dequant::stream::StreamError;
use crate::dequant::{DequantError, OutOfRange};
use crate::export::{ExportError, WriteError};
use crate::format::FormatError;
use crate::gpu::GpuError;
use crate::lora::adapter::AdapterError;
use crate::lora::config::LoraError;
use crate::merge::{CompareError, MergeError};
use crate::model::ModelError;
use crate::model::generate::GenerateError;
use crate::model::generate::sampling::SamplingError;
use crate::model::plan::MemoryError;
use crate::ops::OpError;
use crate::train::checkpoint::{CheckpointError, Difference};
use crate::train::record::RecordError;
use crate::train::run::RunError;
use crate::train::settings::SettingsError;
use crate::verify::VerifyError;
use crate::{FileError, LayerError, OpenError, ReadError};

/// An error of the operating system that no error type of this crate wraps.
const IO: &str = "io";
/// An error without a type.
const OTHER: &str = "other";

/// An error that has a code.
trait Code: Error {
    fn code(&self) -> &'static str;
}

/// The code of an error: that of its outermost cause that has one.
pub(super) fn code(error: &anyhow::Error) -> &'static str {
    let io = || error.chain().any(<dyn Error>::is::<std::io::Error>).then_some(IO);
    error.chain().find_map(of_cause).or_else(io).unwrap_or(OTHER)
}

/// The table. For each enum, the variants that hold an error with codes of its own come first: in
/// their only field (`.0 of`), or in their field `source` (`.source of`). The code of each other
/// variant follows. Structs stand before all of them.
macro_rules! codes {
    (
        structs { $($plain:ident $plain_code:literal)* }
        $($error:ident { $(.0 of $($held:ident),+;)? $(.source of $($caused:ident),+;)? $($variant:ident $code:literal)* })*
    ) => {
        $(impl Code for $error {
            fn code(&self) -> &'static str {
                match self {
                    $($(Self::$held(error) => error.code(),)+)?
                    $($(Self::$caused { source, .. } => source.code(),)+)?
                    $(Self::$variant { .. } => $code,)*
                }
            }
        })*
        $(impl Code for $plain {
            fn code(&self) -> &'static str {
                $plain_code
            }
        })*

        fn of_cause(cause: &(dyn Error + 'static)) -> Option<&'static str> {
            $(if let Some(error) = cause.downcast_ref::<$error>() {
                return Some(error.code());
            })*
            $(if let Some(error) = cause.downcast_ref::<$plain>() {
                return Some(error.code());
            })*
            None
        }

        /// Every code, once for each error that has it.
        #[cfg(test)]
        const ALL: &[&str] = &[$($($code,)*)* $($plain_code,)* IO, OTHER];
    };
}

codes! {
    structs {
        Usage "usage"
        Cancelled "cancelled"
        NotFinite "not-finite-element"
        OutOfRange "dequant-out-of-range"
        Difference "run-difference"
        NoThreads "no-threads"
        Bug "bug"
    }
    ConvertError {
        .0 of Source, Arch, Plan;
        NotFinite "weight-not-finite"
        TargetExists "target-exists"
        TargetNotAFile "target-not-a-file"
        TargetIsSource "target-is-source"
        NoSpace "no-space"
        Target "target-unwritable"
        NotDurable "target-not-durable"
        PartialInUse "partial-in-use"
        PartialDiffers "partial-differs"
        PartialSource "partial-source-changed"
        Cancelled "cancelled"
        Threads "no-threads"
        SyncThread "no-threads"
    }
    SourceError {
        .source of Header, Quantised;
        Io "source-unreadable"
        NotACheckpoint "source-not-a-checkpoint"
        NoWeights "source-no-weights"
        HubCache "source-hub-cache"
        NoConfig "source-no-config"
        NotAFile "source-not-a-file"
        LinkLeavesFolder "source-link-outside"
        ShardName "source-shard-name"
        EmptyIndex "source-empty-index"
        MissingShard "source-shard-missing"
        TooManyFiles "source-too-many-files"
        LfsPointer "source-lfs-pointer"
        TooLarge "source-file-too-large"
        Json "source-json"
        DuplicateKey "source-duplicate-key"
        NotInShard "source-not-in-shard"
        Unstorable "source-unstorable"
        Unmerged "source-adapter-not-merged"
        DuplicateTensor "source-duplicate-tensor"
    }
    HeaderError {
        TooShort "safetensors-too-short"
        LfsPointer "safetensors-lfs-pointer"
        TooLarge "safetensors-header-too-large"
        Truncated "safetensors-truncated"
        Json "safetensors-json"
        DuplicateKey "safetensors-duplicate-key"
        DuplicateField "safetensors-duplicate-field"
        MissingField "safetensors-missing-field"
        TooManyTensors "safetensors-too-many-tensors"
        NameTooLong "safetensors-name-too-long"
        UnknownType "safetensors-dtype"
        TensorLength "safetensors-tensor-length"
        Impossible "safetensors-impossible"
        Layout "safetensors-layout"
        FileLength "safetensors-file-length"
    }
    Quantised {
        Config "quantised-config"
        Bitsandbytes "quantised-bitsandbytes"
        Packed "quantised-packed"
        Scaled "quantised-scaled"
        Narrow "quantised-narrow"
    }
    ArchError {
        .0 of Config;
        MissingTensor "model-missing-tensor"
        Shape "model-tensor-shape"
    }
    ConfigError {
        Json "config-json"
        ModelType "config-model-type"
        MissingKey "config-missing-key"
        BadValue "config-bad-value"
        Indivisible "config-indivisible"
        Overflow "config-overflow"
        TooManyLayers "config-too-many-layers"
    }
    Obstacle {
        .0 of Config;
        HeadDim "run-head-dim"
        Norm "run-norm"
        Part "run-part"
        PartTwice "run-part-twice"
        FusedRows "run-fused-rows"
        NoConfig "run-no-config"
        MissingFile "run-missing-file"
        BadFile "run-bad-file"
        LayerCount "run-layer-count"
        Missing "run-missing-tensor"
        Shape "run-tensor-shape"
    }
    PlanError {
        .0 of Format;
        BlockSize "plan-block-size"
        NoMatch "plan-no-match"
        Provenance "plan-provenance"
    }
    FormatError {
        TooShort "pack-too-short"
        BadMagic "pack-bad-magic"
        UnsupportedVersion "pack-version"
        UnknownFeatures "pack-features"
        FileLength "pack-file-length"
        Checksum "pack-checksum"
        Reserved "pack-reserved-byte"
        Limit "pack-limit"
        Header "pack-header"
        NameRange "pack-name-range"
        NameNotUtf8 "pack-name-not-utf8"
        NameDuplicate "pack-name-duplicate"
        FileName "pack-file-name"
        Unknown "pack-unknown-value"
        Zero "pack-zero"
        Mismatch "pack-mismatch"
        ShapeOverflow "pack-shape-overflow"
        OffsetOverflow "pack-offset-overflow"
        Order "pack-order"
        Unpaired "pack-unpaired"
        LayerMissing "pack-layer-missing"
        MetadataNotUtf8 "pack-metadata-not-utf8"
        PayloadChecksum "pack-payload-checksum"
        ScaleNotFinite "pack-scale-not-finite"
        ScaleNegative "pack-scale-negative"
        CodePadding "pack-code-padding"
        Padding "pack-padding"
    }
    OpenError {
        .source of Format;
        Io "pack-unreadable"
    }
    ReadError {
        .0 of Open;
        .source of Damaged;
        Truncated "pack-cut-in-use"
        Io "stream-unreadable"
        Memory "no-memory"
    }
    LayerError {
        .source of Format, Globals;
        OutOfRange "layer-out-of-range"
    }
    VerifyError {
        .0 of Source, Arch, Read;
        Damaged "pack-damaged"
        Cancelled "cancelled"
        Threads "no-threads"
    }
    ExportError {
        .0 of Verify, Write, Obstacle;
        Overflow "export-overflow"
    }
    WriteError {
        .0 of Pack;
        Memory "no-memory"
        TargetExists "target-folder-exists"
        NoSpace "no-space"
        TensorName "target-tensor-name"
        Source "source-unreadable"
        Target "target-unwritable"
        Safetensors "target-safetensors"
        NotDurable "target-not-durable"
        Cancelled "cancelled"
    }
    MergeError {
        .0 of Verify, Model, Adapter, Source, Write;
        OtherBase "merge-other-base"
        NoProjection "merge-no-projection"
        NotFinite "merge-not-finite"
    }
    CompareError {
        .0 of Model, Memory, Convert, Write;
        Pattern "compare-pattern"
        Empty "compare-empty"
    }
    GpuError {
        NoAdapter "gpu-none"
        NoSuchAdapter "gpu-no-such"
        NoDevice "gpu-no-device"
        NoFeature "gpu-no-feature"
        NoMatrixUnits "gpu-no-matrix-units"
        TooLarge "gpu-too-large"
        OutOfMemory "gpu-out-of-memory"
        KernelLimit "gpu-kernel-limit"
        Invalid "gpu-invalid"
        NotMapped "gpu-not-mapped"
        Overwritten "gpu-overwritten"
        DeviceLost "gpu-lost"
        Timeout "gpu-timeout"
    }
    DequantError {
        .0 of Gpu;
        Weights "dequant-weights"
        Range "dequant-range"
        OutputRange "dequant-output-range"
        Binding "dequant-binding"
        Unfit "dequant-unfit"
    }
    StreamError {
        .0 of Read, Gpu;
        Budget "gpu-budget"
        OutOfRange "layer-out-of-range"
        NoThread "no-threads"
        Loader "stream-loader"
    }
    OpError {
        .0 of Gpu, Weights;
        Unfit "op-unfit"
        Shape "op-shape"
        Value "op-value"
    }
    ModelError {
        .0 of Op, Stream, Config, Lora, Adapter, Data, Obstacle;
        MissingFile "pack-missing-file"
        MissingTensor "pack-missing-tensor"
        TensorShape "pack-tensor-shape"
        NotFinite "not-finite"
    }
    DataError {
        .source of File;
        Cancelled "cancelled"
        NoThread "no-threads"
        Panicked "bug"
        Empty "data-empty"
        Changed "data-changed"
        Memory "data-memory"
        Foreign "data-foreign"
        Array "data-array"
        Json "data-json"
        Read "data-unreadable"
        LineBytes "data-line-bytes"
        Messages "data-messages"
        NotAnObject "data-not-an-object"
        UnknownForm "data-unknown-form"
        OtherForm "data-other-form"
        Value "data-value"
        Utf8 "data-utf8"
        Tokenizer "tokenizer-unreadable"
        TokenizerRefused "tokenizer-refused"
        TokenizerJson "tokenizer-file-json"
        TokenizerFile "tokenizer-file-limit"
        NoDefaultTemplate "chat-no-default-template"
        Unlearned "data-unlearned"
        AllDropped "data-all-dropped"
        Template "template-broken"
        NoTemplate "data-no-template"
        Render "data-render"
        NoChatTemplate "chat-no-template"
        Chat "chat-render"
        Spans "data-spans"
        Encode "tokenizer-encode"
        TokenId "tokenizer-token-id"
        NothingHeldOut "data-nothing-held-out"
        NothingLearned "data-nothing-trained"
    }
    FileError {
        Io "io"
        NotAFile "file-not-regular"
        Link "file-link"
        TooLarge "file-too-large"
    }
    AdapterError {
        .0 of Lora, File;
        Read "adapter-unreadable"
        Write "adapter-unwritable"
        Safetensors "adapter-safetensors"
        Json "adapter-json"
        Settings "adapter-bad-value"
        Unsupported "adapter-unsupported"
        Pattern "adapter-pattern"
        SlowPattern "adapter-slow-pattern"
        SomeLayers "adapter-some-layers"
        Layers "adapter-layers"
        NoMatrices "adapter-no-matrices"
        MissingTensor "adapter-missing-tensor"
        UnexpectedTensor "adapter-unexpected-tensor"
        Vocabulary "adapter-vocabulary"
        SameMatrix "adapter-same-matrix"
        Shape "adapter-tensor-shape"
        Type "adapter-dtype"
        Length "adapter-length"
    }
    LoraError {
        Rank "lora-rank"
        Alpha "lora-alpha"
        Dropout "lora-dropout"
        NoTarget "lora-no-target"
        Target "lora-target"
        NotInModel "lora-not-in-model"
        TooLarge "lora-too-large"
    }
    MemoryError {
        .0 of Stream;
        Budget "gpu-budget"
        Matrix "gpu-matrix-too-large"
        Host "host-memory"
    }
    GenerateError {
        .0 of Model, Sampling, Memory;
        Budget "gpu-budget"
        NoPrompt "prompt-empty"
        TooLong "prompt-too-long"
    }
    SamplingError {
        Temperature "sampling-temperature"
        TopP "sampling-top-p"
        MinP "sampling-min-p"
        Logit "sampling-logit"
        NoToken "sampling-no-token"
    }
    RunError {
        .0 of Settings, Model, Plan, Checkpoint, Record;
        Locked "run-locked"
        Lock "run-lock"
        BestLost "run-best-lost"
        OtherRun "run-other-settings"
        Occupied "run-out-occupied"
        Elsewhere "run-checkpoint-elsewhere"
        NoCheckpoint "run-no-checkpoint"
        Diverged "run-diverged"
    }
    CheckpointError {
        .0 of File;
        .source of Adapter;
        Read "checkpoint-unreadable"
        Remove "checkpoint-remove"
        SetAside "checkpoint-set-aside"
        Json "checkpoint-json"
        Safetensors "checkpoint-safetensors"
        Format "checkpoint-format"
        Tensor "checkpoint-tensor"
        StateChecksum "checkpoint-state-checksum"
        Step "checkpoint-step"
        Checksum "checkpoint-checksum"
        Length "checkpoint-length"
    }
    RecordError {
        .0 of File;
        Read "record-unreadable"
        Write "record-unwritable"
        Json "record-json"
    }
    SettingsError {
        .source of Lora;
        Value "settings-value"
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::ErrorKind;

    use super::*;

    const DOCUMENT: &str = include_str!("../../../docs/error-codes.md");

    /// Codes that several errors share.
    const SHARED: [&str; 11] = [
        "bug",
        "io",
        "source-unreadable",
        "cancelled",
        "no-threads",
        "no-space",
        "no-memory",
        "target-unwritable",
        "target-not-durable",
        "gpu-budget",
        "layer-out-of-range",
    ];

    #[test]
    fn a_code_belongs_to_one_error() {
        let mut seen = BTreeSet::new();
        for &code in ALL {
            assert!(seen.insert(code) || SHARED.contains(&code), "{code} stands for several errors");
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(code.chars().all(plain) && !code.starts_with('-') && !code.ends_with('-'), "{code} is not kebab-case");
        }
        assert!(SHARED.iter().all(|shared| ALL.iter().filter(|&code| code == shared).count() > 1));
    }

    #[test]
    fn every_code_is_documented_once() {
        let row = |line: &'static str| Some(line.strip_prefix("| `")?.split_once('`')?.0);
        let documented: Vec<&str> = DOCUMENT.lines().filter_map(row).collect();
        let unique: BTreeSet<&str> = documented.iter().copied().collect();
        assert_eq!(documented.len(), unique.len(), "a code has two rows in docs/error-codes.md");
        let known: BTreeSet<&str> = ALL.iter().copied().collect();
        let missing: Vec<_> = known.difference(&unique).collect();
        let unknown: Vec<_> = unique.difference(&known).collect();
        assert!(
            missing.is_empty() && unknown.is_empty(),
            "docs/error-codes.md lacks {missing:?}, and has the unknown {unknown:?}"
        );
    }

    #[test]
    fn the_innermost_error_with_a_code_of_its_own_is_named() {
        let magic = || FormatError::BadMagic { found: [0; 8] };
        let open = OpenError::Format { path: "p".into(), source: magic() };
        assert_eq!(code(&StreamError::from(ReadError::from(open)).into()), "pack-bad-magic");
        assert_eq!(code(&anyhow::Error::from(magic()).context("more")), "pack-bad-magic");
        let refused = || std::io::Error::from(ErrorKind::PermissionDenied);
        let read = SourceError::Io { path: "p".into(), source: refused() };
        assert_eq!(code(&ConvertError::Source(read).into()), "source-unreadable");
        assert_eq!(code(&anyhow::Error::from(refused()).context("cannot read p")), "io");
        assert_eq!(code(&anyhow::anyhow!("something")), "other");
    }
}
