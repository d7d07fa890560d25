//! Streams the layers of a pack through a GPU, decodes one projection of each layer, and compares
//! it with the CPU: `cargo run --release --example stream_layer -- PACK [BUDGET_IN_BYTES]`
#![forbid(unsafe_code)]

use std::error::Error;

use nf4pack::MappedPack;
use nf4pack::dequant::stream::{Direction, LayerStream, StreamOptions};
use nf4pack::dequant::{Dequantizer, Output, dequantize};
use nf4pack::gpu::{Gpu, Options};

/// Number of compared values.
const COUNT: u64 = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: stream_layer PACK [BUDGET_IN_BYTES]")?;
    let budget = args.next().map(|bytes| bytes.parse()).transpose()?;

    let gpu = Gpu::open(&Options::from_env())?;
    let kernels = Dequantizer::new(&gpu)?;
    let mut stream = LayerStream::open(&gpu, &path, &StreamOptions { budget, ..StreamOptions::default() })?;
    println!("{}: {} of {} layers at a time", gpu.adapter(), stream.plan().slots, stream.layer_count());

    let mapped = MappedPack::read(&path)?;
    for number in 0..stream.layer_count() {
        let layer = stream.layer(number, Direction::Forward)?;
        let Some(projection) = layer.quantized_tensors.first() else { continue };
        let count = projection.weights.elements.min(COUNT);
        let bytes = kernels.read(&projection.weights, 0..count, Output::F32)?;
        let floats = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let found: Vec<f32> = floats.collect();

        let on_disk = mapped.pack().quantized_tensor(&projection.name).ok_or("the pack has changed")?;
        let mut expected = vec![0.0; count as usize];
        dequantize(&on_disk.data, 0, &mut expected)?;
        if found != expected {
            return Err(format!("{}: the values of GPU and CPU differ", projection.name).into());
        }
        println!("{} {}: {:?} ..", projection.name, projection.shape, &found[..found.len().min(4)]);
    }
    Ok(())
}
