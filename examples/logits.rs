//! Writes the logits of a token sequence, [tokens, vocabulary] in little-endian float32, for
//! comparison with other programs: `logits PACK ADAPTER|none IDS OUT`. IDS is a file of token ids,
//! separated by whitespace.
#![forbid(unsafe_code)]

use nf4pack::arch::ModelConfig;
use std::error::Error;
use std::fs;
use std::path::Path;

use nf4pack::dequant::stream::PackSource;
use nf4pack::gpu::{Gpu, Options};
use nf4pack::lora::Adapter;
use nf4pack::model::{MemoryPlan, Session};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [pack, adapter, ids, out] = arguments.as_slice() else {
        return Err("usage: logits PACK ADAPTER|none IDS OUT".into());
    };
    let tokens = fs::read_to_string(ids)?.split_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>()?;
    let count = u32::try_from(tokens.len())?;
    let gpu = Gpu::open(&Options::from_env())?;
    let pack = PackSource::open(pack)?;
    let model = ModelConfig::of_pack(&pack)?;
    let adapter = match adapter.as_str() {
        "none" => None,
        folder => Some(Adapter::read(Path::new(folder), &model)?),
    };
    let plan = MemoryPlan::one_row(&gpu, &pack, &model, adapter.as_ref(), count)?;
    let logits = Session::open(&gpu, pack, adapter.as_ref(), &plan)?.logits(&tokens)?;
    fs::write(out, logits.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
    println!("{count} x {} logits", logits.len() / tokens.len().max(1));
    Ok(())
}
