//! Tokens to statements, by the grammar of Jinja2's parser.

use std::sync::Arc;

use super::ast::{Arguments, Binary, Body, Comparison, Expr, Filter, For, Macro, Statement, Target};
use super::error::{ErrorKind, Result, TemplateError};
use super::lexer::{Token, tokens};
use super::value::Value;

/// Levels of expressions and statements, at most.
const MAX_DEPTH: u32 = 64;
/// Operators of one kind, or filters, tests, calls and attributes, may follow one another so often.
const MAX_CHAIN: usize = 100;

/// Blocks of a template.
const MAX_BLOCKS: usize = 1000;

/// Parses a template.
pub(super) fn parse(source: &str) -> std::result::Result<Body, TemplateError> {
    let mut parser = Parser { tokens: tokens(source)?, at: 0, depth: 0, loops: 0, names: Vec::new(), blocks: Vec::new() };
    parser.body(&[]).map_err(|kind| kind.at(parser.line()))
}

struct Parser {
    tokens: Vec<(u32, Token)>,
    at: usize,
    depth: u32,
    /// Loops around what is parsed.
    loops: u32,
    /// Names that were used so far.
    names: Vec<String>,
    /// Blocks so far.
    blocks: Vec<String>,
}

fn syntax<T>(message: impl Into<String>) -> Result<T> {
    Err(ErrorKind::Syntax(message.into()))
}

impl Parser {
    fn token(&self) -> &Token {
        self.tokens.get(self.at).map_or(&Token::End, |(_, token)| token)
    }

    fn peek(&self) -> &Token {
        self.tokens.get(self.at + 1).map_or(&Token::End, |(_, token)| token)
    }

    fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |(line, _)| *line)
    }

    fn advance(&mut self) -> Token {
        let token = self.token().clone();
        self.at += 1;
        token
    }

    fn is_operator(&self, operator: &str) -> bool {
        matches!(self.token(), Token::Operator(found) if *found == operator)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.token(), Token::Name(found) if found == name)
    }

    fn skip_operator(&mut self, operator: &str) -> bool {
        let found = self.is_operator(operator);
        self.at += usize::from(found);
        found
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    fn unexpected<T>(&self, expected: &str) -> Result<T> {
        let found = match self.token() {
            Token::End => "the end of the template".to_owned(),
            Token::BlockEnd | Token::PrintEnd => "the end of the tag".to_owned(),
            Token::Name(name) => format!("{name:?}"),
            Token::Operator(operator) => format!("{operator:?}"),
            Token::Number(value) => value.to_string(),
            Token::String(_) => "a string".to_owned(),
            Token::Text(_) | Token::PrintBegin | Token::BlockBegin => "text".to_owned(),
        };
        syntax(format!("expected {expected}, found {found}"))
    }

    fn expect(&mut self, operator: &str) -> Result<()> {
        if self.skip_operator(operator) { Ok(()) } else { self.unexpected(&format!("{operator:?}")) }
    }

    fn name(&mut self) -> Result<String> {
        match self.token() {
            Token::Name(_) => match self.advance() {
                Token::Name(name) => Ok(name),
                _ => self.unexpected("a name"),
            },
            _ => self.unexpected("a name"),
        }
    }

    fn block_end(&mut self) -> Result<()> {
        if *self.token() != Token::BlockEnd {
            return self.unexpected("the end of the tag");
        }
        self.at += 1;
        Ok(())
    }

    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(ErrorKind::Limit("is nested too deep"));
        }
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    /// Counts the links of a chain and fails for a long one: each is a level of the tree.
    fn chain(links: &mut usize) -> Result<()> {
        *links += 1;
        if *links > MAX_CHAIN { Err(ErrorKind::Limit("has too long an expression")) } else { Ok(()) }
    }

    /// Statements up to one of the tags `ends`, whose name is the next token then.
    fn body(&mut self, ends: &[&str]) -> Result<Body> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            match self.advance() {
                Token::Text(text) => body.push((line, Statement::Text(text))),
                Token::PrintBegin => {
                    body.push((line, Statement::Print(self.tuple(true)?)));
                    if self.advance() != Token::PrintEnd {
                        self.at -= 1;
                        return self.unexpected("the end of the tag");
                    }
                }
                Token::BlockBegin => {
                    if ends.iter().any(|end| self.is_name(end)) {
                        return Ok(body);
                    }
                    let statement = self.nested(Self::statement)?;
                    body.push((line, statement));
                }
                Token::End if ends.is_empty() => return Ok(body),
                _ => {
                    self.at -= 1;
                    return self.unexpected(&format!("{:?}", ends.join(" or ")));
                }
            }
        }
    }

    /// The body of a tag, and its end.
    fn body_until(&mut self, end: &str) -> Result<Body> {
        self.block_end()?;
        let body = self.body(&[end])?;
        self.at += 1;
        self.block_end()?;
        Ok(body)
    }

    fn statement(&mut self) -> Result<Statement> {
        let name = self.name()?;
        match name.as_str() {
            "if" => self.conditional(),
            "for" => self.for_loop(),
            "set" => self.set(),
            "with" => self.with(),
            "macro" => self.macro_definition(),
            "call" => self.call_block(),
            "filter" => {
                let filters = self.filters()?;
                Ok(Statement::Filter(filters, self.body_until("endfilter")?))
            }
            "generation" => {
                let loops = std::mem::take(&mut self.loops);
                let body = self.body_until("endgeneration")?;
                self.loops = loops;
                Ok(Statement::Generation(body))
            }
            "break" | "continue" => {
                self.block_end()?;
                match (name.as_str(), self.loops) {
                    (_, 0) => syntax(format!("{name} stands outside of a loop")),
                    ("break", _) => Ok(Statement::Break),
                    _ => Ok(Statement::Continue),
                }
            }
            "block" if self.depth == 1 => self.block(),
            "block" | "include" | "extends" | "import" | "from" | "autoescape" => {
                Err(ErrorKind::Unsupported(format!("the statement {name:?}")))
            }
            _ => Err(ErrorKind::Unknown { what: "statement", name }),
        }
    }

    /// A block of a template that nothing extends: its body in a scope of its own.
    fn block(&mut self) -> Result<Statement> {
        let name = self.name()?;
        self.skip_name("scoped");
        if self.is_name("required") {
            return Err(ErrorKind::Unsupported("a block that is required".to_owned()));
        }
        if self.blocks.contains(&name) {
            return syntax(format!("the block {name:?} is defined twice"));
        }
        if self.blocks.len() == MAX_BLOCKS {
            return Err(ErrorKind::Limit("has more than 1000 blocks"));
        }
        self.blocks.push(name.clone());
        self.block_end()?;
        let body = self.body(&["endblock"])?;
        self.at += 1;
        self.skip_name(&name);
        self.block_end()?;
        Ok(Statement::With(Vec::new(), body))
    }

    fn conditional(&mut self) -> Result<Statement> {
        let mut branches = Vec::new();
        let mut test = Some(self.tuple(false)?);
        loop {
            self.block_end()?;
            let body = self.body(if test.is_some() { &["elif", "else", "endif"] } else { &["endif"] })?;
            branches.push((test, body));
            test = match self.name()?.as_str() {
                "elif" => Some(self.tuple(false)?),
                "else" => None,
                _ => break,
            };
        }
        self.block_end()?;
        Ok(Statement::If(branches))
    }

    fn for_loop(&mut self) -> Result<Statement> {
        let target = self.targets()?;
        if !self.skip_name("in") {
            return self.unexpected("\"in\"");
        }
        let items = self.tuple(false)?;
        let filter = if self.skip_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.skip_name("recursive");
        self.block_end()?;
        self.loops += 1;
        let body = self.body(&["else", "endfor"])?;
        self.loops -= 1;
        let otherwise = match self.name()?.as_str() {
            "else" => self.body_until("endfor")?,
            _ => {
                self.block_end()?;
                Vec::new()
            }
        };
        Ok(Statement::For(Arc::new(For { target, items, filter, recursive, body, otherwise })))
    }

    /// Names that are assigned to, with commas between them.
    fn targets(&mut self) -> Result<Target> {
        let first = self.target()?;
        if !self.is_operator(",") {
            return Ok(first);
        }
        let mut targets = vec![first];
        while self.skip_operator(",") {
            if !matches!(self.token(), Token::Name(_)) && !self.is_operator("(") || self.is_name("in") {
                break;
            }
            targets.push(self.target()?);
        }
        Ok(Target::Tuple(targets))
    }

    fn target(&mut self) -> Result<Target> {
        if self.skip_operator("(") {
            let targets = self.nested(Self::targets)?;
            self.expect(")")?;
            return Ok(targets);
        }
        let name = self.name()?;
        if self.skip_operator(".") {
            return Ok(Target::Attribute(name, self.name()?));
        }
        match name.as_str() {
            "true" | "True" | "false" | "False" | "none" | "None" => syntax(format!("{name} cannot be assigned to")),
            _ => Ok(Target::Name(name)),
        }
    }

    fn set(&mut self) -> Result<Statement> {
        let target = self.targets()?;
        if self.skip_operator("=") {
            let value = self.tuple(true)?;
            self.block_end()?;
            return Ok(Statement::Set(target, value));
        }
        let mut filters = Vec::new();
        if self.is_operator("|") {
            self.at += 1;
            filters = self.filters()?;
        }
        Ok(Statement::SetBlock { target, filters, body: self.body_until("endset")? })
    }

    fn with(&mut self) -> Result<Statement> {
        let mut values = Vec::new();
        while *self.token() != Token::BlockEnd {
            if !values.is_empty() {
                self.expect(",")?;
            }
            let target = self.target()?;
            self.expect("=")?;
            values.push((target, self.expression()?));
        }
        Ok(Statement::With(values, self.body_until("endwith")?))
    }

    fn macro_definition(&mut self) -> Result<Statement> {
        let name = self.name()?;
        let parameters = self.parameters()?;
        Ok(Statement::Macro(Arc::new(self.macro_body(name, parameters, "endmacro")?)))
    }

    fn call_block(&mut self) -> Result<Statement> {
        let parameters = if self.is_operator("(") { self.parameters()? } else { Vec::new() };
        let call = self.expression()?;
        if !matches!(call, Expr::Call(..)) {
            return syntax("a call block needs a call");
        }
        Ok(Statement::Call(call, Arc::new(self.macro_body("caller".to_owned(), parameters, "endcall")?)))
    }

    fn parameters(&mut self) -> Result<Vec<(String, Option<Expr>)>> {
        self.expect("(")?;
        let mut parameters: Vec<(String, Option<Expr>)> = Vec::new();
        while !self.is_operator(")") {
            if !parameters.is_empty() {
                self.expect(",")?;
            }
            let name = self.name()?;
            let default = if self.skip_operator("=") { Some(self.expression()?) } else { None };
            if default.is_none() && parameters.last().is_some_and(|(_, default)| default.is_some()) {
                return syntax("a parameter without a default follows one with a default");
            }
            parameters.push((name, default));
        }
        self.expect(")")?;
        Ok(parameters)
    }

    fn macro_body(&mut self, name: String, parameters: Vec<(String, Option<Expr>)>, end: &str) -> Result<Macro> {
        let (names, loops) = (self.names.len(), std::mem::take(&mut self.loops));
        let body = self.body_until(end)?;
        self.loops = loops;
        let used = |name: &str| self.names.get(names..).unwrap_or_default().iter().any(|used| used == name);
        let uses = [used("varargs"), used("kwargs"), used("caller")];
        Ok(Macro { name, parameters, body, uses })
    }

    /// `name(arguments) | name`, up to the end of a tag.
    fn filters(&mut self) -> Result<Vec<Filter>> {
        let mut filters = vec![self.filter()?];
        while self.skip_operator("|") {
            filters.push(self.filter()?);
        }
        Ok(filters)
    }

    fn filter(&mut self) -> Result<Filter> {
        let name = self.dotted_name()?;
        let arguments = if self.is_operator("(") { self.arguments()? } else { Arguments::default() };
        Ok(Filter { name, arguments })
    }

    fn dotted_name(&mut self) -> Result<String> {
        let mut name = self.name()?;
        while self.skip_operator(".") {
            name.push('.');
            name.push_str(&self.name()?);
        }
        Ok(name)
    }

    /// Expressions with commas between them, or one. Where `if` means something else, none of them
    /// is a conditional.
    fn tuple(&mut self, conditionals: bool) -> Result<Expr> {
        let mut items = Vec::new();
        let mut is_tuple = false;
        loop {
            if !items.is_empty() {
                if !self.skip_operator(",") {
                    break;
                }
                is_tuple = true;
            }
            if matches!(self.token(), Token::PrintEnd | Token::BlockEnd) || self.is_operator(")") {
                break;
            }
            items.push(if conditionals { self.expression()? } else { self.or()? });
        }
        match items.pop() {
            Some(only) if !is_tuple => Ok(only),
            Some(last) => {
                items.push(last);
                Ok(Expr::Tuple(items))
            }
            None => self.unexpected("an expression"),
        }
    }

    fn expression(&mut self) -> Result<Expr> {
        self.nested(|parser| {
            let mut expr = parser.or()?;
            let mut links = 0;
            while parser.skip_name("if") {
                Self::chain(&mut links)?;
                let test = Box::new(parser.or()?);
                let otherwise = if parser.skip_name("else") { Some(Box::new(parser.expression()?)) } else { None };
                expr = Expr::Conditional { test, then: Box::new(expr), otherwise };
            }
            Ok(expr)
        })
    }

    fn or(&mut self) -> Result<Expr> {
        let (mut left, mut links) = (self.and()?, 0);
        while self.skip_name("or") {
            Self::chain(&mut links)?;
            left = Expr::Or(Box::new(left), Box::new(self.and()?));
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Expr> {
        let (mut left, mut links) = (self.not()?, 0);
        while self.skip_name("and") {
            Self::chain(&mut links)?;
            left = Expr::And(Box::new(left), Box::new(self.not()?));
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Expr> {
        if self.skip_name("not") {
            return Ok(Expr::Not(Box::new(self.nested(Self::not)?)));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Expr> {
        let left = self.sum()?;
        let mut operations = Vec::new();
        loop {
            let operation = match self.token() {
                Token::Operator("==") => Comparison::Eq,
                Token::Operator("!=") => Comparison::Ne,
                Token::Operator("<") => Comparison::Lt,
                Token::Operator("<=") => Comparison::Le,
                Token::Operator(">") => Comparison::Gt,
                Token::Operator(">=") => Comparison::Ge,
                Token::Name(name) if name == "in" => Comparison::In,
                Token::Name(name) if name == "not" && matches!(self.peek(), Token::Name(name) if name == "in") => {
                    self.at += 1;
                    Comparison::NotIn
                }
                _ => break,
            };
            self.at += 1;
            operations.push((operation, self.sum()?));
        }
        if operations.is_empty() { Ok(left) } else { Ok(Expr::Compare(Box::new(left), operations)) }
    }

    fn sum(&mut self) -> Result<Expr> {
        self.binary(&[("+", Binary::Add), ("-", Binary::Sub)], Self::concat)
    }

    fn concat(&mut self) -> Result<Expr> {
        let first = self.product()?;
        if !self.is_operator("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.skip_operator("~") {
            parts.push(self.product()?);
        }
        Ok(Expr::Concat(parts))
    }

    fn product(&mut self) -> Result<Expr> {
        let operators = [("*", Binary::Mul), ("/", Binary::Div), ("//", Binary::FloorDiv), ("%", Binary::Mod)];
        self.binary(&operators, Self::power)
    }

    fn power(&mut self) -> Result<Expr> {
        self.binary(&[("**", Binary::Pow)], |parser| parser.unary(true))
    }

    fn binary(&mut self, operators: &[(&str, Binary)], operand: impl Fn(&mut Self) -> Result<Expr>) -> Result<Expr> {
        let (mut left, mut links) = (operand(self)?, 0);
        while let Some(&(_, operator)) = operators.iter().find(|(symbol, _)| self.is_operator(symbol)) {
            Self::chain(&mut links)?;
            self.at += 1;
            left = Expr::Binary(operator, Box::new(left), Box::new(operand(self)?));
        }
        Ok(left)
    }

    fn unary(&mut self, with_filters: bool) -> Result<Expr> {
        let expr = if self.skip_operator("-") {
            Expr::Negative(Box::new(self.nested(|parser| parser.unary(false))?))
        } else if self.skip_operator("+") {
            Expr::Positive(Box::new(self.nested(|parser| parser.unary(false))?))
        } else {
            self.primary()?
        };
        let expr = self.postfix(expr)?;
        if with_filters { self.filtered(expr) } else { Ok(expr) }
    }

    fn primary(&mut self) -> Result<Expr> {
        match self.token().clone() {
            Token::Name(name) => {
                self.at += 1;
                Ok(match name.as_str() {
                    "true" | "True" => Expr::Const(Value::Bool(true)),
                    "false" | "False" => Expr::Const(Value::Bool(false)),
                    "none" | "None" => Expr::Const(Value::None),
                    _ => {
                        self.names.push(name.clone());
                        Expr::Name(name)
                    }
                })
            }
            Token::Number(value) => {
                self.at += 1;
                Ok(Expr::Const(value))
            }
            Token::String(mut text) => {
                self.at += 1;
                while let Token::String(more) = self.token().clone() {
                    text.push_str(&more);
                    self.at += 1;
                }
                Ok(Expr::Const(text.into()))
            }
            Token::Operator("(") => {
                self.at += 1;
                if self.skip_operator(")") {
                    return Ok(Expr::Tuple(Vec::new()));
                }
                let expr = self.nested(|parser| parser.tuple(true))?;
                self.expect(")")?;
                Ok(expr)
            }
            Token::Operator("[") => {
                self.at += 1;
                Ok(Expr::List(self.list("]", Self::expression)?))
            }
            Token::Operator("{") => {
                self.at += 1;
                let entry = |parser: &mut Self| {
                    let key = parser.expression()?;
                    parser.expect(":")?;
                    Ok((key, parser.expression()?))
                };
                Ok(Expr::Dict(self.list("}", entry)?))
            }
            _ => self.unexpected("an expression"),
        }
    }

    /// Items with commas between them, up to `end`.
    fn list<T>(&mut self, end: &str, item: impl Fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut items = Vec::new();
        while !self.is_operator(end) {
            if !items.is_empty() {
                self.expect(",")?;
            }
            if self.is_operator(end) {
                break;
            }
            items.push(item(self)?);
        }
        self.expect(end)?;
        Ok(items)
    }

    fn postfix(&mut self, mut expr: Expr) -> Result<Expr> {
        let mut links = 0;
        loop {
            Self::chain(&mut links)?;
            if self.skip_operator(".") {
                expr = match self.advance() {
                    Token::Name(name) => Expr::Attribute(Box::new(expr), name),
                    Token::Number(index @ Value::Int(_)) => Expr::Item(Box::new(expr), Box::new(Expr::Const(index))),
                    _ => return syntax("expected a name or a number after a dot"),
                };
            } else if self.skip_operator("[") {
                expr = self.subscript(expr)?;
            } else if self.is_operator("(") {
                expr = Expr::Call(Box::new(expr), self.arguments()?);
            } else {
                return Ok(expr);
            }
        }
    }

    fn subscript(&mut self, of: Expr) -> Result<Expr> {
        let mut parts = [None, None, None];
        let mut colons = 0;
        loop {
            if self.skip_operator(":") {
                colons += 1;
            } else if self.skip_operator("]") {
                break;
            } else if let Some(part) = parts.get_mut(colons).filter(|part| part.is_none()) {
                *part = Some(Box::new(self.expression()?));
            } else {
                return self.unexpected("\"]\"");
            }
        }
        match (colons, parts) {
            (0, [Some(index), _, _]) => Ok(Expr::Item(Box::new(of), index)),
            (1 | 2, parts) => Ok(Expr::Slice(Box::new(of), parts)),
            _ => syntax("an empty subscript"),
        }
    }

    /// The filters, tests and calls after an expression.
    fn filtered(&mut self, mut expr: Expr) -> Result<Expr> {
        let mut links = 0;
        loop {
            Self::chain(&mut links)?;
            if self.skip_operator("|") {
                expr = Expr::Filter(Box::new(expr), self.filter()?);
            } else if self.skip_name("is") {
                expr = self.test(expr)?;
            } else if self.is_operator("(") {
                expr = Expr::Call(Box::new(expr), self.arguments()?);
            } else {
                return Ok(expr);
            }
        }
    }

    fn test(&mut self, of: Expr) -> Result<Expr> {
        let negated = self.skip_name("not");
        let name = self.dotted_name()?;
        let mut arguments = Arguments::default();
        let begins_argument = match self.token() {
            Token::Name(name) => !["else", "or", "and"].contains(&name.as_str()),
            Token::String(_) | Token::Number(_) | Token::Operator("[" | "{") => true,
            _ => false,
        };
        if self.is_operator("(") {
            arguments = self.arguments()?;
        } else if begins_argument {
            if self.is_name("is") {
                return syntax("tests cannot be chained with \"is\"");
            }
            let argument = self.primary()?;
            arguments.positional.push(self.postfix(argument)?);
        }
        let test = Expr::Test { of: Box::new(of), name, arguments };
        Ok(if negated { Expr::Not(Box::new(test)) } else { test })
    }

    fn arguments(&mut self) -> Result<Arguments> {
        self.expect("(")?;
        let mut arguments = Arguments::default();
        let mut first = true;
        while !self.is_operator(")") {
            if !std::mem::take(&mut first) {
                self.expect(",")?;
                if self.is_operator(")") {
                    break;
                }
            }
            if self.skip_operator("**") {
                arguments.dict = Some(Box::new(self.expression()?));
            } else if self.skip_operator("*") {
                arguments.list = Some(Box::new(self.expression()?));
            } else if matches!((self.token(), self.peek()), (Token::Name(_), Token::Operator("="))) {
                let name = self.name()?;
                self.at += 1;
                arguments.named.push((name, self.expression()?));
            } else if arguments.named.is_empty() && arguments.dict.is_none() {
                arguments.positional.push(self.expression()?);
            } else {
                return syntax("an argument without a name follows one with a name");
            }
        }
        self.expect(")")?;
        Ok(arguments)
    }
}
