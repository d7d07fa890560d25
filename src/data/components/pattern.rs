//! Patterns of a tokenizer.json that are matched by trial and error: their trials must not
//! multiply.
//!
//! Plain patterns take linear time. The library matches those with look-arounds and
//! back-references by trial and error, up to a million trials for each match, and a trial may
//! compare a whole line.

use fancy_regex::Expr;

/// What [`takes_long`] refuses.
pub(super) const EXPECTED: &str = "a regular expression without back-references and, if it has a look-around, without \
     repeats and choices within repeats";

/// Whether the trials of a pattern multiply.
pub(super) fn takes_long(regex: &str) -> bool {
    let shape = Shape::of(regex);
    shape.refers || shape.tries && shape.multiplies
}

/// Whether a pattern is matched by trial and error.
pub(in crate::data) fn looks_around(regex: &str) -> bool {
    let shape = Shape::of(regex);
    shape.refers || shape.tries
}

/// What decides on the time of a pattern.
#[derive(Default)]
struct Shape {
    /// It has back-references or conditions.
    refers: bool,
    /// It has look-arounds, or the like: it is matched by trial and error.
    tries: bool,
    /// A part that matches in several ways is repeated.
    multiplies: bool,
}

impl Shape {
    fn of(regex: &str) -> Self {
        let mut shape = Self::default();
        // The library names what is wrong with a pattern that it cannot read.
        if let Ok(tree) = Expr::parse_tree(regex) {
            shape.visit(&tree.expr, false);
        }
        shape
    }

    fn visit(&mut self, expr: &Expr, repeated: bool) {
        match expr {
            Expr::Empty | Expr::Any { .. } | Expr::Literal { .. } | Expr::Delegate { .. } => {}
            Expr::Concat(parts) => {
                self.multiplies |= looks_far_from_many_places(parts);
                parts.iter().for_each(|part| self.visit(part, repeated));
            }
            Expr::Alt(parts) => {
                self.multiplies |= repeated;
                parts.iter().for_each(|part| self.visit(part, repeated));
            }
            Expr::Group(inner) => self.visit(inner, repeated),
            Expr::Repeat { child, lo, hi, .. } => {
                self.multiplies |= repeated && lo != hi;
                self.visit(child, repeated || *hi > 1);
            }
            Expr::LookAround(inner, _) | Expr::AtomicGroup(inner) => {
                self.tries = true;
                self.visit(inner, repeated);
            }
            Expr::Assertion(_) | Expr::KeepOut => self.tries = true,
            _ => self.refers = true,
        }
    }
}

/// Whether a look-around, or what follows one, may read the rest of the text, and does so for each
/// length of a repeat before it.
fn looks_far_from_many_places(parts: &[Expr]) -> bool {
    let (mut repeats, mut looks) = (false, false);
    parts.iter().any(|part| {
        let far = within(part, false, &|expr, in_look| is_endless(expr) && (in_look || looks));
        let multiplies = repeats && far;
        repeats |= within(part, false, &|expr, _| is_endless(expr));
        looks |= within(part, false, &|expr, _| matches!(expr, Expr::LookAround(..)));
        multiplies
    })
}

/// Whether a repeat has no end.
fn is_endless(expr: &Expr) -> bool {
    matches!(expr, Expr::Repeat { hi: usize::MAX, .. })
}

/// Whether something in an expression is wanted: `wanted` gets it, and whether it is in a
/// look-around.
fn within(expr: &Expr, in_look: bool, wanted: &dyn Fn(&Expr, bool) -> bool) -> bool {
    let inner = |expr: &Expr| within(expr, in_look, wanted);
    wanted(expr, in_look)
        || match expr {
            Expr::Concat(parts) | Expr::Alt(parts) => parts.iter().any(inner),
            Expr::Group(child) => inner(child),
            Expr::Repeat { child, .. } | Expr::AtomicGroup(child) => inner(child),
            Expr::LookAround(child, _) => within(child, true, wanted),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trials_that_multiply_are_found() {
        for slow in [
            r"(a*)*\1*(.*)*c",
            r"(a)\1",
            r"(?<x>a)\k<x>",
            r"(a)?(?(1)b|c)",
            r"(?:(?=a)a+)+b",
            r"(?:a|a)*(?!b)",
            r"(?:a?){50}(?=c)",
            r"(?=(a+)+b)a",
            r"(?:(?>a*)a*)*b",
            r"(?:\s|\S)+\b",
            r"a*(?=.*x)",
            r"(\s+)((?!.*x))",
            r"\s+(?!\S).*x",
            r"\G.",
        ] {
            assert!(takes_long(slow), "{slow}");
        }
        for fast in [
            r"(a+)+",
            r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lo}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)",
            r"\d{1,3}(?=(\d{3})*\b)",
            r"(?=(\d{3})+(?!\d))",
            r"\p{N}++",
            "(",
        ] {
            assert!(!takes_long(fast), "{fast}");
        }
    }
}
