//! The text of a template to tokens, with the whitespace that Jinja2 leaves out with `trim_blocks`
//! and `lstrip_blocks`.

use super::error::{ErrorKind, TemplateError};
use super::text::is_space;
use super::value::Value;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    /// Text between tags.
    Text(String),
    /// `{{`, `}}`, `{%` and `%}`.
    PrintBegin,
    PrintEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    /// A number.
    Number(Value),
    String(String),
    Operator(&'static str),
    End,
}

/// The longer ones first.
const OPERATORS: [&str; 25] = [
    "**", "//", "==", "!=", "<=", ">=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", "=", ".", ":", "|", ",",
    "<", ">",
];

/// The tokens of a template with their lines; [`Token::End`] is the last one.
pub(super) fn tokens(source: &str) -> Result<Vec<(u32, Token)>, TemplateError> {
    let mut source = source.replace("\r\n", "\n").replace('\r', "\n");
    // One line end at the end of a template is none of its text.
    if source.ends_with('\n') {
        source.pop();
    }
    let mut lexer = Lexer { source: &source, at: 0, counted: (0, 1), tokens: Vec::new(), line_starts: true };
    lexer.run()?;
    let line = lexer.line();
    lexer.tokens.push((line, Token::End));
    Ok(lexer.tokens)
}

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    /// A byte before `at`, and the line that it is in.
    counted: (usize, u32),
    tokens: Vec<(u32, Token)>,
    /// Whether a line starts where the last tag ended.
    line_starts: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Tag {
    Print,
    Block,
    Comment,
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        self.source.get(self.at..).unwrap_or_default()
    }

    fn line(&mut self) -> u32 {
        let (from, line) = self.counted;
        let since = self.source.get(from..self.at).unwrap_or_default();
        self.counted = (self.at, line + since.bytes().filter(|&b| b == b'\n').count() as u32);
        self.counted.1
    }

    fn error(&mut self, message: impl Into<String>) -> TemplateError {
        ErrorKind::Syntax(message.into()).at(self.line())
    }

    fn push(&mut self, token: Token) {
        let line = self.line();
        self.tokens.push((line, token));
    }

    fn push_text(&mut self, text: &str) {
        if !text.is_empty() {
            self.push(Token::Text(text.to_owned()));
        }
    }

    fn run(&mut self) -> Result<(), TemplateError> {
        while let Some((start, tag)) = next_tag(self.rest()) {
            let (text, after) = self.rest().split_at(start);
            let sign = after.chars().nth(2).filter(|sign| "+-".contains(*sign) && !(tag == Tag::Print && *sign == '+'));
            self.push_text(self.before_tag(text, sign, tag));
            self.at += start + 2 + usize::from(sign.is_some());
            match tag {
                Tag::Comment => self.comment()?,
                Tag::Block if self.raw_begins()? => self.raw()?,
                Tag::Block => self.tag(Token::BlockBegin, tag)?,
                Tag::Print => self.tag(Token::PrintBegin, tag)?,
            }
        }
        self.push_text(self.rest());
        self.at = self.source.len();
        Ok(())
    }

    /// What is left of a text before a tag.
    fn before_tag<'t>(&self, text: &'t str, sign: Option<char>, tag: Tag) -> &'t str {
        if sign == Some('-') {
            return text.trim_end_matches(is_space);
        }
        let line = text.rfind('\n').map_or(0, |end| end + 1);
        let starts_a_line = line > 0 || self.line_starts;
        let blank = text.get(line..).unwrap_or_default().chars().all(is_space);
        if sign.is_none() && tag != Tag::Print && starts_a_line && blank {
            return text.get(..line).unwrap_or_default();
        }
        text
    }

    /// Skips the end of a tag: `-` takes the blanks after it, otherwise one line end goes unless a
    /// `+` keeps it.
    fn skip_end(&mut self, end: &str, tag: Tag) -> bool {
        let rest = self.rest();
        let (sign, length) = match rest.strip_prefix(['-', '+']) {
            Some(after) if after.starts_with(end) && !(tag == Tag::Print && rest.starts_with('+')) => {
                (rest.chars().next(), 1 + end.len())
            }
            _ if rest.starts_with(end) => (None, end.len()),
            _ => return false,
        };
        let after = rest.get(length..).unwrap_or_default();
        let skipped = match sign {
            Some('-') => after.len() - after.trim_start_matches(is_space).len(),
            Some(_) => 0,
            None => usize::from(tag != Tag::Print && after.starts_with('\n')),
        };
        self.at += length + skipped;
        self.line_starts = self.source.get(..self.at).unwrap_or_default().ends_with('\n');
        true
    }

    fn comment(&mut self) -> Result<(), TemplateError> {
        let Some(end) = self.rest().find("#}") else { return Err(self.error("a comment has no end")) };
        let sign = self.rest().get(..end).is_some_and(|text| text.ends_with(['-', '+']));
        self.at += end - usize::from(sign);
        self.skip_end("#}", Tag::Comment);
        Ok(())
    }

    /// Whether the tag that begins here is `raw`: its inside is text. Then it is skipped.
    fn raw_begins(&mut self) -> Result<bool, TemplateError> {
        let Some(after) = self.rest().trim_start_matches(is_space).strip_prefix("raw") else { return Ok(false) };
        let after = after.trim_start_matches(is_space);
        let (strips, after) = match after.strip_prefix('-') {
            Some(after) => (true, after),
            None => (false, after),
        };
        let Some(after) = after.strip_prefix("%}") else { return Ok(false) };
        let after = if strips { after.trim_start_matches(is_space) } else { after };
        self.at = self.source.len() - after.len();
        self.line_starts = self.source.get(..self.at).unwrap_or_default().ends_with('\n');
        Ok(true)
    }

    fn raw(&mut self) -> Result<(), TemplateError> {
        let mut from = 0;
        loop {
            let found = self.rest().get(from..).and_then(|rest| rest.find("{%"));
            let Some(found) = found else { return Err(self.error("raw has no endraw")) };
            let start = from + found;
            let (text, after) = self.rest().split_at(start);
            let sign = after.chars().nth(2).filter(|sign| "+-".contains(*sign));
            let inner = after.get(2 + usize::from(sign.is_some())..).unwrap_or_default();
            let Some(end) = inner.trim_start_matches(is_space).strip_prefix("endraw") else {
                from = start + 2;
                continue;
            };
            self.push_text(self.before_tag(text, sign, Tag::Block));
            self.at = self.source.len() - end.trim_start_matches(is_space).len();
            if !self.skip_end("%}", Tag::Block) {
                return Err(self.error("endraw is no tag of its own"));
            }
            return Ok(());
        }
    }

    /// The tokens of a tag up to its end.
    fn tag(&mut self, begin: Token, tag: Tag) -> Result<(), TemplateError> {
        let (end, end_token) = if tag == Tag::Print { ("}}", Token::PrintEnd) } else { ("%}", Token::BlockEnd) };
        self.push(begin);
        let mut open: Vec<&str> = Vec::new();
        loop {
            let rest = self.rest();
            self.at += rest.len() - rest.trim_start_matches(is_space).len();
            // The end of a tag may be that of a dict within it.
            let line = self.line();
            if open.is_empty() && self.skip_end(end, tag) {
                self.tokens.push((line, end_token));
                return Ok(());
            }
            let token = self.token()?;
            if let Token::Operator(operator) = token {
                match operator {
                    "(" | "[" | "{" => open.push(operator),
                    ")" | "]" | "}" => {
                        let matching = [("(", ")"), ("[", "]"), ("{", "}")];
                        let opened = open.pop().unwrap_or_default();
                        if !matching.contains(&(opened, operator)) {
                            return Err(self.error(format!("unexpected {operator:?}")));
                        }
                    }
                    _ => {}
                }
            }
            self.tokens.push((line, token));
        }
    }

    fn token(&mut self) -> Result<Token, TemplateError> {
        let rest = self.rest();
        let Some(first) = rest.chars().next() else { return Err(self.error("a tag has no end")) };
        if first == '_' || first.is_alphabetic() {
            let length = rest.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(rest.len());
            self.at += length;
            return Ok(Token::Name(rest.get(..length).unwrap_or_default().to_owned()));
        }
        if first.is_ascii_digit() {
            return self.number();
        }
        if first == '"' || first == '\'' {
            return self.string(first);
        }
        let Some(operator) = OPERATORS.into_iter().find(|operator| rest.starts_with(operator)) else {
            return Err(self.error(format!("unexpected {first:?}")));
        };
        self.at += operator.len();
        Ok(Token::Operator(operator))
    }

    fn number(&mut self) -> Result<Token, TemplateError> {
        let rest = self.rest();
        // After a dot stands an index, never a float.
        let after_dot = self.tokens.last().is_some_and(|(_, token)| *token == Token::Operator("."));
        let (length, radix) = match rest.get(..2) {
            Some("0b" | "0B") => (digits(rest, 2, 2), 2),
            Some("0o" | "0O") => (digits(rest, 2, 8), 8),
            Some("0x" | "0X") => (digits(rest, 2, 16), 16),
            _ => (digits(rest, 0, 10), 10),
        };
        let float = if radix == 10 && !after_dot { float_length(rest, length) } else { None };
        let text: String = rest.get(..float.unwrap_or(length)).unwrap_or_default().chars().filter(|c| *c != '_').collect();
        self.at += float.unwrap_or(length);
        let value = match float {
            Some(_) => text.parse().ok().map(Value::Float),
            None if radix == 10 => text.parse().ok().map(Value::Int),
            None => i128::from_str_radix(text.get(2..).unwrap_or_default(), radix).ok().map(Value::Int),
        };
        value.map(Token::Number).ok_or_else(|| self.error(format!("the number {text:?}")))
    }

    fn string(&mut self, quote: char) -> Result<Token, TemplateError> {
        let rest = self.rest();
        let mut chars = rest.char_indices().skip(1);
        while let Some((i, c)) = chars.next() {
            if c == '\\' {
                chars.next();
            } else if c == quote {
                let text = unescaped(rest.get(1..i).unwrap_or_default()).map_err(|e| self.error(e))?;
                self.at += i + 1;
                return Ok(Token::String(text));
            }
        }
        Err(self.error("a string has no end"))
    }
}

