//! Matrix operations as loops: the form of a kernel that runs on any device.
//!
//! A software driver compiles a copy of a function for each of its calls, and its time grows with
//! the square of the number of accesses to shared memory in the kernel. So a call only notes what
//! is to be done, in arrays of the thread, and one call of `coop_load` and of `coop_multiply` does
//! all that was noted since the previous one. They stand before the next barrier, store or branch,
//! while the memory of the matrices is as it was.
//!
//! Thread `lane` of a subgroup computes rows `lane / 8 * 4 ..` of C, and in them two columns, from
//! `lane % 8 * 2` on. It holds these four rows of A, too. So a product reads 32 elements of B.
//! With runtime checks, the driver ends all loops of a thread after 65,535 iterations: a product of
//! 16 x 16 x 16 takes 9.

use std::fmt::Write as _;

/// The declaration of a C, after its name.
const C_VARIABLE: &str = ": coop_mat16x16<f32, C>;";

/// The arrays of a thread, and the functions that use no array of the kernel. `COOP_A`, `COOP_C`,
/// `COOP_LOADS` and `COOP_PRODUCTS` are numbers of matrices and of notes.
const COMMON: &str = "
// A matrix in an array. `access` is twice the number of the array, and 1 more if the matrix lies by
// rows. `index` and `stride` count scalars.
struct CoopMatrix { access: u32, index: u32, stride: u32 }
struct CoopLoad { a: u32, matrix: CoopMatrix }
struct CoopProduct { a: u32, b: CoopMatrix, c: u32 }
var<private> coop_a: array<vec4<f32>, 16u * COOP_A>;
var<private> coop_c: array<vec4<f32>, 2u * COOP_C>;
var<private> coop_loads: array<CoopLoad, COOP_LOADS>;
var<private> coop_products: array<CoopProduct, COOP_PRODUCTS>;
var<private> coop_row: u32;
var<private> coop_column: u32;
// 0, which the compiler does not know: it unrolls no loop whose end has it.
var<private> coop_0: u32;
fn coop_zero(c: u32) -> u32 {
    coop_c[c] = vec4<f32>();
    coop_c[c + 1u] = vec4<f32>();
    return c;
}
fn coop_scale(c: u32, factor: f32) -> u32 {
    coop_c[c] *= factor;
    coop_c[c + 1u] *= factor;
    return c;
}
fn coop_matrix(access: u32, width: u32, index: u32, stride: u32) -> CoopMatrix {
    return CoopMatrix(access, index * width, stride * width);
}
fn coop_note(note: u32, a: u32, access: u32, width: u32, index: u32, stride: u32) -> u32 {
    coop_loads[note] = CoopLoad(a, coop_matrix(access, width, index, stride));
    return a;
}
fn coop_multiply_add(note: u32, a: u32, b: CoopMatrix, c: u32) -> u32 {
    coop_products[note] = CoopProduct(a, b, c);
    return c;
}
// The place of element (i, j) of a matrix.
fn coop_at(matrix: CoopMatrix, i: u32, j: u32) -> u32 {
    return matrix.index + select(i + j * matrix.stride, i * matrix.stride + j, matrix.access % 2u == 1u);
}
fn coop_load(count: u32) {
    for (var n = 0u; n < count + coop_0; n++) {
        let load = coop_loads[n];
        for (var k = 0u; k < 16u + coop_0; k++) {
            let low = vec2(coop_of_a(load.matrix, coop_row, k), coop_of_a(load.matrix, coop_row + 1u, k));
            coop_a[load.a + k] = vec4(low, coop_of_a(load.matrix, coop_row + 2u, k), coop_of_a(load.matrix, coop_row + 3u, k));
        }
    }
}
fn coop_multiply(count: u32) {
    for (var n = 0u; n < count + coop_0; n++) {
        let product = coop_products[n];
        var left = coop_c[product.c];
        var right = coop_c[product.c + 1u];
        for (var k = 0u; k < 16u + coop_0; k += 2u) {
            let first = coop_a[product.a + k];
            let second = coop_a[product.a + k + 1u];
            left += first * coop_of_b(product.b, k, coop_column);
            left += second * coop_of_b(product.b, k + 1u, coop_column);
            right += first * coop_of_b(product.b, k, coop_column + 1u);
            right += second * coop_of_b(product.b, k + 1u, coop_column + 1u);
        }
        coop_c[product.c] = left;
        coop_c[product.c + 1u] = right;
    }
}
";

