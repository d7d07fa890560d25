//! Samples to rows of one length. A row has several samples, and attention never crosses samples.

use super::sample::Sample;
use crate::random::{Generator, Stream};

/// The label of a token whose successor is not learned.
pub const IGNORE_INDEX: u32 = u32::MAX;

/// Tokens of some rows, one row after the other, without padding. A token sees only its own sample,
/// so a row is only a number of tokens. All vectors have one element per token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Rows.
    pub rows: u32,
    /// The tokens.
    pub tokens: Vec<u32>,
    /// One per token: the next token of the same sample, or [`IGNORE_INDEX`].
    pub labels: Vec<u32>,
    /// One per token: the index in this batch of its sample's first token.
    pub starts: Vec<u32>,
    /// Labels other than [`IGNORE_INDEX`].
    pub loss_tokens: u64,
}

/// The order of `count` samples in an epoch, from 0: another one in each.
pub fn epoch_order(count: usize, seed: u64, epoch: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    Generator::new(seed, Stream::Order { epoch }).shuffle(&mut order);
    order
}

/// The samples of each row: in `order`, each sample into the first row with room for it. Samples
/// longer than `length` are skipped; [`Dataset`](super::Dataset) has none, since it cuts them.
pub fn rows(samples: &[Sample], order: &[usize], length: u32) -> Vec<Vec<usize>> {
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut room = Room::new(order.len(), length as usize);
    for &i in order {
        let Some(needed) = samples.get(i).map(|sample| sample.tokens.len()) else { continue };
        let Some(row) = room.take(needed) else { continue };
        if row >= rows.len() {
            rows.resize_with(row + 1, Vec::new);
        }
        if let Some(row) = rows.get_mut(row) {
            row.push(i);
        }
    }
    rows
}

/// The free tokens of each row, as a tree of maxima: it finds the first row with enough of them in
/// logarithmic time.
struct Room {
    /// Node 1 is the root, the children of node `i` are `2i` and `2i + 1`; the leaves are the rows.
    tree: Vec<usize>,
    leaves: usize,
}

impl Room {
    fn new(rows: usize, length: usize) -> Self {
        let leaves = rows.next_power_of_two();
        Self { tree: vec![length; 2 * leaves], leaves }
    }

    /// Takes `needed` tokens from the first row that has them free.
    fn take(&mut self, needed: usize) -> Option<usize> {
        let has = |tree: &[usize], node: usize| tree.get(node).is_some_and(|&room| room >= needed);
        let mut node = 1;
        if !has(&self.tree, node) {
            return None;
        }
        while node < self.leaves {
            node *= 2;
            node += usize::from(!has(&self.tree, node));
        }
        let row = node - self.leaves;
        *self.tree.get_mut(node)? -= needed;
        while node > 1 {
            node /= 2;
            let child = |i: usize| self.tree.get(2 * node + i).copied().unwrap_or_default();
            let max = child(0).max(child(1));
            *self.tree.get_mut(node)? = max;
        }
        Some(row)
    }
}

/// The batch of some rows that [`rows`] made.
pub fn batch(samples: &[Sample], rows: &[Vec<usize>]) -> Batch {
    let mut batch =
        Batch { rows: rows.len() as u32, tokens: Vec::new(), labels: Vec::new(), starts: Vec::new(), loss_tokens: 0 };
    rows.iter().flatten().filter_map(|&i| samples.get(i)).for_each(|sample| batch.push(sample));
    batch
}

impl Batch {
    fn push(&mut self, sample: &Sample) {
        let start = self.tokens.len() as u32;
        let targets = sample.tokens.iter().zip(&sample.loss_mask).skip(1);
        let labels = targets.map(|(&token, &learned)| if learned { token } else { IGNORE_INDEX });
        self.labels.extend(labels);
        self.labels.extend(sample.tokens.last().map(|_| IGNORE_INDEX));
        self.tokens.extend(&sample.tokens);
        self.starts.resize(self.tokens.len(), start);
        self.loss_tokens += sample.loss_tokens();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sample with the tokens `first`, `first + 1`, ... and a loss mask.
    fn sample(first: u32, loss_mask: &[bool]) -> Sample {
        Sample { line: 1, tokens: (first..).take(loss_mask.len()).collect(), loss_mask: loss_mask.to_vec() }
    }

    fn of_length(length: usize) -> Sample {
        sample(1, &vec![true; length])
    }

    #[test]
    fn labels_are_shifted_and_stay_in_their_sample() {
        let samples = [sample(10, &[true, false, true]), sample(20, &[false, true])];
        let batch = batch(&samples, &[vec![0, 1], vec![1]]);
        assert_eq!((batch.rows, batch.loss_tokens), (2, 3));
        assert_eq!(batch.tokens, [10, 11, 12, 20, 21, 20, 21]);
        let u = IGNORE_INDEX;
        assert_eq!(batch.labels, [u, 12, u, 21, u, 21, u]);
        assert_eq!(batch.starts, [0, 0, 0, 3, 3, 5, 5]);
    }

    #[test]
    fn samples_go_into_the_first_row_with_room() {
        let samples: Vec<Sample> = [6, 5, 4, 4, 1, 10].map(of_length).into();
        let order = [0, 1, 2, 3, 4, 5];
        assert_eq!(rows(&samples, &order, 10), [vec![0, 2], vec![1, 3, 4], vec![5]]);
        assert_eq!(rows(&samples, &[5, 4, 3], 10), [vec![5], vec![4, 3]]);
        assert_eq!(rows(&samples, &[], 10), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn packing_is_first_fit_for_random_lengths() {
        let mut generator = Generator::new(3, Stream::Split);
        let samples: Vec<Sample> = (0..300).map(|_| of_length(1 + generator.below(64))).collect();
        let order = epoch_order(samples.len(), 3, 0);
        let mut naive: Vec<(usize, Vec<usize>)> = Vec::new();
        for &i in &order {
            let length = samples[i].tokens.len();
            match naive.iter_mut().find(|(room, _)| *room >= length) {
                Some((room, row)) => {
                    *room -= length;
                    row.push(i);
                }
                None => naive.push((64 - length, vec![i])),
            }
        }
        let naive: Vec<Vec<usize>> = naive.into_iter().map(|(_, row)| row).collect();
        assert_eq!(rows(&samples, &order, 64), naive);
    }

    #[test]
    fn every_epoch_has_its_order() {
        let order = epoch_order(50, 7, 0);
        assert_eq!(order, epoch_order(50, 7, 0));
        assert_ne!(order, epoch_order(50, 7, 1));
        assert_ne!(order, epoch_order(50, 8, 0));
        let mut sorted = order;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
    }
}
