//! The files of a fuzz target, and bytes drawn at random, for the checks of the targets as ordinary
//! tests.

use std::path::Path;

/// Runs the check over the target's seeds and over the inputs that it once failed on; gives how
/// many there were.
pub fn replay(target: &str, check: impl Fn(&[u8])) -> usize {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let folders = [fuzz.join("corpus").join(target), fuzz.join("regressions").join(target)];
    let mut count = 0;
    for entry in folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap()) {
        let path = entry.unwrap().path();
        // Shown where the test fails.
        println!("{}", path.display());
        check(&std::fs::read(&path).unwrap());
        count += 1;
    }
    count
}

/// Runs the check on `rounds` inputs drawn at random: where edits are drawn from them, that reaches
/// as far as fuzzing does at first.
pub fn draw(rounds: usize, check: impl Fn(&[u8])) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    for round in 0..rounds {
        let bytes: Vec<u8> = (0..16 + round % 200).map(|_| next()).collect();
        check(&bytes);
    }
}

/// As [`draw`], for checks that take text as a file and other bytes as a choice of changes.
pub fn draw_changes(rounds: usize, check: impl Fn(&[u8])) {
    draw(rounds, |bytes| check(&[&[0x90], bytes].concat()));
}