/// The source with the matrix operations as loops, for subgroups of this number of threads.
pub(super) fn source(source: &str, subgroup: u32) -> String {
    let mut text = Text::new(source);
    text.walk();
    text.finish(subgroup)
}

/// An access to an array: `coopLoad<..>(&array[index], stride)` or
/// `coopStore(c, &array[index], stride)`.
#[derive(Debug)]
struct Access<'a> {
    /// `a`, `b` or `c`.
    role: char,
    store: bool,
    by_rows: bool,
    array: &'a str,
    /// The stored matrix, and the index of the first element.
    stored: &'a str,
    index: &'a str,
    /// Bytes of the source up to the bracket after the index.
    length: usize,
}

impl<'a> Access<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let name_end = text.find(['<', '('])?;
        let name = &text[..name_end];
        let store = match name.trim_end_matches('T') {
            "coopLoad" => false,
            "coopStore" => true,
            _ => return None,
        };
        let arguments = text.find('(')? + 1;
        let role = if store { 'c' } else { text[..arguments].chars().rfind(char::is_ascii_uppercase)?.to_ascii_lowercase() };
        let pointer = text[arguments..].find('&')? + arguments;
        let bracket = text[pointer..].find('[')? + pointer;
        let end = closing(&text[bracket..])? + bracket;
        let stored = text[arguments..pointer].trim_end_matches(", ");
        let (array, index) = (&text[pointer + 1..bracket], &text[bracket + 1..end]);
        Some(Self { role, store, by_rows: name.ends_with('T'), array, stored, index, length: end + 1 })
    }
}

/// The place of the bracket that closes the first one.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    text.find(|c: char| {
        depth += i32::from(c == '[') - i32::from(c == ']');
        depth == 0
    })
}

/// A block of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    /// Its statements run once, in their order.
    Plain,
    /// It has a condition, or it is a function.
    Branch,
}

/// An access to Cs in an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sums<'a> {
    array: &'a str,
    store: bool,
    by_rows: bool,
}

/// A source on its way to loops.
struct Text<'a> {
    source: &'a str,
    rest: &'a str,
    body: String,
    /// Where the present statement starts in `body`.
    statement: usize,
    parentheses: u32,
    blocks: Vec<Block>,
    /// The arrays from which an A is loaded, and those from which a B is.
    arrays: [Vec<&'a str>; 2],
    sums: Vec<Sums<'a>>,
    /// Used slots of A, each with the depth of its block: 0 if that is closed.
    slots: Vec<Option<usize>>,
    /// Number of Cs.
    cs: u32,
    /// In the head of a `for`: the number of semicolons so far.
    head: Option<u32>,
    /// Notes since the last loops, and their maxima.
    notes: [usize; 2],
    most: [usize; 2],
}

impl<'a> Text<'a> {
    fn new(source: &'a str) -> Self {
        Self {
            source,
            rest: source,
            body: String::with_capacity(2 * source.len()),
            statement: 0,
            parentheses: 0,
            blocks: Vec::new(),
            arrays: [Vec::new(), Vec::new()],
            sums: Vec::new(),
            slots: Vec::new(),
            cs: 0,
            head: None,
            notes: [0; 2],
            most: [1; 2],
        }
    }

    /// Copies bytes of the source.
    fn copy(&mut self, length: usize) {
        let (copied, rest) = self.rest.split_at(length);
        self.body.push_str(copied);
        self.rest = rest;
    }

    /// Rewrites the source.
    fn walk(&mut self) {
        while let Some(c) = self.rest.chars().next() {
            let word = self.rest.len() - self.rest.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_').len();
            match c {
                '/' if self.rest.starts_with("//") => self.copy(self.rest.find('\n').unwrap_or(self.rest.len())),
                '(' | ')' => {
                    self.parentheses = if c == '(' { self.parentheses + 1 } else { self.parentheses.saturating_sub(1) };
                    self.copy(1);
                }
                ';' => self.semicolon(),
                '{' | '}' => self.brace(c),
                _ if self.rest.starts_with(C_VARIABLE) => self.variable(),
                _ if word > 0 => self.word(word),
                _ => self.copy(c.len_utf8()),
            }
        }
    }

