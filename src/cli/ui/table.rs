//! Tables.

use std::fmt::{self, Display};

use super::door::one_line;

/// Columns with two spaces between them; text is aligned to the left, numbers to the right.
#[derive(Debug)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Row>,
}

/// How a column is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    Left,
    Right,
}

#[derive(Debug)]
enum Row {
    Cells(Vec<String>),
    Rule,
}

impl Table {
    /// A table with these titles; one that starts with `>` heads a column of numbers.
    pub fn new(titles: &[&str]) -> Self {
        let column = |title: &&str| if title.starts_with('>') { Column::Right } else { Column::Left };
        let cells = titles.iter().map(|title| title.trim_start_matches('>').to_owned()).collect();
        Self { columns: titles.iter().map(column).collect(), rows: vec![Row::Cells(cells), Row::Rule] }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [&dyn Display; N]) {
        // A cell stays within its line and its column.
        let cell = |cell: &&dyn Display| one_line(&cell.to_string()).into_owned();
        self.rows.push(Row::Cells(cells.iter().map(cell).collect()));
    }

    /// Adds a line, above a sum.
    pub fn rule(&mut self) {
        self.rows.push(Row::Rule);
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths = vec![0; self.columns.len()];
        for row in &self.rows {
            let Row::Cells(cells) = row else { continue };
            widths.iter_mut().zip(cells).for_each(|(width, cell)| *width = (*width).max(cell.chars().count()));
        }
        widths
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        for row in &self.rows {
            let Row::Cells(cells) = row else {
                writeln!(f, "{}", widths.iter().map(|&w| "─".repeat(w)).collect::<Vec<_>>().join("  "))?;
                continue;
            };
            let padded = cells.iter().zip(&widths).zip(&self.columns).map(|((cell, &width), column)| match column {
                Column::Left => format!("{cell:<width$}"),
                Column::Right => format!("{cell:>width$}"),
            });
            writeln!(f, "{}", padded.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_aligns_text_and_numbers() {
        let mut table = Table::new(&["name", ">n"]);
        table.row([&"a", &1000]);
        table.rule();
        table.row([&"total", &7]);
        let expected = "name      n\n─────  ────\na      1000\n─────  ────\ntotal     7\n";
        assert_eq!(table.to_string(), expected);
    }
}
