//! Checksums of a changed pack, made right again. Also used by the fuzz targets, so it accepts any
//! bytes, and knows the layout only from sections 2 and 4 of the specification.

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..offset.checked_add(8)?)?.try_into().ok().map(u64::from_le_bytes)
}

/// The bytes that a position and a length at `offset` and `offset + 8` name, if there are any.
fn named(bytes: &[u8], offset: usize) -> Option<&[u8]> {
    let start = usize::try_from(u64_at(bytes, offset)?).ok()?;
    let len = usize::try_from(u64_at(bytes, offset + 8)?).ok()?;
    bytes.get(start..start.checked_add(len)?)
}

fn store(bytes: &mut [u8], offset: usize, crc: Option<u32>) {
    if let (Some(crc), Some(field)) = (crc, bytes.get_mut(offset..offset + 4)) {
        field.copy_from_slice(&crc.to_le_bytes());
    }
}

/// Makes the checksums of index, metadata and header right, so that what they protect is looked at.
pub fn seal(bytes: &mut [u8]) {
    let index = named(bytes, 40).map(nf4pack::format::crc32);
    store(bytes, 88, index);
    let metadata = named(bytes, 72).map(nf4pack::format::crc32);
    store(bytes, 92, metadata);
    let header = bytes.get(..124).map(nf4pack::format::crc32);
    store(bytes, 124, header);
}

/// Makes the checksums of all payloads right, then those of the front.
pub fn seal_payloads(bytes: &mut [u8]) {
    let records = u64_at(bytes, 56).unwrap_or(0).min(bytes.len() as u64 / 96) as usize;
    for record in (0..records).map(|i| 128 + 96 * i) {
        let payload = named(bytes, record + 32).map(nf4pack::format::crc32);
        store(bytes, record + 80, payload);
    }
    seal(bytes);
}