    fn semicolon(&mut self) {
        if let Some(count) = &mut self.head {
            *count += 1;
            if *count == 2 {
                self.body.push_str(" + coop_0");
                self.head = None;
            }
        }
        self.copy(1);
        if self.parentheses == 0 {
            self.statement = self.body.len();
        }
    }

    fn brace(&mut self, c: char) {
        if c == '{' {
            let plain = self.body[self.statement..].trim().is_empty() && !self.blocks.is_empty();
            self.blocks.push(if plain { Block::Plain } else { Block::Branch });
        } else {
            if self.blocks.pop() != Some(Block::Plain) {
                self.run();
            }
            let depth = self.blocks.len();
            self.slots.iter_mut().flatten().filter(|of| **of > depth).for_each(|of| *of = 0);
        }
        self.copy(1);
        self.statement = self.body.len();
    }

    /// `var name: coop_mat16x16<f32, C>;`, a matrix of zeros.
    fn variable(&mut self) {
        let _ = write!(self.body, " = coop_zero({}u)", 2 * self.cs);
        self.cs += 1;
        self.rest = &self.rest[C_VARIABLE.len() - 1..];
    }

    fn word(&mut self, length: usize) {
        let word = &self.rest[..length];
        match word {
            "for"
            | "if"
            | "else"
            | "while"
            | "loop"
            | "switch"
            | "return"
            | "workgroupBarrier"
            | "workgroupUniformLoad"
            | "coopScale" => self.run(),
            _ => {}
        }
        if word == "for" {
            self.head = Some(0);
        }
        match word {
            "coopLoad" | "coopLoadT" | "coopStore" | "coopStoreT" => {
                if let Some(access) = Access::parse(self.rest) {
                    return self.access(access);
                }
            }
            "coopMultiplyAdd" => {
                let _ = write!(self.body, "coop_multiply_add({}u, ", self.notes[1]);
                self.notes[1] += 1;
                self.rest = &self.rest[length + 1..];
                self.parentheses += 1;
                return;
            }
            "coopScale" => {
                self.body.push_str("coop_scale");
                self.rest = &self.rest[length..];
                return;
            }
            _ => {}
        }
        self.copy(length);
    }

    /// The call of a load or of a store, up to its stride.
    fn access(&mut self, access: Access<'a>) {
        self.rest = &self.rest[access.length..];
        self.parentheses += 1;
        let index = access.index;
        if access.role == 'c' {
            self.run();
            let Access { array, store, by_rows, .. } = access;
            let sums = Sums { array, store, by_rows };
            if !self.sums.contains(&sums) {
                self.sums.push(sums);
            }
            let c = if access.store { access.stored.to_owned() } else { format!("{}u", 2 * self.cs) };
            self.cs += u32::from(!access.store);
            let _ = write!(self.body, "{}({c}, {index}", sums.name());
            return;
        }
        let width = width(self.source, access.array);
        let arrays = &mut self.arrays[usize::from(access.role == 'b')];
        let number = arrays.iter().position(|&array| array == access.array).unwrap_or(arrays.len());
        if number == arrays.len() {
            arrays.push(access.array);
        }
        let number = 2 * number + usize::from(access.by_rows);
        // The stride follows.
        let b = format!("coop_matrix({number}u, {width}u, {index}");
        if access.role == 'b' {
            self.body.push_str(&b);
        } else {
            let slot = 16 * self.slot();
            let _ = write!(self.body, "coop_note({}u, {slot}u, {number}u, {width}u, {index}", self.notes[0]);
            self.notes[0] += 1;
        }
    }

    /// A free slot of an A, for the present block.
    fn slot(&mut self) -> usize {
        let free = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        if free == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[free] = Some(self.blocks.len());
        free
    }

    /// Ends the notes before the present statement.
    fn run(&mut self) {
        let mut calls = String::new();
        for (name, (count, most)) in ["coop_load", "coop_multiply"].into_iter().zip(self.notes.iter().zip(&mut self.most)) {
            if *count > 0 {
                let _ = write!(calls, " {name}({count}u);");
            }
            *most = (*most).max(*count);
        }
        self.body.insert_str(self.statement, &calls);
        self.statement += calls.len();
        self.notes = [0; 2];
        self.slots.iter_mut().filter(|slot| **slot == Some(0)).for_each(|slot| *slot = None);
    }

