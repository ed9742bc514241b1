//! Where in a TOML file something stands, for messages about what was read from it.

/// A file's text.
#[derive(Debug)]
pub(crate) struct Lines<'a>(pub(crate) &'a str);

impl Lines<'_> {
    /// The line of a key in the nth table of that name, or of the table if the key is not in it; of the file's head, if
    /// the name is empty.
    pub(crate) fn of(&self, table: &str, nth: usize, key: &str) -> usize {
        let (mut at, mut found) = (0, table.is_empty().then_some(1));
        for (number, line) in self.0.lines().enumerate() {
            let line = line.trim_start();
            if let Some(name) = line.strip_prefix('[') {
                let name =
                    name.trim_start_matches('[').split(']').next().unwrap_or_default().trim();
                if found.is_some() {
                    break;
                }
                if name == table {
                    if at == nth {
                        found = Some(number + 1);
                    }
                    at += 1;
                }
            } else if found.is_some()
                && let Some(rest) = line.strip_prefix(key)
                && rest.trim_start().starts_with('=')
            {
                return number + 1;
            }
        }
        found.unwrap_or(1)
    }

    /// The line of a key by its whole path, such as `detect.threshold.cpu`; of a table, if the path ends in a dot.
    pub(crate) fn of_path(&self, path: &str) -> usize {
        let (table, key) = path.rsplit_once('.').unwrap_or(("", path));
        self.of(table, 0, key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
a = 1

[one]
a = 2
b = 3

[[many]]
a = 4
[[many]]
a = 5
[one.deep]
a = 6
";

    #[test]
    fn keys_are_found_in_their_tables() {
        let lines = Lines(TEXT);
        assert_eq!(lines.of("", 0, "a"), 1);
        assert_eq!(lines.of("one", 0, "b"), 5);
        assert_eq!(lines.of("many", 1, "a"), 10);
        assert_eq!(lines.of_path("a"), 1);
        assert_eq!(lines.of_path("one.a"), 4);
        assert_eq!(lines.of_path("one.deep.a"), 12);
    }

    #[test]
    fn what_is_not_written_is_where_its_table_is() {
        let lines = Lines(TEXT);
        assert_eq!(lines.of_path("one.c"), 3);
        assert_eq!(lines.of_path("one.deep."), 11);
        assert_eq!(lines.of_path("none.a"), 1);
    }
}
