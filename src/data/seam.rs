//! Comparison of the texts that a template writes between messages. They are compared by atoms
//! (marks, words, characters): `<|user|>` and `<|end|>` have nothing in common.

/// Bytes of the first atom of a text: `<..>` or `[..]` without blanks, a word, or a character.
fn atom(text: &str) -> usize {
    let Some(first) = text.chars().next() else { return 0 };
    let close = match first {
        '<' => Some('>'),
        '[' => Some(']'),
        _ => None,
    };
    if let Some(close) = close {
        let stop = text.char_indices().skip(1).find(|&(_, c)| c == close || c == first || c.is_whitespace());
        if let Some((at, _)) = stop.filter(|&(_, c)| c == close) {
            return at + close.len_utf8();
        }
    }
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    match is_word(first) {
        true => text.find(|c| !is_word(c)).unwrap_or(text.len()),
        false => first.len_utf8(),
    }
}

fn each_atom(mut text: &str) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let (first, rest) = text.split_at_checked(atom(text)).filter(|(first, _)| !first.is_empty())?;
        text = rest;
        Some(first)
    })
}

fn atoms(text: &str) -> Vec<&str> {
    each_atom(text).collect()
}

fn bytes(atoms: &[&str]) -> usize {
    atoms.iter().map(|atom| atom.len()).sum()
}

/// Bytes that two texts have in common at their start: all of `b`, or whole atoms.
pub(super) fn common_prefix(a: &str, b: &str) -> usize {
    if a.starts_with(b) {
        return b.len();
    }
    let same = each_atom(a).zip(each_atom(b)).take_while(|(a, b)| a == b);
    same.map(|(atom, _)| atom.len()).sum()
}

/// Bytes of whole atoms that two texts have in common at their end.
pub(super) fn common_suffix(a: &str, b: &str) -> usize {
    if b.is_empty() {
        return 0;
    }
    let same = atoms(a).into_iter().rev().zip(atoms(b).into_iter().rev()).take_while(|(a, b)| a == b);
    same.map(|(atom, _)| atom.len()).sum()
}

/// The end of the last `header` in a seam, if it has one; a blank header does not count.
pub(super) fn header_end(seam: &str, header: &str) -> Option<usize> {
    let (seam, of_header) = (atoms(seam), atoms(header));
    let at = seam.windows(of_header.len().max(1)).rposition(|window| window == of_header)?;
    (!header.trim().is_empty()).then(|| bytes(seam.get(..at + of_header.len()).unwrap_or_default()))
}

/// Bytes up to the end of the first atom that is not blank, including the blanks after it.
pub(super) fn first_mark(text: &str) -> usize {
    let rest = text.trim_start();
    let after = rest.get(atom(rest)..).unwrap_or_default();
    text.len() - after.trim_start().len()
}

/// The end of the last of some strings in a text.
pub(super) fn last_end(text: &str, strings: &[String]) -> Option<usize> {
    strings.iter().filter_map(|string| Some(text.rfind(string.as_str())? + string.len())).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_and_words_are_whole() {
        assert_eq!(atoms("<|im_end|>\n[/INST] été_1</s>"), ["<|im_end|>", "\n", "[/INST]", " ", "été_1", "</s>"]);
        assert_eq!(atoms("a < b [x y]<"), ["a", " ", "<", " ", "b", " ", "[", "x", " ", "y", "]", "<"]);
        assert_eq!(common_prefix("<|end|>\n<|user|>", "<|end|>\n<|endoftext|>"), "<|end|>\n".len());
        assert_eq!(common_prefix("</s>user", "</s>us"), "</s>us".len(), "all of the second text");
        assert_eq!(common_prefix("user:", "users:"), 0);
        assert_eq!(common_suffix("<|a|><|h|>x\n", "<|b|><|h|>x\n"), "<|h|>x\n".len());
    }

    #[test]
    fn the_last_header_of_a_seam_counts() {
        let header = "<|im_start|>assistant\n";
        let end = |seam: &str| header_end(seam, header).map(|end| seam[..end].to_owned());
        assert_eq!(end("</r>\n<|im_start|>assistant\n<think>\n").unwrap(), "</r>\n<|im_start|>assistant\n");
        let twice = "<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(end(twice).unwrap(), twice);
        assert_eq!(end("</r>\n<|im_start|>assistants\n"), None);
        assert_eq!([header_end("a b", ""), header_end("a b", " "), header_end("", "a")], [None; 3]);
        assert_eq!(last_end("a</s>b</s><x>", &["</s>".into(), "<y>".into()]), Some(10));
    }
}
