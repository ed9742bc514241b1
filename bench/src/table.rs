//! Tables, as Markdown and HTML.

use std::fmt::Write as _;

use crate::stats::Span;
use crate::svg::escape;

/// A table whose first column is text and whose others are numbers.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub(crate) fn new(head: &[&str]) -> Self {
        Self { head: head.iter().map(|&text| text.to_owned()).collect(), rows: vec![] }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// As Markdown, its columns padded so that it reads on a terminal, too.
    pub(crate) fn markdown(&self) -> String {
        let width = |column: usize| {
            let cells = std::iter::once(&self.head).chain(&self.rows);
            cells.filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
        };
        let widths: Vec<usize> =
            (0..self.head.len()).map(|column| width(column).unwrap_or(0).max(3)).collect();
        let line = |row: &[String]| {
            let mut text = String::from("|");
            for (at, width) in widths.iter().enumerate() {
                let cell = row.get(at).map_or("", String::as_str);
                // Writing to a String does not fail.
                let _ = match at {
                    0 => write!(text, " {cell:<width$} |"),
                    _ => write!(text, " {cell:>width$} |"),
                };
            }
            text.push('\n');
            text
        };
        let mut text = line(&self.head);
        text.push('|');
        for (at, width) in widths.iter().enumerate() {
            let rule = "-".repeat(*width + 1);
            text.push_str(&if at == 0 { format!("{rule}-|") } else { format!("{rule}:|") });
        }
        text.push('\n');
        self.rows.iter().for_each(|row| text.push_str(&line(row)));
        text
    }

    /// As HTML.
    pub(crate) fn html(&self) -> String {
        let line = |row: &[String], kind: &str| {
            let cells = row.iter().map(|cell| format!("<{kind}>{}</{kind}>", escape(cell)));
            format!("<tr>{}</tr>\n", cells.collect::<String>())
        };
        let rows: String = self.rows.iter().map(|row| line(row, "td")).collect();
        format!("<table>\n{}{rows}</table>", line(&self.head, "th"))
    }
}

/// A number with as many places as its size deserves.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// `median (min-max)`, a single value, or a dash.
pub(crate) fn span(span: Option<Span>) -> String {
    span.map_or_else(
        || "-".to_owned(),
        |span| match span.count {
            1 => number(span.median),
            _ => format!("{} ({}-{})", number(span.median), number(span.min), number(span.max)),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["mode", "ms"]);
        table.row(vec!["a".into(), span(Span::of([1.0, 200.0]))]);
        let text = table.markdown();
        let lengths: Vec<usize> = text.lines().map(str::len).collect();
        assert_eq!(lengths.len(), 3);
        assert!(lengths.iter().all(|length| *length == lengths[0]), "{text}");
        assert!(text.contains("| a    | 100 (1.00-200) |"), "{text}");
        assert_eq!(span(None), "-");
        let html = table.html();
        assert!(html.contains("<th>mode</th>") && html.contains("<td>100 (1.00-200)</td>"));
    }
}
