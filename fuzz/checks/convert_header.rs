//! Any bytes as the start of a safetensors file: the header is refused, or its tensors lie inside
//! the file without overlap.

use nf4pack::convert::source::{MAX_NAME_LEN, MAX_RANK, parse_header};

/// Bytes of data behind a header that is given without its length.
const DATA: [u64; 5] = [0, 2, 4, 12, 64];

/// Runs the check: the bytes as a whole file, as the start of a file of the length that the last
/// eight bytes say, and as a header without its length.
pub fn run(bytes: &[u8]) {
    parse(bytes, bytes.len() as u64);
    if let Some((start, len)) = bytes.split_last_chunk() {
        parse(start, u64::from_le_bytes(*len));
    }
    // JSON is hard to reach behind a length that must fit: here all bytes are the header. Spaces at
    // its end choose the length of the data.
    let mut file = (bytes.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(bytes);
    parse(&file, file.len() as u64 + DATA[bytes.len() % DATA.len()]);
}

/// What holds for a file of this length that starts with these bytes.
pub fn parse(bytes: &[u8], file_len: u64) {
    let header = match parse_header(bytes, file_len) {
        Ok(header) => header,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    assert!(header.data_start >= 8 && header.data_start <= file_len);
    let tensors = header.tensors.iter().map(|tensor| (tensor.offset, tensor.length));
    let mut all: Vec<(u64, u64)> =
        tensors.chain(header.unstorable.iter().map(|tensor| (tensor.offset, tensor.length))).collect();
    all.sort_unstable();
    let mut end = header.data_start;
    for (offset, length) in all {
        assert_eq!(offset, end, "no hole, no overlap");
        end = offset.checked_add(length).expect("inside the file");
    }
    for tensor in &header.tensors {
        assert!((1..=MAX_RANK).contains(&tensor.shape.len()) && tensor.name.len() <= MAX_NAME_LEN);
        let elements = tensor.shape.iter().try_fold(1_u64, |n, &d| n.checked_mul(d)).expect("no overflow");
        assert_eq!(elements * tensor.float_type.size() as u64, tensor.length);
    }
    assert_eq!(end, file_len);
}