/// Where the next tag begins, and which one.
fn next_tag(text: &str) -> Option<(usize, Tag)> {
    text.match_indices('{').find_map(|(at, _)| match text.as_bytes().get(at + 1) {
        Some(b'{') => Some((at, Tag::Print)),
        Some(b'%') => Some((at, Tag::Block)),
        Some(b'#') => Some((at, Tag::Comment)),
        _ => None,
    })
}

/// Where digits end that begin at `from`; single underscores may separate them.
fn digits(text: &str, from: usize, radix: u32) -> usize {
    let mut end = from;
    let mut chars = text.get(from..).unwrap_or_default().chars().peekable();
    while let Some(c) = chars.next() {
        let separates = c == '_' && chars.peek().is_some_and(|next| next.is_digit(radix));
        if !c.is_digit(radix) && !separates {
            break;
        }
        end += 1;
    }
    end
}

/// The length of a float whose first digits are `whole` long, if it is one.
fn float_length(text: &str, whole: usize) -> Option<usize> {
    let mut end = whole;
    let after = |at: usize| text.get(at..).unwrap_or_default();
    if after(end).strip_prefix('.').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
        end = digits(text, end + 1, 10);
    }
    if let Some(exponent) = after(end).strip_prefix(['e', 'E']) {
        let sign = usize::from(exponent.starts_with(['+', '-']));
        if exponent.get(sign..).unwrap_or_default().starts_with(|c: char| c.is_ascii_digit()) {
            end = digits(text, end + 1 + sign, 10);
        }
    }
    (end > whole).then_some(end)
}

