//! A report before it is written: the same blocks become Markdown and HTML.

use std::fmt::Write as _;

use crate::svg::escape;
use crate::table::Table;

/// A part of a report.
#[derive(Debug, Clone)]
pub(crate) enum Block {
    /// Its name.
    Title(String),
    /// A heading.
    Heading(String),
    /// A paragraph.
    Text(String),
    /// Points.
    List(Vec<String>),
    /// A table.
    Table(Table),
    /// A plot; its name follows the report's in the file's.
    Plot {
        /// Name.
        name: &'static str,
        /// The plot.
        svg: String,
    },
}

/// As Markdown of which plots are files beside it, called `NAME-PLOT.svg`.
pub(crate) fn markdown(name: &str, blocks: &[Block]) -> String {
    let mut text = String::new();
    for block in blocks {
        // Writing to a String does not fail, here and below.
        let _ = match block {
            Block::Title(title) => writeln!(text, "# {title}\n"),
            Block::Heading(heading) => writeln!(text, "## {heading}\n"),
            Block::Text(paragraph) => writeln!(text, "{paragraph}\n"),
            Block::List(points) => {
                points.iter().for_each(|point| text.push_str(&format!("- {point}\n")));
                writeln!(text)
            }
            Block::Table(table) => writeln!(text, "{}", table.markdown()),
            Block::Plot { name: plot, .. } => writeln!(text, "![{plot}]({name}-{plot}.svg)\n"),
        };
    }
    text
}

const STYLE: &str = "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em;\
color:#222}table{border-collapse:collapse;margin:1em 0;font-size:90%}td,th{border:1px solid #ccc;\
padding:.25em .6em;text-align:right}td:first-child,th:first-child{text-align:left}svg{max-width:\
46em;display:block;margin:1em 0}section{border-top:2px solid #1b6ca8;margin-top:3em}";

/// One page that holds several reports, each by a name that can be linked to.
pub(crate) fn page(reports: &[(String, Vec<Block>)]) -> String {
    let mut text = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Godwit: benchmarks\
         </title><style>{STYLE}</style></head><body>\n<h1>Godwit: benchmarks</h1>\n<ul>\n"
    );
    for (name, _) in reports {
        let name = escape(name);
        let _ = writeln!(text, "<li><a href=\"#{name}\">{name}</a></li>");
    }
    text.push_str("</ul>\n");
    for (name, blocks) in reports {
        let _ = writeln!(text, "<section id=\"{}\">", escape(name));
        blocks.iter().for_each(|block| html(&mut text, block));
        text.push_str("</section>\n");
    }
    text.push_str("</body></html>\n");
    text
}

fn html(text: &mut String, block: &Block) {
    let _ = match block {
        Block::Title(title) => writeln!(text, "<h2>{}</h2>", escape(title)),
        Block::Heading(heading) => writeln!(text, "<h3>{}</h3>", escape(heading)),
        Block::Text(paragraph) => writeln!(text, "<p>{}</p>", escape(paragraph)),
        Block::List(points) => {
            text.push_str("<ul>\n");
            for point in points {
                let _ = writeln!(text, "<li>{}</li>", escape(point).replace('\n', "<br>"));
            }
            writeln!(text, "</ul>")
        }
        Block::Table(table) => writeln!(text, "{}", table.html()),
        Block::Plot { svg, .. } => writeln!(text, "{svg}"),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_hold_every_block() {
        let mut table = Table::new(&["mode", "ms"]);
        table.row(vec!["<a>".into(), "1".into()]);
        let blocks = vec![
            Block::Title("t&t".into()),
            Block::Heading("h".into()),
            Block::Text("p".into()),
            Block::List(vec!["one".into(), "two".into()]),
            Block::Table(table),
            Block::Plot { name: "outage", svg: "<svg></svg>".into() },
        ];
        let text = markdown("x", &blocks);
        for wanted in ["# t&t\n", "## h\n", "- one\n- two\n", "| <a>", "![outage](x-outage.svg)"] {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
        let page = page(&[("x<".into(), blocks)]);
        for wanted in ["t&amp;t", "<td>&lt;a&gt;</td>", "<li>two</li>", "<svg></svg>", "#x&lt;"] {
            assert!(page.contains(wanted), "{wanted} in\n{page}");
        }
        assert!(page.ends_with("</html>\n"));
        assert!(!page.contains("http"), "the page stands alone");
    }
}
