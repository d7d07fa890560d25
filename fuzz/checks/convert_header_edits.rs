//! A good safetensors header with something changed in some of its tensors: names, types, shapes,
//! places, the length of the file.

use arbitrary::{Result, Unstructured};

use super::convert_header;

const TYPES: [(&str, u64); 8] =
    [("F32", 4), ("F16", 2), ("BF16", 2), ("F64", 8), ("I64", 8), ("U8", 1), ("F8_E4M3", 1), ("Q4", 1)];

/// Runs the check.
pub fn run(bytes: &[u8]) {
    // Too few bytes for a list of tensors are no input.
    let _ = edited(&mut Unstructured::new(bytes)).map(|(file, len)| convert_header::parse(&file, len));
}

/// The start of a file, and the length of the whole of it.
fn edited(u: &mut Unstructured<'_>) -> Result<(Vec<u8>, u64)> {
    let mut place = 0_u64;
    let mut entries = Vec::new();
    if u.ratio(1, 4)? {
        entries.push(r#""__metadata__":{"format":"pt"}"#.to_owned());
    }
    for number in 0..u.int_in_range(0..=6)? {
        entries.push(tensor(u, number, &mut place)?);
    }
    let mut json = format!("{{{}}}", entries.join(",")).into_bytes();
    // As writers pad it, and as none does.
    json.resize(json.len() + u.int_in_range(0..=9)?, if u.ratio(7, 8)? { b' ' } else { 0 });
    if u.ratio(1, 8)? && !json.is_empty() {
        let at = u.choose_index(json.len())?;
        json[at] = u.arbitrary()?;
    }
    let header = if u.ratio(1, 16)? { u.arbitrary()? } else { json.len() as u64 };
    let len = place.wrapping_add(8 + json.len() as u64);
    let file_len = if u.ratio(1, 8)? { len.wrapping_add_signed(i64::from(u.arbitrary::<i8>()?)) } else { len };
    Ok(([&header.to_le_bytes(), &json[..]].concat(), file_len))
}

/// One tensor of the header, mostly behind the one before, and as long as its shape says.
fn tensor(u: &mut Unstructured<'_>, number: usize, place: &mut u64) -> Result<String> {
    let types = if u.ratio(7, 8)? { &TYPES[..3] } else { &TYPES };
    let &(name_of_type, size) = u.choose(types)?;
    let dim = |u: &mut Unstructured<'_>| if u.ratio(15, 16)? { u.int_in_range(1..=9) } else { u.arbitrary::<u64>() };
    let rank = if u.ratio(15, 16)? { u.int_in_range(1..=4)? } else { u.int_in_range(0..=9)? };
    let shape = (0..rank).map(|_| dim(u)).collect::<Result<Vec<u64>>>()?;
    let bytes = shape.iter().fold(size, |n, &d| n.wrapping_mul(d));
    let mut begin = *place;
    let mut end = begin.wrapping_add(bytes);
    if u.ratio(1, 16)? {
        begin = begin.wrapping_add_signed(i64::from(u.arbitrary::<i8>()?));
    }
    if u.ratio(1, 16)? {
        end = end.wrapping_add_signed(i64::from(u.arbitrary::<i8>()?));
    }
    *place = end;
    let name = if u.ratio(1, 16)? { u.arbitrary::<&str>()?.to_owned() } else { format!("model.layers.{number}.w") };
    let name = serde_json::to_string(&name).map_err(|_| arbitrary::Error::IncorrectFormat)?;
    Ok(format!(r#"{name}:{{"dtype":"{name_of_type}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#))
}
