//! Decodes a tensor of a pack on the CPU and prints its first values:
//! `cargo run --release --example read_tensor -- PACK [NAME]` (without NAME, it lists the tensors)
#![forbid(unsafe_code)]

use std::error::Error;

use half::{bf16, f16};
use nf4pack::MappedPack;
use nf4pack::format::{FloatType, Pack};

/// Number of printed values.
const COUNT: usize = 8;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: read_tensor PACK [NAME]")?;
    let mapped = MappedPack::read(path)?;
    let pack = mapped.pack();
    let Some(name) = args.next() else {
        pack.quantized_tensors().for_each(|p| println!("{} {}", p.name, p.shape));
        pack.raw_tensors().for_each(|t| println!("{} {}", t.name, t.shape));
        return Ok(());
    };
    println!("{name}: {:?}", first_values(pack, &name)?);
    Ok(())
}

fn first_values(pack: Pack<'_>, name: &str) -> Result<Vec<f32>, Box<dyn Error>> {
    if let Some(projection) = pack.quantized_tensor(name) {
        let mut values = vec![0.0; COUNT.min(projection.data.elements as usize)];
        nf4pack::dequant::dequantize(&projection.data, 0, &mut values)?;
        return Ok(values);
    }
    let tensor = pack.raw_tensor(name).ok_or("no such tensor; run without NAME to list the tensors")?;
    let value: fn(&[u8]) -> f32 = match tensor.float_type {
        FloatType::F32 => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        FloatType::F16 => |b| f16::from_le_bytes([b[0], b[1]]).to_f32(),
        FloatType::Bf16 => |b| bf16::from_le_bytes([b[0], b[1]]).to_f32(),
    };
    let size = if tensor.float_type == FloatType::F32 { 4 } else { 2 };
    Ok(tensor.bytes.chunks_exact(size).take(COUNT).map(value).collect())
}