    fn finish(mut self, subgroup: u32) -> String {
        let sizes = [
            ("COOP_A", self.slots.len()),
            ("COOP_C", self.cs as usize),
            ("COOP_LOADS", self.most[0]),
            ("COOP_PRODUCTS", self.most[1]),
        ];
        let mut text = "enable f16;\n".to_owned();
        for (name, size) in sizes {
            let _ = writeln!(text, "const {name} = {}u;", size.max(1));
        }
        text.push_str(COMMON);
        for (name, arrays) in ["coop_of_a", "coop_of_b"].into_iter().zip(&self.arrays) {
            text.push_str(&elements(self.source, name, arrays));
        }
        for sums in &self.sums {
            text.push_str(&sums.function(self.source));
        }
        set_lane(&mut self.body, subgroup);
        text + &self.body
    }
}

/// The function of an element of a matrix in one of these arrays.
fn elements(source: &str, name: &str, arrays: &[&str]) -> String {
    let element = |array: &&str| format!("return f32({});", scalar(source, array, "at"));
    let mut text = format!("fn {name}(matrix: CoopMatrix, i: u32, j: u32) -> f32 {{\n    let at = coop_at(matrix, i, j);\n");
    text.push_str("    switch matrix.access / 2u {\n");
    for (number, array) in arrays.iter().enumerate().skip(1) {
        let _ = writeln!(text, "        case {number}u: {{ {} }}", element(array));
    }
    let first = arrays.first().map_or_else(|| "return 0.0;".to_owned(), element);
    let _ = writeln!(text, "        default: {{ {first} }}\n    }}\n}}");
    text
}

/// A scalar of an array whose elements are vectors of four, or scalars.
fn scalar(source: &str, array: &str, at: &str) -> String {
    if width(source, array) == 4 { format!("{array}[{at} / 4u][{at} % 4u]") } else { format!("{array}[{at}]") }
}

/// Scalars in an element of an array: `array<vec4<..` or `array<..`.
fn width(source: &str, array: &str) -> u32 {
    if source.contains(&format!(" {array}: array<vec4<")) { 4 } else { 1 }
}

impl Sums<'_> {
    fn name(self) -> String {
        let order = if self.by_rows { "rows" } else { "columns" };
        format!("coop_{}_{order}_{}", if self.store { "store" } else { "sums" }, self.array)
    }

    /// The function that loads or stores a C.
    fn function(self, source: &str) -> String {
        let (access, width) = (u32::from(self.by_rows), width(source, self.array));
        let [left, right] = ["left", "right"].map(|at| scalar(source, self.array, at));
        let each = if self.store {
            format!("{left} = coop_c[c][n];\n        {right} = coop_c[c + 1u][n];")
        } else {
            format!("coop_c[c][n] = f32({left});\n        coop_c[c + 1u][n] = f32({right});")
        };
        let result = if self.store { ["", ""] } else { [" -> u32", "    return c;\n"] };
        format!(
            "fn {}(c: u32, index: u32, stride: u32){} {{
    let matrix = coop_matrix({access}u, {width}u, index, stride);
    for (var n = 0u; n < 4u + coop_0; n++) {{
        let left = coop_at(matrix, coop_row + n, coop_column);
        let right = coop_at(matrix, coop_row + n, coop_column + 1u);
        {each}
    }}
{}}}
",
            self.name(),
            result[0],
            result[1],
        )
    }
}

/// Sets the variables of the thread at the start of the entry point.
fn set_lane(body: &mut String, subgroup: u32) {
    const INDEX: &str = "@builtin(local_invocation_index) ";
    let Some(at) = body.find(INDEX) else { return };
    let name: String = body[at + INDEX.len()..].chars().take_while(|c| *c != ':').collect();
    let Some(brace) = body[at..].find('{').map(|brace| at + brace + 1) else { return };
    let variables = format!(
        "\n    coop_row = {name} % {subgroup}u / 8u * 4u;\n    coop_column = {name} % 8u * 2u;\n    coop_0 = u32(0.5 * fract(0.1 * f32({name})));"
    );
    body.insert_str(brace, &variables);
}
