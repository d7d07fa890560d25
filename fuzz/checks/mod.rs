//! The fuzz targets: for each one a function that gets any bytes and panics where something does
//! not hold. Tests run the same functions over the committed files of `corpus` and `regressions`.

pub mod adapter;
pub mod arch_config;
pub mod checkpoint;
pub mod convert_header;
pub mod convert_header_edits;
pub mod dequant;
pub mod index_json;
pub mod jsonl;
pub mod jsonl_stream;
pub mod parse;
pub mod parse_edits;
pub mod roundtrip;
pub mod template;
pub mod tokenizer;
pub mod verify;

pub mod json;
#[path = "../../tests/common/seal.rs"]
pub mod seal;

/// The only target of a program that is built for one. libFuzzer looks through the counters of the
/// whole program after each input: with those of all targets, small inputs take several times as
/// long.
const ONLY: Option<&str> = option_env!("NF4PACK_FUZZ_ONLY");

/// The names of the targets, and their checks. The linker drops what a constant leaves out.
macro_rules! targets {
    ($($target:ident,)*) => {
        /// The names of the targets.
        pub const NAMES: &[&str] = &[$(stringify!($target)),*];

        /// The check of a target that this program has.
        pub fn find(name: &str) -> Option<fn(&[u8])> {
            $(
                if const { is_built(stringify!($target)) } && name == stringify!($target) {
                    return Some($target::run);
                }
            )*
            None
        }
    };
}

targets! {
    adapter,
    arch_config,
    checkpoint,
    convert_header,
    convert_header_edits,
    dequant,
    index_json,
    jsonl,
    jsonl_stream,
    parse,
    parse_edits,
    roundtrip,
    template,
    tokenizer,
    verify,
}

/// Whether this program has a target.
const fn is_built(name: &str) -> bool {
    let Some(only) = ONLY else { return true };
    let (name, only) = (name.as_bytes(), only.as_bytes());
    let mut i = 0;
    while i < name.len() && i < only.len() && name[i] == only[i] {
        i += 1;
    }
    i == name.len() && i == only.len()
}