/// What a string of Python stands for.
fn unescaped(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let Some(escape) = chars.next() else { return Err("a string ends in a backslash".to_owned()) };
        match escape {
            '\n' => {}
            '\\' | '\'' | '"' => out.push(escape),
            'a' => out.push('\x07'),
            'b' => out.push('\x08'),
            'f' => out.push('\x0c'),
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            'v' => out.push('\x0b'),
            'x' | 'u' | 'U' => {
                let length = if escape == 'x' {
                    2
                } else if escape == 'u' {
                    4
                } else {
                    8
                };
                let digits: String = std::iter::from_fn(|| chars.next_if(char::is_ascii_hexdigit)).take(length).collect();
                let code = u32::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == length);
                let c = code.and_then(char::from_u32);
                out.push(c.ok_or_else(|| format!("the character \\{escape}{digits} of a string"))?);
            }
            '0'..='7' => {
                let first = escape.to_digit(8).unwrap_or_default();
                let more = std::iter::from_fn(|| chars.next_if(|c| c.is_digit(8))).take(2);
                let code = more.fold(first, |code, c| code * 8 + c.to_digit(8).unwrap_or_default());
                out.extend(char::from_u32(code));
            }
            'N' => return Err("the character \\N of a string".to_owned()),
            other => out.extend(['\\', other]),
        }
    }
    Ok(out)
}
